//! A deterministic stand-in for the patch service: patches as a pure function of recipe hash and index.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use freetumor::digest::Digest;
use freetumor::rng::{Purpose, Rng};
use freetumor::sampler::Pool;
use freetumor::stream::delivery::Delivery;
use freetumor::stream::patch::{GateScores, LesionMeta, Outcome, PatchMeta, StreamedPatch};
use freetumor::stream::recipe::Recipe;
use freetumor::stream::{Batch, PatchService, PatchStream, Resolved, StreamError};
use freetumor::volume::{Affine, ContrastBin, Plan, Region, SizeClass};
use ndarray::Array3;

/// The epoch of every recipe that does not say otherwise.
pub const EPOCH: u64 = 12;

/// The service and what it counts.
pub struct FakeService {
    /// The store's plan.
    pub plan: Plan,
    /// Batches made so far, over all streams.
    pub made: Arc<AtomicU64>,
    /// Streams not dropped yet.
    pub open: Arc<AtomicUsize>,
    /// How long a batch takes.
    pub batch_time: Duration,
    /// What it takes to resolve a recipe.
    pub resolve_time: Duration,
    /// The index whose patch cannot be made.
    pub broken: Option<u64>,
}

impl Default for FakeService {
    fn default() -> Self {
        Self {
            plan: Plan {
                spacing_mm: [2.0; 3],
                patch: [16, 16, 24],
                ..Plan::default()
            },
            made: Arc::default(),
            open: Arc::default(),
            batch_time: Duration::ZERO,
            resolve_time: Duration::ZERO,
            broken: None,
        }
    }
}

impl PatchService for FakeService {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn resolve(&self, mut recipe: Recipe) -> Result<Arc<Resolved>, StreamError> {
        recipe.validate()?;
        std::thread::sleep(self.resolve_time);
        if recipe.select.hold_out.iter().any(|case| case == "trained_on") {
            return Err(StreamError::Leak {
                what: "case trained_on is in the critic's training set".into(),
            });
        }
        if let Some(unknown) = recipe
            .organs
            .iter()
            .flat_map(|organs| organs.keys())
            .find(|organ| self.plan.labels.organ(organ).is_err())
        {
            return Err(StreamError::Infeasible {
                field: "organs",
                what: format!("the store has no {unknown}"),
            });
        }
        recipe.patch.get_or_insert(self.plan.patch);
        recipe.patches_per_epoch.get_or_insert(EPOCH);
        recipe
            .organs
            .get_or_insert_with(|| BTreeMap::from([("liver".to_owned(), 1.0)]));
        Ok(Arc::new(Resolved {
            hash: recipe.hash(),
            snapshot: Digest::of(b"snapshot"),
            bundle: Digest::default(),
            models: None,
            // Fixed, so that the golden frames hold the wire to its bytes and not the patches to theirs.
            revision: 1,
            patches_per_epoch: recipe.patches_per_epoch.unwrap(),
            patch: recipe.patch.unwrap(),
            labels: self.plan.labels.clone(),
            feasible: BTreeMap::from([(Pool::UnlabelledHost, BTreeMap::from([("liver".to_owned(), 3)]))]),
            shortfall: Vec::new(),
            numerics: "fake".into(),
            recipe,
        }))
    }

    fn open(&self, resolved: &Arc<Resolved>, delivery: &Delivery) -> Result<Box<dyn PatchStream>, StreamError> {
        let mut from = delivery.from;
        if let Some(cursor) = &delivery.cursor {
            if cursor.recipe != resolved.hash {
                return Err(StreamError::CursorMismatch {
                    field: "recipe",
                    cursor: cursor.recipe.to_string(),
                    server: resolved.hash.to_string(),
                });
            }
            if cursor.bundle != resolved.bundle {
                return Err(StreamError::BundleGone(cursor.bundle));
            }
            from = cursor.next_index;
        }
        let stride = u64::from(delivery.world) * u64::from(delivery.batch_size);
        let to_epoch = resolved.patches_per_epoch.saturating_sub(from).div_ceil(stride);
        self.open.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(FakeStream {
            resolved: resolved.clone(),
            next: from,
            batches: delivery.count.unwrap_or(to_epoch),
            sent: 0,
            delivery: delivery.clone(),
            made: self.made.clone(),
            open: self.open.clone(),
            batch_time: self.batch_time,
            broken: self.broken,
        }))
    }
}

struct FakeStream {
    resolved: Arc<Resolved>,
    next: u64,
    batches: u64,
    sent: u64,
    delivery: Delivery,
    made: Arc<AtomicU64>,
    open: Arc<AtomicUsize>,
    batch_time: Duration,
    broken: Option<u64>,
}

impl PatchStream for FakeStream {
    fn next_batch(&mut self) -> Option<Result<Batch, StreamError>> {
        if self.sent == self.batches {
            return None;
        }
        std::thread::sleep(self.batch_time);
        let (rank, world) = (u64::from(self.delivery.rank), u64::from(self.delivery.world));
        let size = u64::from(self.delivery.batch_size);
        let first = self.next;
        let indices: Vec<u64> = (0..size).map(|slot| first + slot * world + rank).collect();
        if let Some(index) = indices.iter().copied().find(|index| Some(*index) == self.broken) {
            return Some(Err(StreamError::Failed {
                index,
                what: "case_003.ftv: damaged store file".into(),
            }));
        }
        self.next += size * world;
        self.sent += 1;
        self.made.fetch_add(1, Ordering::SeqCst);
        Some(Ok(Batch {
            step: first / (size * world),
            patches: indices
                .into_iter()
                .map(|index| Arc::new(patch(&self.resolved, index)))
                .collect(),
            reused: Vec::new(),
            shape: self.resolved.patch,
            next: self.resolved.cursor(self.next),
        }))
    }

    fn batches(&self) -> u64 {
        self.batches
    }
}

impl Drop for FakeStream {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Makes the patch of an index: noise, and a bright box as its lesion.
pub fn patch(resolved: &Resolved, index: u64) -> StreamedPatch {
    let seed = u64::from_le_bytes(resolved.hash.0[..8].try_into().unwrap());
    let mut rng = Rng::keyed(seed, index, 0, Purpose::Test);
    let [d, h, w] = resolved.patch;
    let source = Array3::from_shape_simple_fn((d, h, w), || rng.below(500) as i16 - 200);
    let is_lesion = |z: usize, y: usize, x: usize| (4..8).contains(&z) && (4..9).contains(&y) && (4..10).contains(&x);
    let inside = Array3::from_shape_fn((d, h, w), |(z, y, x)| is_lesion(z, y, x));
    StreamedPatch {
        meta: meta(resolved, index),
        image: Array3::from_shape_fn((d, h, w), |at| source[at] + if inside[at] { 60 } else { 0 }),
        label: inside.mapv(|inside| if inside { 2 } else { 1 }),
        source,
        soft_mask: inside.mapv(|inside| u8::from(inside) * 255),
        lesion_instance: inside.mapv(u8::from),
        undecided: None,
        encoded: freetumor::stream::encoded::Encoded::default(),
    }
}

fn meta(resolved: &Resolved, index: u64) -> PatchMeta {
    PatchMeta {
        index,
        case: format!("case_{:03}", index % 5),
        pool: Pool::UnlabelledHost,
        organ: "liver".into(),
        region: Region {
            start: [-3, 5, 7],
            size: resolved.patch,
        },
        affine: Affine::axis_aligned([2.0; 3], [-120.0, -80.5, 33.25]),
        outcome: Outcome::Accepted,
        attempts: 2,
        host_suspect: 1,
        ignored_voxels: 5,
        labels_by: "pseudo:0123".into(),
        borderline: index % 4 == 3,
        lesions: vec![LesionMeta {
            instance: 1,
            organ: "liver".into(),
            centre: [3, 11, 14],
            size: SizeClass::Small,
            contrast: ContrastBin::Bright,
            diameter_mm: 12.25,
            radii_mm: [5.0, 6.0, 7.5],
            requested_hu: 55.0,
            realised_hu: 60.0,
            gate: Some(GateScores {
                recall: 0.75,
                precision: 0.5,
                before: 0.0,
                recall_threshold: 0.5,
                precision_threshold: 0.25,
                realism_threshold: None,
            }),
            discriminator: None,
        }],
        failed: None,
        asked: None,
    }
}
