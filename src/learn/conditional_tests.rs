//! What a step of our stage 2 moves, and what it learns from.

use burn::tensor::Device;

use super::*;
use crate::checkpoint::{Calibration, CalibrationEntry, Provenance, Thresholds, collect};
use crate::digest::Digest;
use crate::nn::{ContrastOver, UnetConfig};
use crate::store::Cases;
use crate::toy;
use crate::volume::SizeClass;

fn critic(device: &Device) -> Bundle {
    let config = UnetConfig {
        in_channels: 1,
        out_channels: 7,
        widths: vec![4, 8],
        condition: 0,
    };
    Bundle {
        hash: Digest::default(),
        plan: crate::volume::Plan::default(),
        cubes: crate::nn::CubeSides::default(),
        critic: config.init(device, 5).into(),
        critic_seen: Provenance::default(),
        inner: Vec::new(),
        generator: None,
        published: None,
        discriminator: None,
        calibration: Calibration::default(),
        realism: None,
        provenance: Provenance::default().into(),
    }
}

fn trainee<'a>(
    config: &'a SynthesizerConfig,
    store: &'a dyn crate::store::Cases,
    bundle: &'a Bundle,
) -> ConditionalTrainee<'a> {
    let device = Device::flex().autodiff();
    let unet = UnetConfig {
        in_channels: 1,
        out_channels: 7,
        widths: vec![4, 8],
        condition: 0,
    };
    let catalogue = Catalogue::new(store, &(0..store.records().len()).collect::<Vec<_>>());
    let generator = GeneratorConfig {
        widths: vec![4, 8],
        organs: 3,
        spread_hu: 30.0,
        contrast_over: ContrastOver::Lesion,
    };
    let critic = Network::from(unet.init(&device, 5)).no_grad();
    let discriminator = UnetConfig {
        out_channels: 3,
        ..unet
    };
    let networks = (generator.init(&device, 1), discriminator.init(&device, 2));
    ConditionalTrainee {
        config,
        textures: Textures::measure(&catalogue, config.max_cube, &Device::flex()).unwrap(),
        catalogue,
        bundle,
        critic,
        rivals: Rivals::new(config, networks, device),
    }
}

fn config() -> SynthesizerConfig {
    SynthesizerConfig {
        voxels_per_step: 2 * 16 * 16 * 16,
        max_cube: 16,
        cube_mix: [(SizeClass::Tiny, 1.0)].into(),
        ..SynthesizerConfig::default()
    }
}

#[test]
fn each_step_moves_its_own_network_and_no_gradient_of_the_other_arrives() {
    let (store, config) = (toy::store(4, 2), config());
    let bundle = critic(&Device::flex());
    let mut both = trainee(&config, &store, &bundle);
    let (generator, discriminator) = (collect(&both.rivals.generator), collect(&both.rivals.discriminator));
    let critic_before = collect(&both.critic);
    let hosts = both.hosts(0).unwrap();
    let painted = both.generator_step(0, &hosts).unwrap();
    assert_ne!(collect(&both.rivals.generator), generator);
    assert_eq!(collect(&both.rivals.discriminator), discriminator);
    let moved = collect(&both.rivals.generator);
    let reals = both.drawing().reals(0).unwrap();
    both.discriminator_step(0, (&hosts, &reals), &painted).unwrap();
    assert_ne!(collect(&both.rivals.discriminator), discriminator);
    assert_eq!(collect(&both.rivals.generator), moved);
    assert_eq!(collect(&both.critic), critic_before);
    // A discriminator that never saw the generator's step ends with the same weights, bit for bit.
    let mut alone = trainee(&config, &store, &bundle);
    alone.discriminator_step(0, (&hosts, &reals), &painted).unwrap();
    assert_eq!(
        collect(&alone.rivals.discriminator),
        collect(&both.rivals.discriminator)
    );
}

#[test]
fn the_edge_is_a_part_of_what_the_generator_learns_from_where_it_is_weighed() {
    let store = toy::store(4, 2);
    let bundle = critic(&Device::flex());
    let step = |edge: f64| {
        let config = SynthesizerConfig {
            cube_mix: [(SizeClass::Small, 1.0)].into(),
            loss: LossWeights {
                edge,
                ..LossWeights::default()
            },
            ..config()
        };
        let mut trainee = trainee(&config, &store, &bundle);
        let hosts = trainee.hosts(0).unwrap();
        let painted = trainee.generator_step(0, &hosts).unwrap();
        let measured = |name: &str| painted.measured[name];
        (
            [measured("edge"), measured("generator_loss")],
            collect(&trainee.rivals.generator),
        )
    };
    let (([edge, without], plain), ([same, with], taught)) = (step(0.0), step(2.0));
    assert!(edge > 0.0 && edge == same, "{edge} {same}");
    assert!(
        (with - without - 2.0 * edge).abs() < 1e-5 * with,
        "{with} {without} {edge}"
    );
    assert_ne!(plain, taught);
}

#[test]
fn every_part_enters_the_generators_loss_by_its_weight() {
    let store = toy::store(4, 2);
    let bundle = critic(&Device::flex());
    let loss = LossWeights {
        recall: 1.5,
        false_alarm: 0.7,
        adversarial: 0.3,
        roughness: 0.2,
        texture: 0.9,
        edge: 1.1,
        sameness: 0.4,
    };
    let config = SynthesizerConfig {
        cube_mix: [(SizeClass::Small, 1.0)].into(),
        diversity: 2.0,
        loss: loss.clone(),
        ..config()
    };
    let mut trainee = trainee(&config, &store, &bundle);
    let hosts = trainee.hosts(0).unwrap();
    let measured = trainee.generator_step(0, &hosts).unwrap().measured;
    let parts = [
        ("missing_recall", loss.recall),
        ("false_alarm", loss.false_alarm),
        ("adversarial", loss.adversarial),
        ("roughness", loss.roughness),
        ("texture", loss.texture),
        ("edge", loss.edge),
        ("sameness", loss.sameness),
    ];
    assert!(parts.iter().all(|(name, _)| measured[*name] > 0.0), "{measured:?}");
    let sum: f64 = parts.iter().map(|(name, weight)| weight * measured[*name]).sum();
    // Sums of seven numbers in single precision.
    assert!(
        (measured["generator_loss"] - sum).abs() < 1e-5 * sum,
        "{measured:?} {sum}"
    );
}

#[test]
fn the_discriminators_penalty_enters_its_loss_by_its_weight_and_moves_it_elsewhere() {
    let store = toy::store(4, 2);
    let bundle = critic(&Device::flex());
    let step = |r1: f64| {
        let config = SynthesizerConfig { r1, ..config() };
        let mut trainee = trainee(&config, &store, &bundle);
        let (hosts, reals) = (trainee.hosts(0).unwrap(), trainee.drawing().reals(0).unwrap());
        let painted = trainee.generator_step(0, &hosts).unwrap();
        let measured = trainee.discriminator_step(0, (&hosts, &reals), &painted).unwrap();
        (
            measured["discriminator_loss"],
            measured["unsteadiness"],
            collect(&trainee.rivals.discriminator),
        )
    };
    let (without, nothing, plain) = step(0.0);
    let (with, unsteadiness, calmed) = step(40.0);
    assert!(nothing == 0.0 && unsteadiness > 0.0, "{nothing} {unsteadiness}");
    assert!(
        (with - without - 40.0 * unsteadiness).abs() < 1e-5 * with,
        "{with} {without} {unsteadiness}"
    );
    assert_ne!(plain, calmed);
}

#[test]
fn the_generator_is_asked_for_the_calibrated_recall_of_its_lesions_bin_and_a_margin() {
    let (store, config) = (toy::store(4, 2), config());
    let wanted = |recalls: &[(Option<SizeClass>, f64)]| {
        let entry = |(size, recall): &(Option<SizeClass>, f64)| CalibrationEntry {
            organ: Some("liver".into()),
            size: *size,
            contrast: None,
            lesions: 20,
            thresholds: Thresholds {
                recall: *recall,
                precision: 0.0,
            },
        };
        let mut bundle = critic(&Device::flex());
        bundle.calibration.entries = recalls.iter().map(entry).collect();
        let trainee = trainee(&config, &store, &bundle);
        let hosts = trainee.hosts(0).unwrap();
        assert!(hosts.iter().all(|host| host.size() == SizeClass::Tiny));
        trainee.wanted_recall(&hosts[0])
    };
    // The bin's own entry counts, not the organ's; 0.15 above it.
    assert!((wanted(&[(Some(SizeClass::Tiny), 0.6), (None, 0.4)]) - 0.75).abs() < 1e-6);
    assert!((wanted(&[(Some(SizeClass::Medium), 0.6), (None, 0.4)]) - 0.55).abs() < 1e-6);
    // A critic that was calibrated to nothing asks for half a lesion, one that misses nothing for 0.95, one never calibrated for 0.85.
    assert!((wanted(&[(None, 0.0)]) - 0.5).abs() < 1e-6);
    assert!((wanted(&[(None, 1.0)]) - 0.95).abs() < 1e-6);
    assert!((wanted(&[]) - 0.85).abs() < 1e-6);
}

#[test]
fn half_of_the_hosts_are_labelled_and_lesions_have_the_contrasts_of_real_ones() {
    let store = toy::store(4, 2);
    let bundle = critic(&Device::flex());
    let drawn = |broad_contrast: f64| {
        let config = SynthesizerConfig {
            broad_contrast,
            voxels_per_step: 6 * 16 * 16 * 16,
            ..config()
        };
        let trainee = trainee(&config, &store, &bundle);
        let hosts: Vec<Host> = (0..40)
            .flat_map(|step| trainee.drawing().hosts(step).unwrap())
            .collect();
        let labelled = hosts.iter().filter(|host| host.case < 4).count();
        // Three hosts a step, in turn: one and two labelled ones by turns.
        assert_eq!((hosts.len(), labelled), (120, 60));
        hosts.iter().map(|host| host.contrast_hu).collect::<Vec<f64>>()
    };
    // All real tumours here have -50 HU; a lesion's is drawn 5 HU (a standard deviation) about that.
    let near = drawn(0.0);
    let mean = near.iter().sum::<f64>() / 120.0;
    let sd = (near.iter().map(|hu| (hu - mean).powi(2)).sum::<f64>() / 119.0).sqrt();
    // Three and four standard errors of 120 draws.
    assert!((mean + 50.0).abs() < 1.4 && (sd - 5.0).abs() < 1.3, "{mean} {sd}");
    let broad = drawn(1.0);
    assert!(broad.iter().all(|hu| (-80.0..=60.0).contains(hu)));
    assert!(broad.iter().filter(|hu| **hu > 0.0).count() > 30, "{broad:?}");
}

#[test]
fn a_contrast_that_nothing_was_compared_with_is_none_that_lesions_get() {
    let mut store = toy::store(2, 0);
    let mut alone = store.records()[0].clone();
    alone.id = "case_alone".into();
    alone.tumours[0].contrast_hu = 0.0;
    let shape = alone.grid.shape;
    store.push(alone, Array3::zeros(shape), Array3::zeros(shape));
    let catalogue = Catalogue::new(&store, &[0, 1, 2]);
    assert_eq!(catalogue.all_tumours().len(), 3);
    assert_eq!(catalogue.contrasts_hu(0), [-50.0, -50.0]);
}
