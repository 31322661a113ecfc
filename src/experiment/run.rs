//! Carries out runs: makes stores and models where they are missing, trains a segmentor, tests it, keeps its predictions.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;

use super::arm::Hosts;
use super::cohort::{Cohort, test_specs};
use super::results::{Calibrated, mean};
use super::{Arm, ExperimentConfig, ExperimentError, Results, RunKey, RunRecord, Setting, identity};
use crate::checkpoint::{Bundle, load_segmentor, write_atomically};
use crate::evaluate::{EvaluateError, Examination, HeldOut, HeldOutSettings, Overlap, score_held_out};
use crate::ingest::nifti::write_labels;
use crate::kernel::ComputeDtype;
use crate::learn::{CriticConfig, Job, LearnError, Progress, SegmentorConfig, Split, SynthesizerConfig};
use crate::learn::{train_critic, train_segmentor, train_synthesizer};
use crate::phantom::{PhantomSpec, Tumours, case_id, write_cohort};
use crate::sampler::Pool;
use crate::store::{CaseRecord, Cases, Store, StoreConfig};
use crate::stream::delivery::Delivery;
use crate::stream::patch::{Outcome, StreamedPatch};
use crate::stream::recipe::Recipe;
use crate::stream::{BinCounts, PatchService, StatsSnapshot, StreamConfig, Streams};
use crate::volume::Organ;

/// What a run that was cut short goes on from.
const STATE: &str = "segmentor.state.safetensors";
/// Patches by which the gate's acceptance is measured.
const PROBED: u32 = 192;

/// Where an experiment keeps its files and what it computes with.
pub struct Workplace<'a> {
    /// The folder of stores, models, runs and predictions.
    pub out: &'a Path,
    /// Where to compute.
    pub device: &'a Device,
    /// What networks compute in.
    pub dtype: ComputeDtype,
    /// How stores are read.
    pub store: &'a StoreConfig,
    /// Threads and windows of the stream.
    pub stream: &'a StreamConfig,
}

/// An experiment at work.
pub struct Experiment<'a> {
    setting: Setting<'a>,
    place: Workplace<'a>,
    test: Arc<Store>,
    results: Results,
    /// Held from the first run on.
    lock: Option<fs_err::File>,
}

impl<'a> Experiment<'a> {
    /// Makes the test patients, and takes over the runs that the folder holds already.
    ///
    /// # Errors
    /// [`ExperimentError`] names the key, the store or the file.
    pub fn open(setting: Setting<'a>, place: Workplace<'a>) -> Result<Self, ExperimentError> {
        setting.experiment.check()?;
        let (config, plan) = (setting.experiment, setting.plan);
        let organs = plan.labels.organs();
        let Some(organ) = organs.iter().find(|organ| organ.name == config.organ) else {
            let names: Vec<&str> = organs.iter().map(|organ| organ.name.as_str()).collect();
            return Err(ExperimentError::Config {
                key: "organ",
                expected: "an organ of the plan that has a tumour class",
                got: format!("{:?}; there are {}", config.organ, names.join(", ")),
            });
        };
        identity::claim(place.out, setting.digest(), setting.own_digests())?;
        let specs = test_specs(setting.phantom, config.cohort_seed, config.test, plan.spacing_mm);
        let test = store_of(&setting, &place, &place.out.join("test"), &specs)?;
        let cases = scored_cases(config, organ, &test)?;
        let digests = (setting.digest(), setting.digests_before());
        let mut results = Results::new(digests, setting.own_digests(), cases);
        results.take_over(&place.out.join("results.json"))?;
        Ok(Self {
            setting,
            place,
            test,
            results,
            lock: None,
        })
    }

    /// Returns what is done.
    pub fn results(&self) -> &Results {
        &self.results
    }

    /// Takes over a file's runs, see [`Results::take_over`].
    ///
    /// # Errors
    /// [`ExperimentError::Results`] names the file.
    pub fn take_over(&mut self, path: &Path) -> Result<Option<usize>, ExperimentError> {
        self.results.take_over(path)
    }

    /// Carries out a run and keeps its record; one that was cut short goes on from its last checkpoint.
    ///
    /// # Errors
    /// [`ExperimentError`] names the key, the case or the file.
    pub fn run(&mut self, key: RunKey, progress: &mut dyn Progress) -> Result<(), ExperimentError> {
        if self.lock.is_none() {
            self.lock = Some(identity::lock(self.place.out)?);
        }
        let store = self.training_store(key)?;
        let started = Instant::now();
        let models = self.models(key, &store, progress)?;
        let model_seconds = models
            .as_ref()
            .and_then(|(_, is_new)| is_new.then(|| started.elapsed().as_secs_f64()));
        let bundle = models.map(|(bundle, _)| bundle);
        let calibration = bundle.as_ref().and_then(|bundle| self.calibration(bundle));
        let service = Streams::start(store.clone(), bundle, self.place.stream.clone())?;
        let folder = self.place.out.join("runs").join(key.name());
        let hosts = self.hosts(key, &service, &folder)?;
        // What the gate accepts is measured for the recipe: no part of the training.
        let started = Instant::now();
        let config = self.segmentor(key, hosts);
        let before = service.stats().snapshot();
        let mut job = self.job(&store, &folder, progress)?;
        let went_on = folder.join(STATE).exists();
        let report = train_segmentor(&config, &*service, &mut job)?;
        let scores = self.test(&folder, &config, report.steps, progress)?;
        let after = service.stats().snapshot();
        let count = |of: fn(&BinCounts) -> u64| {
            let sum = |stats: &StatsSnapshot| stats.bins.iter().map(of).sum::<u64>();
            sum(&after) - sum(&before)
        };
        let (attempted, accepted) = (count(|bin| bin.attempted), count(|bin| bin.accepted));
        let patches = after.patches - before.patches;
        let record = RunRecord {
            key,
            accepted: (attempted > 0).then(|| accepted as f64 / attempted as f64),
            hosts_share: if key.arm.synthesizes() { hosts.share } else { 0.0 },
            synthetic_share: accepted as f64 / patches.max(1) as f64,
            seconds: started.elapsed().as_secs_f64(),
            model_seconds,
            went_on,
            data_wait: report.data_wait,
            calibration,
            ..self.record(key, &scores)
        };
        self.results.insert(record);
        self.results
            .write(self.setting.experiment, &self.place.out.join("results.json"))
    }

    /// Returns a run's scores; what they cost and streamed is filled in by who knows.
    fn record(&self, key: RunKey, scores: &HeldOut) -> RunRecord {
        let organ = &self.setting.experiment.organ;
        let tumour = format!("{organ}_tumour");
        let of = |class: &str| {
            let class = class.to_string();
            scores.scores.iter().filter_map(move |case| case.classes.get(&class))
        };
        let sum = |count: fn(&Overlap) -> u64| of(&tumour).map(|m| count(&m.overlap)).sum::<u64>() as f64;
        RunRecord {
            key,
            tumour_dsc: (self.results.cases.iter())
                .filter_map(|id| scores.scores.iter().find(|case| case.case == *id))
                .filter_map(|case| case.classes.get(&tumour)?.dice)
                .collect(),
            organ_dsc: mean(of(organ).filter_map(|measures| measures.dice)).unwrap_or(0.0),
            predicted_over_true: sum(|overlap| overlap.predicted) / sum(|overlap| overlap.truth).max(1.0),
            hosts_share: 0.0,
            synthetic_share: 0.0,
            accepted: None,
            seconds: 0.0,
            model_seconds: None,
            went_on: false,
            data_wait: None,
            calibration: None,
            numerics: Some(self.place.dtype.numerics(self.place.device)),
            own: self.setting.own_digests().get(&key.arm).copied(),
        }
    }

    /// Returns what a critic was calibrated on.
    fn calibration(&self, bundle: &Bundle) -> Option<Calibrated> {
        Some(Calibrated {
            lesions: bundle.calibration.lesions()?,
            suspect_from: bundle.calibration.suspect_from(&self.setting.experiment.organ)?,
        })
    }

    /// Returns what a run takes of its healthy patients; of gated arms, the share of accepted patches is measured first. A run that goes on
    /// keeps what was measured when it began: on a GPU a patch may be decided otherwise, and its state would be another configuration's.
    fn hosts(&self, key: RunKey, service: &Streams, folder: &Path) -> Result<Hosts, ExperimentError> {
        let experiment = self.setting.experiment;
        let pool = match key.unlabelled {
            0 => Pool::LabelledHost,
            _ => Pool::UnlabelledHost,
        };
        let of = |accepted: f64| Hosts::new(pool, experiment.synthetic_share, accepted);
        if !key.arm.is_gated() {
            return Ok(of(1.0));
        }
        let mut recipe = self.segmentor(key, of(1.0)).recipe;
        recipe.pools = Some(BTreeMap::from([(pool, 1.0)]));
        let path = folder.join("accepted.json");
        if folder.join(STATE).exists() && path.exists() {
            return Ok(of(f64::from(read_accepted(&path)?) / f64::from(PROBED)));
        }
        let accepted = probe(service, recipe)?;
        fs_err::create_dir_all(folder)?;
        write_atomically(&path, accepted.to_string().as_bytes())?;
        Ok(of(f64::from(accepted) / f64::from(PROBED)))
    }

    fn segmentor(&self, key: RunKey, hosts: Hosts) -> SegmentorConfig {
        let Setting {
            segmentor, experiment, ..
        } = self.setting;
        let mut config = segmentor.clone();
        config.seed = segmentor.seed + key.seed;
        config.recipe = key.arm.recipe(&segmentor.recipe, experiment, hosts);
        config.recipe.seed = segmentor.recipe.seed + key.seed;
        config.split = nothing_held_out();
        config
    }

    fn job<'b>(
        &self,
        store: &'b Arc<Store>,
        folder: &'b Path,
        progress: &'b mut dyn Progress,
    ) -> Result<Job<'b>, ExperimentError>
    where
        'a: 'b,
    {
        fs_err::create_dir_all(folder)?;
        Ok(Job {
            cases: &**store,
            out: folder,
            resume: true,
            device: self.place.device,
            dtype: self.place.dtype,
            progress,
        })
    }

    /// Predicts the test cases, keeps the predictions as NIfTI, and scores them.
    fn test(
        &self,
        folder: &Path,
        config: &SegmentorConfig,
        step: u64,
        progress: &mut dyn Progress,
    ) -> Result<HeldOut, ExperimentError> {
        progress.on_note("predicting the test cases");
        let net = load_segmentor(folder, self.place.device)?
            .model
            .with_compute_dtype(self.place.dtype);
        let all: Vec<usize> = (0..self.test.records().len()).collect();
        let settings = HeldOutSettings {
            cases: all.len(),
            ..config.held_out.clone()
        };
        let exam = Examination {
            net: &net,
            device: self.place.device,
            cases: &*self.test,
            held_out: &all,
            settings: &settings,
        };
        let predictions = folder.join("predictions");
        fs_err::create_dir_all(&predictions)?;
        let mut kept = Ok(());
        let scores = score_held_out(&exam, &mut |scored| {
            let case = self.test.find(&scored.score.case);
            let path = predictions.join(format!("{}.nii.gz", scored.score.case));
            if let (Some(case), Ok(())) = (case, &kept) {
                let grid = &self.test.records()[case].grid;
                kept = write_labels(&path, scored.prediction.view(), grid).map_err(|error| (path, error.to_string()));
            }
            match progress.should_stop() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        });
        let scores = match scores {
            Err(EvaluateError::Stopped) => return Err(LearnError::Stopped { step }.into()),
            scores => scores?,
        };
        kept.map_err(|(path, what)| ExperimentError::Prediction { path, what })?;
        Ok(scores)
    }

    fn cohort(&self, labelled: usize, unlabelled: usize, seed: u64) -> Cohort {
        Cohort {
            seed: self.setting.experiment.cohort_seed + 1 + seed,
            labelled,
            unlabelled,
            tumours: match self.setting.experiment.hidden {
                true => Tumours::Hidden,
                false => Tumours::None,
            },
            spacing_mm: self.setting.plan.spacing_mm,
        }
    }

    fn seed_folder(&self, seed: u64) -> PathBuf {
        self.place.out.join(format!("seed-{seed}"))
    }

    /// Returns the store that a run's patches come from.
    fn training_store(&self, key: RunKey) -> Result<Arc<Store>, ExperimentError> {
        let mut cohort = self.cohort(key.labelled, key.unlabelled, key.seed);
        if key.arm == Arm::Oracle {
            cohort.tumours = Tumours::Labelled;
        }
        self.store(cohort, key.seed)
    }

    fn store(&self, cohort: Cohort, seed: u64) -> Result<Arc<Store>, ExperimentError> {
        let folder = self.seed_folder(seed).join(cohort.name()).join("store");
        store_of(&self.setting, &self.place, &folder, &cohort.specs(self.setting.phantom))
    }

    /// Returns the models of a run that needs some, and whether they were trained for it.
    fn models(
        &self,
        key: RunKey,
        store: &Arc<Store>,
        progress: &mut dyn Progress,
    ) -> Result<Option<(Arc<Bundle>, bool)>, ExperimentError> {
        if !key.arm.needs_models() {
            return Ok(None);
        }
        let cohort = self.cohort(key.labelled, key.unlabelled, key.seed);
        let (name, synthesizer) = if key.arm.is_published() {
            ("published", &self.setting.experiment.published)
        } else {
            ("models", self.setting.synthesizer)
        };
        let folder = self.seed_folder(key.seed).join(cohort.name()).join(name);
        let is_new = !folder.join("synthesizer.report.json").exists();
        if is_new {
            let critic = self.critic(key, progress)?;
            let config = SynthesizerConfig {
                seed: synthesizer.seed + key.seed,
                ..synthesizer.clone()
            };
            train_synthesizer(&config, &critic, &mut self.job(store, &folder, progress)?)?;
        }
        let bundle = Bundle::load(&folder, self.place.device)?.with_compute_dtype(self.place.dtype);
        Ok(Some((Arc::new(bundle), is_new)))
    }

    /// Returns the folder of the critic of a number of labelled patients: unlabelled ones teach it nothing.
    fn critic(&self, key: RunKey, progress: &mut dyn Progress) -> Result<PathBuf, ExperimentError> {
        let cohort = self.cohort(key.labelled, 0, key.seed);
        let folder = self.seed_folder(key.seed).join(cohort.name()).join("critic");
        if !folder.join("critic.report.json").exists() {
            let store = self.store(cohort, key.seed)?;
            let config = CriticConfig {
                seed: self.setting.critic.seed + key.seed,
                ..self.setting.critic.clone()
            };
            train_critic(&config, &mut self.job(&store, &folder, progress)?)?;
        }
        Ok(folder)
    }
}

/// Returns the test patients that have a tumour of the organ: of the others no Dice is defined.
fn scored_cases(config: &ExperimentConfig, organ: &Organ, test: &Store) -> Result<Vec<String>, ExperimentError> {
    let has_tumour = |record: &&CaseRecord| record.tumours.iter().any(|tumour| tumour.id == organ.tumour_id);
    let cases: Vec<String> = (test.records().iter().filter(has_tumour))
        .map(|record| record.id.clone())
        .collect();
    if cases.is_empty() {
        return Err(ExperimentError::Config {
            key: "organ",
            expected: "an organ of which test patients grow tumours (phantom.tumours)",
            got: format!("{:?}", config.organ),
        });
    }
    Ok(cases)
}

/// The segmentor learns from every patient of its store: it is tested on others.
fn nothing_held_out() -> Split {
    Split {
        folds: 1,
        ..Split::default()
    }
}

/// Opens a store of patients, making those that it lacks.
fn store_of(
    setting: &Setting,
    place: &Workplace,
    folder: &Path,
    specs: &[PhantomSpec],
) -> Result<Arc<Store>, ExperimentError> {
    // A store that another configuration left, or that was cut short, is completed or refused by its writer.
    let open = || Store::open(folder).map(|store| Arc::new(store.with_config(place.store)));
    if let Ok(store) = open()
        && store.plan() == setting.plan
        && specs.iter().all(|spec| store.find(&case_id(spec)).is_some())
    {
        return Ok(store);
    }
    write_cohort(folder, setting.plan, (setting.phantom, specs), &|_| ())?;
    Ok(open()?)
}

/// Counts the patches of a recipe, among the first ones, whose lesion the gate accepts.
fn probe(service: &Streams, recipe: Recipe) -> Result<u32, ExperimentError> {
    let delivery = Delivery {
        count: Some(PROBED.into()),
        batch_size: 1,
        ..Delivery::default()
    };
    let mut stream = service.open(&service.resolve(recipe)?, &delivery)?;
    let mut accepted = 0;
    while let Some(batch) = stream.next_batch() {
        let patches = batch?.patches;
        let is_accepted = |patch: &&Arc<StreamedPatch>| patch.meta.outcome == Outcome::Accepted;
        accepted += patches.iter().filter(is_accepted).count() as u32;
    }
    Ok(accepted)
}

/// Reads what was counted when a run began.
fn read_accepted(path: &Path) -> Result<u32, ExperimentError> {
    // A damaged file may be of any size: only what can be a number is read.
    let text = match fs_err::metadata(path)?.len() {
        ..64 => fs_err::read_to_string(path)?,
        _ => String::new(),
    };
    let accepted = text.trim().parse().ok().filter(|accepted| *accepted <= PROBED);
    accepted.ok_or_else(|| ExperimentError::Results {
        path: path.into(),
        what: format!("expected a number from 0 to {PROBED}; without the run's folder it begins anew"),
    })
}
