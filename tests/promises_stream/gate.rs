//! Promise P4: what the gate did is visible, and whose critic judges.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use freetumor::checkpoint::{InnerCritic, Provenance, Realism};
use freetumor::digest::Digest;
use freetumor::sampler::Pool;
use freetumor::store::{CaseRecord, MemoryStore};
use freetumor::stream::delivery::Delivery;
use freetumor::stream::negatives::UnlabelledNegatives;
use freetumor::stream::patch::{Outcome, StreamedPatch};
use freetumor::stream::recipe::{Fallback, Recipe};
use freetumor::stream::{PatchService, judges, seen_cases, seen_patients};
use freetumor::synth::{GateRule, SynthesizerKind};
use freetumor::volume::{ContrastBin, Region, SizeClass};

use super::{SIDE, analytic, batches, bundle, digest, judged, known, plan, read, start, store, unet};

#[test]
fn p4_what_the_gate_did_is_visible() {
    let streams = start(2, Some(bundle(known())));
    let delivery = batches(Delivery::default(), 3);
    for (fallback, outcome) in [
        (Fallback::Healthy, Outcome::HealthyAfterK),
        (Fallback::Best, Outcome::BestAfterK),
        (Fallback::Real, Outcome::RealAfterK),
    ] {
        for patch in read(&streams, &judged(1.0, fallback), &delivery) {
            let meta = &patch.meta;
            assert_eq!((meta.outcome, meta.attempts), (outcome, 3));
            // Counted by the size that was asked for, also where no lesion is left to tell.
            let asked = meta.asked.unwrap();
            assert_eq!(asked.refused, 3);
            assert!(meta.lesions.iter().all(|lesion| lesion.size == asked.size));
            let has_lesion = fallback == Fallback::Best;
            assert_eq!(meta.lesions.len(), usize::from(has_lesion));
            assert_eq!(patch.image != patch.source, has_lesion);
            if let Some(lesion) = meta.lesions.first() {
                let gate = lesion.gate.unwrap();
                assert_eq!((gate.recall_threshold, gate.precision_threshold), (1.0, 1.0));
                assert!((0.0..=1.0).contains(&lesion.discriminator.unwrap()));
            }
        }
    }
    let counts = streams.stats().snapshot().bins;
    let sum = |of: fn(&freetumor::stream::BinCounts) -> u64| counts.iter().map(of).sum::<u64>();
    assert_eq!((sum(|bin| bin.requested), sum(|bin| bin.attempted)), (18, 54));
    assert_eq!(sum(|bin| bin.accepted), 0);
}

#[test]
fn p4_lesions_have_the_size_and_contrast_that_were_asked_for() {
    let recipe = Recipe {
        sizes: BTreeMap::from([(SizeClass::Small, 0.5), (SizeClass::Medium, 0.5)]),
        contrasts: BTreeMap::from([(ContrastBin::Dark, 1.0)]),
        pools: Some(BTreeMap::from([(Pool::UnlabelledHost, 1.0)])),
        organs: Some(BTreeMap::from([("liver".into(), 1.0)])),
        ..analytic()
    };
    for patch in read(&start(2, None), &recipe, &batches(Delivery::default(), 6)) {
        let lesion = &patch.meta.lesions[0];
        assert!(patch.meta.asked.is_none(), "no gate, nothing refused");
        assert_eq!(SizeClass::of_diameter(lesion.diameter_mm), lesion.size);
        assert_eq!(ContrastBin::of_contrast(lesion.requested_hu), lesion.contrast);
        // The soft edge takes some of the contrast: at least two thirds of it must arrive.
        let ratio = lesion.realised_hu / lesion.requested_hu;
        assert!((0.66..1.05).contains(&ratio), "{lesion:?}");
    }
}

/// The store's tumours are small and dark; tiny and bright ones are asked for.
#[test]
fn a_copied_tumour_tells_its_own_size_and_contrast() {
    let recipe = Recipe {
        synthesizer: Some(SynthesizerKind::CopyPaste),
        sizes: BTreeMap::from([(SizeClass::Tiny, 1.0)]),
        contrasts: BTreeMap::from([(ContrastBin::Bright, 1.0)]),
        pools: Some(BTreeMap::from([(Pool::UnlabelledHost, 1.0)])),
        organs: Some(BTreeMap::from([("liver".into(), 1.0)])),
        ..analytic()
    };
    let streams = start(2, None);
    let patches = read(&streams, &recipe, &batches(Delivery::default(), 6));
    let copied: Vec<_> = patches.iter().flat_map(|patch| &patch.meta.lesions).collect();
    assert!(!copied.is_empty());
    for lesion in copied {
        assert_eq!((lesion.size, lesion.contrast), (SizeClass::Small, ContrastBin::Dark));
        assert_eq!(lesion.requested_hu, -50.0);
        assert!(lesion.realised_hu < -30.0, "{lesion:?}");
    }
    // What was asked for is what is counted.
    let bins = streams.stats().snapshot().bins;
    let of_size = |size| {
        bins.iter()
            .filter(|bin| bin.size == size)
            .map(|bin| bin.requested)
            .sum::<u64>()
    };
    assert_eq!(
        (of_size(SizeClass::Tiny), of_size(SizeClass::Small)),
        (patches.len() as u64, 0)
    );
}

#[test]
fn lesions_must_look_as_real_as_the_recipe_asks() {
    let models = |scores: Option<Vec<f64>>| {
        let mut models = Arc::into_inner(bundle(known())).unwrap();
        models.realism = scores.map(|scores| Realism { scores });
        Arc::new(models)
    };
    let asking = |realism: f64, fallback| {
        let mut recipe = judged(0.0, fallback);
        recipe.gate.realism = realism;
        recipe
    };
    let delivery = batches(Delivery::default(), 8);
    let of =
        |scores: Vec<f64>, fallback| read(&start(2, Some(models(Some(scores)))), &asking(0.5, fallback), &delivery);
    // What everything reaches changes nothing but that it is told; what nothing reaches refuses every attempt.
    let plain = read(
        &start(1, Some(models(None))),
        &judged(0.0, Fallback::Healthy),
        &delivery,
    );
    let easy = of(vec![0.0, 0.0], Fallback::Healthy);
    let outcomes = |patches: &[StreamedPatch]| patches.iter().map(|patch| patch.meta.outcome).collect::<Vec<_>>();
    assert_eq!(outcomes(&easy), outcomes(&plain));
    let thresholds = |patches: &[StreamedPatch]| -> BTreeSet<String> {
        let lesions = patches.iter().flat_map(|patch| &patch.meta.lesions);
        let gates = lesions.filter_map(|lesion| lesion.gate);
        gates.map(|gate| format!("{:?}", gate.realism_threshold)).collect()
    };
    assert_eq!(thresholds(&easy), BTreeSet::from(["Some(0.0)".to_string()]));
    assert_eq!(thresholds(&plain), BTreeSet::from(["None".to_string()]));
    let strict = of(vec![0.0, 2.0], Fallback::Healthy);
    assert!(strict.iter().all(|patch| patch.meta.lesions.is_empty()));
    // The best of those refused is known by all its scores, the discriminator's too.
    let best = of(vec![0.0, 2.0], Fallback::Best);
    let lesions: Vec<_> = best.iter().flat_map(|patch| &patch.meta.lesions).collect();
    assert!(lesions.len() >= 4 && lesions.iter().all(|l| l.gate.is_some() && l.discriminator.is_some()));

    // A threshold between the scores of two lesions parts them.
    let real = |patches: &[StreamedPatch]| -> Vec<f64> {
        let lesions = patches.iter().flat_map(|patch| &patch.meta.lesions);
        lesions.filter_map(|lesion| lesion.discriminator).collect()
    };
    let mut all = real(&plain);
    all.sort_by(f64::total_cmp);
    let between = all[all.len() / 2];
    let kept = real(&of(vec![0.0, between], Fallback::Healthy));
    assert!(
        !kept.is_empty() && kept.iter().all(|real| *real >= between),
        "{kept:?} {between}"
    );

    let refused =
        |scores: Option<Vec<f64>>, recipe| start(1, Some(models(scores))).resolve(recipe).unwrap_err().to_string();
    for none in [None, Some(vec![])] {
        let why = refused(none, asking(0.5, Fallback::Healthy));
        assert!(why.contains("gate.realism") && why.contains("discriminator"), "{why}");
    }
    let mut published = asking(0.5, Fallback::Healthy);
    published.gate.rule = GateRule::Published;
    assert!(refused(Some(vec![0.0]), published).contains("gate.realism: expected 0 with the rule published"));
}

#[test]
fn a_host_that_the_critic_learnt_from_is_judged_by_one_that_did_not() {
    let labelled: Vec<Digest> = store().records()[..2].iter().map(|record| record.source_hash).collect();
    let seen = |hashes: &[Digest]| Provenance {
        known: true,
        source_hashes: hashes.iter().copied().collect(),
        fingerprints: BTreeSet::new(),
    };
    // Case 2 is another scan of case 0's patient.
    let mut of_patients = MemoryStore::new(plan());
    for (number, record) in store().records().iter().enumerate() {
        let crop = store().read(number, Region::whole([SIDE; 3])).unwrap();
        let patient = if [0, 2].contains(&number) { "one" } else { "" };
        let record = CaseRecord {
            patient: patient.into(),
            ..record.clone()
        };
        of_patients.push(record, crop.image, crop.labels);
    }
    // What a model is worth is measured on patients whom it has not seen.
    let first = seen(&labelled[..1]);
    assert_eq!(seen_cases(&of_patients, &first), [true, false, false, false, false]);
    assert_eq!(seen_patients(&of_patients, &first), [true, false, true, false, false]);
    let models = |inner: usize| {
        let mut models = Arc::into_inner(bundle(known())).unwrap();
        models.critic_seen = seen(&labelled);
        // Each saw the other's case.
        models.inner = (0..inner)
            .map(|fold| InnerCritic {
                seen: seen(&[labelled[1 - fold]]),
                critic: unet(7, 20 + fold as u64).into(),
            })
            .collect();
        let (alone, together) = match inner {
            0 => ([None; 5], [None; 5]),
            _ => (
                [Some(0), Some(1), None, None, None],
                [Some(0), Some(1), Some(0), None, None],
            ),
        };
        assert_eq!(judges(&*store(), &models), alone);
        assert_eq!(judges(&of_patients, &models), together);
        Arc::new(models)
    };
    // Where each inner critic saw one of a patient's scans, the one that did not see this scan is next best.
    let mut torn = Arc::into_inner(models(2)).unwrap();
    torn.inner[0].seen = seen(&[labelled[0]]);
    torn.inner[1].seen = seen(&[store().records()[2].source_hash]);
    assert_eq!(judges(&of_patients, &torn)[..3], [Some(1), Some(0), Some(0)]);

    let recipe = Recipe {
        pools: Some(BTreeMap::from([(Pool::LabelledHost, 0.5), (Pool::UnlabelledHost, 0.5)])),
        unlabelled_negatives: Some(UnlabelledNegatives::Trust),
        ..judged(0.0, Fallback::Best)
    };
    let delivery = batches(Delivery::default(), 8);
    let [own, inner] = [0, 2].map(|folds| read(&start(2, Some(models(folds))), &recipe, &delivery));
    let scores = |patch: &StreamedPatch| patch.meta.lesions.first().map(|lesion| lesion.gate.unwrap().recall);
    let (mut same, mut other) = (0, 0);
    for (own, inner) in own.iter().zip(&inner) {
        match own.meta.pool {
            Pool::UnlabelledHost => {
                assert_eq!(digest(own), digest(inner));
                same += 1;
            }
            _ => other += usize::from(scores(own) != scores(inner)),
        }
    }
    assert!(same >= 4 && other >= 2, "{same} {other}");
}
