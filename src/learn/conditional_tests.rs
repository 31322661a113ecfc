//! What a step of our stage 2 moves, and what it learns from.

use burn::tensor::Device;

use super::*;
use crate::checkpoint::{Calibration, Provenance, collect};
use crate::digest::Digest;
use crate::nn::{ContrastOver, UnetConfig};
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
    both.discriminator_step(0, &hosts, &painted).unwrap();
    assert_ne!(collect(&both.rivals.discriminator), discriminator);
    assert_eq!(collect(&both.rivals.generator), moved);
    assert_eq!(collect(&both.critic), critic_before);
    // A discriminator that never saw the generator's step ends with the same weights, bit for bit.
    let mut alone = trainee(&config, &store, &bundle);
    alone.discriminator_step(0, &hosts, &painted).unwrap();
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
