//! nnU-Net's plans file as the plan of a store: its spacing and patch size, in our order of axes.
//!
//! # Source
//! nnU-Net 2.8 writes `configurations.NAME.spacing` and `patch_size` in the order of its arrays after `transpose_forward`: entry
//! i belongs to axis `transpose_forward[i]` of (z, y, x). A configuration may inherit what it does not say
//! (`inherits_from`).
//!
//! Departure: nnU-Net keeps the axes of the files, we reorient, so z is the patient's axis here and the file's third one there;
//! for axial CTs they are the same. Its normalization stays with the trainer: a store holds HU.

use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::IngestError;
use crate::volume::{MAX_PATCH_SIDE, Plan};

/// The most bytes of a plans file; real ones take some tens of thousands.
const MAX_BYTES: u64 = 16 << 20;
/// Patches are multiples of this.
const PATCH_STEP: usize = 8;
/// Configurations that inherit from each other, at most.
const MAX_PARENTS: usize = 8;

/// Returns `base` with the spacing and patch size of a configuration of nnU-Net's plans file.
///
/// Patch sides are rounded up to multiples of 8.
///
/// # Errors
/// [`IngestError::NnunetPlans`] names the file and the key, for 2-D configurations and anything but `CTNormalization` too.
pub fn apply(path: &Path, configuration: &str, base: &Plan) -> Result<Plan, IngestError> {
    let refused = |what: String| IngestError::NnunetPlans {
        path: path.into(),
        what,
    };
    let plans = read(path).map_err(refused)?;
    let plan = planned(&plans, configuration, base).map_err(refused)?;
    match plan.refusal() {
        Some(what) => Err(refused(what)),
        None => Ok(plan),
    }
}

/// Returns a whole plans file, and one of its configurations with what it inherits.
///
/// # Errors
/// [`IngestError::NnunetPlans`] names the file and the key.
pub fn configuration(path: &Path, configuration: &str) -> Result<(Value, Value), IngestError> {
    let read = || {
        let plans = read(path)?;
        let mut merged = serde_json::Map::new();
        for parent in lineage(&plans, configuration)? {
            for (key, value) in parent.as_object().into_iter().flatten() {
                merged.entry(key.clone()).or_insert_with(|| value.clone());
            }
        }
        Ok((plans, Value::Object(merged)))
    };
    read().map_err(|what| IngestError::NnunetPlans {
        path: path.into(),
        what,
    })
}

fn read(path: &Path) -> Result<Value, String> {
    let file = std::fs::File::open(path).map_err(|error| format!("cannot open: {error}"))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot read: {error}"))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("more than {MAX_BYTES} bytes"));
    }
    serde_json::from_slice(&bytes).map_err(|error| format!("not JSON: {error}"))
}

fn planned(plans: &Value, configuration: &str, base: &Plan) -> Result<Plan, String> {
    let key = |name: &str| find(plans, configuration, name);
    let schemes = key("normalization_schemes")?;
    if schemes != &serde_json::json!(["CTNormalization"]) {
        return Err(format!(
            "configurations.{configuration}.normalization_schemes: expected [\"CTNormalization\"] of one channel, got {schemes}"
        ));
    }
    let axes: [usize; 3] = three(&plans["transpose_forward"], "transpose_forward")?;
    let mut sorted = axes;
    sorted.sort_unstable();
    if sorted != [0, 1, 2] {
        return Err(format!(
            "transpose_forward: expected the axes 0, 1 and 2 in some order, got {axes:?}"
        ));
    }
    let spacing: [f64; 3] = three(key("spacing")?, "spacing")?;
    let patch: [usize; 3] = three(key("patch_size")?, "patch_size")?;
    let mut plan = base.clone();
    for (entry, axis) in axes.into_iter().enumerate() {
        plan.spacing_mm[axis] = spacing[entry];
        // No overflow: a side beyond the limit is refused by the plan.
        plan.patch[axis] = patch[entry].min(MAX_PATCH_SIDE + 1).next_multiple_of(PATCH_STEP);
    }
    Ok(plan)
}

/// Returns a key of a configuration, or of those it inherits from.
fn find<'a>(plans: &'a Value, configuration: &str, key: &str) -> Result<&'a Value, String> {
    let found = lineage(plans, configuration)?.into_iter().find_map(|of| of.get(key));
    found.ok_or(format!("configurations.{configuration}.{key}: missing"))
}

/// Returns a configuration and those it inherits from, nearest first.
fn lineage<'a>(plans: &'a Value, configuration: &str) -> Result<Vec<&'a Value>, String> {
    let (mut name, mut lineage) = (configuration, Vec::new());
    for _ in 0..MAX_PARENTS {
        let Some(found) = plans["configurations"].get(name) else {
            let known: Vec<&String> = plans["configurations"]
                .as_object()
                .into_iter()
                .flat_map(|all| all.keys())
                .collect();
            return Err(format!("configurations: expected {name:?}, it has {known:?}"));
        };
        lineage.push(found);
        match found["inherits_from"].as_str() {
            Some(parent) => name = parent,
            None => return Ok(lineage),
        }
    }
    Err(format!(
        "configurations.{configuration}: inherits from more than {MAX_PARENTS} others"
    ))
}

/// Reads three numbers.
fn three<T: serde::de::DeserializeOwned>(value: &Value, key: &str) -> Result<[T; 3], String> {
    serde_json::from_value(value.clone())
        .map_err(|_| format!("{key}: expected three numbers, of a 3-D configuration, got {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLANS: &str = r#"{
        "dataset_name": "Dataset901_Phantom", "plans_name": "nnUNetPlans",
        "transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2],
        "configurations": {
            "2d": {"normalization_schemes": ["CTNormalization"], "spacing": [0.8, 0.7], "patch_size": [512, 448]},
            "3d_lowres": {"inherits_from": "3d_fullres", "spacing": [2.0, 1.5, 1.4], "patch_size": [64, 96, 80]},
            "3d_fullres": {"normalization_schemes": ["CTNormalization"], "spacing": [3.0, 0.9, 0.7], "patch_size": [28, 128, 112]},
            "mr": {"inherits_from": "3d_fullres", "normalization_schemes": ["ZScoreNormalization"]},
            "loop": {"inherits_from": "loop"}
        }}"#;

    fn apply_text(text: &str, configuration: &str) -> Result<Plan, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nnUNetPlans.json");
        std::fs::write(&path, text).unwrap();
        apply(&path, configuration, &Plan::default()).map_err(|error| error.to_string())
    }

    #[test]
    fn spacing_and_patch_come_in_our_order() {
        let plan = apply_text(PLANS, "3d_fullres").unwrap();
        // Entry 0 of the file belongs to axis 1, y.
        assert_eq!(plan.spacing_mm, [0.9, 3.0, 0.7]);
        assert_eq!(plan.patch, [128, 32, 112]);
        assert_eq!(
            (&plan.labels, plan.window_hu),
            (&Plan::default().labels, Plan::default().window_hu)
        );
        let low = apply_text(PLANS, "3d_lowres").unwrap();
        assert_eq!((low.spacing_mm, low.patch), ([1.5, 2.0, 1.4], [96, 64, 80]));
    }

    #[test]
    fn what_cannot_be_a_store_is_refused_by_key() {
        let refused = |text: &str, configuration: &str| apply_text(text, configuration).unwrap_err();
        assert!(refused(PLANS, "2d").contains("nnUNetPlans.json: spacing: expected three numbers"));
        assert!(refused(PLANS, "3d_cascade").contains("3d_fullres"));
        assert!(refused(PLANS, "mr").contains("normalization_schemes"));
        assert!(refused(PLANS, "loop").contains("inherits from more than 8"));
        assert!(refused("{", "2d").contains("not JSON"));
        assert!(refused(&PLANS.replace("[1, 0, 2]", "[1, 1, 2]"), "3d_fullres").contains("transpose_forward"));
        assert!(refused(&PLANS.replace("128, 112", "128, 18446744073709551615"), "3d_fullres").contains("plan.patch"));
        assert!(refused(&PLANS.replace("3.0, 0.9", "3.0, 0.0009"), "3d_fullres").contains("plan.spacing_mm"));
    }
}
