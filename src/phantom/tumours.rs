//! The phantom's tumours and benign nodules: grown, not drawn. They share neither code nor family with [`crate::lesion`].
//!
//! A tumour starts at one voxel of its organ and takes the cheapest reachable voxel until it has its volume, so it is
//! connected and stays where it is allowed. What "cheap" means is its family: lobules (a sum of bumps), infiltration
//! (slow and fast tissue at random), or ragged (distance plus a random field).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use super::canvas::{Canvas, Tissue};
use super::field::{Frame, LocalField, Point};
use super::form::{dot, sub};
use super::intensity::Intensities;
use super::settings::{LesionLaw, ORGANS, PhantomSettings, RimLaw};
use super::{KIDNEY, PANCREAS, Phase};
use crate::rng::Rng;

/// A tumour on the canvas.
pub(super) struct Grown {
    pub(super) label: u8,
    pub(super) voxels: Vec<usize>,
}

/// How a tumour looks inside.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    Even,
    /// A bright rim around a dark centre.
    Rim,
    /// A nearly liquid core.
    Necrotic,
    /// A thin shell that is brighter than the rest, in HU.
    Capsule(f32),
}

/// Grows and paints a patient's tumours.
pub(super) fn paint_tumours(
    canvas: &mut Canvas,
    hu: &mut [f32],
    (intensities, phase): (&Intensities, Phase),
    settings: &PhantomSettings,
    rng: &mut Rng,
) -> Vec<Grown> {
    let mut tumours = Vec::new();
    for (organ, law) in plan(&settings.tumours, rng) {
        let diameter = law.draw_mm(rng);
        let contrast = settings.contrast.draw(rng) * strength(organ, phase);
        let contrast = contrast as f32;
        if let Some(voxels) = grow(canvas, organ, diameter, rng) {
            let layers = Layers::of(&canvas.frame, &voxels);
            let pattern = layers.draw_pattern(&settings.rim, rng);
            render(canvas, hu, (&voxels, &layers, pattern), (intensities, contrast), rng);
            voxels.iter().for_each(|i| canvas.labels[*i] = organ + 1);
            tumours.push(Grown {
                label: organ + 1,
                voxels,
            });
        }
    }
    tumours
}

/// Grows and paints a patient's benign nodules: what tumours are but for their inside, their label and maybe their contrast.
pub(super) fn paint_nodules(
    canvas: &mut Canvas,
    hu: &mut [f32],
    (intensities, phase): (&Intensities, Phase),
    settings: &PhantomSettings,
    rng: &mut Rng,
) {
    for (organ, law) in plan(&settings.nodules, rng) {
        let diameter = law.draw_mm(rng);
        let law = settings.nodule_contrast.as_ref().unwrap_or(&settings.contrast);
        let contrast = (law.draw(rng) * strength(organ, phase)) as f32;
        if let Some(mut voxels) = grow(canvas, organ, diameter, rng) {
            // A kidney's tumours may grow into the fat around it; what is labelled as the organ must not.
            voxels.retain(|i| canvas.labels[*i] == organ);
            let layers = Layers::of(&canvas.frame, &voxels);
            render(
                canvas,
                hu,
                (&voxels, &layers, Pattern::Even),
                (intensities, contrast),
                rng,
            );
            voxels.iter().for_each(|i| canvas.tissue[*i] = Tissue::Nodule);
        }
    }
}

/// Draws how many lesions grow, organ by organ.
fn plan<'a>(laws: &'a BTreeMap<String, LesionLaw>, rng: &mut Rng) -> Vec<(u8, &'a LesionLaw)> {
    let mut planned = vec![];
    for (name, organ) in ORGANS {
        if let Some(law) = laws.get(name) {
            planned.extend((0..law.draw_count(rng)).map(|_| (organ, law)));
        }
    }
    planned
}

/// Returns how much of a drawn contrast an organ shows in a phase.
fn strength(organ: u8, phase: Phase) -> f64 {
    match (organ, phase) {
        (PANCREAS, _) => 0.8,
        (_, Phase::NonContrast) => 0.75,
        _ => 1.0,
    }
}

/// Tells whether a tumour of an organ may take a voxel.
fn allows(canvas: &Canvas, organ: u8, i: usize) -> bool {
    let is_fat = matches!(canvas.tissue[i], Tissue::OrganFat | Tissue::Cavity);
    (canvas.labels[i] == organ && !canvas.tissue[i].is_benign()) || (organ == KIDNEY && is_fat)
}

/// Chooses where a tumour starts: the best of a few draws by how much of the ball around it lies in the organ.
fn choose_seed(canvas: &Canvas, organ: u8, radius: f32, rng: &mut Rng) -> Option<usize> {
    let host: Vec<u32> = (0..canvas.labels.len())
        .filter(|i| canvas.labels[*i] == organ && !canvas.tissue[*i].is_benign())
        .map(|i| i as u32)
        .collect();
    if host.is_empty() {
        return None;
    }
    let wanted = if organ == KIDNEY { 0.45 } else { 0.8 };
    let mut best = (-1.0, 0);
    for _ in 0..16 {
        let seed = host[rng.below(host.len())] as usize;
        let centre = canvas.frame.position(canvas.frame.voxel(seed));
        let (mut inside, mut all) = (0u32, 0u32);
        let reach = [radius * 0.8; 3];
        canvas.frame.visit(
            sub(centre, reach),
            std::array::from_fn(|a| centre[a] + reach[a]),
            |i, _| {
                inside += u32::from(canvas.labels[i] == organ);
                all += 1;
            },
        );
        let share = inside as f32 / all.max(1) as f32;
        if share > best.0 {
            best = (share, seed);
        }
        if share >= wanted {
            break;
        }
    }
    Some(best.1)
}

/// What a tumour's next voxel costs.
enum Family {
    Lobules(Vec<(Point, f32)>),
    Infiltrating(LocalField),
    Ragged(LocalField),
}

impl Family {
    fn draw(centre: Point, radius: f32, rng: &mut Rng) -> Self {
        let (low, high) = (centre.map(|mm| mm - 3.0 * radius), centre.map(|mm| mm + 3.0 * radius));
        match rng.below(3) {
            0 => {
                let lobules = (0..3 + rng.below(6)).map(|_| {
                    let off: Point = std::array::from_fn(|_| rng.range(-0.75, 0.75) as f32 * radius);
                    let bump = radius * rng.range(0.45, 0.95) as f32;
                    (std::array::from_fn(|axis| centre[axis] + off[axis]), bump)
                });
                Self::Lobules(lobules.collect())
            }
            1 => Self::Infiltrating(LocalField::draw(low, high, (0.5 * radius).max(4.0), rng)),
            _ => Self::Ragged(LocalField::draw(low, high, (0.8 * radius).max(4.0), rng)),
        }
    }

    /// Returns the cost of reaching `p` from a neighbour `step_mm` away that cost `so_far`.
    fn cost(&self, p: Point, (centre, radius): (Point, f32), (so_far, step_mm): (f32, f32)) -> f32 {
        let off = sub(p, centre);
        let distance = dot(off, off).sqrt() / radius;
        match self {
            Self::Lobules(lobules) => {
                let bump = |(at, size): &(Point, f32)| {
                    let off = sub(p, *at);
                    (1.0 - dot(off, off) / (2.6 * size * size)).max(0.0).powi(2)
                };
                so_far.max(0.25 * distance - lobules.iter().map(bump).sum::<f32>())
            }
            Self::Infiltrating(tissue) => so_far + step_mm * (0.25 + (1.0 + tissue.at(p)).max(0.0)) + 0.02 * distance,
            Self::Ragged(field) => so_far.max(distance + 0.3 * field.at(p)),
        }
    }
}

/// Grows a tumour of about `diameter` mm; nothing where the organ has no room.
fn grow(canvas: &Canvas, organ: u8, diameter: f32, rng: &mut Rng) -> Option<Vec<usize>> {
    let radius = diameter / 2.0;
    let frame = &canvas.frame;
    let seed = choose_seed(canvas, organ, radius, rng)?;
    let organ_voxels = canvas.labels.iter().filter(|label| **label == organ).count();
    let ball = std::f32::consts::PI / 6.0 * diameter.powi(3) / frame.voxel_mm3();
    let wanted = (ball.round() as usize).clamp(4, (organ_voxels / 3).max(4));
    let centre = frame.position(frame.voxel(seed));
    let family = Family::draw(centre, radius, rng);
    let mut voxels = Vec::with_capacity(wanted);
    let mut seen = std::collections::HashSet::from([seed]);
    // Costs as ordered integers; ties go to the lower voxel, so the order never depends on the heap.
    let ordered = |cost: f32| (f64::from(cost) * 1e6) as i64;
    let mut front = BinaryHeap::from([Reverse((ordered(-10.0), seed))]);
    while let Some(Reverse((cost, i))) = front.pop() {
        voxels.push(i);
        if voxels.len() == wanted {
            break;
        }
        let so_far = (cost as f64 / 1e6) as f32;
        frame.neighbours(i, |axis, next| {
            if !seen.contains(&next) && allows(canvas, organ, next) {
                seen.insert(next);
                let at = frame.position(frame.voxel(next));
                let cost = family.cost(at, (centre, radius), (so_far, frame.spacing_mm[axis]));
                front.push(Reverse((ordered(cost), next)));
            }
        });
    }
    voxels.sort_unstable();
    Some(voxels)
}

/// A lesion's voxels by their depth.
struct Layers {
    /// In the order of the voxels, see [`depths`].
    depth: Vec<u16>,
    deepest: f32,
}

impl Layers {
    fn of(frame: &Frame, voxels: &[usize]) -> Self {
        let depth = depths(frame, voxels);
        let deepest = f32::from(depth.iter().copied().max().unwrap_or(1));
        Self { depth, deepest }
    }

    /// Draws how a tumour looks inside.
    fn draw_pattern(&self, rim: &RimLaw, rng: &mut Rng) -> Pattern {
        let pattern = match rng.below(6) {
            0 if self.deepest > 3.0 => Pattern::Rim,
            1 if self.deepest > 4.0 => Pattern::Necrotic,
            2 if self.deepest > 2.0 => Pattern::Capsule(28.0),
            _ => Pattern::Even,
        };
        // Without a core there is nothing to be brighter than.
        match rim.share > 0.0 && rng.chance(rim.share) && self.deepest > 1.0 {
            true => Pattern::Capsule(rim.hu as f32),
            false => pattern,
        }
    }
}

/// Returns every voxel's depth below the lesion's surface in voxel layers, 1 at the surface.
fn depths(frame: &Frame, voxels: &[usize]) -> Vec<u16> {
    let mut depth = vec![0u16; voxels.len()];
    let mut current = 1;
    loop {
        let is_open = |i: usize| {
            voxels
                .binary_search(&i)
                .map_or(true, |k| depth[k] != 0 && depth[k] < current)
        };
        let layer: Vec<usize> = (0..voxels.len())
            .filter(|k| depth[*k] == 0)
            .filter(|k| {
                let mut open = false;
                frame.neighbours(voxels[*k], |_, next| open |= is_open(next));
                open
            })
            .collect();
        if layer.is_empty() {
            return depth;
        }
        layer.iter().for_each(|k| depth[*k] = current);
        current += 1;
    }
}

/// Writes a lesion's HU.
fn render(
    canvas: &Canvas,
    hu: &mut [f32],
    (voxels, layers, pattern): (&[usize], &Layers, Pattern),
    (intensities, contrast): (&Intensities, f32),
    rng: &mut Rng,
) {
    let frame = &canvas.frame;
    let at = |i: usize| frame.position(frame.voxel(i));
    let bounds = voxels
        .iter()
        .map(|i| at(*i))
        .fold(([f32::MAX; 3], [f32::MIN; 3]), |(low, high), p| {
            (
                std::array::from_fn(|a| low[a].min(p[a])),
                std::array::from_fn(|a| high[a].max(p[a])),
            )
        });
    let texture = LocalField::draw(bounds.0, bounds.1, rng.range(4.0, 9.0) as f32, rng);
    let amplitude = rng.range(4.0, 13.0) as f32;
    let mut values: Vec<f32> = (0..voxels.len())
        .map(|k| {
            let relative = f32::from(layers.depth[k]) / layers.deepest;
            let structure = match pattern {
                Pattern::Even => 0.0,
                Pattern::Rim if relative < 0.35 => 25.0,
                Pattern::Necrotic if relative > 0.5 => -38.0,
                Pattern::Capsule(bright) if layers.depth[k] == 1 => bright,
                _ => 0.0,
            };
            structure + amplitude * texture.at(at(voxels[k]))
        })
        .collect();
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    // A share of the organ's own mottling shows through; the contrast is against the organ's mean.
    let host = intensities.of(canvas.tissue[voxels[0]].host());
    // Solid tissue is no less dense than water, whatever a fatty organ measures: there a tumour is bright.
    let contrast = contrast.max(8.0 - host);
    let seen_through = rng.range(0.0, 0.5) as f32;
    for (k, value) in values.iter_mut().enumerate() {
        let under = hu[voxels[k]].clamp(host - 20.0, host + 20.0) - host;
        hu[voxels[k]] = host + contrast + (*value - mean) + seen_through * under;
    }
}
