//! A segmentor becomes a critic: the next round's gate and teacher.

use std::path::Path;

use burn::tensor::Device;

use super::calibrate::{calibrate, judge_real};
use super::cubes::Catalogue;
use super::segmentor::Setup;
use super::{LearnError, SegmentorConfig};
use crate::checkpoint::{Calibration, Precision, Provenance, Role, collect_network, load_segmentor, save_model};
use crate::kernel::ComputeDtype;
use crate::nn::CubeSides;
use crate::store::Cases;
use crate::stream::{PatchService, seen_patients};

/// Which segmentor becomes whose critic.
pub struct Promotion<'a> {
    /// How the segmentor was trained: which cases it never saw.
    pub config: &'a SegmentorConfig,
    /// What it was trained from.
    pub service: &'a dyn PatchService,
    /// The store.
    pub cases: &'a dyn Cases,
    /// The cubes in which the generator paints, and the critic will look.
    pub cubes: CubeSides,
    /// Where to compute.
    pub device: &'a Device,
    /// What networks compute in.
    pub dtype: ComputeDtype,
}

/// Calibrates a segmentor's scores on the real lesions that it never saw, and writes it as a critic; returns the gate's
/// thresholds.
///
/// # Errors
/// [`LearnError::Data`] where no lesion was held out; others name the file.
pub fn promote_segmentor(promotion: &Promotion, from: &Path, to: &Path) -> Result<Calibration, LearnError> {
    let Promotion {
        config,
        service,
        cases,
        cubes,
        device,
        dtype,
    } = promotion;
    let loaded = load_segmentor(from, device)?;
    let weights = collect_network(&loaded.model);
    let net = loaded.model.with_compute_dtype(*dtype);
    // The store may have changed since, and the folds with it: what is held out now may be what the segmentor learnt from.
    let seen = seen_patients(*cases, &Provenance::of(&[&loaded.manifest]));
    let mut held_out = Setup::new(config, *service, *cases)?.held_out;
    held_out.retain(|case| !seen[*case]);
    let [.., longest] = cubes.all();
    let scores = judge_real((&net, device), &Catalogue::new(*cases, &held_out), longest, || Ok(()))?;
    if scores.is_empty() {
        return Err(LearnError::Data(
            "no tumour was held out that the segmentor has not learnt from, so that the gate cannot be calibrated; hold cases out \
             with split or recipe.select.hold_out"
                .into(),
        ));
    }
    let calibration = calibrate(&scores);
    let mut manifest = loaded.manifest;
    manifest.role = Role::Critic;
    manifest.cubes = cubes.all().to_vec();
    manifest.calibration = Some(calibration.clone());
    save_model(to, manifest, &weights, Precision::Single)?;
    Ok(calibration)
}
