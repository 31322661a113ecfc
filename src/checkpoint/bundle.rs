//! Critic, generator and discriminator that belong together.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Device;

use super::load::{AnyGenerator, load_discriminator, load_generator, load_network};
use super::{Calibration, CheckpointError, ModelManifest, Realism, Role, check_plan, check_spacing};
use crate::digest::Digest;
use crate::kernel::ComputeDtype;
use crate::nn::{CubeSides, Generator, Network, Published, Unet};
use crate::volume::{Fingerprint, Plan};

/// What a model was trained on.
#[derive(Clone, Debug, Default)]
pub struct Provenance {
    /// Whether the training set is known at all; imported models may not say.
    pub known: bool,
    /// The `source_hash` of every training case.
    pub source_hashes: BTreeSet<Digest>,
    /// Their fingerprints, as far as they are known: older manifests do not have them.
    pub fingerprints: BTreeSet<Fingerprint>,
}

/// Returns the folder, in that of a bundle, of the critic of an inner fold.
pub fn inner_folder(fold: usize) -> String {
    format!("inner-{fold}")
}

/// The most inner folds that are looked for.
const MAX_INNER: usize = 20;

/// A critic that learnt from some of the cases that the bundle's own learnt from.
pub struct InnerCritic {
    /// What it learnt from.
    pub seen: Provenance,
    /// The network.
    pub critic: Network,
}

/// Critic, generator and discriminator that belong together, on a device.
pub struct Bundle {
    /// BLAKE3 over the manifests, which hold the weights' checksums.
    pub hash: Digest,
    /// The grid, labels and window they were trained on.
    pub plan: Plan,
    /// Sides of the cubes in which they look at lesions.
    pub cubes: CubeSides,
    /// The frozen stage-1 segmentor: classes as in the plan's label map.
    pub critic: Network,
    /// What the critic learnt from.
    pub critic_seen: Provenance,
    /// Critics of inner folds.
    pub inner: Vec<InnerCritic>,
    /// Stage 2's generator.
    pub generator: Option<Generator>,
    /// The published generator, where the bundle has it instead.
    pub published: Option<Published>,
    /// Stage 2's voxel-wise discriminator: logits for 0 background, 1 real tumour, 2 synthetic tumour.
    pub discriminator: Option<Unet>,
    /// The gate's thresholds, and the levels from which tissue is suspect.
    pub calibration: Calibration,
    /// How real the discriminator finds real lesions.
    pub realism: Option<Realism>,
    /// What any of them was trained on.
    pub provenance: Arc<Provenance>,
}

impl Bundle {
    /// Loads a folder with a critic and, where present, a generator and a discriminator.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file, or the field in which the models differ.
    pub fn load(folder: &Path, device: &Device) -> Result<Self, CheckpointError> {
        let has = |role: Role| folder.join(format!("{}.json", role.name())).exists();
        let critic = load_network(folder, Role::Critic, device)?;
        let generator = has(Role::Generator)
            .then(|| load_generator(folder, device))
            .transpose()?;
        let discriminator = has(Role::Discriminator)
            .then(|| load_discriminator(folder, device))
            .transpose()?;
        let inner = (0..MAX_INNER)
            .map(|fold| folder.join(inner_folder(fold)))
            .take_while(|folder| folder.join("critic.json").exists())
            .map(|folder| load_network(&folder, Role::Critic, device))
            .collect::<Result<Vec<_>, _>>()?;
        let others = generator.iter().map(|loaded| &loaded.manifest);
        let others = others.chain(inner.iter().map(|loaded| &loaded.manifest));
        let others = others.chain(discriminator.iter().map(|loaded| &loaded.manifest));
        let mut manifests = vec![&critic.manifest];
        for manifest in others {
            check_plan(
                ("the critic", &critic.manifest.plan),
                (manifest.role.name(), &manifest.plan),
            )?;
            check_grid(&critic.manifest, manifest)?;
            let sides = CubeSides::of_manifest(&manifest.cubes);
            sides.map_or(Ok(()), |sides| {
                check_cubes(cubes_of(&critic.manifest), (manifest.role.name(), sides))
            })?;
            manifests.push(manifest);
        }
        if let (Some(generator), Some(discriminator)) = (&generator, &discriminator) {
            check_run(folder, [&generator.manifest, &discriminator.manifest])?;
        }
        let hash = Digest::of_json(&manifests);
        let provenance = Arc::new(Provenance::of(&manifests));
        let (generator, published) = match generator.map(|loaded| loaded.model) {
            Some(AnyGenerator::Conditional(generator)) => (Some(generator), None),
            Some(AnyGenerator::Published(generator)) => (None, Some(generator)),
            None => (None, None),
        };
        Ok(Self {
            hash,
            plan: critic.manifest.plan.clone(),
            cubes: cubes_of(&critic.manifest),
            provenance,
            calibration: critic.manifest.calibration.clone().unwrap_or_default(),
            critic_seen: Provenance::of(&[&critic.manifest]),
            critic: critic.model,
            inner: inner
                .into_iter()
                .map(|loaded| InnerCritic {
                    seen: Provenance::of(&[&loaded.manifest]),
                    critic: loaded.model,
                })
                .collect(),
            generator,
            published,
            realism: discriminator
                .as_ref()
                .and_then(|loaded| loaded.manifest.realism.clone()),
            discriminator: discriminator.map(|loaded| loaded.model),
        })
    }

    /// Loads the critic of a folder alone, whatever else the folder holds.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file.
    pub fn load_critic(folder: &Path, device: &Device) -> Result<Self, CheckpointError> {
        let critic = load_network(folder, Role::Critic, device)?;
        let manifests = [&critic.manifest];
        Ok(Self {
            hash: Digest::of_json(&manifests),
            plan: critic.manifest.plan.clone(),
            cubes: cubes_of(&critic.manifest),
            provenance: Arc::new(Provenance::of(&manifests)),
            calibration: critic.manifest.calibration.clone().unwrap_or_default(),
            critic_seen: Provenance::of(&[&critic.manifest]),
            critic: critic.model,
            inner: Vec::new(),
            generator: None,
            published: None,
            discriminator: None,
            realism: None,
        })
    }

    /// Computes in another type; the weights stay what they are.
    pub fn with_compute_dtype(self, dtype: ComputeDtype) -> Self {
        Self {
            critic: self.critic.with_compute_dtype(dtype),
            inner: self
                .inner
                .into_iter()
                .map(|inner| InnerCritic {
                    critic: inner.critic.with_compute_dtype(dtype),
                    ..inner
                })
                .collect(),
            generator: self.generator.map(|net| net.with_compute_dtype(dtype)),
            published: self.published.map(|net| net.with_compute_dtype(dtype)),
            discriminator: self.discriminator.map(|net| net.with_compute_dtype(dtype)),
            ..self
        }
    }

    /// Returns the bundle's own critic, or that of an inner fold.
    pub fn critic_of(&self, judge: Option<usize>) -> &Network {
        judge.map_or(&self.critic, |fold| &self.inner[fold].critic)
    }

    /// Returns where its models live.
    pub fn device(&self) -> Device {
        self.critic.devices().into_iter().next().unwrap_or_default()
    }

    /// Returns the class of results that are equal bit for bit, see [`ComputeDtype::numerics`].
    pub fn numerics(&self) -> String {
        self.compute_dtype().numerics(&self.device())
    }

    /// Returns the least precise of what its networks compute in: some know single precision alone, whatever the others do.
    fn compute_dtype(&self) -> ComputeDtype {
        let critics = self.inner.iter().map(|inner| inner.critic.compute_dtype());
        let others = [
            Some(self.critic.compute_dtype()),
            self.generator.as_ref().map(Generator::compute_dtype),
            self.published.as_ref().map(Published::compute_dtype),
            self.discriminator.as_ref().map(Unet::compute_dtype),
        ];
        let mut all = critics.chain(others.into_iter().flatten());
        if all.any(|dtype| dtype == ComputeDtype::Bf16) {
            ComputeDtype::Bf16
        } else {
            ComputeDtype::F32
        }
    }

    /// Checks that the models may work on a store.
    ///
    /// # Errors
    /// [`CheckpointError::PlanMismatch`] where labels or window differ; a different grid is bridged, see
    /// [`Self::has_grid_of`].
    pub fn check_plan(&self, store: &Plan) -> Result<(), CheckpointError> {
        check_plan(("the bundle", &self.plan), ("the store", store))
    }

    /// Refuses to train beside the critic what it could not be loaded with: on voxels of another size, or in cubes of other sides.
    ///
    /// # Errors
    /// [`CheckpointError::PlanMismatch`] names the field.
    pub fn check_companion(&self, store: &Plan, max_cube: usize) -> Result<(), CheckpointError> {
        self.check_plan(store)?;
        check_spacing(("the critic", &self.plan), ("the store", store))?;
        let cubes = CubeSides::up_to(max_cube);
        check_cubes(self.cubes, (&format!("max_cube = {max_cube}"), cubes))
    }

    /// Tells whether the models' voxels are the store's, so that nothing needs resampling.
    pub fn has_grid_of(&self, store: &Plan) -> bool {
        self.plan.spacing_mm == store.spacing_mm
    }
}

impl Provenance {
    /// Joins what several models were trained on; known only where all of them say.
    pub fn of(manifests: &[&ModelManifest]) -> Self {
        let trainings = || manifests.iter().filter_map(|manifest| manifest.training.as_ref());
        Self {
            known: manifests.iter().all(|manifest| manifest.provenance_known),
            source_hashes: trainings().flat_map(|t| t.source_hashes.iter().copied()).collect(),
            fingerprints: trainings().flat_map(|t| t.fingerprints.iter().cloned()).collect(),
        }
    }
}

/// Returns the sides of a critic's cubes. An imported one was trained on patches, and is shown the default cubes.
fn cubes_of(critic: &ModelManifest) -> CubeSides {
    CubeSides::of_manifest(&critic.cubes).unwrap_or_default()
}

/// Within a bundle a lesion's cube is one and the same for all: what the generator paints, the others judge.
fn check_cubes(critic: CubeSides, (name, other): (&str, CubeSides)) -> Result<(), CheckpointError> {
    if critic == other {
        return Ok(());
    }
    Err(CheckpointError::PlanMismatch {
        field: "cubes",
        left_name: "the critic".into(),
        left: format!("{:?}", critic.all()),
        right_name: name.into(),
        right: format!("{:?}", other.all()),
    })
}

/// A generator and a discriminator come of one run: one that a killed save or a copy left beside another's has never seen its lesions.
fn check_run(folder: &Path, [generator, discriminator]: [&ModelManifest; 2]) -> Result<(), CheckpointError> {
    let (Some(one), Some(other)) = (&generator.training, &discriminator.training) else {
        return Ok(());
    };
    let is_same = (one.snapshot, one.seed, one.steps) == (other.snapshot, other.seed, other.steps)
        && (&one.config, &one.metrics) == (&other.config, &other.metrics);
    if is_same {
        return Ok(());
    }
    Err(CheckpointError::Invalid {
        path: folder.join("discriminator.json"),
        what: format!(
            "of another run of stage 2 (seed {}, {} steps) than the generator beside it (seed {}, {} steps); resume the run that was \
             cut short, or take both from one folder",
            other.seed, other.steps, one.seed, one.steps
        ),
    })
}

/// Within a bundle voxels must be of one size: the generator's cube goes to the critic as it is.
fn check_grid(critic: &ModelManifest, other: &ModelManifest) -> Result<(), CheckpointError> {
    if critic.plan.spacing_mm == other.plan.spacing_mm {
        return Ok(());
    }
    Err(CheckpointError::PlanMismatch {
        field: "spacing_mm",
        left_name: "the critic".into(),
        left: format!("{:?}", critic.plan.spacing_mm),
        right_name: other.role.name().into(),
        right: format!("{:?}", other.plan.spacing_mm),
    })
}
