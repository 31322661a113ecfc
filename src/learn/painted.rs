//! Hosts with a drawn lesion: what the generator is asked to paint in training, as it will be asked in serving.

use burn::tensor::{Device, Tensor, TensorData};
use ndarray::{Array3, Zip};

use super::LearnError;
use super::augment::Look;
use super::cubes::{Catalogue, normalise, read_cube, stack};
use crate::lesion::{LESION_FROM, LesionForm, MaskRequest, Shape, ShapeRequest, choose_centre, soft_mask};
use crate::nn::{Condition, Generator};
use crate::rng::{Purpose, Rng};
use crate::synth::habitat;
use crate::volume::{HuWindow, Region, SizeClass, dilated};

/// Places tried in one host, and hosts tried for one lesion.
const TRIES: [u32; 2] = [6, 12];

/// A host cube and the lesion wanted in it.
#[derive(Clone, Debug)]
pub(super) struct Host {
    /// Intensities in HU, without the lesion.
    pub image: Array3<f32>,
    /// Stored label ids.
    pub labels: Array3<u8>,
    /// What is known of the case.
    pub case: usize,
    /// The organ's position.
    pub organ: usize,
    /// The soft mask in [0, 1].
    pub soft: Array3<f32>,
    /// {soft mask >= 0.5}, 1 inside.
    pub lesion: Array3<u8>,
    /// Equivalent-sphere diameter after clipping, in mm.
    pub diameter_mm: f64,
    /// The requested contrast in HU.
    pub contrast_hu: f64,
}

/// What kind of lesion is drawn, and in which hosts.
pub(super) struct Wanted<'a> {
    pub form: &'a LesionForm,
    pub size: SizeClass,
    pub side: usize,
    pub labelled: bool,
    /// Share of contrasts drawn evenly from -80 to 60 HU instead of near a real tumour's.
    pub broad_contrast: f64,
}

impl Wanted<'_> {
    /// Draws a host, a place and a lesion; nothing where none of several hosts holds one.
    pub fn draw(&self, catalogue: &Catalogue, rng: &mut Rng, look: &Look) -> Result<Option<Host>, LearnError> {
        for _ in 0..TRIES[1] {
            let host = catalogue
                .draw_host(rng, self.labelled)
                .or_else(|| catalogue.draw_host(rng, !self.labelled));
            let Some((case, organ)) = host else {
                return Ok(None);
            };
            if let Some(host) = self.draw_in(catalogue, (case, organ), rng, look)? {
                return Ok(Some(host));
            }
        }
        Ok(None)
    }

    fn draw_in(
        &self,
        catalogue: &Catalogue,
        (case, organ): (usize, usize),
        rng: &mut Rng,
        look: &Look,
    ) -> Result<Option<Host>, LearnError> {
        let record = catalogue.record(case);
        let spacing_mm = record.grid.spacing_mm();
        let organ_id = catalogue.organs[organ].id;
        let diameter_mm = draw_diameter_mm(rng, self.size, self.side, spacing_mm);
        let candidates = catalogue.cases.candidates(case, organ_id)?;
        for tried in 0..TRIES[0] {
            let Some(centre) = choose_centre(&candidates, diameter_mm, (self.form, tried), rng) else {
                return Ok(None);
            };
            let shape = Shape::draw(
                &ShapeRequest {
                    diameter_mm,
                    form: self.form,
                },
                rng,
            );
            let cube = read_cube(catalogue.cases, case, centre, self.side, look)?;
            let mask = soft_mask(&MaskRequest {
                shape: &shape,
                centre: [(self.side / 2) as i64; 3],
                region: Region::whole([self.side; 3]),
                spacing_mm,
                host: &habitat(&cube.labels, &cube.image, organ_id),
                form: self.form,
            });
            if mask.kept < self.form.min_kept || mask.voxels == 0 || !mask.is_whole() {
                continue;
            }
            return Ok(Some(Host {
                image: cube.image,
                labels: cube.labels,
                case,
                organ,
                lesion: mask.soft.mapv(|soft| u8::from(soft >= LESION_FROM)),
                soft: mask.soft.mapv(|soft| f32::from(soft) / 255.0),
                diameter_mm: mask.diameter_mm,
                contrast_hu: self.draw_contrast_hu(catalogue, organ, rng),
            }));
        }
        Ok(None)
    }

    fn draw_contrast_hu(&self, catalogue: &Catalogue, organ: usize, rng: &mut Rng) -> f64 {
        let real = catalogue.contrasts_hu(organ);
        if real.is_empty() || rng.chance(self.broad_contrast) {
            return rng.range(-80.0, 60.0);
        }
        f64::from(real[rng.below(real.len())]) + 5.0 * rng.normal()
    }
}

/// Draws a diameter of a size class evenly in its logarithm, no larger than the cube shows with its surroundings.
fn draw_diameter_mm(rng: &mut Rng, size: SizeClass, side: usize, spacing_mm: [f64; 3]) -> f64 {
    let [low, high] = [[5.0, 10.0], [10.0, 20.0], [20.0, 50.0], [50.0, 80.0]][size as usize];
    let room = 0.65 * side as f64 * spacing_mm.into_iter().fold(f64::INFINITY, f64::min);
    let logarithm = rng.range(libm::log(low), libm::log(high));
    libm::exp(logarithm).min(room)
}

impl Host {
    /// Returns the lesion's size class.
    pub fn size(&self) -> SizeClass {
        SizeClass::of_diameter(self.diameter_mm)
    }

    /// Marks where a false tumour would count against the lesion: near it, but neither it nor a real tumour.
    pub fn around(&self, catalogue: &Catalogue) -> Array3<f32> {
        let spacing_mm = catalogue.record(self.case).grid.spacing_mm();
        let longest = spacing_mm.into_iter().fold(0.0, f64::max);
        let near = dilated(&self.lesion, spacing_mm, (self.diameter_mm / 2.0).max(6.0));
        let touched = dilated(&self.lesion, spacing_mm, longest);
        let mut out = Array3::zeros(near.dim());
        Zip::from(&mut out)
            .and(&near)
            .and(&touched)
            .and(&self.labels)
            .for_each(|out, near, touched, label| {
                let is_tumour = catalogue.organs.iter().any(|organ| organ.tumour_id == *label);
                *out = f32::from(u8::from(*near && !*touched && !is_tumour));
            });
        out
    }
}

/// A batch of hosts as tensors.
pub(super) struct HostBatch {
    /// `[B, 1, D, H, W]` in HU.
    pub image_hu: Tensor<5>,
    /// `[B, 1, D, H, W]` in [0, 1].
    pub soft: Tensor<5>,
    /// `[B, 1, D, H, W]`, 1 in the lesion.
    pub lesion: Tensor<5>,
    /// `[B]` in HU.
    pub contrast_hu: Tensor<1>,
    /// `[B, K]`.
    pub condition: Tensor<2>,
}

impl HostBatch {
    pub fn new(hosts: &[Host], organs: usize, device: &Device) -> Self {
        let mut vectors = Vec::new();
        for host in hosts {
            let condition = Condition {
                organ: host.organ,
                diameter_mm: host.diameter_mm,
                contrast_hu: host.contrast_hu,
            };
            vectors.extend(condition.vector(organs));
        }
        let contrasts: Vec<f32> = hosts.iter().map(|host| host.contrast_hu as f32).collect();
        let lesions: Vec<Array3<f32>> = hosts.iter().map(|host| host.lesion.mapv(f32::from)).collect();
        let batch = hosts.len();
        Self {
            image_hu: stack(hosts.iter().map(|host| &host.image), device),
            soft: stack(hosts.iter().map(|host| &host.soft), device),
            lesion: stack(lesions.iter(), device),
            contrast_hu: Tensor::from_data(TensorData::new(contrasts, [batch]), device),
            condition: Tensor::from_data(TensorData::new(vectors, [batch, Condition::len(organs)]), device),
        }
    }

    /// Returns the generator's residual in HU for a noise field per host.
    pub fn residual(&self, generator: &Generator, window: &HuWindow, noise: Tensor<5>) -> Tensor<5> {
        generator.forward(
            normalise(self.image_hu.clone(), window),
            self.soft.clone(),
            noise,
            self.contrast_hu.clone(),
            &self.condition,
        )
    }
}

/// Draws the noise field of one host.
pub(super) fn draw_noise(seed: u64, step: u64, slot: u64, side: usize) -> Array3<f32> {
    let values = Rng::keyed(seed, step, slot, Purpose::Noise).normals(side * side * side);
    Array3::from_shape_vec((side, side, side), values).expect("as many values as voxels")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toy;

    #[test]
    fn what_grows_out_of_an_organ_takes_no_real_tumour() {
        let store = toy::store(2, 0);
        let catalogue = Catalogue::new(&store, &[0, 1]);
        let form = LesionForm {
            exophytic: true,
            min_kept: 0.2,
            ..LesionForm::default()
        };
        let wanted = Wanted {
            form: &form,
            size: SizeClass::Small,
            side: 24,
            labelled: true,
            broad_contrast: 0.0,
        };
        let mut grown_out = 0;
        for seed in 0..20 {
            let mut rng = Rng::keyed(seed, 0, 0, Purpose::Test);
            let Some(host) = wanted.draw(&catalogue, &mut rng, &Look::none()).unwrap() else {
                continue;
            };
            let under = |id: u8| {
                Zip::from(&host.soft)
                    .and(&host.labels)
                    .fold(0, |sum, soft, label| sum + u32::from(*soft > 0.0 && *label == id))
            };
            grown_out += under(0);
            assert_eq!(under(catalogue.organs[0].tumour_id), 0, "seed {seed}");
        }
        assert!(grown_out > 0);
    }
}
