//! Scores as one HTML file that needs neither a network nor scripts.

use serde::Serialize;

use super::case::ClassMeasures;
use super::held_out::HeldOut;
use super::plot::{Row, plot};
use super::slice::Slice;
use super::statistics::Summary;
use super::summary::{LesionRates, Rate};

/// How wide a picture should be at least, in pixels.
const WIDTH: usize = 800;
/// The page around a report's body.
const PAGE: &str = include_str!("report.html");
/// How HD95 is computed, named wherever it is shown.
pub const HD95_VARIANT: &str =
    "robust Hausdorff distance of surface elements: 95th percentile by area, the larger of both directions";

/// What a report is about.
pub struct ReportHead<'a> {
    /// The network's role and hash.
    pub model: &'a str,
    /// The store's snapshot, or the datalist.
    pub snapshot: &'a str,
    /// What was not scored.
    pub left_out: LeftOut,
}

/// Cases that were not scored, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// The model was trained on them, on near-duplicates or on other scans of their patients.
    pub trained_on: usize,
    /// Nobody looked for tumours in them.
    pub unannotated: usize,
    /// More than `held_out.cases`: nobody looked at them.
    pub beyond_limit: usize,
    /// They cannot be read.
    pub refused: usize,
}

impl LeftOut {
    /// Says it in words; nothing where every case was scored.
    fn words(&self) -> Option<String> {
        let reasons = [
            (self.trained_on, "trained on"),
            (self.unannotated, "nobody looked for tumours"),
            (self.beyond_limit, "more than held_out.cases"),
            (self.refused, "cannot be read"),
        ];
        let said = reasons.iter().filter(|(cases, _)| *cases > 0);
        let said: Vec<String> = said.map(|(cases, why)| format!("{cases} ({why})")).collect();
        (!said.is_empty()).then(|| said.join(", "))
    }
}

/// Writes scores and pictures as an HTML page.
pub fn html(head: &ReportHead, scores: &HeldOut, slices: &[Slice]) -> String {
    let body = [
        introduction(head, scores),
        classes(scores),
        lesions(scores),
        tumour_free(scores),
        pictures(slices),
        cases(scores),
        settings(scores),
    ];
    // One pass: nothing that comes from names can open a second placeholder.
    let title = "Evaluation";
    PAGE.split("{{title}}")
        .collect::<Vec<_>>()
        .join(title)
        .replacen("{{body}}", &body.concat(), 1)
}

/// Escapes text for HTML and its attributes.
pub(super) fn escape(text: &str) -> String {
    let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    escaped.replace('"', "&quot;").replace('\'', "&#39;")
}

fn introduction(head: &ReportHead, scores: &HeldOut) -> String {
    let left_out = head.left_out.words();
    let left_out = left_out.map_or(String::new(), |words| format!(" Left out: {words}."));
    format!(
        "<p>{} cases of snapshot {}, predicted by {}.{left_out}</p>\n<p class=\"note\">Means are over patients, brackets are 95 % bootstrap \
         intervals. A class that is neither there nor predicted has no score and is left out. HD95 is the {HD95_VARIANT}; it \
         is undefined where a mask is empty.</p>\n",
        scores.cases.len(),
        escape(head.snapshot),
        escape(head.model)
    )
}

fn classes(scores: &HeldOut) -> String {
    let of_cases = |class: &str, value: &dyn Fn(&ClassMeasures) -> Option<f64>| -> Vec<f64> {
        let measured = scores.scores.iter().filter_map(|score| score.classes.get(class));
        measured.filter(|m| m.overlap.truth > 0).filter_map(value).collect()
    };
    let seen = || {
        scores
            .classes
            .iter()
            .filter(|(_, score)| score.cases + score.false_alarms > 0)
    };
    let rows = |title: &str, mean: &dyn Fn(&str) -> Summary, value: &dyn Fn(&ClassMeasures) -> Option<f64>| {
        let row = |class: &String| {
            let summary = mean(class);
            Row {
                name: class.clone(),
                values: of_cases(class, value),
                centre: summary.mean,
                interval: summary.interval,
            }
        };
        plot(title, &seen().map(|(class, _)| row(class)).collect::<Vec<_>>())
    };
    let dice = rows("Dice", &|class| scores.classes[class].dice_by_patient.clone(), &|m| {
        m.dice
    });
    let nsd = rows("NSD", &|class| scores.classes[class].nsd.clone(), &|m| m.nsd);
    let lines = seen().map(|(class, score)| {
        line([
            escape(class),
            score.cases.to_string(),
            shown(&score.dice_by_patient),
            format!("{}{}", number(score.pooled_dice), brackets(score.pooled_dice_interval)),
            shown(&score.nsd),
            format!("{}{}", number(score.pooled_nsd), brackets(score.pooled_nsd_interval)),
            format!("{} mm", score.tolerance_mm),
            shown(&score.hd95_mm),
            score.hd95_undefined.to_string(),
            score.false_alarms.to_string(),
        ])
    });
    let head = [
        "class",
        "cases",
        "Dice",
        "pooled",
        "NSD",
        "pooled",
        "tolerance",
        "HD95 in mm",
        "undefined",
        "false alarms",
    ];
    format!(
        "<h2>Overlap and surfaces</h2>\n{}<h3>Dice</h3>\n{dice}<h3>Normalised surface Dice</h3>\n{nsd}",
        table(&head, lines)
    )
}

fn lesions(scores: &HeldOut) -> String {
    let mut out = String::from(
        "<h2>Lesions</h2>\n<p class=\"note\">26-connected components, matched one to one at an intersection over union of at least \
         0.1. Values are of all lesions together; a false positive has the predicted lesion's size.</p>\n",
    );
    let mut rows = Vec::new();
    let mut lines = Vec::new();
    for (organ, lesions) in &scores.lesions {
        let by_size = lesions.by_size.iter().map(|(size, rates)| (size.name(), rates));
        for (size, rates) in std::iter::once(("all", &lesions.all)).chain(by_size) {
            lines.push(lesion_line(&format!("{} {size}", escape(organ)), rates));
            let row = |what: &str, rate: &Rate| Row {
                name: format!("{organ} {size}: {what}"),
                values: Vec::new(),
                centre: rate.pooled,
                interval: rate.interval,
            };
            rows.extend([
                row("sensitivity", &rates.sensitivity),
                row("precision", &rates.precision),
            ]);
        }
        let (merges, splits) = (lesions.merges, lesions.splits);
        out += &format!(
            "<p>{}: {merges} predicted lesions touch several true ones, {splits} true ones are touched by several.</p>\n",
            escape(organ)
        );
    }
    let head = [
        "organ and size",
        "true",
        "matched",
        "false positives",
        "sensitivity",
        "precision",
        "F1",
        "touched at all",
        "predictions that touch",
    ];
    out + &table(&head, lines.into_iter()) + &plot("Lesions by size", &rows)
}

fn lesion_line(name: &str, rates: &LesionRates) -> String {
    let rate = |rate: &Rate| format!("{}{}", number(rate.pooled), brackets(rate.interval));
    line([
        name.into(),
        rates.counts.truths.to_string(),
        rates.counts.matched.to_string(),
        rates.counts.false_positives.to_string(),
        rate(&rates.sensitivity),
        rate(&rates.precision),
        rate(&rates.f1),
        number(rates.sensitivity_any_overlap.pooled),
        number(rates.precision_any_overlap.pooled),
    ])
}

fn tumour_free(scores: &HeldOut) -> String {
    let lines = scores.lesions.iter().map(|(organ, lesions)| {
        let free = &lesions.tumour_free;
        line([
            escape(organ),
            free.cases.to_string(),
            free.with_any.to_string(),
            shown(&free.volume_ml),
            shown(&free.lesions),
        ])
    });
    let head = [
        "organ",
        "tumour-free cases",
        "with false positives",
        "ml per case",
        "lesions per case",
    ];
    format!("<h2>Tumour-free cases</h2>\n{}", table(&head, lines))
}

fn pictures(slices: &[Slice]) -> String {
    let figure = |slice: &Slice| {
        // Whole multiples keep pixels square; coarse grids would be stamps otherwise.
        let zoom = (WIDTH / slice.width).clamp(1, 4);
        let height = (zoom * slice.height) as f64 * slice.aspect;
        format!(
            "<figure><img width=\"{}\" height=\"{height:.0}\" alt=\"slice {} of {case}\" src=\"{}\"><figcaption>{case}, slice {}\
             </figcaption></figure>\n",
            zoom * slice.width,
            slice.number,
            slice.uri,
            slice.number,
            case = escape(&slice.case)
        )
    };
    format!(
        "<h2>Slices</h2>\n<p class=\"note\">Green: truth. Magenta: prediction. White: both. The slice with the most tumour, the \
         patient's right on the left.</p>\n{}",
        slices.iter().map(figure).collect::<String>()
    )
}

fn cases(scores: &HeldOut) -> String {
    let lines = scores.scores.iter().flat_map(|score| {
        let shown = score
            .classes
            .iter()
            .filter(|(_, m)| m.overlap.truth + m.overlap.predicted > 0);
        shown.map(|(class, measures)| {
            line([
                escape(&score.case),
                escape(&score.patient),
                escape(class),
                number(measures.dice),
                number(measures.nsd),
                number(measures.hd95_mm),
                format!("{:.1}", measures.truth_ml),
                format!("{:.1}", measures.predicted_ml),
            ])
        })
    });
    let head = [
        "case",
        "patient",
        "class",
        "Dice",
        "NSD",
        "HD95 in mm",
        "true ml",
        "predicted ml",
    ];
    format!("<h2>Cases</h2>\n{}", table(&head, lines))
}

fn settings(scores: &HeldOut) -> String {
    let settings = serde_json::to_string_pretty(&scores.settings).expect("settings are representable in JSON");
    format!("<h2>Settings</h2>\n<pre>{}</pre>\n", escape(&settings))
}

fn table<const N: usize>(head: &[&str; N], lines: impl Iterator<Item = String>) -> String {
    let head: String = head.iter().map(|name| format!("<th>{name}</th>")).collect();
    let lines: String = lines.collect();
    format!("<div class=\"wide\"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table></div>\n")
}

/// Returns a table's line; the cells are HTML already.
fn line<const N: usize>(cells: [String; N]) -> String {
    let cells: String = cells.iter().map(|cell| format!("<td>{cell}</td>")).collect();
    format!("<tr>{cells}</tr>\n")
}

fn shown(summary: &Summary) -> String {
    let spread = summary.sd.map_or(String::new(), |sd| format!(" &plusmn; {sd:.3}"));
    format!("{}{spread}{}", number(summary.mean), brackets(summary.interval))
}

fn brackets(interval: Option<[f64; 2]>) -> String {
    interval.map_or(String::new(), |[low, high]| format!(" [{low:.3}, {high:.3}]"))
}

fn number(value: Option<f64>) -> String {
    value.map_or("-".into(), |value| format!("{value:.3}"))
}

#[cfg(test)]
mod tests {
    use ndarray::Array3;

    use super::*;
    use crate::evaluate::{Comparison, HeldOutSettings, Scored};
    use crate::volume::{Annotation, HuWindow, LabelMap};

    #[test]
    fn a_page_holds_everything_and_asks_for_nothing() {
        let labels = LabelMap::default();
        let truth = Array3::from_shape_fn((6, 20, 30), |(z, y, x)| match (z, y, x) {
            (2..5, 5..15, 5..25) if z == 3 && x > 18 => 2,
            (2..5, 5..15, 5..25) => 1,
            _ => 0,
        });
        let prediction = truth.mapv(|id| if id == 2 { 1 } else { id });
        let annotation = Annotation {
            classes: vec!["liver".into(), "liver_tumour".into()],
            assumed_tumour_free: false,
        };
        let settings = HeldOutSettings::default();
        let score = |case: &str, prediction: &Array3<u8>| {
            let comparison = Comparison {
                prediction,
                truth: &truth,
                annotation: &annotation,
                spacing_mm: [3.0, 1.0, 1.0],
            };
            comparison
                .measure(&labels, &settings.tolerance)
                .unwrap()
                .named(case, "")
        };
        let scores = vec![score("<script>alert(1)</script>", &prediction), score("b", &truth)];
        let slice = Slice::of(
            &Scored {
                score: &scores[0],
                image: &Array3::from_elem((6, 20, 30), 40),
                truth: &truth,
                prediction: &prediction,
                spacing_mm: [3.0, 1.0, 1.0],
            },
            &labels,
            HuWindow::default(),
        );
        assert_eq!((slice.number, slice.width, slice.height), (3, 60, 20));
        let held_out = HeldOut::of(scores, &labels, &settings);
        let head = ReportHead {
            model: "critic",
            snapshot: "1",
            left_out: LeftOut {
                trained_on: 3,
                refused: 1,
                ..LeftOut::default()
            },
        };
        let page = html(&head, &held_out, &[slice]);
        assert!(
            page.contains("&lt;script&gt;alert(1)") && !page.contains("<script"),
            "{page}"
        );
        assert!(page.contains("Left out: 3 (trained on), 1 (cannot be read)."));
        assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("{{"));
        assert!(page.contains("src=\"data:image/png;base64,iVBOR") && page.contains("<svg"));
        // The tumour is missed in one of two cases.
        let tumour = &held_out.classes["liver_tumour"];
        assert_eq!((tumour.cases, tumour.hd95_undefined, tumour.dice), (2, 1, Some(0.5)));
        // Together 2 T / (2 T + T); of the four draws of two patients one has the missed tumour twice, one the found one.
        assert_eq!(tumour.pooled_dice, Some(2.0 / 3.0));
        assert_eq!(tumour.pooled_dice_interval, Some([0.0, 1.0]));
        // The missed tumour has a surface of A, the found one two: 2 A of 3 A are near.
        assert!((tumour.pooled_nsd.unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(tumour.pooled_nsd_interval, Some([0.0, 1.0]));
        assert_eq!(held_out.lesions["liver"].all.sensitivity.pooled, Some(0.5));
        assert_eq!(held_out.lesions["liver"].tumour_free.cases, 0);
    }
}
