//! Makes one patch: schedule, lesion, synthesis, gate, retries, fallback.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

use ndarray::Array3;

use super::encoded::Encoded;
use super::judge::{Trial, judge};
use super::leak::judges;
use super::negatives::{Search, SearchError, Suspects, UnlabelledNegatives, unsearched};
use super::patch::{Asked, GateScores, LesionMeta, Outcome, PatchMeta, StreamedPatch};
use super::planting::Lesion;
use super::recipe::Fallback;
use super::resolve::Prepared;
use super::scene::{Painted, Scene, assemble, crop_around, draw_warp, read_box};
use super::stats::{StreamStats, Tally};
use super::{StreamError, delivery::OnFailed};
use crate::checkpoint::Bundle;
use crate::panic::panic_text;
use crate::rng::{Purpose, Rng};
use crate::sampler::{Centre, Draw, Pool, draw_contrast_hu};
use crate::store::{Cases, StoreError};
use crate::synth::gate::Verdict;
use crate::synth::{Cancelled, Engine, LesionCube, SynthError, compose, realised_hu};
use crate::telemetry::metrics::Stage;
use crate::volume::{IGNORE, Region};

/// The attempt number under which a real patch is drawn in the place of a host that never passed.
const REAL_DRAW: u64 = u64::MAX;

/// What every preparation thread needs.
pub(super) struct Maker {
    pub(super) cases: Arc<dyn Cases>,
    pub(super) bundle: Option<Arc<Bundle>>,
    pub(super) engine: Option<Arc<Engine>>,
    pub(super) stats: Arc<StreamStats>,
    /// Whose critic judges lesions in each case; found when first asked for.
    pub(super) judges: OnceLock<Vec<Option<usize>>>,
}

/// One patch to be made.
pub(super) struct PatchOrder {
    pub(super) prepared: Arc<Prepared>,
    pub(super) index: u64,
    pub(super) on_failed: OnFailed,
    pub(super) cancelled: Cancelled,
}

/// A lesion that was painted, and what was thought of it.
struct Attempt {
    /// As in [`Lesion`].
    draw: Draw,
    painted: Painted,
    region: Region,
    requested_hu: f64,
    verdict: Option<Verdict>,
    scores: Option<GateScores>,
    discriminator: Option<f64>,
}

impl Attempt {
    /// Returns what its margin is worth less where it is no lesion of its own: 2, more than margins differ, where the critic saw a tumour there
    /// before, or sees none now.
    fn flaw(&self) -> f64 {
        let is_suspect = self.verdict.is_some_and(|verdict| verdict.host_suspect);
        let is_unseen = self.scores.is_some_and(|scores| scores.recall == 0.0);
        if is_suspect || is_unseen { 2.0 } else { 0.0 }
    }
}

/// Everything that was tried for one index.
#[derive(Default)]
struct Trials {
    chosen: Option<Attempt>,
    passed: bool,
    /// Where the last attempt would have been cut out.
    region: Option<Region>,
    attempts: u32,
    placed: u32,
    host_suspect: u32,
    borderline: bool,
}

/// Why an attempt could not be carried out.
#[derive(Debug, thiserror::Error)]
enum MakeError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Synth(#[from] SynthError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("internal error: {0}")]
    Panic(String),
}

impl From<SearchError> for MakeError {
    fn from(error: SearchError) -> Self {
        match error {
            SearchError::Store(error) => Self::Store(error),
            SearchError::Synth(error) => Self::Synth(error),
        }
    }
}

impl Maker {
    /// Makes a patch; what cannot be made is an error or an item marked failed, as the client chose.
    pub(super) fn make(&self, order: &PatchOrder) -> Result<StreamedPatch, StreamError> {
        let draw = order.prepared.schedule.draw(order.index);
        let make = || match draw.pool {
            Pool::LabelledReal => self.real(order, &draw, draw.case, draw.centre, Outcome::Real),
            Pool::LabelledHost | Pool::UnlabelledHost => self.host(order, &draw),
        };
        // A fault of ours is one patch's too, and whoever skips what fails goes on.
        let made = catch_unwind(AssertUnwindSafe(make));
        let made = made.unwrap_or_else(|panic| Err(MakeError::Panic(panic_text(&*panic))));
        if order.cancelled.is_set() {
            // Nobody waits: neither made nor failed.
            return Err(StreamError::Stopped);
        }
        self.stats.count_patch();
        let is_lost = made.as_ref().is_err_and(|error| self.has_lost_device(error));
        let error = match made {
            Ok(patch) => return Ok(patch),
            Err(MakeError::Stream(error)) => error,
            Err(error) => StreamError::Failed {
                index: order.index,
                what: format!("case {:?}: {error}", self.cases.records()[draw.case].id),
            },
        };
        self.stats.count_failed();
        match order.on_failed {
            // No item is at fault, and a cursor must not pass all that are left.
            OnFailed::Skip if !is_lost => Ok(self.failed(order, &draw, error.to_string())),
            OnFailed::Skip | OnFailed::Error => Err(error),
        }
    }

    /// Tells whether a patch could not be made because none with a lesion can be made any more.
    fn has_lost_device(&self, error: &MakeError) -> bool {
        let is_gone = || self.engine.as_ref().is_some_and(|engine| engine.failure().is_some());
        match error {
            MakeError::Synth(SynthError::Ended) => true,
            MakeError::Synth(_) => is_gone(),
            MakeError::Store(_) | MakeError::Stream(_) | MakeError::Panic(_) => false,
        }
    }

    fn real(
        &self,
        order: &PatchOrder,
        draw: &Draw,
        case: usize,
        centre: Centre,
        outcome: Outcome,
    ) -> Result<StreamedPatch, MakeError> {
        let recipe = &order.prepared.resolved.recipe;
        let mut rng = Rng::keyed(recipe.seed, order.index, 0, Purpose::Crop);
        let record = &self.cases.records()[case];
        let tumours = record.tumours.iter().filter(|tumour| tumour.id == draw.organ.tumour_id);
        let tumours: Vec<_> = tumours.collect();
        let centre = match centre {
            Centre::Tumour if !tumours.is_empty() => tumours[rng.below(tumours.len())].centre,
            Centre::Tumour | Centre::Organ => self.organ_voxel(case, draw, &mut rng)?,
            Centre::Anywhere => record.grid.shape.map(|side| rng.below(side) as i64),
        };
        let region = crop_around(centre, record.grid.shape, order.prepared.resolved.patch, &mut rng);
        let meta = self.meta(order, draw, case, region, outcome);
        let scene = Scene {
            cases: &*self.cases,
            recipe,
            case,
            painted: None,
            warp: draw_warp(recipe, order.index, region.size, record.grid.spacing_mm()),
            suspects: None,
        };
        Ok(assemble(&scene, meta)?)
    }

    /// Returns a voxel of the organ: a candidate, or the middle of its box where it has none.
    fn organ_voxel(&self, case: usize, draw: &Draw, rng: &mut Rng) -> Result<[i64; 3], StoreError> {
        let candidates = self.cases.candidates(case, draw.organ.id)?;
        if !candidates.is_empty() {
            return Ok(candidates[rng.below(candidates.len())].voxel.map(i64::from));
        }
        let record = &self.cases.records()[case];
        let region = record
            .organ(draw.organ.id)
            .map_or(Region::whole(record.grid.shape), |organ| organ.region);
        Ok(std::array::from_fn(|axis| {
            region.start[axis] + (region.size[axis] / 2) as i64
        }))
    }

    fn host(&self, order: &PatchOrder, draw: &Draw) -> Result<StreamedPatch, MakeError> {
        let recipe = &order.prepared.resolved.recipe;
        let mut trials = Trials::default();
        for attempt in 0..=u64::from(recipe.gate.retries) {
            if order.cancelled.is_set() {
                return Err(SynthError::Cancelled.into());
            }
            self.attempt(order, draw, attempt, &mut trials)?;
            if trials.passed {
                break;
            }
        }
        let tally = Tally {
            attempts: trials.placed,
            host_suspect: trials.host_suspect,
            accepted: trials.passed,
            unplaceable: trials.placed == 0,
        };
        self.stats.count_host(&draw.organ.name, draw.size, draw.contrast, tally);
        self.settle(order, draw, trials)
    }

    /// Carries out one attempt and keeps it if it passes or is the best so far.
    fn attempt(&self, order: &PatchOrder, draw: &Draw, attempt: u64, trials: &mut Trials) -> Result<(), MakeError> {
        trials.attempts += 1;
        let prepared = &order.prepared;
        let seed = prepared.resolved.recipe.seed;
        let key = [seed, order.index, attempt];
        let Some(lesion) = Stage::Lesion.time(|| self.plant(prepared, draw, key))? else {
            return Ok(());
        };
        trials.placed += 1;
        let mut rng = Rng::keyed(seed, order.index, attempt, Purpose::Crop);
        let shape = self.cases.records()[draw.case].grid.shape;
        let region = crop_around(lesion.planted.centre, shape, prepared.resolved.patch, &mut rng);
        trials.region = Some(region);
        let made = self.paint(order, key, lesion, region)?;
        let verdict = made.verdict;
        trials.host_suspect += u32::from(verdict.is_some_and(|verdict| verdict.host_suspect));
        trials.borderline |= verdict.is_some_and(|verdict| verdict.borderline);
        trials.passed = verdict.is_none_or(|verdict| verdict.passes);
        let margin = |attempt: &Attempt| {
            attempt
                .verdict
                .map_or(f64::NEG_INFINITY, |verdict| verdict.margin - attempt.flaw())
        };
        // Of equals the first stays, so that the outcome follows from the order of attempts alone.
        if trials.passed || trials.chosen.as_ref().is_none_or(|best| margin(&made) > margin(best)) {
            trials.chosen = Some(made);
        }
        Ok(())
    }

    /// Paints a planted lesion and asks the gate.
    fn paint(&self, order: &PatchOrder, key: [u64; 3], lesion: Lesion, region: Region) -> Result<Attempt, MakeError> {
        let Lesion { draw, planted, graft } = lesion;
        let [seed, index, attempt] = key;
        let recipe = &order.prepared.resolved.recipe;
        let drawn_hu = draw_contrast_hu(&mut Rng::keyed(seed, index, attempt, Purpose::Contrast), draw.contrast);
        let requested_hu = graft.as_ref().map_or(drawn_hu, |graft| graft.contrast_hu);
        let organs = self.cases.plan().labels.organs();
        let cube = LesionCube {
            image: planted.host.image.clone(),
            soft: planted.soft.clone(),
            organ: organs.iter().position(|organ| *organ == draw.organ).unwrap_or(0),
            host: planted.host.labels.map(|label| u8::from(*label == draw.organ.id)),
            diameter_mm: planted.diameter_mm,
            contrast_hu: requested_hu,
            spacing_mm: self.cases.records()[draw.case].grid.spacing_mm(),
            key,
            cancelled: order.cancelled.clone(),
        };
        let bridge = self.bridge(&order.prepared, &draw);
        let residual = match graft {
            Some(graft) => graft.residual,
            None => self.residual(recipe.synthesizer, &cube, bridge.as_ref())?,
        };
        let mut made = Attempt {
            painted: Painted {
                image: compose(&cube.image, &residual, &cube.soft),
                planted,
                tumour_id: draw.organ.tumour_id,
            },
            draw,
            region,
            requested_hu,
            verdict: None,
            scores: None,
            discriminator: None,
        };
        if recipe.gate.enabled {
            self.judge(order, &mut made)?;
        }
        Ok(made)
    }

    fn judge(&self, order: &PatchOrder, made: &mut Attempt) -> Result<(), MakeError> {
        let draw = &made.draw;
        let (Some(engine), Some(bundle)) = (&self.engine, &self.bundle) else {
            return Err(SynthError::NoModel("critic").into());
        };
        let opinion = judge(&Trial {
            engine,
            bundle,
            gate: &order.prepared.resolved.recipe.gate,
            draw,
            painted: &made.painted,
            bridge: self.bridge(&order.prepared, draw),
            judge: self.judges.get_or_init(|| judges(&*self.cases, bundle))[draw.case],
            keeps_best: order.prepared.resolved.recipe.fallback == Fallback::Best,
            cancelled: &order.cancelled,
        })?;
        made.discriminator = opinion.discriminator;
        made.verdict = Some(opinion.verdict);
        made.scores = opinion.scores;
        Ok(())
    }

    /// Turns the trials into the patch that the client asked for.
    fn settle(&self, order: &PatchOrder, draw: &Draw, trials: Trials) -> Result<StreamedPatch, MakeError> {
        let recipe = &order.prepared.resolved.recipe;
        let (outcome, lesion) = match (trials.placed, trials.passed, recipe.fallback) {
            (0, ..) => (Outcome::Unplaceable, None),
            (_, true, _) => (Outcome::Accepted, trials.chosen.as_ref()),
            (_, false, Fallback::Healthy) => (Outcome::HealthyAfterK, None),
            (_, false, Fallback::Best) => (Outcome::BestAfterK, trials.chosen.as_ref()),
            (_, false, Fallback::Real) => (Outcome::RealAfterK, None),
        };
        let mut patch = if outcome == Outcome::RealAfterK {
            let mut rng = Rng::keyed(recipe.seed, order.index, REAL_DRAW, Purpose::Pool);
            let cases = order
                .prepared
                .real_cases
                .get(&draw.organ.id)
                .map_or(&[][..], Vec::as_slice);
            let case = if cases.is_empty() {
                draw.case
            } else {
                cases[rng.below(cases.len())]
            };
            let shares: Vec<f64> = recipe.centres.values().copied().collect();
            let centre = rng.weighted(&shares).and_then(|at| recipe.centres.keys().nth(at));
            self.real(order, draw, case, *centre.unwrap_or(&Centre::Organ), outcome)?
        } else {
            let region = match lesion.map(|attempt| attempt.region).or(trials.region) {
                Some(region) => region,
                None => self.empty_region(order, draw)?,
            };
            let mut meta = self.meta(order, draw, draw.case, region, outcome);
            meta.lesions = lesion.map(|attempt| self.lesion_meta(attempt)).into_iter().collect();
            let spacing_mm = self.cases.records()[draw.case].grid.spacing_mm();
            let warp = draw_warp(recipe, order.index, region.size, spacing_mm);
            let scene = Scene {
                cases: &*self.cases,
                recipe,
                case: draw.case,
                painted: lesion.map(|attempt| &attempt.painted),
                suspects: self.suspects(order, draw.case, read_box(region, warp.as_ref()))?,
                warp,
            };
            assemble(&scene, meta)?
        };
        patch.meta.attempts = trials.attempts;
        patch.meta.asked = recipe.gate.enabled.then(|| Asked {
            size: draw.size,
            contrast: draw.contrast,
            refused: trials.placed - u32::from(trials.passed),
        });
        patch.meta.host_suspect = trials.host_suspect;
        patch.meta.borderline = trials.borderline;
        Ok(patch)
    }

    /// Asks the critic what may be tumour in the untouched patch, where the recipe wants to know.
    fn suspects(&self, order: &PatchOrder, case: usize, patch: Region) -> Result<Option<Suspects>, MakeError> {
        let organs = unsearched(&self.cases.records()[case], &self.cases.plan().labels);
        let negatives = order.prepared.resolved.recipe.unlabelled_negatives;
        if organs.is_empty() || negatives != Some(UnlabelledNegatives::Critic) {
            return Ok(None);
        }
        let (Some(engine), Some(bundle)) = (&self.engine, &self.bundle) else {
            return Err(SynthError::NoModel("critic").into());
        };
        let search = Search {
            engine,
            cases: &*self.cases,
            case,
            patch,
            models_mm: bundle.plan.spacing_mm,
            cubes: bundle.cubes,
            cancelled: &order.cancelled,
        };
        Ok(Some(search.suspects(&organs)?))
    }

    /// Draws the crop of a host in which no lesion found a place.
    fn empty_region(&self, order: &PatchOrder, draw: &Draw) -> Result<Region, StoreError> {
        let resolved = &order.prepared.resolved;
        let mut rng = Rng::keyed(resolved.recipe.seed, order.index, 0, Purpose::Crop);
        let centre = self.organ_voxel(draw.case, draw, &mut rng)?;
        let shape = self.cases.records()[draw.case].grid.shape;
        Ok(crop_around(centre, shape, resolved.patch, &mut rng))
    }

    fn meta(&self, order: &PatchOrder, draw: &Draw, case: usize, region: Region, outcome: Outcome) -> PatchMeta {
        let record = &self.cases.records()[case];
        PatchMeta {
            index: order.index,
            case: record.id.clone(),
            pool: draw.pool,
            organ: draw.organ.name.clone(),
            region,
            affine: record.grid.affine.shifted(region.start),
            outcome,
            attempts: 0,
            host_suspect: 0,
            ignored_voxels: 0,
            labels_by: record.labels_by.clone(),
            borderline: false,
            lesions: Vec::new(),
            failed: None,
            asked: None,
        }
    }

    fn lesion_meta(&self, attempt: &Attempt) -> LesionMeta {
        let (draw, planted) = (&attempt.draw, &attempt.painted.planted);
        let spacing_mm = self.cases.records()[draw.case].grid.spacing_mm();
        let (labels, organ_id) = (&planted.host.labels, draw.organ.id);
        LesionMeta {
            instance: 1,
            organ: draw.organ.name.clone(),
            centre: planted.centre,
            size: draw.size,
            contrast: draw.contrast,
            diameter_mm: planted.diameter_mm,
            radii_mm: planted.radii_mm,
            requested_hu: attempt.requested_hu,
            realised_hu: realised_hu(&attempt.painted.image, labels, &planted.soft, organ_id, spacing_mm),
            gate: attempt.scores,
            discriminator: attempt.discriminator,
        }
    }

    /// Returns the item that stands for a patch that could not be made. Its labels are *ignore*, so that a trainer that
    /// overlooks the mark learns nothing from it.
    fn failed(&self, order: &PatchOrder, draw: &Draw, what: String) -> StreamedPatch {
        let size = order.prepared.resolved.patch;
        let outcome = match draw.pool {
            Pool::LabelledReal => Outcome::Real,
            Pool::LabelledHost | Pool::UnlabelledHost => Outcome::HealthyAfterK,
        };
        let mut meta = self.meta(order, draw, draw.case, Region::whole(size), outcome);
        meta.failed = Some(what);
        StreamedPatch {
            meta,
            image: Array3::zeros(size),
            label: Array3::from_elem(size, IGNORE),
            source: Array3::zeros(size),
            soft_mask: Array3::zeros(size),
            lesion_instance: Array3::zeros(size),
            undecided: None,
            encoded: Encoded::default(),
        }
    }
}
