//! The results as a page of tables and as pictures.

use std::fmt::Write;

use super::results::mean;
use super::{Arm, ExperimentConfig, Results, paired_difference};
use crate::evaluate::{Bootstrap, PlotRow, Summary, plot};

/// Returns the page: a table of the arms, the comparisons, and the curves, as far as there are runs.
pub fn page(results: &Results, config: &ExperimentConfig) -> String {
    let mut page = format!(
        "Configuration `{}`; {} test cases; arms with {} labelled and {} unlabelled patients.\n",
        results.config,
        results.cases.len(),
        config.labelled,
        config.unlabelled
    );
    page += &arms(results, config);
    page += &comparisons(results, config);
    page += &curves(results, config);
    page
}

fn percent(value: Option<f64>) -> String {
    value.map_or("-".into(), |value| format!("{:.1}", 100.0 * value))
}

fn arms(results: &Results, config: &ExperimentConfig) -> String {
    let mut table = String::from(
        "\n| arm | seeds | tumour DSC | of each seed | organ DSC | called / true tumour | synthetic share | accepted | minutes |\n\
         |---|---|---|---|---|---|---|---|---|\n",
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
        let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
        writeln!(
            table,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            arm.name(),
            runs.len(),
            percent(over(&|run| mean(run.tumour_dsc.iter().copied()))),
            each.join(", "),
            percent(over(&|run| Some(run.organ_dsc))),
            number(over(&|run| Some(run.predicted_over_true))),
            number(over(&|run| Some(run.synthetic_share))),
            number(over(&|run| run.accepted)),
            number(over(&|run| Some(run.seconds / 60.0))),
        )
        .expect("writing to a string");
    }
    table
}

fn comparisons(results: &Results, config: &ExperimentConfig) -> String {
    let mut table =
        String::from("\n| difference in points of DSC | mean | 95 % interval | of each seed |\n|---|---|---|---|\n");
    let others = config.arms.iter().filter(|arm| **arm != Arm::Gated);
    for arms in others
        .map(|arm| [Arm::Gated, *arm])
        .chain([[Arm::Oracle, Arm::RealOnly]])
    {
        let [first, second] = results.pair(config, arms);
        if let Some(found) = paired_difference(&first, &second) {
            let points = |value: f64| format!("{:+.1}", 100.0 * value);
            let ends = found
                .interval
                .map(|[low, high]| format!("{} to {}", points(low), points(high)));
            let seeds: Vec<String> = found.of_each_seed.iter().map(|value| points(*value)).collect();
            writeln!(
                table,
                "| {} - {} | {} | {} | {} |",
                arms[0].name(),
                arms[1].name(),
                points(found.difference),
                ends.unwrap_or_else(|| "-".into()),
                seeds.join(", ")
            )
            .expect("writing to a string");
        }
    }
    table
}

fn curves(results: &Results, config: &ExperimentConfig) -> String {
    let at = |arm, labelled, unlabelled| {
        let scores = results.scores(arm, labelled, unlabelled);
        let all = mean(scores.iter().flatten().copied());
        format!("{} ({})", percent(all), scores.len())
    };
    let mut text = String::from("\n| labelled patients | real_only (seeds) | gated (seeds) |\n|---|---|---|\n");
    for count in &config.labelled_counts {
        let [real, gated] = [Arm::RealOnly, Arm::Gated].map(|arm| at(arm, *count, config.unlabelled));
        writeln!(text, "| {count} | {real} | {gated} |").expect("writing to a string");
    }
    text += "\n| unlabelled patients | gated (seeds) |\n|---|---|\n";
    for count in &config.unlabelled_counts {
        let gated = at(Arm::Gated, config.labelled, *count);
        writeln!(text, "| {count} | {gated} |").expect("writing to a string");
    }
    text
}

/// Returns a picture of the arms: a point per seed, the mean over seeds and cases, and its interval over cases.
pub fn figures(results: &Results, config: &ExperimentConfig) -> String {
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
    plot("Tumour DSC of the arms", &rows.collect::<Vec<_>>())
}
