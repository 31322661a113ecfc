//! Promise P5: only the lesion changes, and nobody learns from what nobody looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use burn::tensor::Device;
use freetumor::checkpoint::Bundle;
use freetumor::nn::PublishedConfig;
use freetumor::sampler::{Augmentation, Pool};
use freetumor::stream::PatchService;
use freetumor::stream::delivery::Delivery;
use freetumor::stream::patch::{Outcome, StreamedPatch};
use freetumor::stream::recipe::{Fallback, Recipe};
use freetumor::synth::{GateRule, SynthesizerKind};
use freetumor::volume::{ClassSet, SizeClass};

use super::{
    KIDNEY, LIVER, analytic, batches, bundle, bundle_of, bundle_of_before, digests, judged, known, read, start,
};

#[test]
fn p5_only_the_lesion_changes() {
    let streams = start(2, Some(bundle(known())));
    for recipe in [analytic(), judged(0.0, Fallback::Best)] {
        let patches = read(&streams, &recipe, &batches(Delivery::default(), 12));
        let mut changed = 0;
        for patch in &patches {
            let lesion_tumour = match patch.meta.organ.as_str() {
                "liver" => LIVER.1,
                _ => KIDNEY.1,
            };
            for (at, soft) in patch.soft_mask.indexed_iter() {
                if *soft == 0 {
                    assert_eq!(patch.image[at], patch.source[at]);
                }
                assert_eq!(patch.lesion_instance[at] == 1, *soft >= 128);
                if *soft >= 128 {
                    assert_eq!(patch.label[at], lesion_tumour);
                } else if patch.meta.pool == Pool::UnlabelledHost {
                    assert!(![2, 4, 6].contains(&patch.label[at]), "a tumour outside the lesion");
                }
            }
            changed += u64::from(patch.image != patch.source);
            assert_eq!(patch.image != patch.source, !patch.meta.lesions.is_empty());
        }
        assert!(changed >= 8, "{changed} of {}", patches.len());
    }
}

#[test]
fn p5_voxels_that_nobody_looked_at_are_ignored() {
    let patches = read(&start(1, None), &analytic(), &batches(Delivery::default(), 12));
    let unlabelled = patches.iter().filter(|patch| patch.meta.pool == Pool::UnlabelledHost);
    let labels: BTreeSet<u8> = unlabelled.flat_map(|patch| patch.label.iter().copied()).collect();
    // Only the liver was annotated: background may be any other organ, a kidney voxel is a kidney.
    assert!(
        labels.contains(&255) && labels.contains(&LIVER.0) && !labels.contains(&0),
        "{labels:?}"
    );
    // A training in the same process is told what such a voxel cannot be: it teaches that no liver is there.
    let all = ClassSet(0b111_1111);
    for patch in patches.iter().filter(|patch| patch.meta.pool == Pool::UnlabelledHost) {
        for (label, set) in patch.label.iter().zip(&patch.admissible(all)) {
            if *label == 255 {
                assert!(set.contains(0) && !set.contains(LIVER.0) && *set != all, "{set:?}");
            } else {
                assert_eq!(*set, ClassSet::of(*label));
            }
        }
    }
}

#[test]
fn p5_a_warp_moves_image_mask_and_label_together() {
    let mut recipe = analytic();
    recipe.augment = Augmentation {
        warp: 1.0,
        rotation_deg: 20.0,
        zoom: 1.2,
        elastic_mm: 3.0,
        ..recipe.augment
    };
    let delivery = batches(Delivery::default(), 8);
    let patches = read(&start(1, None), &recipe, &delivery);
    assert_eq!(digests(&read(&start(3, None), &recipe, &delivery)), digests(&patches));
    let plain = read(&start(2, None), &analytic(), &delivery);
    let mut painted = 0;
    for (patch, plain) in patches.iter().zip(&plain) {
        // The same case and box, seen otherwise.
        assert_eq!(
            (&patch.meta.case, patch.meta.region),
            (&plain.meta.case, plain.meta.region)
        );
        assert_ne!(patch.meta.affine, plain.meta.affine);
        assert_eq!(patch.image.dim(), plain.image.dim());
        painted += usize::from(!patch.meta.lesions.is_empty());
        check_warped(patch);
    }
    assert!(painted >= 8, "{painted}");
}

/// Checks that the label follows from the mask, and that voxels with no mask around them are the source's.
fn check_warped(patch: &StreamedPatch) {
    let shape = patch.image.dim();
    for ((z, y, x), now) in patch.image.indexed_iter() {
        let soft = patch.soft_mask[[z, y, x]];
        let is_tumour = [LIVER.1, KIDNEY.1].contains(&patch.label[[z, y, x]]);
        // Labelled hosts bring tumours of their own.
        assert!(soft < 128 || (is_tumour && patch.lesion_instance[[z, y, x]] == 1));
        let near = |at: usize, side: usize| at.saturating_sub(1)..(at + 2).min(side);
        let around = ndarray::s![near(z, shape.0), near(y, shape.1), near(x, shape.2)];
        if patch.soft_mask.slice(around).iter().all(|soft| *soft == 0) {
            assert_eq!(*now, patch.source[[z, y, x]]);
        }
    }
}

#[test]
fn p5_models_of_another_grid_change_only_the_lesion() {
    let recipe = Recipe {
        sizes: BTreeMap::from([(SizeClass::Tiny, 0.5), (SizeClass::Small, 0.5)]),
        ..judged(0.0, Fallback::Best)
    };
    let delivery = batches(Delivery::default(), 6);
    // The store's own grid is 2 mm; then finer, coarser, and both in one.
    let grids = [[2.0; 3], [1.5; 3], [3.0; 3], [5.0, 0.9, 1.1]];
    let mean_off_hu = |models_mm: [f64; 3], bundle_of: fn([f64; 3]) -> Arc<Bundle>| {
        let other = bundle_of(models_mm);
        let patches = read(&start(1, Some(other.clone())), &recipe, &delivery);
        assert_eq!(
            digests(&read(&start(3, Some(other)), &recipe, &delivery)),
            digests(&patches)
        );
        let painted: Vec<f64> = patches.iter().filter_map(off_hu).collect();
        assert!(
            painted.len() >= 10,
            "{models_mm:?}: {} of {}",
            painted.len(),
            patches.len()
        );
        painted.iter().sum::<f64>() / painted.len() as f64
    };
    // Host and surroundings differ by noise, and HU are rounded: on every grid a lesion's mean is what was asked for.
    let off = grids.map(|grid| mean_off_hu(grid, bundle_of));
    assert!(off.iter().all(|off| *off < 1.0), "{off:?}");
    // Generators of before leave to the soft edge what it takes, as much on every grid, give or take what interpolation takes from a lesion of
    // a few voxels.
    let off = grids.map(|grid| mean_off_hu(grid, bundle_of_before));
    assert!(
        off[0] > 3.0 && off.iter().all(|other| (other - off[0]).abs() < 5.0),
        "{off:?}"
    );
}

/// The paper's generator paints on its own grid and on others, the same bytes on one thread and on three, inside the mask alone.
#[test]
fn the_published_generator_paints_where_the_models_hold_it() {
    let published = |spacing_mm| {
        let mut models = Arc::into_inner(bundle_of(spacing_mm)).unwrap();
        models.generator = None;
        models.published = Some(PublishedConfig::generator(2, 3).init(&Device::flex(), 4));
        Arc::new(models)
    };
    let delivery = batches(Delivery::default(), 4);
    let recipe = judged(0.0, Fallback::Best);
    for spacing_mm in [[2.0; 3], [1.5; 3]] {
        let streams = start(1, Some(published(spacing_mm)));
        // Where the models hold no other generator, it is what an absent synthesizer means.
        let resolved = streams.resolve(recipe.clone()).unwrap();
        assert_eq!(resolved.recipe.synthesizer, Some(SynthesizerKind::Published));
        let patches = read(&streams, &recipe, &delivery);
        let three = start(3, Some(published(spacing_mm)));
        assert_eq!(digests(&read(&three, &recipe, &delivery)), digests(&patches));
        assert!(patches.iter().filter_map(off_hu).count() >= 6);
    }
    // Under the published rule a critic that recognises nothing refuses everything; what it refuses is the client's to choose.
    let mut strict = judged(0.0, Fallback::Healthy);
    strict.gate.rule = GateRule::Published;
    for patch in read(&start(2, Some(published([2.0; 3]))), &strict, &delivery) {
        let expected = if patch.meta.lesions.is_empty() {
            Outcome::HealthyAfterK
        } else {
            Outcome::Accepted
        };
        assert_eq!(patch.meta.outcome, expected);
    }
}

/// Checks that a patch is its source but for its lesion; returns how far the lesion's contrast is off what was asked.
fn off_hu(patch: &StreamedPatch) -> Option<f64> {
    let [lesion] = &patch.meta.lesions[..] else { return None };
    assert!(lesion.gate.is_some());
    let mut changed = 0;
    let voxels = patch
        .image
        .iter()
        .zip(&patch.source)
        .zip(&patch.soft_mask)
        .zip(&patch.label);
    for (((now, before), soft), label) in voxels {
        assert!(*soft > 0 || now == before);
        assert_eq!(*soft >= 128, *label == LIVER.1 || *label == KIDNEY.1);
        changed += usize::from(now != before);
    }
    assert!(changed > 0);
    Some((lesion.realised_hu - lesion.requested_hu).abs())
}
