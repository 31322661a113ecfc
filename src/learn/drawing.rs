//! What a step of stage 2 works on: hosts with a lesion to be painted, and cubes around real tumours.

use super::augment::Look;
use super::cubes::{Catalogue, Cube, read_cube, side_of};
use super::painted::{Host, Wanted};
use super::{LearnError, SynthesizerConfig};
use crate::rng::{Purpose, Rng};
use crate::volume::SizeClass;

/// Most cubes of a step over those that show one host.
const MOST: usize = 16;

/// Draws a step's hosts and tumours; both follow from the seed and the step's number alone.
pub(super) struct Drawing<'a> {
    pub config: &'a SynthesizerConfig,
    pub catalogue: &'a Catalogue<'a>,
    /// Cubes of a step that show the same host.
    pub each: usize,
}

impl Drawing<'_> {
    /// Returns a step's size class, cube side and number of different hosts.
    fn plan_step(&self, step: u64) -> (SizeClass, usize, usize) {
        let mut rng = Rng::keyed(self.config.seed, step, 0, Purpose::Training);
        let mix = &self.config.cube_mix;
        let shares: Vec<f64> = SizeClass::ALL
            .iter()
            .map(|size| mix.get(size).copied().unwrap_or(0.0))
            .collect();
        let size = SizeClass::ALL[rng.weighted(&shares).unwrap_or(0)];
        let side = side_of(size, self.config.max_cube);
        let count = self.config.voxels_per_step / side.pow(3) / self.each;
        (size, side, count.clamp(1, MOST))
    }

    /// Draws a step's hosts, labelled and unlabelled in turn.
    pub fn hosts(&self, step: u64) -> Result<Vec<Host>, LearnError> {
        let (size, side, count) = self.plan_step(step);
        let draws = (0..count).map(|slot| {
            let mut rng = Rng::keyed(self.config.seed, step, slot as u64 + 1, Purpose::Training);
            let look = Look::draw(&mut rng, &self.config.look);
            let wanted = Wanted {
                form: &self.config.form,
                size,
                side,
                labelled: (step + slot as u64).is_multiple_of(2),
                broad_contrast: self.config.broad_contrast,
            };
            if let Some(host) = wanted.draw(self.catalogue, &mut rng, &look)? {
                return Ok(host);
            }
            // Nobody holds a lesion of this size: a tiny one in the same cube keeps the step's shape.
            let tiny = Wanted {
                size: SizeClass::Tiny,
                ..wanted
            };
            let host = tiny.draw(self.catalogue, &mut rng, &look)?;
            host.ok_or_else(|| LearnError::Data("no organ of the training cases holds a lesion of 5 mm".into()))
        });
        draws.collect()
    }

    /// Draws a step's cubes around real tumours, as many as there are different hosts.
    pub fn reals(&self, step: u64) -> Result<Vec<Cube>, LearnError> {
        let (size, side, count) = self.plan_step(step);
        let draws = (0..count).map(|slot| {
            let mut rng = Rng::keyed(self.config.seed, step, 1000 + slot as u64, Purpose::Training);
            let look = Look::draw(&mut rng, &self.config.look);
            let Some((case, _, tumour)) = self.catalogue.draw_tumour(&mut rng, &[size]) else {
                return Err(LearnError::Data(
                    "the synthesizer needs real tumours that are not held out".into(),
                ));
            };
            read_cube(self.catalogue.cases, case, tumour.centre, side, &look)
        });
        draws.collect()
    }
}
