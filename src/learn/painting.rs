//! How good a generator's lesions are on given hosts: the gate's scores, contrast, diversity, noise.

use burn::tensor::{Device, Tensor, activation};
use ndarray::{Array3, Array4, Zip};
use serde::Serialize;

use super::adversary::{lesion_means, log_odds};
use super::augment::Look;
use super::cubes::{Catalogue, lesion_of, normalise, read_cube, side_of, stack};
use super::guard::area;
use super::numbers::{mean, metrics};
use super::painted::{Host, Wanted};
use super::texture::{Textures, edge, strength};
use super::{LearnError, Metrics, Progress, SynthesizerConfig};
use crate::checkpoint::{Bundle, Realism, Thresholds};
use crate::evaluate::{argmax, forward};
use crate::rng::{Purpose, Rng};
use crate::store::TumourRecord;
use crate::synth::gate::{Judged, Scores, judge, scores};
use crate::volume::{ContrastBin, Organ, SizeClass, dilated};

/// Noise fields that diversity is measured over.
const NOISES: u64 = 3;
/// Added to the seed, so that no lesion of training is painted again.
const SEED_OFFSET: u64 = 0x5eed;
/// How far from the lesion the organ counts as its surroundings, in mm.
const AROUND_MM: f64 = 10.0;

/// Means over lesions painted into given hosts.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PaintingScore {
    /// Lesions painted.
    pub lesions: usize,
    /// The critic's mean probability of the organ's tumour inside the lesion.
    pub soft_recall: f64,
    /// The gate's recall.
    pub recall: f64,
    /// The gate's precision.
    pub precision: f64,
    /// Share of lesions that pass the calibrated gate.
    pub accepted: f64,
    /// Slope of realised over requested contrast.
    pub contrast_slope: f64,
    /// Share of the realised contrast's variance that the requested one explains.
    pub contrast_r2: f64,
    /// Mean difference between two noise fields' lesions, voxel by voxel, in HU.
    pub diversity_hu: f64,
    /// Standard deviation inside the lesion of means over 3 x 3 x 3 voxels, in HU.
    pub texture_hu: f64,
    /// The same of the hosts' organs' real lesions; absent where they have none.
    pub real_texture_hu: Option<f64>,
    /// By how much the outermost voxels are brighter than those inside, in HU, of lesions that have some inside.
    pub edge_hu: f64,
    /// The same of the hosts' organs' real lesions; absent where they have none.
    pub real_edge_hu: Option<f64>,
    /// Area under the trained discriminator's curve, real lesions of these cases against painted ones; absent where there are none
    /// of either.
    pub discriminator_auc: Option<f64>,
    /// Noise inside over noise of the organ around, from differences of neighbouring voxels.
    pub noise_ratio: f64,
}

impl PaintingScore {
    /// Returns the measures by name.
    pub(super) fn metrics(&self) -> Metrics {
        let mut all = metrics([
            ("lesions", self.lesions as f64),
            ("soft_recall", self.soft_recall),
            ("recall", self.recall),
            ("precision", self.precision),
            ("accepted", self.accepted),
            ("contrast_slope", self.contrast_slope),
            ("contrast_r2", self.contrast_r2),
            ("diversity_hu", self.diversity_hu),
            ("texture_hu", self.texture_hu),
            ("edge_hu", self.edge_hu),
            ("noise_ratio", self.noise_ratio),
        ]);
        let of_real = [
            ("real_texture_hu", self.real_texture_hu),
            ("real_edge_hu", self.real_edge_hu),
            ("discriminator_auc", self.discriminator_auc),
        ];
        all.extend(
            of_real
                .into_iter()
                .filter_map(|(name, value)| Some((name.to_string(), value?))),
        );
        all
    }
}

/// What lesions are painted into, and how they are measured.
pub(super) struct Painter<'a> {
    pub config: &'a SynthesizerConfig,
    pub catalogue: Catalogue<'a>,
    pub textures: Textures,
    pub bundle: &'a Bundle,
    pub device: &'a Device,
    /// Says when to stop.
    pub progress: &'a dyn Progress,
}

/// What paints, and what tells painted from real.
pub(super) struct Brush<'a> {
    /// The residual in HU of a host for the noise of a key (seed, lesion, noise field), `[1, 1, D, H, W]`.
    pub residual: &'a dyn Fn(&Host, [u64; 3]) -> Tensor<5>,
    /// The discriminator's logits of a windowed image, `[1, 3, D, H, W]`.
    pub discriminate: &'a dyn Fn(Tensor<5>) -> Tensor<5>,
}

/// The measures of one lesion.
struct Measure {
    soft_recall: f64,
    recall: f64,
    precision: f64,
    accepted: bool,
    requested_hu: f64,
    realised_hu: Option<f64>,
    diversity_hu: f64,
    texture_hu: f64,
    edge_hu: Option<f64>,
    /// Strength and edge.
    real_texture_hu: [Option<f64>; 2],
    odds: f32,
    noise_ratio: Option<f64>,
}

impl Painter<'_> {
    /// Refuses to go on where the run is to stop: the state of its last step is saved, so that a resumed run comes back here.
    fn go_on(&self) -> Result<(), LearnError> {
        match self.progress.should_stop() {
            true => Err(LearnError::Stopped {
                step: self.config.steps,
            }),
            false => Ok(()),
        }
    }

    fn hosts(&self) -> Result<Vec<Host>, LearnError> {
        let mut hosts = Vec::new();
        for i in 0..self.config.held_out_lesions {
            let mut rng = Rng::keyed(self.config.seed + SEED_OFFSET, i as u64, 0, Purpose::Training);
            let shares: Vec<f64> = SizeClass::ALL
                .iter()
                .map(|size| self.config.cube_mix.get(size).copied().unwrap_or(0.0))
                .collect();
            let size = SizeClass::ALL[rng.weighted(&shares).unwrap_or(0)];
            let wanted = Wanted {
                form: &self.config.form,
                size,
                side: side_of(size, self.config.max_cube),
                labelled: i % 2 == 0,
                broad_contrast: self.config.broad_contrast,
            };
            hosts.extend(wanted.draw(&self.catalogue, &mut rng, &Look::none())?);
        }
        Ok(hosts)
    }

    /// Paints a lesion with one noise field; HU rounded as in serving.
    fn paint(&self, brush: &Brush, host: &Host, index: u64, noise: u64) -> Array3<f32> {
        let residual = (brush.residual)(host, [self.config.seed + SEED_OFFSET, index, noise]);
        let data = residual.into_data().convert::<f32>();
        let values: Vec<f32> = data.try_to_vec().expect("converted to this type");
        let residual = Array3::from_shape_vec(host.image.dim(), values).expect("the generator keeps the shape");
        Zip::from(&host.image)
            .and(&residual)
            .map_collect(|hu, change| (hu + change).round())
    }

    fn measure(&self, brush: &Brush, host: &Host, index: u64) -> Result<Measure, LearnError> {
        self.go_on()?;
        let painted: Vec<_> = (0..NOISES).map(|noise| self.paint(brush, host, index, noise)).collect();
        let organ = &self.catalogue.organs[host.organ];
        let logits = self.see(&painted[0]);
        let (score, accepted) = self.judged(host, organ, &logits);
        let ring = self.ring(host, organ);
        let [image, lesion] =
            [painted[0].clone(), host.lesion.mapv(f32::from)].map(|a| stack(std::iter::once(&a), self.device));
        let [edge_hu, has_core] = edge(image.clone(), lesion.clone()).map(|x| f64::from(x.into_scalar::<f32>()));
        Ok(Measure {
            edge_hu: (has_core > 0.0).then_some(edge_hu),
            texture_hu: f64::from(strength(image, lesion).into_scalar::<f32>()),
            real_texture_hu: self.textures.mean(host.organ),
            odds: self.odds(brush, &painted[0], &host.lesion),
            soft_recall: mean_inside(&chance(&logits, organ.tumour_id), &host.lesion),
            recall: score.recall,
            precision: score.precision,
            accepted,
            requested_hu: host.contrast_hu,
            realised_hu: realised_hu(&painted[0], &host.lesion, &ring),
            diversity_hu: disagreement(&painted, &host.lesion),
            noise_ratio: noise_ratio(&painted[0], &host.lesion, &ring),
        })
    }

    /// Returns the critic's logits of an image in HU.
    fn see(&self, image: &Array3<f32>) -> Array4<f32> {
        let window = &self.bundle.plan.window_hu;
        let image = image.mapv(|hu| window.normalise(hu as i16));
        forward(&self.bundle.critic, &image, self.device)
    }

    /// Returns the gate's scores of a lesion by the critic's logits of it, and whether it passes.
    fn judged(&self, host: &Host, organ: &Organ, logits: &Array4<f32>) -> (Scores, bool) {
        let is_tumour = |id: u8| self.catalogue.organs.iter().any(|organ| organ.tumour_id == id);
        let score = scores(&Judged {
            before: &argmax(&self.see(&host.image)),
            after: &argmax(logits),
            lesion: &host.lesion,
            others: &host.labels.mapv(|id| u8::from(is_tumour(id))),
            tumour_id: organ.tumour_id,
            spacing_mm: self.catalogue.record(host.case).grid.spacing_mm(),
            radius_mm: host.diameter_mm / 2.0,
        });
        let bin = ContrastBin::of_contrast(host.contrast_hu);
        let thresholds = self.bundle.calibration.thresholds(&organ.name, host.size(), bin);
        let thresholds = thresholds.unwrap_or(Thresholds {
            recall: 0.7,
            precision: 0.0,
        });
        (score, judge(score, thresholds).passes)
    }

    /// Returns the discriminator's log odds of real over painted, averaged over a lesion.
    fn odds(&self, brush: &Brush, image: &Array3<f32>, lesion: &Array3<u8>) -> f32 {
        let [image, lesion] = [image.clone(), lesion.mapv(f32::from)].map(|a| stack(std::iter::once(&a), self.device));
        let logits = (brush.discriminate)(normalise(image, &self.bundle.plan.window_hu));
        lesion_means(log_odds(logits), lesion).into_scalar()
    }

    /// Asks the discriminator about every real lesion of the cases.
    fn real_odds(&self, brush: &Brush) -> Result<Vec<f32>, LearnError> {
        let of = |(case, _, tumour): (usize, usize, &TumourRecord)| {
            self.go_on()?;
            let side = side_of(
                SizeClass::of_diameter(f64::from(tumour.diameter_mm)),
                self.config.max_cube,
            );
            let cube = read_cube(self.catalogue.cases, case, tumour.centre, side, &Look::none())?;
            Ok(self.odds(brush, &cube.image, &lesion_of(&cube, tumour.id)))
        };
        self.catalogue.all_tumours().into_iter().map(of).collect()
    }

    /// Returns how real the discriminator finds every real lesion of the cases, as the gate measures it.
    pub fn realism(&self, discriminate: &dyn Fn(Tensor<5>) -> Tensor<5>) -> Result<Realism, LearnError> {
        let of = |(case, _, tumour): (usize, usize, &TumourRecord)| {
            self.go_on()?;
            let size = SizeClass::of_diameter(f64::from(tumour.diameter_mm));
            let side = side_of(size, self.config.max_cube);
            let cube = read_cube(self.catalogue.cases, case, tumour.centre, side, &Look::none())?;
            let lesion = lesion_of(&cube, tumour.id).mapv(f32::from);
            let [image, lesion] = [&cube.image, &lesion].map(|array| stack(std::iter::once(array), self.device));
            let logits = discriminate(normalise(image, &self.bundle.plan.window_hu));
            let real = lesion_means(activation::sigmoid(log_odds(logits)), lesion);
            Ok(f64::from(real.into_scalar::<f32>()))
        };
        let scores: Result<Vec<f64>, LearnError> = self.catalogue.all_tumours().into_iter().map(of).collect();
        Ok(Realism::of(scores?))
    }

    /// Marks the organ's healthy voxels within 10 mm that the lesion leaves as they were.
    fn ring(&self, host: &Host, organ: &Organ) -> Array3<u8> {
        let spacing_mm = self.catalogue.record(host.case).grid.spacing_mm();
        let around = dilated(&host.lesion, spacing_mm, AROUND_MM);
        Zip::from(&around)
            .and(&host.soft)
            .and(&host.labels)
            .map_collect(|around, soft, label| u8::from(*around && *soft == 0.0 && *label == organ.id))
    }
}

/// Returns a class's probability in each voxel.
fn chance(logits: &Array4<f32>, class: u8) -> Array3<f64> {
    let (classes, depth, height, width) = logits.dim();
    Array3::from_shape_fn((depth, height, width), |(z, y, x)| {
        let at = |class: usize| f64::from(logits[[class, z, y, x]]);
        let largest = (0..classes).map(at).fold(f64::MIN, f64::max);
        let total: f64 = (0..classes).map(|class| libm::exp(at(class) - largest)).sum();
        libm::exp(at(usize::from(class)) - largest) / total
    })
}

fn mean_inside(values: &Array3<f64>, lesion: &Array3<u8>) -> f64 {
    let inside = values.iter().zip(lesion).filter(|(_, inside)| **inside == 1);
    mean(inside.map(|(value, _)| *value))
}

/// Mean difference of two of the images inside the lesion, in HU.
fn disagreement(painted: &[Array3<f32>], lesion: &Array3<u8>) -> f64 {
    let pairs = (0..painted.len()).flat_map(|a| (0..a).map(move |b| (&painted[a], &painted[b])));
    mean(pairs.map(|(a, b)| {
        let difference = Zip::from(a).and(b).map_collect(|a, b| f64::from((a - b).abs()));
        mean_inside(&difference, lesion)
    }))
}

/// Mean inside minus mean of the ring; nothing where one of them is empty.
fn realised_hu(image: &Array3<f32>, lesion: &Array3<u8>, ring: &Array3<u8>) -> Option<f64> {
    let over = |mask: &Array3<u8>| {
        let count = mask.iter().filter(|value| **value == 1).count();
        let values = image.iter().zip(mask).filter(|(_, mask)| **mask == 1);
        (count > 0).then(|| values.map(|(hu, _)| f64::from(*hu)).sum::<f64>() / count as f64)
    };
    Some(over(lesion)? - over(ring)?)
}

/// Root mean square of neighbours' differences along x inside over that in the ring.
fn noise_ratio(image: &Array3<f32>, lesion: &Array3<u8>, ring: &Array3<u8>) -> Option<f64> {
    let rough = |mask: &Array3<u8>| {
        let (mut sum, mut count) = (0.0, 0_u32);
        for (row, mask) in image.rows().into_iter().zip(mask.rows()) {
            for x in 1..row.len() {
                if mask[x] == 1 && mask[x - 1] == 1 {
                    sum += f64::from(row[x] - row[x - 1]).powi(2);
                    count += 1;
                }
            }
        }
        (count >= 8 && sum > 0.0).then(|| libm::sqrt(sum / f64::from(count)))
    };
    Some(rough(lesion)? / rough(ring)?)
}

/// Returns slope and R2 of a straight line through points (x, y); zeros where x does not vary.
fn line(points: &[(f64, f64)]) -> (f64, f64) {
    let (mx, my) = (mean(points.iter().map(|p| p.0)), mean(points.iter().map(|p| p.1)));
    let sum = |f: &dyn Fn(f64, f64) -> f64| points.iter().map(|(x, y)| f(x - mx, y - my)).sum::<f64>();
    let (xx, xy, yy) = (sum(&|x, _| x * x), sum(&|x, y| x * y), sum(&|_, y| y * y));
    if xx <= 0.0 || yy <= 0.0 {
        return (0.0, 0.0);
    }
    (xy / xx, xy * xy / (xx * yy))
}

/// Paints the same lesions with whatever brush and averages.
pub(super) fn score_painting(painter: &Painter, brush: &Brush) -> Result<PaintingScore, LearnError> {
    let hosts = painter.hosts()?;
    let measures: Vec<Measure> = hosts
        .iter()
        .zip(0..)
        .map(|(host, index)| painter.measure(brush, host, index))
        .collect::<Result<_, _>>()?;
    let points: Vec<(f64, f64)> = measures
        .iter()
        .filter_map(|measure| Some((measure.requested_hu, measure.realised_hu?)))
        .collect();
    let (contrast_slope, contrast_r2) = line(&points);
    let average = |of: &dyn Fn(&Measure) -> f64| mean(measures.iter().map(of));
    let of_real = |which: usize| {
        let known: Vec<f64> = measures.iter().filter_map(|m| m.real_texture_hu[which]).collect();
        (!known.is_empty()).then(|| mean(known))
    };
    let (real, odds) = (
        painter.real_odds(brush)?,
        measures.iter().map(|m| m.odds).collect::<Vec<_>>(),
    );
    Ok(PaintingScore {
        lesions: measures.len(),
        soft_recall: average(&|m| m.soft_recall),
        recall: average(&|m| m.recall),
        precision: average(&|m| m.precision),
        accepted: average(&|m| f64::from(u8::from(m.accepted))),
        contrast_slope,
        contrast_r2,
        diversity_hu: average(&|m| m.diversity_hu),
        texture_hu: average(&|m| m.texture_hu),
        real_texture_hu: of_real(0),
        edge_hu: mean(measures.iter().filter_map(|m| m.edge_hu)),
        real_edge_hu: of_real(1),
        discriminator_auc: (!real.is_empty() && !odds.is_empty()).then(|| area(&real, &odds)),
        noise_ratio: mean(measures.iter().filter_map(|m| m.noise_ratio)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found() {
        let (slope, r2) = line(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]);
        assert!((slope - 2.0).abs() < 1e-12 && (r2 - 1.0).abs() < 1e-12);
        assert_eq!(line(&[(1.0, 1.0)]), (0.0, 0.0));
    }
}
