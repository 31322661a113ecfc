//! A patch service that makes each patch from its index alone and ends its streams every few batches.

use std::collections::BTreeMap;
use std::sync::Arc;

use freetumor::digest::Digest;
use freetumor::rng::{Purpose, Rng};
use freetumor::sampler::Pool;
use freetumor::stream::delivery::Delivery;
use freetumor::stream::patch::{Outcome, PatchMeta, StreamedPatch};
use freetumor::stream::recipe::{REVISION, Recipe};
use freetumor::stream::{Batch, PatchService, PatchStream, Resolved, StreamError};
use freetumor::volume::{Affine, IGNORE, Plan, Region};
use ndarray::Array3;

pub struct ToyService(pub Plan);

struct ToyStream {
    recipe: Arc<Resolved>,
    next: u64,
    batch_size: u64,
    left: u64,
}

impl PatchService for ToyService {
    fn plan(&self) -> &Plan {
        &self.0
    }

    fn resolve(&self, recipe: Recipe) -> Result<Arc<Resolved>, StreamError> {
        Ok(Arc::new(Resolved {
            hash: recipe.hash(),
            recipe,
            snapshot: Digest::default(),
            bundle: Digest::default(),
            models: None,
            revision: REVISION,
            patches_per_epoch: 8,
            patch: [16; 3],
            labels: self.0.labels.clone(),
            feasible: BTreeMap::new(),
            shortfall: Vec::new(),
            numerics: "toy".into(),
        }))
    }

    fn open(&self, recipe: &Arc<Resolved>, delivery: &Delivery) -> Result<Box<dyn PatchStream>, StreamError> {
        Ok(Box::new(ToyStream {
            recipe: recipe.clone(),
            next: delivery.from,
            batch_size: u64::from(delivery.batch_size),
            left: 4,
        }))
    }
}

impl PatchStream for ToyStream {
    fn next_batch(&mut self) -> Option<Result<Batch, StreamError>> {
        self.left = self.left.checked_sub(1)?;
        let patches = (self.next..self.next + self.batch_size)
            .map(|index| Arc::new(patch(index)))
            .collect();
        self.next += self.batch_size;
        Some(Ok(Batch {
            step: self.next / self.batch_size - 1,
            patches,
            reused: Vec::new(),
            shape: [16; 3],
            next: self.recipe.cursor(self.next),
        }))
    }

    fn batches(&self) -> u64 {
        4
    }
}

/// Liver below a random height with a tumour in its corner; one layer is ignored.
fn patch(index: u64) -> StreamedPatch {
    let mut rng = Rng::keyed(index, 0, 0, Purpose::Test);
    let height = 4 + rng.below(8);
    let truth = Array3::from_shape_fn((16, 16, 16), |(z, y, x)| match (z < height, y < 5 && x < 5) {
        (false, _) => 0_u8,
        (true, false) => 1,
        (true, true) => 2,
    });
    let image = truth.mapv(|label| [-80, 100, 40][usize::from(label)] + rng.below(20) as i16);
    let mut label = truth;
    label.slice_mut(ndarray::s![0, .., ..]).fill(IGNORE);
    StreamedPatch {
        meta: PatchMeta {
            index,
            case: "case_000".into(),
            pool: Pool::LabelledReal,
            organ: "liver".into(),
            region: Region::whole([16; 3]),
            affine: Affine::axis_aligned([1.5; 3], [0.0; 3]),
            outcome: if index.is_multiple_of(2) {
                Outcome::Accepted
            } else {
                Outcome::Real
            },
            attempts: 1,
            host_suspect: 0,
            ignored_voxels: 0,
            labels_by: String::new(),
            borderline: false,
            lesions: Vec::new(),
            failed: None,
            asked: None,
        },
        source: image.clone(),
        soft_mask: Array3::zeros((16, 16, 16)),
        lesion_instance: Array3::zeros((16, 16, 16)),
        undecided: None,
        encoded: freetumor::stream::encoded::Encoded::default(),
        image,
        label,
    }
}
