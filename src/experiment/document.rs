//! The results as a page of tables and as pictures.

use std::fmt::Write;

use super::cohort::{TEST_SCANNERS, scanner_of};
use super::results::mean;
use super::{Arm, ExperimentConfig, PairedDifference, Results, paired_difference};
use crate::evaluate::{self, Bootstrap, Curve, PlotRow, Summary, plot};

/// Returns the page: tables of the arms, of the scanners, the comparisons, and the curves, as far as there are runs.
pub fn page(results: &Results, config: &ExperimentConfig) -> String {
    let mut page = format!(
        "Configuration `{}`; {} test cases; arms with {} labelled and {} unlabelled patients.\n",
        results.config,
        results.cases.len(),
        config.labelled,
        config.unlabelled
    );
    page += &arms(results, config);
    page += &scanners(results, config);
    page += &comparisons(results, config);
    page += &curves(results, config);
    page
}

fn percent(value: Option<f64>) -> String {
    value.map_or("-".into(), |value| format!("{:.1}", 100.0 * value))
}

fn arms(results: &Results, config: &ExperimentConfig) -> String {
    let mut table = String::from(
        "\n| arm | seeds | tumour DSC | of each seed | organ DSC | called / true tumour | synthetic share | accepted | data wait, % | minutes |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for arm in &config.arms {
        let keys = (0..config.seeds).map(|seed| config.arm_key(*arm, seed));
        let runs: Vec<_> = keys.filter_map(|key| results.run(&key)).collect();
        if runs.is_empty() {
            continue;
        }
        let each: Vec<String> = runs
            .iter()
            .map(|run| percent(mean(run.tumour_dsc.iter().copied())))
            .collect();
        let over = |of: &dyn Fn(&super::RunRecord) -> Option<f64>| mean(runs.iter().filter_map(|run| of(run)));
        let whole = |of: &dyn Fn(&super::RunRecord) -> Option<f64>| over(&|run| of(run).filter(|_| !run.went_on));
        let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
        writeln!(
            table,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            arm.name(),
            runs.len(),
            percent(over(&|run| mean(run.tumour_dsc.iter().copied()))),
            each.join(", "),
            percent(over(&|run| Some(run.organ_dsc))),
            number(over(&|run| Some(run.predicted_over_true))),
            number(whole(&|run| Some(run.synthetic_share))),
            number(whole(&|run| run.accepted)),
            percent(whole(&|run| run.data_wait)),
            number(whole(&|run| Some(run.seconds / 60.0))),
        )
        .expect("writing to a string");
    }
    table
}

/// Returns the table of what the arms reach on each of the test patients' scanners.
fn scanners(results: &Results, config: &ExperimentConfig) -> String {
    let names = TEST_SCANNERS.map(|scanner| format!("scanner {scanner:?}"));
    let mut table = format!(
        "\n| tumour DSC | {} |\n|---|{}\n",
        names.join(" | "),
        "---|".repeat(names.len())
    );
    for arm in &config.arms {
        let scores = results.scores(*arm, config.labelled, config.unlabelled);
        let of = |scanner: usize| {
            let is_its = |id: &String| scanner_of(id) == Some(scanner);
            let cases = scores.iter().flat_map(|row| results.cases.iter().zip(row));
            percent(mean(cases.filter(|(id, _)| is_its(id)).map(|(_, dsc)| *dsc)))
        };
        if !scores.is_empty() {
            let each: Vec<String> = (0..TEST_SCANNERS.len()).map(of).collect();
            writeln!(table, "| {} | {} |", arm.name(), each.join(" | ")).expect("writing to a string");
        }
    }
    table
}

fn comparisons(results: &Results, config: &ExperimentConfig) -> String {
    let mut table =
        String::from("\n| difference in points of DSC | mean | 95 % interval | of each seed |\n|---|---|---|---|\n");
    for arms in config.pairs() {
        let [first, second] = results.pair(arms, config.labelled, config.unlabelled);
        if let Some(found) = paired_difference(&first, &second) {
            let names = arms.map(Arm::name).join(" - ");
            writeln!(table, "| {names} | {} |", difference(&found)).expect("writing to a string");
        }
    }
    table
}

/// Returns the mean, the interval and the difference of each seed, in points, as three cells.
fn difference(found: &PairedDifference) -> String {
    let points = |value: f64| format!("{:+.1}", 100.0 * value);
    let ends = found.interval.map(|ends| ends.map(points).join(" to "));
    let seeds: Vec<String> = found.of_each_seed.iter().map(|value| points(*value)).collect();
    let cells = [
        points(found.difference),
        ends.unwrap_or_else(|| "-".into()),
        seeds.join(", "),
    ];
    cells.join(" | ")
}

fn curves(results: &Results, config: &ExperimentConfig) -> String {
    let at = |arm, labelled, unlabelled| {
        let scores = results.scores(arm, labelled, unlabelled);
        let all = mean(scores.iter().flatten().copied());
        format!("{} ({})", percent(all), scores.len())
    };
    let mut text = String::from(
        "\n| labelled patients | real_only (seeds) | gated (seeds) | gated - real_only | 95 % interval | of each seed |\n|---|---|---|---|---|---|\n",
    );
    for count in &config.labelled_counts {
        let [real, gated] = [Arm::RealOnly, Arm::Gated].map(|arm| at(arm, *count, config.unlabelled));
        let [first, second] = results.pair([Arm::Gated, Arm::RealOnly], *count, config.unlabelled);
        let found = paired_difference(&first, &second).map_or("- | - | -".into(), |found| difference(&found));
        writeln!(text, "| {count} | {real} | {gated} | {found} |").expect("writing to a string");
    }
    text += "\n| unlabelled patients | gated (seeds) | of each seed |\n|---|---|---|\n";
    for count in &config.unlabelled_counts {
        let scores = results.scores(Arm::Gated, config.labelled, *count);
        let each: Vec<String> = scores.iter().map(|row| percent(mean(row.iter().copied()))).collect();
        let gated = at(Arm::Gated, config.labelled, *count);
        writeln!(text, "| {count} | {gated} | {} |", each.join(", ")).expect("writing to a string");
    }
    text
}

/// A picture of results.
pub struct Picture {
    /// What its file's name adds to that of the results.
    pub suffix: &'static str,
    /// What it shows.
    pub title: &'static str,
    /// SVG text, as a file of its own.
    pub svg: String,
}

/// Returns the pictures: the arms, and the curves as far as there are runs of them.
pub fn pictures(results: &Results, config: &ExperimentConfig) -> Vec<Picture> {
    let title = "Tumour DSC of the arms";
    let arms = Picture {
        suffix: "",
        title,
        svg: evaluate::as_file(&arms_picture(title, results, config)),
    };
    let (labelled, unlabelled) = (&config.labelled_counts, &config.unlabelled_counts);
    let over_labelled = [Arm::RealOnly, Arm::Gated]
        .map(|arm| curve(arm, labelled, &|count| results.scores(arm, count, config.unlabelled)));
    let over_unlabelled = curve(Arm::Gated, unlabelled, &|count| {
        results.scores(Arm::Gated, config.labelled, count)
    });
    let drawn = |suffix, title, along, counts: &[usize], curves: &[Curve]| {
        let any = curves
            .iter()
            .flat_map(|curve| &curve.values)
            .any(|values| !values.is_empty());
        let places: Vec<String> = counts.iter().map(usize::to_string).collect();
        let svg = evaluate::as_file(&evaluate::curves(title, along, &places, curves));
        any.then_some(Picture { suffix, title, svg })
    };
    let curves = [
        drawn(
            "-labelled",
            "Tumour DSC over labelled patients",
            "labelled patients",
            labelled,
            &over_labelled,
        ),
        drawn(
            "-unlabelled",
            "Tumour DSC over unlabelled patients",
            "unlabelled patients",
            unlabelled,
            &[over_unlabelled],
        ),
    ];
    [Some(arms)].into_iter().chain(curves).flatten().collect()
}

/// Returns an arm's curve: at every count the mean of each seed.
fn curve(arm: Arm, counts: &[usize], scores: &dyn Fn(usize) -> Vec<Vec<f64>>) -> Curve {
    let of_seeds = |count: &usize| {
        scores(*count)
            .into_iter()
            .filter_map(|row| mean(row.into_iter()))
            .collect()
    };
    Curve {
        name: arm.name().into(),
        values: counts.iter().map(of_seeds).collect(),
    }
}

/// Returns a picture of the arms: a point per seed, the mean over seeds and cases, and its interval over cases.
fn arms_picture(title: &str, results: &Results, config: &ExperimentConfig) -> String {
    let rows = config.arms.iter().filter_map(|arm| {
        let scores = results.scores(*arm, config.labelled, config.unlabelled);
        let values: Vec<f64> = scores.iter().filter_map(|row| mean(row.iter().copied())).collect();
        let of_cases = results.cases.iter().enumerate().filter_map(|(case, id)| {
            let value = mean(scores.iter().map(|row| row[case]))?;
            Some((id.as_str(), value))
        });
        let summary = Summary::of(of_cases, &Bootstrap::default());
        (!values.is_empty()).then(|| PlotRow {
            name: arm.name().into(),
            values,
            centre: summary.mean,
            interval: summary.interval,
        })
    });
    plot(title, &rows.collect::<Vec<_>>())
}
