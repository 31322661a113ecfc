//! Critics of inner folds: each left some of the critic's own training cases out, so that it can judge those.

use std::path::Path;

use super::calibrate::RealScore;
use super::critic::train_on;
use super::fit::{Job, Metrics};
use super::validation::ValidationSettings;
use super::{CriticConfig, LearnError, Split};
use crate::checkpoint::inner_folder;
use crate::store::Cases;

/// How many ways of dealing cases to inner folds are tried: some of few cases leave a fold without any.
const DEALS: u64 = 100;

/// What the critic of an inner fold learns from, and what it is kept from.
pub(super) type InnerFold = (Vec<usize>, Vec<usize>);

/// Deals the training cases to the inner folds.
pub(super) fn inner_folds(
    config: &CriticConfig,
    cases: &dyn Cases,
    labelled: &[usize],
) -> Result<Vec<InnerFold>, LearnError> {
    // Other seeds than the outer split's: the folds of one would else be those of the other.
    for deal in 1..=DEALS {
        let fold_of = |fold| -> Result<InnerFold, LearnError> {
            let split = Split {
                folds: config.inner_folds,
                fold,
                seed: config.split.seed + deal,
                file: None,
                ..config.split.clone()
            };
            let (_, left_out) = split.divide(cases)?;
            Ok(labelled.iter().partition(|case| !left_out.contains(case)))
        };
        let folds = (0..config.inner_folds).map(fold_of).collect::<Result<Vec<_>, _>>()?;
        if folds
            .iter()
            .all(|(learn, left_out)| !learn.is_empty() && !left_out.is_empty())
        {
            return Ok(folds);
        }
    }
    Err(LearnError::Config {
        key: "critic.inner_folds".into(),
        expected: format!(
            "no more than the patients of the {} labelled training cases (0: no critics of inner folds)",
            labelled.len()
        ),
        got: config.inner_folds.to_string(),
    })
}

/// Trains a critic for every inner fold; returns how each scores the lesions that it did not see.
pub(super) fn train_inner(
    config: &CriticConfig,
    job: &mut Job,
    folds: &[InnerFold],
) -> Result<Vec<RealScore>, LearnError> {
    let mut scores = Vec::new();
    for (fold, (learn, left_out)) in folds.iter().enumerate() {
        job.progress
            .on_note(&format!("inner fold {fold} of {}", config.inner_folds));
        let out = job.out.join(inner_folder(fold));
        fs_err::create_dir_all(&out)?;
        let config = CriticConfig {
            seed: config.seed + 1 + fold as u64,
            inner_folds: 0,
            validation: ValidationSettings::default(),
            ..config.clone()
        };
        let mut job = Job {
            cases: job.cases,
            out: &out,
            resume: job.resume,
            device: job.device,
            dtype: job.dtype,
            progress: &mut *job.progress,
        };
        let trained = train_on(&config, &mut job, learn, &[])?;
        scores.extend(trained.judge(&config, &job, left_out)?);
        trained.save(&config, &job, (learn, Metrics::new()), None)?;
    }
    Ok(scores)
}

/// Removes what an earlier run left of inner folds from one on: its states would be resumed by mistake, and its critics belong
/// to no bundle of this run.
pub(super) fn forget_inner(out: &Path, from: usize) -> Result<(), LearnError> {
    let folders = (from..).map(|fold| out.join(inner_folder(fold)));
    for folder in folders.take_while(|folder| folder.exists()) {
        fs_err::remove_dir_all(folder)?;
    }
    Ok(())
}
