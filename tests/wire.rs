//! The wire format: golden bytes shared with the Python client, round trips, and decoders that never panic.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::FakeService;
use freetumor::stream::delivery::{Codec, Delivery, ImageType, Output};
use freetumor::stream::recipe::Recipe;
use freetumor::stream::{Batch, PatchService};
use freetumor::volume::HuWindow;
use freetumor::wire::codec::{Encoding, pack, tensors, unpack};
use freetumor::wire::frame::{self, FrameError, Kind, Parts};
use freetumor::wire::header::{batch_frame, end_frame, heartbeat_frame, stream_header};
use freetumor::wire::proto::{EndReason, PatchMeta};
use freetumor::wire::reader::{self, Message};
use freetumor::wire::{npz, safetensors};
use proptest::prelude::*;

fn batches(count: u64) -> (FakeService, Delivery, Vec<Batch>) {
    let service = FakeService::default();
    let delivery = Delivery {
        count: Some(count),
        batch_size: 1,
        image: ImageType::I16,
        outputs: vec![Output::LesionInstance, Output::Source, Output::SoftMask],
        ..Delivery::default()
    };
    let resolved = service.resolve(recipe()).unwrap();
    let mut stream = service.open(&resolved, &delivery).unwrap();
    let batches = std::iter::from_fn(|| stream.next_batch()).map(Result::unwrap).collect();
    (service, delivery, batches)
}

fn recipe() -> Recipe {
    Recipe {
        patch: Some([16; 3]),
        ..Recipe::default()
    }
}

/// A small stream: header, heartbeat, two batches, a frame of an unknown kind, the end.
fn small_stream() -> Vec<u8> {
    let (service, delivery, batches) = batches(2);
    let resolved = service.resolve(recipe()).unwrap();
    let encoding = Encoding::of(&delivery, HuWindow::default());
    let header = stream_header(&resolved, service.plan(), &delivery, 0, 2);
    let mut bytes = frame::encode(Kind::Header, &header, &[]).unwrap().to_vec();
    bytes.extend_from_slice(&heartbeat_frame(15));
    bytes.extend_from_slice(&batch_frame(&batches[0], &encoding).unwrap().to_vec());
    bytes.extend_from_slice(&frame::encode(Kind::Unknown(99), &header, b"later").unwrap());
    bytes.extend_from_slice(&batch_frame(&batches[1], &encoding).unwrap().to_vec());
    bytes.extend_from_slice(&end_frame(EndReason::Count, &batches[1].next));
    bytes
}

fn small_npz() -> Vec<u8> {
    let (_, delivery, batches) = batches(1);
    let arrays = tensors(&batches[0].patches, &Encoding::of(&delivery, HuWindow::default())).unwrap();
    npz::write(&arrays, r#"{"case":"Müller","n":1}"#).unwrap()
}

/// Compares with the file of that name, or writes it where `FREETUMOR_UPDATE_GOLDEN` is set.
fn assert_golden(name: &str, bytes: &[u8]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/wire")
        .join(name);
    if std::env::var_os("FREETUMOR_UPDATE_GOLDEN").is_some() {
        fs_err::write(&path, bytes).unwrap();
    }
    assert!(
        fs_err::read(&path).unwrap() == bytes,
        "{name} changed: clients in the field read the old bytes; raise the version or add a field instead"
    );
}

#[test]
fn the_bytes_of_a_stream_never_change() {
    assert_golden("stream.bin", &small_stream());
}

#[test]
fn the_bytes_of_an_archive_never_change() {
    assert_golden("batch.npz", &small_npz());
}

#[test]
fn a_stream_reads_back_and_unknown_kinds_are_skipped() {
    let bytes = small_stream();
    let mut source = &bytes[..];
    let mut kinds = Vec::new();
    let (_, _, batches) = batches(2);
    while let Some(message) = reader::read(&mut source).unwrap() {
        kinds.push(match &message {
            Message::Header(_) => 'h',
            Message::Heartbeat(_) => '.',
            Message::Batch { header, tensors } => {
                let patch = &batches[usize::try_from(header.step).unwrap()].patches[0];
                assert_eq!(header.patches[0], PatchMeta::from(&patch.meta));
                let names: Vec<_> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
                assert_eq!(names, ["image", "label", "source", "soft_mask", "lesion_instance"]);
                assert!(header.tensors.iter().all(|tensor| tensor.offset % 64 == 0));
                let image: Vec<u8> = patch.image.iter().flat_map(|hu| hu.to_le_bytes()).collect();
                assert_eq!(
                    (&tensors[0].bytes, &tensors[0].shape[..]),
                    (&image, &[1, 1, 16, 16, 16][..])
                );
                assert_eq!(tensors[1].bytes, patch.label.iter().copied().collect::<Vec<_>>());
                'b'
            }
            Message::End(_) => 'e',
            Message::Error(_) => 'x',
        });
    }
    assert_eq!(String::from_iter(kinds), "h.bbe");
}

#[test]
fn reuse_is_declared_and_a_batch_of_no_patches_keeps_its_shape() {
    let (_, delivery, mut batches) = batches(1);
    let mut batch = batches.remove(0);
    for codec in [Codec::Raw, Codec::Zstd, Codec::ZstdU8] {
        let encoding = Encoding {
            codec,
            ..Encoding::of(&delivery, HuWindow::default())
        };
        batch.reused = vec![0];
        let whole = batch_frame(&batch, &encoding).unwrap().to_vec();
        let Message::Batch { header, .. } = reader::read(&mut &whole[..]).unwrap().unwrap() else {
            panic!("no batch");
        };
        assert_eq!((header.reused, header.patches.len()), (vec![0], 1));
        let empty = Batch {
            step: batch.step,
            patches: Vec::new(),
            reused: Vec::new(),
            shape: batch.shape,
            next: batch.next.clone(),
        };
        let bytes = batch_frame(&empty, &encoding).unwrap().to_vec();
        let Message::Batch { header, tensors } = reader::read(&mut &bytes[..]).unwrap().unwrap() else {
            panic!("no batch");
        };
        assert!(header.patches.is_empty() && tensors.iter().all(|tensor| tensor.bytes.is_empty()));
        assert!(tensors.iter().all(|tensor| tensor.shape == [0, 1, 16, 16, 16]));
    }
}

/// Three patches of 7^3 with optional tensors: no recipe may say so, and tensors do not end where the next may begin.
fn odd_batch() -> (Delivery, Batch) {
    let service = FakeService::default();
    let delivery = Delivery {
        count: Some(1),
        batch_size: 3,
        outputs: vec![Output::Source, Output::SoftMask],
        ..Delivery::default()
    };
    let mut resolved = Arc::unwrap_or_clone(service.resolve(recipe()).unwrap());
    resolved.patch = [7; 3];
    let mut stream = service.open(&Arc::new(resolved), &delivery).unwrap();
    (delivery, stream.next_batch().unwrap().unwrap())
}

fn encoding(delivery: &Delivery, image: ImageType) -> Encoding {
    Encoding {
        image,
        ..Encoding::of(delivery, HuWindow::default())
    }
}

/// Where the pieces of a payload lie in memory.
fn places(frame: &Parts) -> Vec<*const u8> {
    frame.payload.iter().map(|piece| piece.as_ptr()).collect()
}

#[test]
fn patches_that_somebody_else_holds_are_encoded_once() {
    for image in [ImageType::I16, ImageType::F16, ImageType::F32] {
        let (delivery, batch) = odd_batch();
        let encoding = encoding(&delivery, image);
        let own = batch_frame(&batch, &encoding).unwrap();
        let shared = batch.patches.clone();
        let first = batch_frame(&batch, &encoding).unwrap();
        let second = batch_frame(&batch, &encoding).unwrap();
        assert!(own == first && first == second, "{image:?}");
        assert_ne!(places(&own), places(&first));
        assert_eq!(places(&first), places(&second));
        drop(shared);
        assert_eq!(
            places(&batch_frame(&batch, &encoding).unwrap()),
            places(&first),
            "the last takes what was left"
        );
        let Message::Batch { tensors: read, .. } = reader::read(&mut &own.to_vec()[..]).unwrap().unwrap() else {
            panic!("no batch");
        };
        for (read, made) in read.iter().zip(tensors(&batch.patches, &encoding).unwrap()) {
            assert_eq!((read.name.as_str(), &read.bytes), (made.name, &made.bytes));
        }
    }
}

#[test]
fn readers_of_one_patch_get_what_each_asked_for() {
    let (delivery, batch) = odd_batch();
    let _shared = batch.patches.clone();
    for image in [ImageType::F16, ImageType::F32, ImageType::I16, ImageType::F16] {
        for codec in [Codec::Raw, Codec::Zstd, Codec::ZstdU8] {
            let encoding = Encoding {
                codec,
                ..encoding(&delivery, image)
            };
            let (_, own) = odd_batch();
            assert!(
                batch_frame(&batch, &encoding).unwrap() == batch_frame(&own, &encoding).unwrap(),
                "{image:?} {codec:?}"
            );
        }
    }
}

#[test]
fn masks_alone_may_be_compressed() {
    let (delivery, batch) = odd_batch();
    let plain = tensors(&batch.patches, &encoding(&delivery, ImageType::F16)).unwrap();
    let (described, payload) = pack(&plain, Codec::ZstdU8).unwrap();
    for (tensor, plain) in described.iter().zip(&plain) {
        let is_mask = plain.element.bytes() == 1;
        assert_eq!(tensor.codec, i32::from(is_mask), "{}", tensor.name);
        assert_eq!(tensor.stored_length < tensor.raw_length, is_mask, "{}", tensor.name);
        assert!(unpack(tensor, &payload).unwrap() == plain.bytes, "{}", tensor.name);
    }
}

#[test]
fn every_cut_is_an_error_or_an_end_without_an_end_frame() {
    let bytes = small_stream();
    for cut in (0..bytes.len()).step_by(97) {
        let mut source = &bytes[..cut];
        let mut is_ended = false;
        loop {
            match reader::read(&mut source) {
                Ok(Some(message)) => is_ended = matches!(message, Message::End(_)),
                Ok(None) => break,
                Err(error) => {
                    assert!(matches!(error, FrameError::Cut), "{error}");
                    break;
                }
            }
        }
        assert!(!is_ended, "cut at {cut}");
    }
}

#[test]
fn a_flipped_payload_byte_names_its_tensor() {
    let (_, delivery, batches) = batches(1);
    let mut bytes = batch_frame(&batches[0], &Encoding::of(&delivery, HuWindow::default()))
        .unwrap()
        .to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    let error = reader::read(&mut &bytes[..]).unwrap_err().to_string();
    assert!(error.contains("lesion_instance"), "{error}");
}

#[test]
fn windowed_images_are_in_the_unit_interval() {
    let (_, _, batches) = batches(1);
    for image in [ImageType::F16, ImageType::F32] {
        let encoding = Encoding {
            image,
            codec: Codec::Raw,
            outputs: Vec::new(),
            window_hu: HuWindow::default(),
        };
        let arrays = tensors(&batches[0].patches, &encoding).unwrap();
        let hu = batches[0].patches[0].image[[5, 5, 5]];
        let at = (5 * 16 + 5) * 16 + 5;
        let (value, tolerance) = match image {
            ImageType::F16 => {
                let bytes = [arrays[0].bytes[2 * at], arrays[0].bytes[2 * at + 1]];
                // Half precision keeps 11 bits: half a step below 1 is 2^-12.
                (half::f16::from_le_bytes(bytes).to_f32(), 1.0 / 4096.0)
            }
            _ => {
                let bytes: [u8; 4] = arrays[0].bytes[4 * at..4 * at + 4].try_into().unwrap();
                (f32::from_le_bytes(bytes), 0.0)
            }
        };
        let expected = ((f32::from(hu) + 175.0) / 425.0).clamp(0.0, 1.0);
        assert!((value - expected).abs() <= tolerance, "{value} {expected}");
    }
}

#[test]
fn safetensors_files_read_back() {
    let (_, delivery, batches) = batches(1);
    let arrays = tensors(&batches[0].patches, &Encoding::of(&delivery, HuWindow::default())).unwrap();
    let bytes = safetensors::write(&arrays, "{}".into()).unwrap();
    let file = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("image").unwrap().data(), arrays[0].bytes);
    let (_, metadata) = ::safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["meta"], "{}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn tensors_round_trip(values in prop::collection::vec(any::<u8>(), 8..4096), is_zstd in any::<bool>()) {
        let length = values.len() / 8 * 8;
        let tensor = freetumor::wire::codec::RawTensor {
            name: "label",
            element: freetumor::wire::codec::Element::U8,
            shape: [1, 1, 2, 4, length / 8],
            bytes: values[..length].to_vec(),
        };
        let codec = if is_zstd { Codec::Zstd } else { Codec::Raw };
        let (described, payload) = pack(&[tensor.clone(), tensor.clone()], codec).unwrap();
        for one in &described {
            prop_assert_eq!(&unpack(one, &payload).unwrap(), &tensor.bytes);
        }
    }

    #[test]
    fn readers_never_panic_on_arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut source = &bytes[..];
        while let Ok(Some(_)) = reader::read(&mut source) {}
        // With a valid preamble in front the bytes reach the protobuf and tensor decoders.
        for kind in 1u16..6 {
            let split = bytes.len() / 2;
            let preamble = frame::Preamble {
                kind: kind.into(),
                header_length: split as u32,
                payload_length: (bytes.len() - split) as u64,
                header_crc32: crc32fast::hash(&bytes[..split]),
            };
            let whole = [&preamble.to_bytes()[..], &bytes].concat();
            reader::read(&mut &whole[..]).ok();
        }
    }

    #[test]
    fn damaged_streams_never_panic(at in 0usize..50_000, bit in 0u8..8) {
        let mut bytes = small_stream();
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        let mut source = &bytes[..];
        while let Ok(Some(_)) = reader::read(&mut source) {}
    }
}
