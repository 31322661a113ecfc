//! Models on disk: what is saved is what is loaded, and nothing else is.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::path::Path;

use burn::tensor::{Device, Tensor};
use freetumor::checkpoint::{
    Architecture, Bundle, Calibration, CalibrationEntry, FORMAT_VERSION, ModelManifest, Precision, Role, Thresholds,
    Weights, WeightsFile, collect, load_manifest, load_segmentor, save_model, write_atomically,
};
use freetumor::digest::Digest;
use freetumor::nn::{Adapter, ContrastOver, GeneratorConfig, UnetConfig};
use freetumor::volume::{ContrastBin, HuWindow, LabelMap, Plan, SizeClass};

fn unet(out_channels: usize) -> UnetConfig {
    UnetConfig {
        in_channels: 1,
        out_channels,
        widths: vec![4, 8],
        condition: 0,
    }
}

fn manifest(role: Role, architecture: Architecture) -> ModelManifest {
    ModelManifest {
        format_version: FORMAT_VERSION,
        role,
        architecture,
        plan: Plan::default(),
        cubes: vec![32, 48, 64, 96],
        provenance_known: false,
        training: None,
        calibration: None,
        realism: None,
        adapter: Adapter::default(),
        imported: None,
        weights: WeightsFile::default(),
    }
}

fn save_unet(folder: &Path, role: Role, out_channels: usize, precision: Precision) -> ModelManifest {
    let config = unet(out_channels);
    let weights = collect(&config.init(&Device::flex(), 1));
    save_model(folder, manifest(role, Architecture::Unet(config)), &weights, precision).unwrap()
}

fn edit(folder: &Path, role: Role, change: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join(format!("{}.json", role.name()));
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(&path, serde_json::to_vec(&json).unwrap()).unwrap();
}

fn bundle_error(folder: &Path) -> String {
    Bundle::load(folder, &Device::flex())
        .err()
        .expect("must be refused")
        .to_string()
}

/// A folder with all three models of a bundle.
fn whole_bundle() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut critic = manifest(Role::Critic, Architecture::Unet(unet(7)));
    critic.calibration = Some(Calibration {
        entries: vec![CalibrationEntry {
            organ: Some("liver".into()),
            size: None,
            contrast: None,
            lesions: 9,
            thresholds: Thresholds {
                recall: 0.4,
                precision: 0.3,
            },
        }],
        suspect_from: None,
    });
    let weights = collect(&unet(7).init(&Device::flex(), 1));
    save_model(folder.path(), critic, &weights, Precision::Single).unwrap();
    save_unet(folder.path(), Role::Discriminator, 3, Precision::Half);
    let generator = GeneratorConfig {
        widths: vec![4, 8],
        organs: 3,
        spread_hu: 30.0,
        contrast_over: ContrastOver::FullMask,
    };
    let weights = collect(&generator.init(&Device::flex(), 1));
    let manifest = manifest(Role::Generator, Architecture::Generator(generator));
    save_model(folder.path(), manifest, &weights, Precision::Half).unwrap();
    folder
}

#[test]
fn weights_survive_exactly_and_halves_to_eleven_bits() {
    let folder = tempfile::tempdir().unwrap();
    let original = collect(&unet(7).init(&Device::flex(), 1));
    for (precision, tolerance) in [(Precision::Single, 0.0), (Precision::Half, 1.0 / 2048.0)] {
        save_unet(folder.path(), Role::Segmentor, 7, precision);
        let loaded = collect(&load_segmentor(folder.path(), &Device::flex()).unwrap().model);
        let bare = |name: String| name.strip_prefix("body.Unet.").unwrap().to_string();
        let loaded: Weights = loaded.into_iter().map(|(name, weight)| (bare(name), weight)).collect();
        assert_eq!(loaded.keys().collect::<Vec<_>>(), original.keys().collect::<Vec<_>>());
        for (name, weight) in &original {
            assert_eq!(weight.shape, loaded[name].shape);
            for (a, b) in weight.values.iter().zip(&loaded[name].values) {
                assert!((a - b).abs() <= tolerance * a.abs().max(1e-4), "{name}: {a} {b}");
            }
        }
        assert_eq!(precision.rounded(original.clone()), loaded);
    }
}

#[test]
fn the_parameter_count_is_that_of_the_network() {
    let count = |weights: &freetumor::checkpoint::Weights| weights.values().map(|w| w.values.len() as u64).sum::<u64>();
    let config = UnetConfig {
        widths: vec![4, 8, 12],
        ..unet(7)
    };
    let weights = collect(&config.init(&Device::flex(), 1));
    assert_eq!(Architecture::Unet(config).parameters(), count(&weights));
    let config = GeneratorConfig {
        widths: vec![4, 8],
        organs: 3,
        spread_hu: 30.0,
        contrast_over: ContrastOver::FullMask,
    };
    let weights = collect(&config.init(&Device::flex(), 1));
    assert_eq!(Architecture::Generator(config).parameters(), count(&weights));
}

#[test]
fn a_bundle_loads_and_its_hash_follows_every_manifest() {
    let folder = whole_bundle();
    let bundle = Bundle::load(folder.path(), &Device::flex()).unwrap();
    assert!(bundle.generator.is_some() && bundle.discriminator.is_some() && !bundle.provenance.known);
    let thresholds = bundle
        .calibration
        .thresholds("liver", SizeClass::Tiny, ContrastBin::Iso)
        .unwrap();
    assert_eq!(thresholds.recall, 0.4);
    assert!(
        bundle
            .calibration
            .thresholds("kidney", SizeClass::Tiny, ContrastBin::Iso)
            .is_none()
    );
    // What the generator paints in one cube, the others cannot judge in another.
    let narrow = |role| {
        edit(folder.path(), role, |json| {
            json["cubes"] = serde_json::json!([16, 16, 16, 16])
        })
    };
    narrow(Role::Generator);
    let error = Bundle::load(folder.path(), &Device::flex()).err().unwrap().to_string();
    assert!(error.contains("cubes") && error.contains("[16, 16, 16, 16]"), "{error}");
    narrow(Role::Critic);
    narrow(Role::Discriminator);
    let other = Bundle::load(folder.path(), &Device::flex()).unwrap();
    assert_ne!(other.hash, bundle.hash);
    assert_eq!((bundle.cubes.all(), other.cubes.all()), ([32, 48, 64, 96], [16; 4]));
}

#[test]
fn a_flipped_byte_is_refused_with_file_and_both_checksums() {
    let folder = whole_bundle();
    let path = folder.path().join("generator.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = bundle_error(folder.path());
    let expected = load_manifest(folder.path(), Role::Generator).unwrap().weights.sha256;
    assert!(
        error.contains("generator.safetensors") && error.contains(&expected),
        "{error}"
    );
    assert!(error.contains("expected sha256") && error.contains("got"), "{error}");
}

#[test]
fn manifests_of_the_first_format_load_and_have_no_fingerprints() {
    let folder = whole_bundle();
    for role in [Role::Critic, Role::Generator, Role::Discriminator] {
        edit(folder.path(), role, |json| {
            json["format_version"] = 1.into();
            json["training"] = serde_json::json!({
                "case_ids": ["a"], "source_hashes": [Digest::of(b"a")], "snapshot": Digest::default(), "config": {},
                "steps": 1, "seed": 2, "metrics": {},
            });
        });
    }
    let bundle = Bundle::load(folder.path(), &Device::flex()).unwrap();
    assert_eq!(bundle.provenance.source_hashes.len(), 1);
    assert!(bundle.provenance.fingerprints.is_empty());
    // A field that is absent is not written either, so that the hash of an old bundle stays what it was.
    let manifest = load_manifest(folder.path(), Role::Critic).unwrap();
    assert!(!serde_json::to_string(&manifest).unwrap().contains("fingerprints"));
    edit(folder.path(), Role::Generator, |json| {
        json["format_version"] = 2.into();
        json["training"]["fingerprints"] = serde_json::json!(["0102", "03"]);
    });
    let bundle = Bundle::load(folder.path(), &Device::flex()).unwrap();
    assert_eq!(bundle.provenance.fingerprints.len(), 2);
    // A run that is killed between the two leaves the discriminator of the one before.
    edit(folder.path(), Role::Generator, |json| {
        json["training"]["seed"] = 3.into()
    });
    let error = bundle_error(folder.path());
    assert!(
        error.contains("discriminator.json: of another run of stage 2 (seed 2, 1 steps)") && error.contains("seed 3"),
        "{error}"
    );
}

#[test]
fn bad_manifests_are_refused_naming_the_key() {
    let cases: [(&str, serde_json::Value, &str); 6] = [
        ("/format_version", 9.into(), "format_version: expected 1 to 3, got 9"),
        ("/role", "segmentor".into(), "role: expected Critic"),
        (
            "/architecture/unet/widths",
            serde_json::json!([1000000]),
            "widths: expected 1 to 1024",
        ),
        (
            "/architecture/unet/widths",
            serde_json::json!([]),
            "widths: expected 1 to 7 levels",
        ),
        (
            "/architecture/unet/widths",
            serde_json::json!([1024, 1024, 1024]),
            "expected weights of",
        ),
        (
            "/architecture/unet/out_channels",
            5.into(),
            "expected 7 of the label map, the network has 5",
        ),
    ];
    for (pointer, value, expected) in cases {
        let folder = whole_bundle();
        edit(folder.path(), Role::Critic, |json| {
            *json.pointer_mut(pointer).unwrap() = value
        });
        let error = bundle_error(folder.path());
        assert!(
            error.contains("critic.") && error.contains(expected),
            "{pointer}: {error}"
        );
    }
    let folder = whole_bundle();
    edit(folder.path(), Role::Critic, |json| json["surprise"] = 1.into());
    assert!(bundle_error(folder.path()).contains("surprise"));
    edit(folder.path(), Role::Critic, |json| {
        json.as_object_mut().unwrap().remove("surprise");
        json["architecture"]["unet"]["widths"] = serde_json::json!([4, 12]);
    });
    // A wider network that the file could hold by its size: the tensor is named.
    let error = bundle_error(folder.path());
    assert!(error.contains("tensor down") && error.contains("expected"), "{error}");
}

#[test]
fn plans_that_differ_are_refused_by_field_and_grids_are_bridged() {
    let folder = whole_bundle();
    let bundle = Bundle::load(folder.path(), &Device::flex()).unwrap();
    let refused = |plan: Plan| bundle.check_plan(&plan).unwrap_err().to_string();
    let window_hu = HuWindow {
        low: -100.0,
        high: 240.0,
    };
    assert!(
        refused(Plan {
            window_hu,
            ..Plan::default()
        })
        .starts_with("plan field window_hu: the bundle has")
    );
    let labels: LabelMap = serde_json::from_str(r#"{"background":0,"liver":1,"liver_tumour":2}"#).unwrap();
    assert!(
        refused(Plan {
            labels,
            ..Plan::default()
        })
        .starts_with("plan field labels: ")
    );
    let coarser = Plan {
        spacing_mm: [3.0; 3],
        ..Plan::default()
    };
    assert!(bundle.check_plan(&coarser).is_ok() && !bundle.has_grid_of(&coarser));
    edit(folder.path(), Role::Discriminator, |json| {
        json["plan"]["window_hu"]["low"] = (-200.0).into();
    });
    assert!(bundle_error(folder.path()).starts_with("plan field window_hu: the critic has"));
}

#[test]
fn a_file_is_replaced_as_a_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.json");
    write_atomically(&path, b"first").unwrap();
    write_atomically(&path, b"second, longer").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"second, longer");
    // No temporary file is left, and a folder in the way leaves nothing half-written.
    let blocked = folder.path().join("blocked");
    std::fs::create_dir(&blocked).unwrap();
    let error = write_atomically(&blocked, b"x").unwrap_err().to_string();
    assert!(error.contains("blocked"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn a_patch_is_judged_alike_whatever_its_batch_mates() {
    let net = unet(7).init(&Device::flex(), 3);
    let noise = |seed| {
        let values = freetumor::rng::Rng::keyed(seed, 0, 0, freetumor::rng::Purpose::Test).normals(16 * 16 * 16);
        Tensor::<5>::from_data(
            burn::tensor::TensorData::new(values, [1, 1, 16, 16, 16]),
            &Device::flex(),
        )
    };
    let alone = net.forward(noise(1), None);
    for mate in [2, 3] {
        let together = net.forward(Tensor::cat(vec![noise(1), noise(mate) * 50.0], 0), None);
        let first = together.slice([0..1, 0..7, 0..16, 0..16, 0..16]);
        assert_eq!(first.into_data(), alone.clone().into_data());
    }
}
