//! Files written here, byte by byte: layouts of networks that are too large to keep, and what no `torch.save` would write.

use std::io::Write;
use std::path::Path;

use burn::tensor::Device;
use freetumor::checkpoint::{
    Architecture, CheckpointError, ImportRequest, Role, Weight, Weights, collect, import_pytorch, load_manifest,
    read_pytorch, source_name,
};
use freetumor::nn::{Merging, OutputActivation, PublishedConfig, SwinUnetrConfig};
use freetumor::volume::Plan;
use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

use super::{folder, request, support};

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn number(number: usize) -> Vec<u8> {
    [b"J", &(number as u32).to_le_bytes()[..]].concat()
}

/// The pickle of a tensor whose numbers are the entry `key`.
fn tensor(key: &str, shape: &[usize]) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let strides = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product());
    let tuple = |numbers: &mut dyn Iterator<Item = usize>| {
        [b"(", &numbers.flat_map(number).collect::<Vec<_>>()[..], b"t"].concat()
    };
    [
        &b"ctorch._utils\n_rebuild_tensor_v2\n(("[..],
        &text("storage"),
        b"ctorch\nFloatStorage\n",
        &text(key),
        &text("cpu"),
        &number(count),
        b"tQK\x00",
        &tuple(&mut shape.iter().copied()),
        &tuple(&mut strides.collect::<Vec<_>>().into_iter()),
        b"\x89ccollections\nOrderedDict\n)RtR",
    ]
    .concat()
}

/// Writes an archive as `torch.save` does.
fn write(path: &Path, pickle: &[u8], storages: &[Vec<f32>]) {
    let mut archive = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut entry = |name: &str, bytes: &[u8]| {
        archive.start_file(format!("archive/{name}"), stored).unwrap();
        archive.write_all(bytes).unwrap();
    };
    entry("data.pkl", pickle);
    for (key, values) in storages.iter().enumerate() {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        entry(&format!("data/{key}"), &bytes);
    }
    archive.finish().unwrap();
}

/// Writes a `state_dict`.
fn write_tensors(path: &Path, tensors: &Weights) {
    let mut pickle = b"\x80\x02}(".to_vec();
    let mut storages = Vec::new();
    for (name, weight) in tensors {
        pickle.extend(text(name));
        pickle.extend(tensor(&storages.len().to_string(), &weight.shape));
        storages.push(weight.values.clone());
    }
    pickle.extend(b"u.");
    write(path, &pickle, &storages);
}

/// Returns a network's parameters, and what another program calls them.
fn named(architecture: &Architecture, prefix: &str) -> (Weights, Weights) {
    let device = Device::flex();
    let ours = match architecture {
        Architecture::Published(config) => collect(&config.init(&device, 5)),
        Architecture::SwinUnetr(config) => collect(&config.init(&device, 5)),
        other => panic!("{other:?}"),
    };
    let name =
        |(name, weight): (&String, &Weight)| (format!("{prefix}{}", source_name(architecture, name)), weight.clone());
    let theirs = ours.iter().map(name).collect();
    (ours, theirs)
}

fn swin(version: u8) -> SwinUnetrConfig {
    SwinUnetrConfig {
        feature_size: 12,
        stage_convolutions: version == 2,
        merging: Merging::Corrected,
        ..SwinUnetrConfig::published(7)
    }
}

#[test]
fn the_published_file_and_both_swin_unetrs_are_told_by_their_names() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("TGAN.pt");
    let generator = Architecture::Published(PublishedConfig {
        width: 4,
        in_channels: 1,
        out_channels: 3,
        activation: OutputActivation::Tanh,
    });
    let plan = Plan::default();
    for version in [1, 2] {
        let critic = Architecture::SwinUnetr(swin(version));
        let (generator_weights, mut file) = named(&generator, "module.netG.");
        let (critic_weights, segmentor) = named(&critic, "module.netSeg.module.");
        file.extend(segmentor);
        write_tensors(&path, &file);
        let asked = ImportRequest {
            merging: Merging::Corrected,
            ..request(Role::Critic, &plan, None)
        };
        let (manifest, weights) = import_pytorch(&path, &asked).unwrap();
        assert_eq!((manifest.architecture, weights), (critic, critic_weights));
        let (manifest, weights) = import_pytorch(&path, &request(Role::Generator, &plan, None)).unwrap();
        assert_eq!((&manifest.architecture, weights), (&generator, generator_weights));
    }
    let models = out.path().join("models");
    let [from, to] = [&path, &models].map(|path| path.to_str().unwrap());
    let said = support::run(&["import", "--from", from, "--as", "generator", "--out", to]);
    assert!(
        said.code == Some(0) && said.text.contains("generator: "),
        "{}",
        said.text
    );
    assert_eq!(
        load_manifest(Path::new(to), Role::Generator).unwrap().architecture,
        generator
    );
    let classes = ["--classes", "background,liver,liver_tumour"];
    let said = support::run(
        &[
            &["import", "--from", from, "--as", "generator", "--out", to][..],
            &classes,
        ]
        .concat(),
    );
    assert!(
        said.code == Some(1) && said.text.contains("classes: only for critics"),
        "{}",
        said.text
    );
}

fn refused(path: &Path) -> String {
    match read_pytorch(path) {
        Err(error @ CheckpointError::Invalid { .. }) => error.to_string(),
        other => panic!("{:?}", other.err()),
    }
}

/// The reader goes by the first bytes: what stands in front of an archive would be read instead of it, unchecked.
#[test]
fn an_archive_is_the_whole_file_and_nothing_in_it_is_compressed() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model.pt");
    let weight = Weight {
        shape: vec![2],
        values: vec![1.5, -2.0],
    };
    write_tensors(&path, &[("a".to_string(), weight.clone())].into());
    let whole = std::fs::read(&path).unwrap();
    assert_eq!(read_pytorch(&path).unwrap().weights["a"], weight);
    std::fs::write(&path, [&b"\x80\x02cposix\nsystem\n."[..], &whole].concat()).unwrap();
    assert!(refused(&path).contains("does not begin with a zip archive"));

    let mut compressed = whole.clone();
    let central = whole.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
    compressed[central + 10] = 8;
    std::fs::write(&path, compressed).unwrap();
    assert!(
        refused(&path).contains("archive/data.pkl: compressed"),
        "{}",
        refused(&path)
    );

    // PyTorch writes no checksums where it is told so: they are 0 then.
    let mut unchecked = whole.clone();
    for (signature, crc) in [(b"PK\x03\x04", 14), (b"PK\x01\x02", 16)] {
        for at in 0..whole.len() - 4 {
            if whole[at..].starts_with(signature) {
                unchecked[at + crc..at + crc + 4].fill(0);
            }
        }
    }
    assert_ne!(unchecked, whole);
    std::fs::write(&path, unchecked).unwrap();
    assert_eq!(read_pytorch(&path).unwrap().weights["a"], weight);
}

#[test]
fn two_tensors_of_one_name_are_refused() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model.pt");
    let inner = [&b"}"[..], &text("b"), &tensor("1", &[1]), b"s"].concat();
    let pickle = [
        &b"\x80\x02}("[..],
        &text("a.b"),
        &tensor("0", &[1]),
        &text("a"),
        &inner,
        b"u.",
    ]
    .concat();
    write(&path, &pickle, &[vec![1.0], vec![2.0]]);
    assert!(
        refused(&path).contains("tensor a.b: there are two of that name"),
        "{}",
        refused(&path)
    );
}

/// nnU-Net's trainer with batch norm leaves plans that speak of instance norm, and the same parameters.
#[test]
fn statistics_of_a_batch_norm_are_not_passed_over() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("batch_norm.pt");
    let mut weights = read_pytorch(&folder().join("monai_plain.pt")).unwrap().weights;
    let statistics = Weight {
        shape: vec![4],
        values: vec![0.0; 4],
    };
    weights.insert("model.0.adn.N.running_mean".into(), statistics);
    write_tensors(&path, &weights);
    let plan = Plan::default();
    let error = import_pytorch(&path, &request(Role::Segmentor, &plan, None))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("model.0.adn.N.running_mean") && error.contains("an instance norm"),
        "{error}"
    );
}
