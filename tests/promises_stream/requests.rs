//! What is asked for: recipes and models that cannot be served are refused by field.

use std::collections::BTreeMap;

use freetumor::sampler::Pool;
use freetumor::stream::recipe::{Recipe, Selection};
use freetumor::stream::{PatchService, StartError, Streams};
use freetumor::synth::{GateSettings, SynthesizerKind};
use freetumor::volume::SizeClass;

use super::{analytic, bundle_of, config, start, store};

#[test]
fn recipes_that_cannot_be_served_are_refused_by_field() {
    let streams = start(1, None);
    let refused = |recipe: Recipe| streams.resolve(recipe).map(|_| ()).unwrap_err().to_string();
    let organ = |name: &str| Recipe {
        organs: Some(BTreeMap::from([(name.into(), 1.0)])),
        ..analytic()
    };
    assert!(refused(organ("spleen")).starts_with("recipe field organs: unknown organ \"spleen\""));
    assert!(refused(organ("pancreas")).contains("no case of the store holds \"pancreas\""));
    let unknown = Recipe {
        select: Selection {
            hold_out: vec!["case-9".into()],
            ..Selection::default()
        },
        ..analytic()
    };
    assert!(refused(unknown).starts_with("recipe field select.hold_out: no case \"case-9\""));
    let kind = |kind| Recipe {
        synthesizer: Some(kind),
        ..analytic()
    };
    assert!(refused(kind(SynthesizerKind::Published)).starts_with("recipe field synthesizer: published"));
    assert!(refused(kind(SynthesizerKind::Conditional)).starts_with("recipe field synthesizer: conditional"));
    let gated = Recipe {
        gate: GateSettings::default(),
        ..analytic()
    };
    assert!(refused(gated).starts_with("recipe field gate.enabled"));
}

#[test]
fn absent_fields_and_spelled_defaults_are_one_recipe() {
    let streams = start(1, None);
    let resolved = streams.resolve(analytic()).unwrap();
    let again = streams.resolve(resolved.recipe.clone()).unwrap();
    assert_eq!((again.hash, &again.recipe), (resolved.hash, &resolved.recipe));
    // Kidneys of 24 mm hold no medium lesion: known beforehand.
    let medium = Recipe {
        sizes: BTreeMap::from([(SizeClass::Tiny, 1.0), (SizeClass::Large, 1.0)]),
        ..analytic()
    };
    let resolved = streams.resolve(medium).unwrap();
    let expected = ["labelled_host/kidney/large", "unlabelled_host/kidney/large"];
    assert_eq!(resolved.shortfall, expected);
    assert_eq!(resolved.feasible[&Pool::UnlabelledHost]["liver"], 3);
}

#[test]
fn models_of_another_plan_are_refused_by_field() {
    // A fifth of the store's voxels: further than a grid is bridged.
    let other = bundle_of([0.4; 3]);
    let error = Streams::start(store(), Some(other), config(1)).map(|_| ()).unwrap_err();
    assert!(
        matches!(
            &error,
            StartError::PlanMismatch {
                field: "spacing_mm",
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("[0.4, 0.4, 0.4]") && error.to_string().contains("[2.0, 2.0, 2.0]"));
}
