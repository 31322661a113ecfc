//! The recipe: everything that decides what a stream holds, and its hash.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::negatives::UnlabelledNegatives;
use crate::digest::Digest;
use crate::lesion::LesionForm;
use crate::sampler::{Augmentation, Centre, Pool};
use crate::synth::{GateRule, GateSettings, SynthesizerKind};
use crate::volume::{ContrastBin, MAX_PATCH_SIDE, Plan, Shape, SizeClass};

/// Raised on any change to the bytes that a recipe and an index stand for.
pub const REVISION: u32 = 8;

/// The longest side of a patch that is warped.
const MAX_WARPED_SIDE: usize = 192;

/// What a client gets when no attempt passes the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Fallback {
    /// The untouched host patch.
    #[default]
    Healthy,
    /// A patch of the labelled-real pool, cut as `centres` says.
    Real,
    /// The attempt with the best gate score.
    Best,
}

/// Which cases may appear.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Selection {
    /// Only these cases; all where absent.
    pub cases: Option<Vec<String>>,
    /// Never these cases, nor the same scans under other ids, nor near-duplicates of them: the fold's validation set.
    pub hold_out: Vec<String>,
    /// Never scans of these source hashes, whether the store has them or not, nor near-duplicates of those it has; models that
    /// were trained on one are refused.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hold_out_hashes: Vec<Digest>,
}

/// Everything that decides a stream's content; with snapshot, bundle, revision and index it fixes every byte (P1).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// The seed of every random choice.
    pub seed: u64,
    /// The models, by name or hash as `GET /v1/models` lists them; absent: the active ones. A coordinate of its own: it is
    /// not part of the hash, and the resolved recipe carries it beside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bundle: Option<String>,
    /// What synthesizes lesions; absent: that of the models' generator, or `analytic` where they hold none.
    pub synthesizer: Option<SynthesizerKind>,
    /// Which cases may appear.
    pub select: Selection,
    /// Shares of the pools; a pool that the store cannot fill is refused where its share is above 0 and it was named
    /// by the client. Absent: `labelled_real` 1, hosts 1 each, of those that exist.
    pub pools: Option<BTreeMap<Pool, f64>>,
    /// Shares of the organs; absent: all that the store can host, equally.
    pub organs: Option<BTreeMap<String, f64>>,
    /// Shares of the size classes.
    pub sizes: BTreeMap<SizeClass, f64>,
    /// Shares of the contrast bins.
    pub contrasts: BTreeMap<ContrastBin, f64>,
    /// Shares of what patches of the labelled-real pool show in their middle half. nnU-Net's foreground oversampling is
    /// `{"tumour": 0.33, "anywhere": 0.67}`.
    pub centres: BTreeMap<Centre, f64>,
    /// How many patches of an organ are taken from a volume, one after the other, before the next one's turn comes; more
    /// than one for disks that are slow to find a volume.
    pub patches_per_visit: u32,
    /// A lesion's form.
    pub lesion: LesionForm,
    /// Random changes after synthesis.
    pub augment: Augmentation,
    /// The gate.
    pub gate: GateSettings,
    /// What a client gets when no attempt passes.
    pub fallback: Fallback,
    /// What a hidden tumour in an unlabelled host means; absent: `critic` where models are loaded and an unlabelled host
    /// can be served, else `trust`.
    pub unlabelled_negatives: Option<UnlabelledNegatives>,
    /// Patch size (z, y, x) in voxels; absent: the plan's.
    pub patch: Option<Shape>,
    /// Indices in an epoch; absent: the size of the hosts' pool.
    pub patches_per_epoch: Option<u64>,
    /// Whether models that do not say what they were trained on may serve a recipe that holds cases out.
    pub allow_unknown_provenance: bool,
}

impl Default for Recipe {
    fn default() -> Self {
        use {ContrastBin as C, SizeClass as S};
        Self {
            seed: 0,
            bundle: None,
            synthesizer: None,
            select: Selection::default(),
            pools: None,
            organs: None,
            sizes: BTreeMap::from([(S::Tiny, 0.25), (S::Small, 0.35), (S::Medium, 0.35), (S::Large, 0.05)]),
            contrasts: BTreeMap::from([(C::Dark, 0.4), (C::Dim, 0.35), (C::Iso, 0.1), (C::Bright, 0.15)]),
            centres: BTreeMap::from([(Centre::Tumour, 0.5), (Centre::Organ, 0.5)]),
            patches_per_visit: 1,
            lesion: LesionForm::default(),
            augment: Augmentation::default(),
            gate: GateSettings::default(),
            fallback: Fallback::default(),
            unlabelled_negatives: None,
            patch: None,
            patches_per_epoch: None,
            allow_unknown_provenance: false,
        }
    }
}

/// A field outside its range.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[error("recipe field {field}: expected {expected}, got {got}")]
pub struct RecipeError {
    /// The field's path in the recipe.
    pub field: String,
    /// The allowed range.
    pub expected: String,
    /// What was found.
    pub got: String,
}

fn check(field: &str, ok: bool, expected: &str, got: impl std::fmt::Debug) -> Result<(), RecipeError> {
    if ok {
        return Ok(());
    }
    Err(RecipeError {
        field: field.into(),
        expected: expected.into(),
        got: shortened(&got),
    })
}

/// Returns a value's text, at most 200 characters of it: clients may send a megabyte.
fn shortened(got: &impl std::fmt::Debug) -> String {
    let text = format!("{got:?}");
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn check_shares<K: std::fmt::Debug>(field: &str, shares: &BTreeMap<K, f64>) -> Result<(), RecipeError> {
    let ok =
        shares.values().all(|share| share.is_finite() && *share >= 0.0) && shares.values().any(|share| *share > 0.0);
    check(field, ok, "shares of at least 0, one of them above 0", shares)
}

impl Recipe {
    /// Checks every field that can be checked without a store.
    ///
    /// # Errors
    /// [`RecipeError`] names the field, its range and what it holds.
    pub fn validate(&self) -> Result<(), RecipeError> {
        let unit = |field: &str, value: f64| check(field, (0.0..=1.0).contains(&value), "0 to 1", value);
        unit("gate.recall", self.gate.recall)?;
        unit("gate.precision", self.gate.precision)?;
        unit("gate.realism", self.gate.realism)?;
        check(
            "gate.realism",
            self.gate.realism == 0.0 || self.gate.rule != GateRule::Published,
            "0 with the rule published",
            self.gate.realism,
        )?;
        check("gate.retries", self.gate.retries <= 15, "0 to 15", self.gate.retries)?;
        check_shares("sizes", &self.sizes)?;
        check_shares("contrasts", &self.contrasts)?;
        check_shares("centres", &self.centres)?;
        let visits = self.patches_per_visit;
        check("patches_per_visit", (1..=256).contains(&visits), "1 to 256", visits)?;
        self.pools
            .as_ref()
            .map_or(Ok(()), |pools| check_shares("pools", pools))?;
        self.organs
            .as_ref()
            .map_or(Ok(()), |organs| check_shares("organs", organs))?;
        self.check_augment()?;
        for (field, ok, expected, got) in self.lesion.ranges() {
            check(&format!("lesion.{field}"), ok, expected, got)?;
        }
        if let Some(patch) = self.patch {
            let ok = patch
                .iter()
                .all(|side| (16..=MAX_PATCH_SIDE).contains(side) && side % 8 == 0);
            check(
                "patch",
                ok,
                &format!("multiples of 8 from 16 to {MAX_PATCH_SIDE}"),
                patch,
            )?;
        }
        self.patches_per_epoch.map_or(Ok(()), |epoch| {
            check("patches_per_epoch", (1..=1 << 40).contains(&epoch), "1 to 2^40", epoch)
        })
    }

    fn check_augment(&self) -> Result<(), RecipeError> {
        let unit = |field: &str, value: f64| check(field, (0.0..=1.0).contains(&value), "0 to 1", value);
        self.augment.flip.iter().try_for_each(|p| unit("augment.flip", *p))?;
        unit("augment.rotate90", self.augment.rotate90)?;
        unit("augment.intensity", self.augment.intensity)?;
        check(
            "augment.scale",
            (0.0..=0.5).contains(&self.augment.scale),
            "0 to 0.5",
            self.augment.scale,
        )?;
        check(
            "augment.shift_hu",
            (0.0..=500.0).contains(&self.augment.shift_hu),
            "0 to 500",
            self.augment.shift_hu,
        )?;
        unit("augment.blur", self.augment.blur)?;
        let noise = self.augment.noise_hu;
        check("augment.noise_hu", (0.0..=200.0).contains(&noise), "0 to 200", noise)?;
        self.check_warp()
    }

    fn check_warp(&self) -> Result<(), RecipeError> {
        let warp = &self.augment;
        check("augment.warp", (0.0..=1.0).contains(&warp.warp), "0 to 1", warp.warp)?;
        let degrees = warp.rotation_deg;
        check(
            "augment.rotation_deg",
            (0.0..=30.0).contains(&degrees),
            "0 to 30",
            degrees,
        )?;
        check("augment.zoom", (1.0..=1.4).contains(&warp.zoom), "1 to 1.4", warp.zoom)?;
        let elastic = warp.elastic_mm;
        check("augment.elastic_mm", (0.0..=6.0).contains(&elastic), "0 to 6", elastic)?;
        // The box that a warp reads is larger still, see `resolve`.
        let fits = |patch: Shape| warp.warp == 0.0 || patch.iter().all(|side| *side <= MAX_WARPED_SIDE);
        let expected = format!("at most {MAX_WARPED_SIDE} voxels a side where augment.warp is above 0");
        self.patch
            .map_or(Ok(()), |patch| check("patch", fits(patch), &expected, patch))
    }

    /// Returns the patch size that streams of this recipe have.
    pub fn patch(&self, plan: &Plan) -> Shape {
        self.patch.unwrap_or(plan.patch)
    }

    /// Returns the hash of the canonical form. Call it on a resolved recipe (see `Streams::resolve`): absent fields and
    /// their defaults are then the same recipe.
    pub fn hash(&self) -> Digest {
        Digest::of_json(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_and_bad_ranges_are_named() {
        let error = serde_json::from_str::<Recipe>(r#"{"sed": 1}"#).unwrap_err().to_string();
        assert!(error.contains("unknown field `sed`"), "{error}");
        let recipe: Recipe = serde_json::from_str(r#"{"gate": {"recall": 2.0}}"#).unwrap();
        assert_eq!(
            recipe.validate().unwrap_err().to_string(),
            "recipe field gate.recall: expected 0 to 1, got 2.0"
        );
        let recipe: Recipe = serde_json::from_str(r#"{"patch": [4096, 64, 64]}"#).unwrap();
        assert_eq!(recipe.validate().unwrap_err().field, "patch");
    }

    #[test]
    fn defaults_are_valid_and_hash_alike() {
        let spelled: Recipe = serde_json::from_str(r#"{"seed": 0, "fallback": "healthy"}"#).unwrap();
        assert!(spelled.validate().is_ok());
        assert_eq!(spelled.hash(), Recipe::default().hash());
        assert_ne!(
            Recipe {
                seed: 1,
                ..Recipe::default()
            }
            .hash(),
            spelled.hash()
        );
    }
}
