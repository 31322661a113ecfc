//! Holds the published gate rule to the released code's filter, case by case.

#[path = "common/npz.rs"]
mod npz;

use freetumor::synth::gate::{judge_published, published_recall};
use freetumor::volume::{ClassSet, LabelMap};
use ndarray::Array3;

#[test]
fn the_published_rule_accepts_what_the_released_filter_accepts() {
    let Some(golden) = npz::golden("05_filter.npz") else {
        return;
    };
    let tumours = LabelMap::default().organs().iter().fold(ClassSet(0), |set, organ| {
        ClassSet(set.0 | ClassSet::of(organ.tumour_id).0)
    });
    let mut outcomes = [0, 0];
    for (name, rho) in golden.iter().filter(|(name, _)| name.ends_with("_rho")) {
        let case = name.trim_end_matches("_rho");
        let of = |part: &str| &golden[&format!("{case}_{part}")];
        let (logits, fake) = (of("s_logits"), of("fake_label3"));
        let (batch, classes) = (logits.shape[0], logits.shape[1]);
        let voxels = fake.values.len() / batch;
        // Class 3 is the synthesized tumour. Pooled over the batch as the filter does it: the crops stand one behind the other.
        let after = Array3::from_shape_fn([1, batch, voxels], |(_, b, v)| {
            let logit = |class: usize| logits.values[(b * classes + class) * voxels + v];
            (1..classes).fold(0, |best, class| if logit(class) > logit(best) { class } else { best }) as u8
        });
        let lesion = Array3::from_shape_fn([1, batch, voxels], |(_, b, v)| {
            u8::from(fake.values[b * voxels + v] == 3.0)
        });
        let recall = published_recall(&after, &lesion, tumours);
        // The filter divides by |F| + 1e-6 in single precision.
        assert!((recall - f64::from(rho.values[0])).abs() < 1e-6, "{case}: {recall}");
        let accepts = of("accept").values[0] > 0.5;
        assert_eq!(judge_published(recall).passes, accepts, "{case}");
        outcomes[usize::from(accepts)] += 1;
    }
    assert_eq!(outcomes.iter().sum::<usize>(), 10);
    assert!(outcomes.iter().all(|count| *count > 1), "{outcomes:?}");
}
