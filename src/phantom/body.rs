//! The trunk: skin, fat, muscle, lungs, spine, ribs and great vessels.

use super::canvas::{Canvas, Tissue};
use super::field::Point;
use super::form::{Tube, ellipsoid};
use crate::rng::Rng;

/// Half axes of the nominal trunk along (anterior, right) in mm.
pub(super) const TRUNK_MM: [f32; 2] = [118.0, 152.0];

/// What differs between trunks, in nominal mm.
struct Trunk {
    fat: f32,
    muscle: f32,
    rib_phase: f32,
    vertebra_phase: f32,
    dome: f32,
}

/// Paints everything that is no abdominal organ.
pub(super) fn paint_body(canvas: &mut Canvas, rng: &mut Rng) {
    let trunk = Trunk {
        fat: rng.range(7.0, 20.0) as f32,
        muscle: rng.range(10.0, 15.0) as f32,
        rib_phase: rng.range(0.0, 26.0) as f32,
        vertebra_phase: rng.range(0.0, 33.0) as f32,
        dome: rng.range(88.0, 104.0) as f32,
    };
    canvas.paint_whole(|p| trunk.tissue(p));
    paint_great_vessels(canvas, rng);
}

impl Trunk {
    /// Returns the tissue of the trunk at a nominal position.
    fn tissue(&self, p: Point) -> Tissue {
        let [z, y, x] = p;
        let q = ((y / TRUNK_MM[0]).powi(2) + (x / TRUNK_MM[1]).powi(2)).sqrt().max(1e-3);
        if q > 1.0 {
            return Tissue::Air;
        }
        let distance = (y * y + x * x).sqrt();
        // Distance to the skin along the ray from the middle; fat is thicker behind and at the flanks.
        let depth = distance * (1.0 / q - 1.0);
        let fat = self.fat * (1.0 + 0.3 * (x.abs() - y) / distance.max(1.0));
        if depth < 2.0 {
            return Tissue::Skin;
        }
        if let Some(tissue) = self.spine(p) {
            return tissue;
        }
        if depth < fat {
            return Tissue::Fat;
        }
        if depth < fat + self.muscle {
            return self.wall(p, depth - fat);
        }
        if is_back_muscle(p) {
            return Tissue::Muscle;
        }
        let room = [TRUNK_MM[0] - self.fat - 10.0, TRUNK_MM[1] - self.fat - 10.0];
        let recess = (y / room[0]).powi(2) + (x / room[1]).powi(2) + (z.max(0.0) / self.dome).powi(2);
        if recess > 1.06 && z > 12.0 {
            return Tissue::Lung;
        }
        Tissue::Cavity
    }

    /// Returns muscle or rib at a depth into the wall.
    fn wall(&self, [z, y, x]: Point, depth: f32) -> Tissue {
        // Ribs descend from back to front and end before the midline.
        let along = (z + 0.45 * y + self.rib_phase).rem_euclid(26.0) - 13.0;
        let across = depth - self.muscle * 0.5;
        let radius = (along / 5.5).powi(2) + (across / 4.2).powi(2);
        let has_ribs = z + 0.5 * y > -45.0 && (x.abs() > 35.0 || y < 0.0);
        if !has_ribs || radius > 1.0 {
            return Tissue::Muscle;
        }
        if radius > 0.45 {
            Tissue::Cortical
        } else {
            Tissue::Trabecular
        }
    }

    /// Returns the spine's tissue, or nothing beside it.
    fn spine(&self, p: Point) -> Option<Tissue> {
        let [z, y, x] = p;
        let canal = ((y + 84.0) / 8.0).powi(2) + (x / 10.0).powi(2);
        if canal < 1.0 {
            return Some(Tissue::Canal);
        }
        let level = (z + self.vertebra_phase).rem_euclid(33.0);
        let body = ((y + 60.0) / 16.0).powi(2) + (x / 21.0).powi(2);
        if body < 1.0 {
            if level < 6.5 {
                return Some(Tissue::Disc);
            }
            let is_edge = body > 0.82 || !(8.0..31.5).contains(&level);
            return Some(if is_edge { Tissue::Cortical } else { Tissue::Trabecular });
        }
        let is_arch = canal < 1.8;
        let is_spinous = x.abs() < 3.5 && (-110.0..-90.0).contains(&y) && (4.0..26.0).contains(&level);
        let is_transverse = (y + 80.0).abs() < 4.5 && x.abs() < 38.0 && (10.0..22.0).contains(&level);
        (is_arch || is_spinous || is_transverse).then_some(Tissue::Cortical)
    }
}

/// Tells whether a position lies in the muscles along the spine.
fn is_back_muscle([z, y, x]: Point) -> bool {
    let erector = ((y + 84.0) / 20.0).powi(2) + ((x.abs() - 32.0) / 26.0).powi(2);
    let psoas_radius = (14.0 - 0.12 * z).clamp(0.0, 20.0);
    let psoas = (y + 56.0).powi(2) + (x.abs() - 34.0).powi(2);
    let crus = (y + 46.0).powi(2) / 30.0 + (x.abs() - 16.0).powi(2) / 60.0;
    erector < 1.0 || (z < 40.0 && psoas < psoas_radius * psoas_radius) || (z > -20.0 && crus < 1.0)
}

/// Paints aorta, inferior vena cava and the branches that run through the upper abdomen.
fn paint_great_vessels(canvas: &mut Canvas, rng: &mut Rng) {
    let mut tube = |tissue, knots: &[(Point, f32)]| {
        let tube = Tube::through(knots);
        canvas.paint(tube.bounds(0.0), tissue, |p| tube.distance(p) > 0.0);
    };
    let wide = rng.range(0.85, 1.2) as f32;
    let aorta = 10.0 * wide;
    tube(
        Tissue::Artery,
        &[
            ([-130.0, -33.0, -6.0], aorta * 0.85),
            ([0.0, -31.0, -8.0], aorta),
            ([130.0, -36.0, -9.0], aorta),
        ],
    );
    tube(
        Tissue::Artery,
        &[
            ([10.0, -24.0, -7.0], 4.0),
            ([2.0, -8.0, -4.0], 4.0),
            ([-40.0, 2.0, 0.0], 3.5),
            ([-100.0, 4.0, 6.0], 3.0),
        ],
    );
    let cava = rng.range(9.0, 13.0) as f32;
    tube(
        Tissue::Vein,
        &[
            ([-130.0, -31.0, 18.0], cava),
            ([20.0, -26.0, 21.0], cava),
            ([60.0, -14.0, 22.0], cava),
            ([130.0, -4.0, 20.0], cava),
        ],
    );
    for side in [-1.0, 1.0] {
        let from = if side > 0.0 { 22.0 } else { -10.0 };
        tube(
            Tissue::Vein,
            &[([-34.0, -26.0, from], 5.0), ([-38.0, -32.0, side * 44.0], 4.0)],
        );
    }
    let portal = rng.range(5.5, 7.5) as f32;
    tube(
        Tissue::Vein,
        &[
            ([-110.0, 10.0, 14.0], 5.0),
            ([-45.0, 8.0, 14.0], portal),
            ([-12.0, 5.0, 20.0], portal),
            ([2.0, 8.0, 36.0], portal),
        ],
    );
    tube(
        Tissue::Vein,
        &[
            ([-16.0, 4.0, 16.0], 5.0),
            ([-2.0, 8.0, -20.0], 4.5),
            ([10.0, -10.0, -55.0], 4.0),
            ([20.0, -22.0, -74.0], 3.5),
        ],
    );
}

/// Paints one gut loop: a wall around gas above (anterior) and fluid or stool below.
pub(super) fn paint_loop(canvas: &mut Canvas, tube: &Tube, gas_above_mm: f32, content: Tissue) {
    canvas.visit(tube.bounds(0.0), |tissue, _, p| {
        let depth = if *tissue == Tissue::Cavity {
            tube.distance(p)
        } else {
            -1.0
        };
        if depth > 0.0 {
            *tissue = filling(depth, p[1], gas_above_mm, content);
        }
    });
}

/// Returns the tissue at a depth into a hollow organ.
fn filling(depth: f32, anterior: f32, gas_above_mm: f32, content: Tissue) -> Tissue {
    if depth < 3.0 {
        Tissue::Wall
    } else if anterior > gas_above_mm {
        Tissue::Gas
    } else {
        content
    }
}

/// Paints stomach and bowel into what the organs left free.
pub(super) fn paint_gut(canvas: &mut Canvas, rng: &mut Rng) {
    let level = rng.range(36.0, 62.0) as f32;
    let centre = [
        38.0 + rng.range(-6.0, 6.0) as f32,
        34.0,
        -52.0 + rng.range(-8.0, 8.0) as f32,
    ];
    let radii = [38.0, 32.0, rng.range(26.0, 38.0) as f32];
    let reach = |sign: f32| std::array::from_fn(|axis| centre[axis] + sign * radii[axis]);
    canvas.visit((reach(-1.0), reach(1.0)), |tissue, _, p| {
        let depth = ellipsoid(p, centre, radii);
        if *tissue == Tissue::Cavity && depth > 0.0 {
            *tissue = filling(depth + 1e-3, p[1], level, Tissue::Fluid);
        }
    });
    // Duodenum beside the pancreatic head.
    let duodenum = Tube::through(&[
        ([0.0, 28.0, 34.0], 10.0),
        ([-25.0, 4.0, 56.0], 10.0),
        ([-62.0, 0.0, 44.0], 9.0),
        ([-68.0, -4.0, 0.0], 9.0),
    ]);
    paint_loop(canvas, &duodenum, 1e3, Tissue::Fluid);
    for _ in 0..16 {
        let mut at: Point = [
            rng.range(-110.0, -15.0) as f32,
            rng.range(5.0, 75.0) as f32,
            rng.range(-105.0, 105.0) as f32,
        ];
        let radius = rng.range(9.0, 19.0) as f32;
        let mut knots = vec![(at, radius)];
        for _ in 0..3 {
            at = [
                at[0] + rng.range(-22.0, 22.0) as f32,
                (at[1] + rng.range(-18.0, 18.0) as f32).min(82.0),
                at[2] + rng.range(-32.0, 32.0) as f32,
            ];
            knots.push((at, radius * rng.range(0.75, 1.15) as f32));
        }
        let gas_above = if rng.chance(0.5) {
            at[1] + rng.range(-4.0, 9.0) as f32
        } else {
            1e3
        };
        let content = if rng.chance(0.4) { Tissue::Stool } else { Tissue::Fluid };
        paint_loop(canvas, &Tube::through(&knots), gas_above, content);
    }
}
