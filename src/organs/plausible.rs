//! Whether what a network calls an organ can be one: its pieces, its volume, its HU.

use std::cmp::Reverse;

use ndarray::Array3;
use serde::Serialize;

use super::Anatomy;
use crate::volume::{BACKGROUND, Connectivity, IGNORE, LabelMap, Shape, components};

/// A further piece of a paired organ has at least this share of the first one's voxels; what is smaller is a speck.
const LEAST_PIECE: f64 = 0.2;
/// The pieces kept hold at least this share of the organ's predicted voxels; else the prediction is scattered.
const LEAST_KEPT: f64 = 0.7;
/// Of an organ that the volume's border cuts, at least this share of the least volume is asked.
const LEAST_WHEN_CUT: f64 = 0.2;
/// Tissue is never of one value: less spread than this, in HU, is no scan.
const LEAST_SPREAD_HU: f64 = 1.0;

/// A case's image and what a network predicts of it.
pub struct Scan<'a> {
    /// HU.
    pub image: &'a Array3<i16>,
    /// The network's label ids.
    pub prediction: &'a Array3<u8>,
    /// Voxel size (z, y, x) in mm.
    pub spacing_mm: [f64; 3],
}

/// What became of an organ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OrganVerdict {
    /// Its voxels are stored.
    Accepted,
    /// Its voxels count as unknown.
    Refused,
    /// The network predicts no voxel of it; it counts as unknown.
    Absent,
}

/// What a network predicts of one organ, and what is thought of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OrganReport {
    /// The organ's name.
    pub organ: String,
    /// What became of it.
    pub verdict: OrganVerdict,
    /// Why it was refused.
    pub reasons: Vec<String>,
    /// What a user should know.
    pub notes: Vec<String>,
    /// Volume of the pieces kept, tumours predicted in them included, in ml.
    pub volume_ml: f64,
    /// Pieces predicted: voxels that share a face, an edge or a corner are of one piece.
    pub components: usize,
    /// Pieces kept.
    pub kept: usize,
    /// Share of the organ's predicted voxels that lie in them.
    pub kept_share: f64,
    /// Mean of the kept voxels in HU; absent without a voxel.
    pub mean_hu: Option<f64>,
    /// Their standard deviation in HU.
    pub spread_hu: Option<f64>,
    /// Voxels predicted as the organ's tumour, anywhere: sent as *ignore* where any organ is accepted.
    pub suspect_voxels: usize,
}

/// Labels for a case.
pub struct Proposal {
    /// Ids of accepted organs; 255 where the network calls any tumour, so that it never counts as healthy tissue.
    pub labels: Array3<u8>,
    /// The accepted organs' names.
    pub accepted: Vec<String>,
    /// Every organ of the label map, by id.
    pub organs: Vec<OrganReport>,
}

/// A class that is neither background nor tumour.
struct Tissue {
    name: String,
    id: u8,
    tumour_id: Option<u8>,
}

/// Keeps of a prediction what can be the organ that it is called.
///
/// Of every organ together with its tumour the largest pieces are kept, one or, of paired organs, two; the rest counts as
/// background. An organ that is refused becomes background too, and stays out of `accepted`: nobody has looked for it.
pub fn propose(scan: &Scan, map: &LabelMap) -> Proposal {
    let mut proposal = Proposal {
        labels: Array3::from_elem(scan.prediction.dim(), BACKGROUND),
        accepted: Vec::new(),
        organs: Vec::new(),
    };
    for tissue in tissues(map) {
        let (report, kept) = examine(scan, &tissue);
        if report.verdict == OrganVerdict::Accepted {
            kept.iter()
                .flatten()
                .for_each(|voxel| proposal.labels[*voxel] = tissue.id);
            proposal.accepted.push(tissue.name);
        }
        proposal.organs.push(report);
    }
    if !proposal.accepted.is_empty() {
        let is_tumour = |id: u8| map.name(id).is_some_and(|name| name.ends_with("_tumour"));
        let tumours: Vec<u8> = (0..IGNORE).filter(|id| is_tumour(*id)).collect();
        ndarray::Zip::from(&mut proposal.labels)
            .and(scan.prediction)
            .for_each(|label, predicted| {
                if tumours.contains(predicted) {
                    *label = IGNORE;
                }
            });
    }
    proposal
}

/// Lists the classes to be examined, by id.
fn tissues(map: &LabelMap) -> Vec<Tissue> {
    let organs = map
        .iter()
        .filter(|(name, id)| *id != BACKGROUND && !name.ends_with("_tumour"));
    let mut tissues: Vec<Tissue> = organs
        .map(|(name, id)| Tissue {
            name: name.into(),
            id,
            tumour_id: map.id(&format!("{name}_tumour")).ok(),
        })
        .collect();
    tissues.sort_by_key(|tissue| tissue.id);
    tissues
}

/// A piece of an organ.
struct Piece {
    /// Voxels of the organ without its tumour.
    healthy: usize,
    voxels: Vec<Shape>,
}

/// Judges one organ and lists the voxels of its pieces that are kept.
fn examine(scan: &Scan, tissue: &Tissue) -> (OrganReport, Vec<Vec<Shape>>) {
    let mut pieces = pieces(scan, tissue);
    let anatomy = Anatomy::of(&tissue.name);
    let components = pieces.len();
    let all: usize = pieces.iter().map(|piece| piece.healthy).sum();
    let least = pieces.first().map_or(0.0, |piece| LEAST_PIECE * piece.healthy as f64);
    pieces.truncate(anatomy.map_or(usize::MAX, |anatomy| anatomy.pieces));
    pieces.retain(|piece| piece.healthy as f64 >= least);
    let healthy: usize = pieces.iter().map(|piece| piece.healthy).sum();
    let voxels: usize = pieces.iter().map(|piece| piece.voxels.len()).sum();
    let suspects = |id: &&u8| Some(**id) == tissue.tumour_id;
    let hu = moments(scan, tissue, &pieces);
    let mut report = OrganReport {
        organ: tissue.name.clone(),
        verdict: OrganVerdict::Absent,
        reasons: Vec::new(),
        notes: Vec::new(),
        volume_ml: voxels as f64 * scan.spacing_mm.iter().product::<f64>() / 1000.0,
        components,
        kept: pieces.len(),
        kept_share: if all == 0 { 0.0 } else { healthy as f64 / all as f64 },
        mean_hu: hu.map(|[mean, _]| mean),
        spread_hu: hu.map(|[_, spread]| spread),
        suspect_voxels: scan.prediction.iter().filter(suspects).count(),
    };
    let cut = pieces
        .iter()
        .any(|piece| touches_border(&piece.voxels, scan.prediction.dim()));
    if let Some([mean, spread]) = hu {
        judge(&mut report, anatomy, [mean, spread], cut);
    }
    (report, pieces.into_iter().map(|piece| piece.voxels).collect())
}

/// Lists the pieces of an organ and its tumour that hold any of its own voxels, those with most of them first.
fn pieces(scan: &Scan, tissue: &Tissue) -> Vec<Piece> {
    let of_organ = scan
        .prediction
        .mapv(|id| id == tissue.id || Some(id) == tissue.tumour_id);
    let found = components(of_organ, Connectivity::Corners).into_iter();
    let mut pieces: Vec<Piece> = found
        .map(|voxels| Piece {
            healthy: voxels
                .iter()
                .filter(|voxel| scan.prediction[**voxel] == tissue.id)
                .count(),
            voxels,
        })
        .filter(|piece| piece.healthy > 0)
        .collect();
    // Stable: of equals the first in scan order stays first.
    pieces.sort_by_key(|piece| Reverse(piece.healthy));
    pieces
}

/// Returns mean and standard deviation of the organ's own voxels; nothing without one.
fn moments(scan: &Scan, tissue: &Tissue, pieces: &[Piece]) -> Option<[f64; 2]> {
    let voxels = pieces.iter().flat_map(|piece| &piece.voxels);
    let own = voxels.filter(|voxel| scan.prediction[**voxel] == tissue.id);
    let (mut count, mut sum, mut squares) = (0i64, 0i64, 0i64);
    for hu in own.map(|voxel| i64::from(scan.image[*voxel])) {
        count += 1;
        sum += hu;
        squares += hu * hu;
    }
    let mean = sum as f64 / count as f64;
    (count > 0).then(|| [mean, (squares as f64 / count as f64 - mean * mean).max(0.0).sqrt()])
}

fn touches_border(voxels: &[Shape], (d, h, w): (usize, usize, usize)) -> bool {
    let at_border = |voxel: &Shape| (0..3).any(|axis| voxel[axis] == 0 || voxel[axis] + 1 == [d, h, w][axis]);
    voxels.iter().any(at_border)
}

/// Writes verdict, reasons and notes into an organ's report.
fn judge(report: &mut OrganReport, anatomy: Option<Anatomy>, [mean, spread]: [f64; 2], cut: bool) {
    let mut reasons = Vec::new();
    if report.kept_share < LEAST_KEPT {
        reasons.push(format!(
            "scattered: {} pieces, the {} kept hold {:.2} of its voxels, expected at least {LEAST_KEPT}",
            report.components, report.kept, report.kept_share
        ));
    }
    if spread < LEAST_SPREAD_HU {
        reasons.push(format!("spread {spread:.1} HU: expected at least {LEAST_SPREAD_HU}"));
    }
    match anatomy {
        Some(anatomy) => reasons.extend(out_of_bounds(report.volume_ml, [mean, spread], anatomy, cut)),
        None => report
            .notes
            .push("no bounds known for this organ: only its pieces were checked".into()),
    }
    if cut {
        report
            .notes
            .push("touches the volume's border: only a part may be seen".into());
    }
    if anatomy.is_some_and(|anatomy| report.kept < anatomy.pieces) {
        report
            .notes
            .push("one piece of a pair: the other is missing, or both touch".into());
    }
    report.verdict = if reasons.is_empty() {
        OrganVerdict::Accepted
    } else {
        OrganVerdict::Refused
    };
    report.reasons = reasons;
}

/// Names the bounds that an organ breaks.
fn out_of_bounds(volume_ml: f64, [mean, spread]: [f64; 2], anatomy: Anatomy, cut: bool) -> Vec<String> {
    let [least, most] = anatomy.volume_ml;
    let least = if cut { LEAST_WHEN_CUT * least } else { least };
    let mut reasons = Vec::new();
    if !(least..=most).contains(&volume_ml) {
        reasons.push(format!("volume {volume_ml:.0} ml: expected {least:.0} to {most:.0}"));
    }
    let [low, high] = anatomy.mean_hu;
    if !(low..=high).contains(&mean) {
        reasons.push(format!("mean {mean:.0} HU: expected {low:.0} to {high:.0}"));
    }
    if spread > anatomy.spread_hu {
        reasons.push(format!(
            "spread {spread:.0} HU: expected at most {:.0}",
            anatomy.spread_hu
        ));
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Rng};

    const SIDE: usize = 40;

    /// A volume of 5 mm voxels: fat with noise, and boxes of (start, size, id, HU).
    fn volume(boxes: &[([usize; 3], [usize; 3], u8, i16)]) -> (Array3<i16>, Array3<u8>) {
        let mut rng = Rng::keyed(1, 0, 0, Purpose::Test);
        let mut image = Array3::from_elem([SIDE; 3], -100i16);
        let mut prediction = Array3::zeros([SIDE; 3]);
        for (start, size, id, hu) in boxes {
            let part = ndarray::s![
                start[0]..start[0] + size[0],
                start[1]..start[1] + size[1],
                start[2]..start[2] + size[2]
            ];
            image.slice_mut(part).fill(*hu);
            prediction.slice_mut(part).fill(*id);
        }
        image.mapv_inplace(|hu| hu + rng.below(21) as i16 - 10);
        (image, prediction)
    }

    fn propose_in(boxes: &[([usize; 3], [usize; 3], u8, i16)]) -> Proposal {
        let (image, prediction) = volume(boxes);
        let scan = Scan {
            image: &image,
            prediction: &prediction,
            spacing_mm: [5.0; 3],
        };
        propose(&scan, &LabelMap::default())
    }

    /// 20 x 20 x 20 voxels of 0.125 ml are a liver of 1000 ml.
    const LIVER: ([usize; 3], [usize; 3], u8, i16) = ([4, 4, 4], [20, 20, 20], 1, 100);

    #[test]
    fn specks_are_dropped_and_the_organ_kept() {
        let proposal = propose_in(&[
            LIVER,
            ([30, 30, 30], [3, 3, 3], 1, 100),
            ([36, 2, 2], [1, 1, 1], 1, 100),
        ]);
        let liver = &proposal.organs[0];
        assert_eq!(liver.verdict, OrganVerdict::Accepted, "{liver:?}");
        assert_eq!((liver.components, liver.kept), (3, 1));
        assert_eq!(liver.kept_share, 8000.0 / 8028.0);
        assert_eq!(liver.volume_ml, 1000.0);
        assert!((liver.mean_hu.unwrap() - 100.0).abs() < 1.0, "{liver:?}");
        // Evenly from -10 to 10: the root of (21^2 - 1) / 12.
        assert!((liver.spread_hu.unwrap() - 6.06).abs() < 0.2, "{liver:?}");
        assert_eq!(proposal.accepted, ["liver"]);
        assert_eq!(proposal.labels.iter().filter(|label| **label == 1).count(), 8000);
        assert_eq!(
            proposal.labels.iter().filter(|label| **label == 0).count(),
            SIDE.pow(3) - 8000
        );
        assert!(
            proposal.organs[1..]
                .iter()
                .all(|organ| organ.verdict == OrganVerdict::Absent)
        );
    }

    #[test]
    fn two_livers_are_refused() {
        let proposal = propose_in(&[([2, 2, 2], [16, 16, 16], 1, 100), ([22, 22, 22], [16, 16, 16], 1, 100)]);
        let liver = &proposal.organs[0];
        assert_eq!((liver.verdict, liver.kept_share), (OrganVerdict::Refused, 0.5));
        assert!(
            liver.reasons.len() == 1 && liver.reasons[0].starts_with("scattered: 2 pieces"),
            "{liver:?}"
        );
        assert!(proposal.accepted.is_empty() && proposal.labels.iter().all(|label| *label == 0));
    }

    #[test]
    fn wrong_hu_sizes_and_constants_are_refused() {
        let reasons = |part| propose_in(&[part]).organs.swap_remove(0).reasons;
        let starts = |reasons: &[String], what: &str| reasons.len() == 1 && reasons[0].starts_with(what);
        assert!(starts(
            &reasons(([4, 4, 4], [20, 20, 20], 1, -700)),
            "mean -700 HU: expected -20 to 200"
        ));
        assert!(starts(&reasons(([4, 4, 4], [20, 20, 20], 1, 900)), "mean 900 HU"));
        assert!(starts(
            &reasons(([4, 4, 4], [12, 12, 12], 1, 100)),
            "volume 216 ml: expected 300 to 6000"
        ));
        assert!(starts(&reasons(([1, 1, 1], [38, 38, 38], 1, 100)), "volume 6859 ml"));
        let (mut image, prediction) = volume(&[LIVER]);
        let scan = |image: &Array3<i16>| {
            let scan = Scan {
                image,
                prediction: &prediction,
                spacing_mm: [5.0; 3],
            };
            propose(&scan, &LabelMap::default()).organs.swap_remove(0).reasons
        };
        image.fill(100);
        assert!(starts(&scan(&image), "spread 0.0 HU"));
        ndarray::Zip::indexed(&mut image).for_each(|(z, _, _), hu| *hu = if z % 2 == 0 { -200 } else { 300 });
        assert!(starts(&scan(&image), "spread 250 HU: expected at most 80"));
    }

    #[test]
    fn kidneys_are_two_and_a_missing_one_is_a_note() {
        let right = ([10, 10, 6], [12, 8, 8], 5, 150);
        let left = ([10, 10, 26], [12, 8, 8], 5, 150);
        let both = propose_in(&[right, left, ([2, 2, 2], [4, 4, 4], 5, 150)]);
        let kidney = &both.organs[2];
        assert_eq!(
            (kidney.verdict, kidney.components, kidney.kept),
            (OrganVerdict::Accepted, 3, 2)
        );
        assert!(kidney.notes.is_empty() && kidney.volume_ml == 192.0, "{kidney:?}");
        let one = propose_in(&[right]).organs.swap_remove(2);
        assert_eq!(one.verdict, OrganVerdict::Accepted);
        assert!(one.notes[0].starts_with("one piece of a pair"), "{one:?}");
    }

    #[test]
    fn an_organ_at_the_border_may_be_smaller_and_is_noted() {
        let cut = propose_in(&[([0, 4, 4], [12, 12, 12], 1, 100)]).organs.swap_remove(0);
        assert_eq!((cut.verdict, cut.volume_ml), (OrganVerdict::Accepted, 216.0));
        assert!(cut.notes[0].contains("border"), "{cut:?}");
        let stump = propose_in(&[([0, 4, 4], [4, 10, 10], 1, 100)]).organs.swap_remove(0);
        assert_eq!(stump.verdict, OrganVerdict::Refused, "{stump:?}");
    }

    #[test]
    fn a_predicted_tumour_is_unknown_and_joins_its_organ() {
        // A slab of tumour divides the liver: still one piece. Another lies far from any organ.
        let proposal = propose_in(&[
            LIVER,
            ([12, 4, 4], [2, 20, 20], 2, 60),
            ([34, 34, 34], [2, 2, 2], 4, 60),
        ]);
        let liver = &proposal.organs[0];
        assert_eq!((liver.verdict, liver.components), (OrganVerdict::Accepted, 1));
        assert_eq!((liver.suspect_voxels, liver.volume_ml), (800, 1000.0));
        let count = |id: u8| proposal.labels.iter().filter(|label| **label == id).count();
        assert_eq!((count(1), count(IGNORE)), (7200, 808));
        assert_eq!(proposal.organs[1].verdict, OrganVerdict::Absent);
    }

    #[test]
    fn pieces_are_those_that_scipy_finds() {
        // ((73856093 z) ^ (19349663 y) ^ (83492791 x)) mod 2^32 mod 1000 < 60 on 24 x 20 x 28 voxels.
        let prediction = Array3::from_shape_fn((24, 20, 28), |(z, y, x)| {
            let [z, y, x] = [z, y, x].map(|v| v as u32);
            let hash = z.wrapping_mul(73_856_093) ^ y.wrapping_mul(19_349_663) ^ x.wrapping_mul(83_492_791);
            u8::from(hash % 1000 < 60)
        });
        let image = Array3::zeros(prediction.dim());
        let scan = Scan {
            image: &image,
            prediction: &prediction,
            spacing_mm: [1.0; 3],
        };
        let liver = Tissue {
            name: "liver".into(),
            id: 1,
            tumour_id: Some(2),
        };
        let pieces = pieces(&scan, &liver);
        let sizes: Vec<usize> = pieces.iter().map(|piece| piece.voxels.len()).collect();
        // scipy 1.17.1: label(mask, numpy.ones((3, 3, 3))), the sizes by numpy.bincount, largest first.
        assert_eq!(sizes.iter().sum::<usize>(), 787);
        assert_eq!((sizes.len(), &sizes[..5]), (354, &[19, 16, 15, 12, 11][..]));
    }
}
