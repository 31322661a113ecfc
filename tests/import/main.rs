//! Networks of PyTorch, MONAI and nnU-Net: what they saved is read, and computes what they computed
//! (`golden/import/make.py`).

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

#[path = "../common/formula.rs"]
mod formula;
#[path = "../common/golden.rs"]
mod golden;
#[path = "../common/npz.rs"]
mod npz;
mod refusals;
#[path = "../support/mod.rs"]
mod support;
mod written;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use freetumor::checkpoint::{
    Architecture, Bundle, ImportRequest, ModelManifest, NnunetPlans, Precision, Role, Weight, Weights, collect, fill,
    import_pytorch, load_segmentor, save_model, source_name,
};
use freetumor::ingest::nnunet_plans;
use freetumor::nn::{Encoder, Merging, OutputActivation, PublishedConfig, SwinUnetr, SwinUnetrConfig};
use freetumor::volume::{LabelMap, Plan};
use golden::{Golden, numbers, tensor};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/import")
}

fn read(path: &Path) -> Golden {
    golden::read(&std::fs::read(path).unwrap())
}

fn image(golden: &Golden) -> Tensor<5> {
    tensor(golden, "x", &Device::flex())
}

/// Asserts that the largest difference is at most so many standard deviations of what is expected.
#[track_caller]
#[expect(clippy::print_stdout, reason = "`--nocapture` shows what docs/import.md reports")]
fn assert_near(name: &str, got: &[f32], expected: &[f32], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let count = expected.len() as f64;
    let mean = expected.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
    let sd = (expected.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / count).sqrt();
    let off = got
        .iter()
        .zip(expected)
        .map(|(a, b)| f64::from((a - b).abs()))
        .fold(0.0, f64::max);
    println!("{name}: {:.1e} of the standard deviation", off / sd);
    assert!(
        off <= tolerance * sd,
        "{name}: off by {off:e}, standard deviation {sd:e}"
    );
}

/// Keeps every `step`-th voxel, as the golden files do.
fn thinned(x: &Tensor<5>, step: usize) -> Vec<f32> {
    let [_, _, d, h, w] = x.dims();
    let pick = |x: Tensor<5>, axis: usize, length: usize| {
        let at: Vec<i32> = (0..length).step_by(step).map(|i| i as i32).collect();
        let count = at.len();
        x.select(axis, Tensor::from_data(TensorData::new(at, [count]), &Device::flex()))
    };
    numbers(pick(pick(pick(x.clone(), 2, d), 3, h), 4, w))
}

fn request<'a>(role: Role, plan: &'a Plan, nnunet: Option<&'a NnunetPlans>) -> ImportRequest<'a> {
    ImportRequest {
        role,
        plan,
        classes: None,
        merging: Merging::Released,
        strides: None,
        activation: OutputActivation::Tanh,
        nnunet,
    }
}

fn three_classes() -> LabelMap {
    let ids = [("background", 0), ("liver", 1), ("liver_tumour", 2)];
    BTreeMap::from(ids.map(|(name, id)| (name.to_string(), id)))
        .try_into()
        .unwrap()
}

fn nnunet(folder: &Path, name: &str) -> NnunetPlans {
    let path = folder.join(format!("{name}.plans.json"));
    let (plans, configuration) = nnunet_plans::configuration(&path, "3d_fullres").unwrap();
    let dataset = serde_json::from_slice(&std::fs::read(folder.join("dataset.json")).unwrap()).unwrap();
    NnunetPlans::parse(&configuration, &plans, &dataset).unwrap()
}

fn import_nnunet(folder: &Path, name: &str, plan: &Plan) -> (ModelManifest, Weights) {
    let plans = nnunet(folder, name);
    let file = folder.join(format!("{name}.pth"));
    import_pytorch(&file, &request(Role::Segmentor, plan, Some(&plans))).unwrap()
}

/// Checks the logits of every resolution, and those of the model as it is loaded again and asked in our axes and units.
fn check_nnunet(folder: &Path, name: &str, encoder: Encoder) {
    let golden = read(&folder.join(format!("{name}.safetensors")));
    let plan = Plan {
        labels: three_classes(),
        ..Plan::default()
    };
    let (manifest, weights) = import_nnunet(folder, name, &plan);
    let Architecture::Nnunet(config) = &manifest.architecture else {
        panic!("{:?}", manifest.architecture);
    };
    assert_eq!(config.encoder, encoder);
    // In f32 counts above 2^24 are rounded to even.
    assert!((manifest.architecture.parameters() as f32 - golden["parameters"].1[0]).abs() <= 4.0);
    let device = Device::flex();
    let net = fill(config.init(&device, 0), weights.clone()).unwrap();
    assert_eq!(net.num_params() as u64, manifest.architecture.parameters());
    let hu = image(&golden) * 425.0 - 175.0;
    let standard = (hu.clamp(-97.0, 214.0) - 61.5) / 43.25;
    for (i, logits) in net.forward_deep(standard).into_iter().enumerate() {
        let layer = format!("logits{i}");
        // f32 sums in another order: measured up to 6e-6 of a standard deviation in the small networks.
        assert_near(&format!("{name} {layer}"), &numbers(logits), &golden[&layer].1, 1e-4);
    }

    let saved = tempfile::tempdir().unwrap();
    save_model(saved.path(), manifest, &weights, Precision::Single).unwrap();
    let loaded = load_segmentor(saved.path(), &device).unwrap();
    assert!(!loaded.manifest.provenance_known && loaded.manifest.training.is_none());
    // The plans turn the first two axes: [1, 0, 2].
    let ours = loaded.model.forward(image(&golden).swap_dims(2, 3));
    assert_near(
        &format!("{name} reloaded"),
        &numbers(ours.swap_dims(2, 3)),
        &golden["logits0"].1,
        1e-4,
    );
}

#[test]
fn nnunet_checkpoints_compute_what_nnunet_computes() {
    check_nnunet(&folder(), "plain", Encoder::Plain);
    check_nnunet(&folder(), "residual", Encoder::Residual);
}

#[test]
fn what_an_nnunet_checkpoint_says_of_itself_is_kept() {
    let plan = Plan {
        labels: three_classes(),
        ..Plan::default()
    };
    let (manifest, _) = import_nnunet(&folder(), "plain", &plan);
    let imported = manifest.imported.unwrap();
    let note = |key: &str| imported.notes.get(key).map(String::as_str);
    assert_eq!(imported.file, "plain.pth");
    assert_eq!(imported.sha256.len(), 64);
    let expected = (Some("nnUNetTrainer"), Some("3d_fullres"), Some("0"));
    assert_eq!((note("trainer_name"), note("configuration"), note("fold")), expected);
}

#[test]
fn monai_unets_compute_what_monai_computes() {
    let plan = Plan {
        labels: three_classes(),
        ..Plan::default()
    };
    let cases: [(&str, Option<&[usize]>); 4] = [
        ("monai_residual", None),
        ("monai_residual", Some(&[2, 2])),
        ("monai_plain", None),
        ("monai_strides", Some(&[1, 2])),
    ];
    for (name, strides) in cases {
        let golden = read(&folder().join(format!("{name}.safetensors")));
        let file = folder().join(format!("{name}.pt"));
        let request = ImportRequest {
            strides,
            ..request(Role::Segmentor, &plan, None)
        };
        let (manifest, weights) = import_pytorch(&file, &request).unwrap();
        assert_eq!(manifest.architecture.parameters() as f32, golden["parameters"].1[0]);
        let saved = tempfile::tempdir().unwrap();
        save_model(saved.path(), manifest, &weights, Precision::Single).unwrap();
        let net = load_segmentor(saved.path(), &Device::flex()).unwrap().model;
        assert_near(name, &numbers(net.forward(image(&golden))), &golden["logits"].1, 1e-4);
    }
}

/// Fills a SwinUNETR with weights that follow from MONAI's names, under a prefix.
fn swin(config: &SwinUnetrConfig, prefix: &str) -> SwinUnetr {
    let net = config.init(&Device::flex(), 1);
    let architecture = Architecture::SwinUnetr(config.clone());
    let named = collect(&net).into_iter().map(|(name, Weight { shape, .. })| {
        let values = formula::values(&format!("{prefix}{}", source_name(&architecture, &name)), &shape);
        (name, Weight { shape, values })
    });
    let weights: Weights = named.collect();
    fill(net, weights).unwrap()
}

/// Runs a SwinUNETR and compares every layer with MONAI's; `thin` is the script's.
fn check_swin(net: &SwinUnetr, x: Tensor<5>, golden: &Golden, thin: usize) {
    let mut layers = 0;
    let mut compare = |name: &str, y: &Tensor<5>| {
        let step = match y.dims()[4] {
            ..=4 => 1,
            5..=8 => thin.min(3),
            _ => thin,
        };
        // f32 sums in another order, through attention and eleven blocks: measured up to 1e-4 of a standard deviation
        // in encoder10, whose norms see eight voxels, and up to 8e-5 elsewhere. The wrong merging is off by 0.3.
        assert_near(name, &thinned(y, step), &golden[name].1, 5e-4);
        layers += 1;
    };
    let logits = net.forward_seen(x, &mut compare);
    compare("logits", &logits);
    assert_eq!(layers, 16);
}

#[test]
fn swin_unetr_computes_what_monai_computes_layer_by_layer() {
    let golden = read(&folder().join("swin_unetr.safetensors"));
    let config = SwinUnetrConfig {
        feature_size: 12,
        merging: Merging::Corrected,
        ..SwinUnetrConfig::published(3)
    };
    let x: Vec<f32> = formula::values("x", &[64 * 64 * 64])
        .iter()
        .map(|v| v * 5.0 + 0.5)
        .collect();
    let x = Tensor::from_data(TensorData::new(x, [1, 1, 64, 64, 64]), &Device::flex());
    check_swin(&swin(&config, ""), x, &golden, 7);
}

#[test]
fn swin_unetr_merges_tokens_as_the_published_models_do() {
    let Some(golden) = npz::golden("09_swinunetr.npz") else {
        return;
    };
    let config = SwinUnetrConfig {
        feature_size: 12,
        ..SwinUnetrConfig::published(7)
    };
    let x = &golden["x"];
    let x: Tensor<5> = Tensor::from_data(TensorData::new(x.values.clone(), x.shape.clone()), &Device::flex());
    let net = swin(&config, "netSeg.");
    let mut states = 0;
    let y = net.forward_seen(x.clone(), &mut |name, y| {
        if let Some(i) = name.strip_prefix("hidden") {
            let norms: Tensor<2> = y
                .clone()
                .powi_scalar(2)
                .flatten::<3>(2, 4)
                .sum_dim(2)
                .sqrt()
                .squeeze_dim(2);
            let expected = &golden[&format!("h{i}_raw_channel_l2")].values;
            for (a, b) in numbers(norms).iter().zip(expected) {
                // The golden tensors' own tolerance.
                assert!((a - b).abs() <= 2e-3, "{name}: {a} instead of {b}");
            }
            states += 1;
        }
    });
    assert_eq!(states, 5);
    let off = |got: &[f32], expected: &[f32]| {
        assert_eq!(got.len(), expected.len());
        got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    // The golden tensors' own tolerance, of float32 on both sides.
    let difference = off(&numbers(y), &golden["y"].values);
    assert!(difference <= 1e-4, "{difference:e}");
    let later = SwinUnetrConfig {
        merging: Merging::Corrected,
        ..config
    };
    let y = swin(&later, "netSeg.").forward(x);
    let difference = off(&thinned(&y, 5), &golden["y_later_merging_s5"].values);
    assert!(difference <= 1e-4, "{difference:e}");
}

#[test]
fn parameters_are_counted_as_their_programs_count() {
    let mut published = SwinUnetrConfig::published(7);
    assert_eq!(published.parameters(), 72_762_313);
    published.stage_convolutions = false;
    assert_eq!(published.parameters(), 62_186_953);
    let small = SwinUnetrConfig {
        feature_size: 12,
        ..SwinUnetrConfig::published(3)
    };
    assert_eq!(small.init(&Device::flex(), 0).num_params() as u64, small.parameters());
    let generator = PublishedConfig::generator(PublishedConfig::PUBLISHED_WIDTH, 3);
    assert_eq!(Architecture::Published(generator).parameters(), 19_073_795);
}

/// A plan of more classes than the network knows: the others have no chance, the known ones their own logits.
#[test]
fn classes_find_their_place_in_a_larger_label_map() {
    let golden = read(&folder().join("plain.safetensors"));
    let plan = Plan::default();
    let (manifest, weights) = import_nnunet(&folder(), "plain", &plan);
    let expected = Some(vec![Some(0), Some(1), Some(2), None, None, None, None]);
    assert_eq!(manifest.adapter.outputs, expected);
    let saved = tempfile::tempdir().unwrap();
    save_model(saved.path(), manifest, &weights, Precision::Single).unwrap();
    let net = load_segmentor(saved.path(), &Device::flex()).unwrap().model;
    let logits = net.forward(image(&golden).swap_dims(2, 3));
    assert_eq!(logits.dims()[1], 7);
    let highest: f32 = logits.clone().narrow(1, 3, 4).max().into_scalar();
    assert_eq!(highest, -1e4);
    // 13 is no multiple of the network's stride of 4: it is filled up and cut off again.
    assert_eq!(
        net.forward(Tensor::zeros([1, 1, 13, 16, 24], &Device::flex())).dims(),
        [1, 7, 13, 16, 24]
    );
}

#[test]
fn the_command_imports_what_info_evaluate_and_bundles_open() {
    let out = tempfile::tempdir().unwrap();
    let file = |name: &str| folder().join(name).to_str().unwrap().to_string();
    let models = out.path().to_str().unwrap();
    let [from, plans, dataset] = [file("plain.pth"), file("plain.plans.json"), file("dataset.json")];
    for role in ["critic", "segmentor"] {
        let said = support::run(&[
            "import",
            "--from",
            &from,
            "--as",
            role,
            "--config",
            "configs/demo.toml",
            "--plans",
            &plans,
            "--dataset",
            &dataset,
            "--out",
            models,
        ]);
        assert_eq!(said.code, Some(0), "{}", said.text);
        assert!(said.text.contains("allow_unknown_provenance"), "{}", said.text);
    }
    let said = support::run(&["info", "--models", models, "--json"]);
    assert!(
        said.code == Some(0) && said.text.contains("\"provenance_known\": false"),
        "{}",
        said.text
    );
    let bundle = Bundle::load(out.path(), &Device::flex()).unwrap();
    assert!(!bundle.provenance.known && bundle.generator.is_none());
    assert_eq!(bundle.plan.spacing_mm, [0.9, 3.0, 0.7]);
    let alone = tempfile::tempdir().unwrap();
    for file in ["segmentor.json", "segmentor.safetensors"] {
        std::fs::copy(out.path().join(file), alone.path().join(file)).unwrap();
    }
    let said = support::run(&["info", "--models", alone.path().to_str().unwrap(), "--json"]);
    assert!(said.code == Some(0) && said.text.contains("plain.pth"), "{}", said.text);
    // Its voxels are not the store's; with the store's, it is scored.
    let evaluate = |models: &str| {
        let store = support::phantom_store().to_str().unwrap();
        let (config, models) = (["--config", "configs/demo.toml"], ["--models", models, "--json"]);
        support::run(&[&["evaluate", "--store", store][..], &config, &models].concat())
    };
    let said = evaluate(models);
    assert!(
        said.code == Some(1)
            && said
                .text
                .contains("segmentor has [0.9, 3.0, 0.7], the store has [3.0, 3.0, 3.0]"),
        "{}",
        said.text
    );
    let coarse = tempfile::tempdir().unwrap();
    let [turned, coarser] = ["plans.json", "models"].map(|name| coarse.path().join(name).to_str().unwrap().to_string());
    let mut text: serde_json::Value = serde_json::from_slice(&std::fs::read(&plans).unwrap()).unwrap();
    text["configurations"]["3d_fullres"]["spacing"] = serde_json::json!([3.0, 3.0, 3.0]);
    std::fs::write(&turned, text.to_string()).unwrap();
    let from = [
        "import",
        "--from",
        &from,
        "--as",
        "segmentor",
        "--config",
        "configs/demo.toml",
    ];
    let to = ["--plans", &turned, "--dataset", &dataset, "--out", &coarser];
    let said = support::run(&[&from[..], &to].concat());
    assert_eq!(said.code, Some(0), "{}", said.text);
    let said = evaluate(&coarser);
    assert!(
        said.code == Some(0) && said.text.contains("liver_tumour"),
        "{}",
        said.text
    );
}

/// Networks of the published sizes, made by the script where FREETUMOR_TORCH_PYTHON names a Python with torch, monai and
/// nnunetv2; else nothing is tested.
#[test]
#[ignore = "takes PyTorch, 1.1 GB of disk and some minutes"]
fn networks_of_full_size_compute_what_their_programs_compute() {
    let Some(python) = std::env::var_os("FREETUMOR_TORCH_PYTHON") else {
        println!("skipped: FREETUMOR_TORCH_PYTHON names no Python");
        return;
    };
    let out = tempfile::tempdir().unwrap();
    let script = folder().join("make.py");
    let done = std::process::Command::new(python)
        .arg(script)
        .arg("--full")
        .arg(out.path())
        .status()
        .unwrap();
    assert!(done.success());
    check_nnunet(out.path(), "plain", Encoder::Plain);
    check_nnunet(out.path(), "residual", Encoder::Residual);
    let plan = Plan {
        labels: three_classes(),
        ..Plan::default()
    };
    let request = ImportRequest {
        merging: Merging::Corrected,
        ..request(Role::Critic, &plan, None)
    };
    let (manifest, weights) = import_pytorch(&out.path().join("swin.pt"), &request).unwrap();
    assert_eq!(manifest.architecture.parameters(), 72_762_117);
    let Architecture::SwinUnetr(config) = &manifest.architecture else {
        panic!("{:?}", manifest.architecture);
    };
    let golden = read(&out.path().join("swin.safetensors"));
    let net = fill(config.init(&Device::flex(), 0), weights.clone()).unwrap();
    check_swin(&net, image(&golden), &golden, 1);
    check_published_file(out.path(), &request, &weights);
}

/// Takes generator and critic out of the published file of three networks.
fn check_published_file(folder: &Path, as_critic: &ImportRequest, critic: &Weights) {
    let file = folder.join("tgan.pt");
    let (_, weights) = import_pytorch(&file, as_critic).unwrap();
    assert_eq!(&weights, critic);
    let plan = Plan::default();
    let (manifest, weights) = import_pytorch(&file, &request(Role::Generator, &plan, None)).unwrap();
    let Architecture::Published(config) = &manifest.architecture else {
        panic!("{:?}", manifest.architecture);
    };
    let golden = read(&folder.join("generator.safetensors"));
    let net = fill(config.init(&Device::flex(), 0), weights).unwrap();
    let y = numbers(net.forward(image(&golden)));
    // f32 sums in another order, fourteen convolutions deep.
    assert_near("generator", &y, &golden["y"].1, 2e-4);
}
