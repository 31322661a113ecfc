//! The gate's scores: how well a critic recognises a lesion where it was painted.
//!
//! Sets are those of the cube's voxels. With L the lesion and P the voxels that the critic calls tumour of the organ,
//! N = L dilated by max(6 mm, its radius), without P_before and without the other lesions dilated by one voxel.

use ndarray::{Array3, Axis, Zip};

use crate::checkpoint::Thresholds;
use crate::volume::{ClassSet, dilated};

/// A place the critic called tumour before synthesis, to more than this share, makes the host suspect.
pub const SUSPECT_SHARE: f64 = 0.1;
/// Scores nearer to a threshold than this might be decided otherwise by another numerics class.
pub const BORDERLINE: f64 = 0.01;
/// What the published rule asks of the mask: more than this share called tumour.
///
/// # Source
/// FreeTumor, section "filtering"; the released code's `filter_acc > 0.7`.
pub const PUBLISHED_RECALL: f64 = 0.7;
/// The least distance from the lesion at which false tumour counts, in mm.
const NEAR_MM: f64 = 6.0;

/// What the critic saw in a lesion's cube, and where the lesion is.
pub struct Judged<'a> {
    /// The critic's label ids before synthesis.
    pub before: &'a Array3<u8>,
    /// The critic's label ids after it.
    pub after: &'a Array3<u8>,
    /// The lesion: {soft mask >= 0.5}, 1 inside.
    pub lesion: &'a Array3<u8>,
    /// Real tumours and other lesions of the cube, 1 inside.
    pub others: &'a Array3<u8>,
    /// The label id of the organ's tumour.
    pub tumour_id: u8,
    /// Voxel size (z, y, x) in mm.
    pub spacing_mm: [f64; 3],
    /// Radius of the lesion's equivalent sphere in mm.
    pub radius_mm: f64,
}

/// The three scores, each in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// |P_after and L| / |L|.
    pub recall: f64,
    /// |P_after and N and L dilated by one voxel| / |P_after and N|; 0 where P_after misses N.
    pub precision: f64,
    /// |P_before and L| / |L|; above 0.1 the host is suspect.
    pub before: f64,
}

/// Returns the scores of one lesion.
///
/// # Panics
/// When the arrays' shapes differ.
pub fn scores(judged: &Judged) -> Scores {
    let Judged {
        before,
        after,
        lesion,
        others,
        tumour_id,
        spacing_mm,
        radius_mm,
    } = *judged;
    let near = dilated(lesion, spacing_mm, radius_mm.max(NEAR_MM));
    let touched = dilate_voxel(lesion);
    let taken = dilate_voxel(others);
    // Whole counts until the last division: the scores are exact whatever the order of the voxels.
    let (mut inside, mut found, mut suspect) = (0u64, 0u64, 0u64);
    Zip::from(lesion).and(before).and(after).for_each(|l, b, a| {
        inside += u64::from(*l != 0);
        found += u64::from(*l != 0 && *a == tumour_id);
        suspect += u64::from(*l != 0 && *b == tumour_id);
    });
    let (mut called, mut right) = (0u64, 0u64);
    Zip::from(&near)
        .and(&touched)
        .and(&taken)
        .and(before)
        .and(after)
        .for_each(|near, touched, taken, b, a| {
            let counts = *near && !*taken && *b != tumour_id && *a == tumour_id;
            called += u64::from(counts);
            right += u64::from(counts && *touched);
        });
    Scores {
        recall: share(found, inside),
        precision: share(right, called),
        before: share(suspect, inside),
    }
}

/// Returns the share of the lesion that the critic calls any tumour class: the published rule's score.
pub fn published_recall(after: &Array3<u8>, lesion: &Array3<u8>, tumours: ClassSet) -> f64 {
    let (mut inside, mut found) = (0u64, 0u64);
    Zip::from(lesion).and(after).for_each(|l, a| {
        inside += u64::from(*l != 0);
        found += u64::from(*l != 0 && tumours.contains(*a));
    });
    share(found, inside)
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// What the gate says of one lesion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Whether the lesion passes.
    pub passes: bool,
    /// Whether a score is so near its threshold that another numerics class might decide otherwise.
    pub borderline: bool,
    /// Whether the critic called the place tumour before.
    pub host_suspect: bool,
    /// How far the worse of the two scores lies above its threshold: what `best` compares.
    pub margin: f64,
}

impl Verdict {
    /// Asks also that the discriminator finds the lesion as real as `least`, both means of how probably real rather than painted it is.
    pub fn and_real(self, real: f64, least: f64) -> Self {
        Self {
            passes: self.passes && real >= least,
            borderline: self.borderline || (real - least).abs() < BORDERLINE,
            margin: self.margin.min(real - least),
            ..self
        }
    }

    /// What is said of a lesion of which nothing but this is known: it is refused.
    pub fn unreal(real: f64, least: f64) -> Self {
        Self {
            passes: false,
            borderline: (real - least).abs() < BORDERLINE,
            host_suspect: false,
            margin: real - least,
        }
    }
}

/// Compares scores with thresholds.
pub fn judge(scores: Scores, thresholds: Thresholds) -> Verdict {
    let margins = [
        scores.recall - thresholds.recall,
        scores.precision - thresholds.precision,
    ];
    let margin = margins[0].min(margins[1]);
    let host_suspect = scores.before > SUSPECT_SHARE;
    Verdict {
        // Where the critic misses a tenth of the real lesions, or few were scored, the calibrated threshold is 0: unseen lesions still fail.
        passes: margin >= 0.0 && scores.recall > 0.0 && !host_suspect,
        borderline: margins.iter().any(|m| m.abs() < BORDERLINE) || (scores.before - SUSPECT_SHARE).abs() < BORDERLINE,
        host_suspect,
        margin,
    }
}

/// Returns the share of the lesion that the critic calls the organ's tumour after synthesis: the first of [`scores`].
pub fn recall(after: &Array3<u8>, lesion: &Array3<u8>, tumour_id: u8) -> f64 {
    let mut tumours = ClassSet::default();
    tumours.insert(tumour_id);
    published_recall(after, lesion, tumours)
}

/// Returns the verdict on a lesion whose recall alone refuses it; nothing where the other scores have a say.
pub fn refused_by(recall: f64, thresholds: Thresholds) -> Option<Verdict> {
    let margin = recall - thresholds.recall;
    (margin < 0.0 || recall == 0.0).then_some(Verdict {
        passes: false,
        borderline: margin.abs() < BORDERLINE,
        host_suspect: false,
        margin,
    })
}

/// Applies the published rule to its score (see [`published_recall`]), which knows no precision and no suspect host.
pub fn judge_published(recall: f64) -> Verdict {
    let margin = recall - PUBLISHED_RECALL;
    Verdict {
        passes: margin > 0.0,
        borderline: margin.abs() < BORDERLINE,
        host_suspect: false,
        margin,
    }
}

/// Returns the voxels that are in the mask (1 inside) or touch it by a face, an edge or a corner.
pub fn dilate_voxel(mask: &Array3<u8>) -> Array3<bool> {
    let mut out = mask.map(|inside| *inside != 0);
    for axis in 0..3 {
        for mut lane in out.lanes_mut(Axis(axis)) {
            let line: Vec<bool> = lane.iter().copied().collect();
            for (at, value) in lane.iter_mut().enumerate() {
                *value = line[at.saturating_sub(1)..(at + 2).min(line.len())].contains(&true);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Rng};

    const TUMOUR: u8 = 2;

    fn ball(side: usize, radius: f64, value: u8) -> Array3<u8> {
        let c = side as f64 / 2.0;
        Array3::from_shape_fn([side; 3], |(z, y, x)| {
            let d = [z, y, x].map(|v| (v as f64 - c).powi(2)).iter().sum::<f64>();
            if d <= radius * radius { value } else { 1 - value.min(1) }
        })
    }

    fn judged<'a>(
        before: &'a Array3<u8>,
        after: &'a Array3<u8>,
        lesion: &'a Array3<u8>,
        others: &'a Array3<u8>,
    ) -> Judged<'a> {
        Judged {
            before,
            after,
            lesion,
            others,
            tumour_id: TUMOUR,
            spacing_mm: [1.0; 3],
            radius_mm: 4.0,
        }
    }

    #[test]
    fn a_perfect_critic_scores_one_and_a_blind_one_zero() {
        let lesion = ball(24, 4.0, 1);
        let organ = Array3::from_elem([24; 3], 1);
        let none = Array3::zeros([24; 3]);
        let seen = lesion.map(|l| if *l == 1 { TUMOUR } else { 1 });
        let all = scores(&judged(&organ, &seen, &lesion, &none));
        assert_eq!(
            all,
            Scores {
                recall: 1.0,
                precision: 1.0,
                before: 0.0
            }
        );
        let blind = scores(&judged(&organ, &organ, &lesion, &none));
        assert_eq!([blind.recall, blind.precision], [0.0, 0.0]);
        // What recall alone refuses is what all scores refuse; of the others it says nothing.
        let seen_half = Array3::from_shape_fn([24; 3], |(z, y, x)| if z < 12 { seen[[z, y, x]] } else { 1 });
        for after in [&organ, &seen_half, &seen] {
            let found = recall(after, &lesion, TUMOUR);
            let full = scores(&judged(&organ, after, &lesion, &none));
            assert_eq!(found, full.recall);
            for least in [0.0, 0.3, 0.9] {
                let thresholds = Thresholds {
                    recall: least,
                    precision: 0.0,
                };
                let early = refused_by(found, thresholds);
                assert_eq!(early.is_none(), judge(full, thresholds).passes, "{found} {least}");
                assert!(early.is_none_or(|verdict| !verdict.passes && verdict.margin == found - least));
            }
        }
        // Calling everything tumour: full recall, low precision, and a suspect host.
        let everything = Array3::from_elem([24; 3], TUMOUR);
        let loud = scores(&judged(&organ, &everything, &lesion, &none));
        assert!(loud.recall == 1.0 && loud.precision < 0.5, "{loud:?}");
        assert_eq!(scores(&judged(&everything, &everything, &lesion, &none)).before, 1.0);
    }

    #[test]
    fn scores_equal_their_definition_on_random_sets() {
        let mut rng = Rng::keyed(3, 0, 0, Purpose::Test);
        let shape = [9, 10, 11];
        let mut draw = |p: f64, value: u8| Array3::from_shape_fn(shape, |_| if rng.chance(p) { value } else { 0 });
        for _ in 0..5 {
            let (lesion, others) = (draw(0.01, 1), draw(0.02, 1));
            let (before, after) = (draw(0.05, TUMOUR), draw(0.4, TUMOUR));
            let judged = Judged {
                spacing_mm: [3.0, 1.5, 2.0],
                radius_mm: 2.0,
                ..judged(&before, &after, &lesion, &others)
            };
            let members: Vec<[usize; 3]> = lesion
                .indexed_iter()
                .filter(|(_, l)| **l == 1)
                .map(|((z, y, x), _)| [z, y, x])
                .collect();
            let gap = |a: usize, b: usize| a.abs_diff(b) as f64;
            let touches = |mask: &Array3<u8>, (z, y, x): (usize, usize, usize)| {
                mask.indexed_iter()
                    .any(|((a, b, c), m)| *m == 1 && a.abs_diff(z) <= 1 && b.abs_diff(y) <= 1 && c.abs_diff(x) <= 1)
            };
            let (mut called, mut right) = (0, 0);
            for (at, a) in after.indexed_iter() {
                let near = members.iter().any(|m| {
                    let d = [gap(m[0], at.0) * 3.0, gap(m[1], at.1) * 1.5, gap(m[2], at.2) * 2.0];
                    d.iter().map(|v| v * v).sum::<f64>() <= 36.0
                });
                if near && *a == TUMOUR && before[at] != TUMOUR && !touches(&others, at) {
                    called += 1;
                    right += u64::from(touches(&lesion, at));
                }
            }
            let got = scores(&judged);
            assert_eq!(got.precision, share(right, called));
            let found = members.iter().filter(|m| after[**m] == TUMOUR).count();
            assert_eq!(got.recall, share(found as u64, members.len() as u64));
        }
    }

    #[test]
    fn real_tumours_beside_the_lesion_cost_no_precision() {
        let lesion = ball(24, 4.0, 1);
        let mut others = Array3::zeros([24; 3]);
        others.slice_mut(ndarray::s![4..6, 4..20, 4..20]).fill(1u8);
        let organ = Array3::from_elem([24; 3], 1);
        let seen = ndarray::Zip::from(&lesion)
            .and(&others)
            .map_collect(|l, o| if *l + *o > 0 { TUMOUR } else { 1 });
        assert_eq!(scores(&judged(&organ, &seen, &lesion, &others)).precision, 1.0);
        let none = Array3::zeros([24; 3]);
        assert!(scores(&judged(&organ, &seen, &lesion, &none)).precision < 1.0);
    }

    #[test]
    fn verdicts_follow_thresholds() {
        let thresholds = Thresholds {
            recall: 0.5,
            precision: 0.3,
        };
        let scores = |recall, precision, before| Scores {
            recall,
            precision,
            before,
        };
        assert!(judge(scores(0.5, 0.3, 0.0), thresholds).passes);
        assert!(!judge(scores(0.49, 1.0, 0.0), thresholds).passes);
        assert!(!judge(scores(1.0, 0.29, 0.0), thresholds).passes);
        let suspect = judge(scores(1.0, 1.0, 0.2), thresholds);
        assert!(suspect.host_suspect && !suspect.passes && !suspect.borderline);
        assert!(judge(scores(0.505, 1.0, 0.0), thresholds).borderline);
        assert!(!judge_published(0.7).passes && judge_published(0.72).passes);
    }
}
