//! What came out: a record of every run, and the tables that follow from them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Arm, ExperimentConfig, ExperimentError, RunKey, paired_difference};
use crate::checkpoint::write_atomically;
use crate::digest::Digest;

/// The most bytes of a file of results.
const MAX_BYTES: u64 = 64 << 20;

/// What a critic was calibrated on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibrated {
    /// Real lesions that it did not learn from.
    pub lesions: usize,
    /// The probability of a tumour from which it takes a host's tissue for suspect.
    pub suspect_from: f64,
}

/// What a run ended with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRecord {
    /// Which run.
    pub key: RunKey,
    /// Dice of the organ's tumours, per test case, in the order of the results' cases.
    pub tumour_dsc: Vec<f64>,
    /// Mean Dice of the organ.
    pub organ_dsc: f64,
    /// Voxels called tumour over voxels that are, over all test cases.
    pub predicted_over_true: f64,
    /// Share of patches from healthy patients that were meant to get a lesion.
    pub hosts_share: f64,
    /// Share of patches with an accepted lesion among all that the segmentor saw.
    pub synthetic_share: f64,
    /// Accepted lesions over attempted ones; absent where nothing was attempted.
    pub accepted: Option<f64>,
    /// Wall time of the segmentor's training and test, in s.
    pub seconds: f64,
    /// Wall time of critic and synthesizer, in s, where this run trained them.
    pub model_seconds: Option<f64>,
    /// Whether it went on from a checkpoint: shares and times are those of its last part then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub went_on: bool,
    /// Share of a training step in which it waited for patches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_wait: Option<f64>,
    /// What the run's critic was calibrated on, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibrated>,
    /// The class of machines on which the same run gives the same bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numerics: Option<String>,
    /// The digest of what this arm alone is told, where there is something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own: Option<Digest>,
}

/// All runs of one configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    /// The digest of everything that decides a run.
    pub config: Digest,
    /// Its digests by revisions before.
    before: Vec<Digest>,
    /// Ids of the test cases.
    pub cases: Vec<String>,
    /// Digests of what decides the runs of one arm alone.
    own: BTreeMap<Arm, Digest>,
    runs: BTreeMap<RunKey, RunRecord>,
}

/// The file, as far as it is read back: the rest follows from it.
#[derive(Deserialize)]
struct Stored {
    config: Digest,
    cases: Vec<String>,
    runs: Vec<RunRecord>,
}

impl Results {
    /// Starts without runs; the digests are of the configuration by this revision and by those before.
    pub fn new((config, before): (Digest, Vec<Digest>), own: BTreeMap<Arm, Digest>, cases: Vec<String>) -> Self {
        Self {
            config,
            before,
            own,
            cases,
            runs: BTreeMap::new(),
        }
    }

    /// Reads those runs of a file that are not done yet, if there is one of the same configuration; a file of another is left out, and
    /// `None` returned. Else it returns how many runs were left out, 0 where there is no file: those of an arm that was told something else, and of a file of a
    /// revision before those that needed models.
    ///
    /// # Errors
    /// [`ExperimentError::Results`] names the file.
    pub fn take_over(&mut self, path: &Path) -> Result<Option<usize>, ExperimentError> {
        let refused = |what: String| ExperimentError::Results {
            path: path.into(),
            what,
        };
        if !path.exists() {
            return Ok(Some(0));
        }
        if fs_err::metadata(path)?.len() > MAX_BYTES {
            return Err(refused(format!("expected at most {MAX_BYTES} bytes")));
        }
        let stored: Stored =
            serde_json::from_slice(&fs_err::read(path)?).map_err(|error| refused(error.to_string()))?;
        let is_before = self.before.contains(&stored.config);
        if !(is_before || stored.config == self.config) || stored.cases != self.cases {
            return Ok(None);
        }
        let is_current = |run: &RunRecord| {
            let needs_models = run.key.arm.needs_models();
            !(is_before && needs_models) && run.own == self.own.get(&run.key.arm).copied()
        };
        let (current, others): (Vec<RunRecord>, Vec<RunRecord>) = stored.runs.into_iter().partition(is_current);
        for run in current {
            if run.tumour_dsc.len() != self.cases.len() {
                return Err(refused(format!(
                    "{}: expected {} cases",
                    run.key.name(),
                    self.cases.len()
                )));
            }
            self.runs.entry(run.key).or_insert(run);
        }
        Ok(Some(others.len()))
    }

    /// Adds a run.
    pub fn insert(&mut self, run: RunRecord) {
        self.runs.insert(run.key, run);
    }

    /// Returns a run that is done.
    pub fn run(&self, key: &RunKey) -> Option<&RunRecord> {
        self.runs.get(key)
    }

    /// Returns the runs of an arm at a number of patients that are done, by seed.
    fn of(&self, arm: Arm, labelled: usize, unlabelled: usize) -> Vec<&RunRecord> {
        let like = RunKey::new(arm, labelled, unlabelled, 0);
        let alike = |key: &&RunKey| RunKey { seed: 0, ..**key } == like;
        self.runs.keys().filter(alike).map(|key| &self.runs[key]).collect()
    }

    /// Returns the scores of an arm, per seed and case.
    pub fn scores(&self, arm: Arm, labelled: usize, unlabelled: usize) -> Vec<Vec<f64>> {
        let runs = self.of(arm, labelled, unlabelled);
        runs.into_iter().map(|run| run.tumour_dsc.clone()).collect()
    }

    /// Returns the scores of two arms at a number of patients, of the seeds that both have.
    pub fn pair(&self, arms: [Arm; 2], labelled: usize, unlabelled: usize) -> [Vec<Vec<f64>>; 2] {
        let done = |arm: Arm| self.of(arm, labelled, unlabelled);
        let [first, second] = arms.map(done);
        let has = |runs: &[&RunRecord], seed: u64| runs.iter().any(|run| run.key.seed == seed);
        let of = |runs: &[&RunRecord], others: &[&RunRecord]| {
            let both = runs.iter().filter(|run| has(others, run.key.seed));
            both.map(|run| run.tumour_dsc.clone()).collect()
        };
        [of(&first, &second), of(&second, &first)]
    }

    /// Returns the document: runs, and what follows from them.
    pub fn document(&self, config: &ExperimentConfig) -> Value {
        let scores = |runs: Vec<&RunRecord>| {
            json!({
                "tumour_dsc": runs.iter().map(|run| &run.tumour_dsc).collect::<Vec<_>>(),
                "mean": mean(runs.iter().flat_map(|run| run.tumour_dsc.iter().copied())),
                "seeds": runs.iter().map(|run| run.key.seed).collect::<Vec<_>>(),
            })
        };
        let at = |arm, labelled, unlabelled| scores(self.of(arm, labelled, unlabelled));
        let (n, m) = (config.labelled, config.unlabelled);
        let arms: BTreeMap<&str, Value> = config.arms.iter().map(|arm| (arm.name(), at(*arm, n, m))).collect();
        let labelled: BTreeMap<String, Value> = (config.labelled_counts.iter())
            .map(|count| {
                let both = [Arm::RealOnly, Arm::Gated].map(|arm| (arm.name().to_string(), at(arm, *count, m)));
                (count.to_string(), Value::Object(both.into_iter().collect()))
            })
            .collect();
        let scaling: BTreeMap<String, Value> = (config.unlabelled_counts.iter())
            .map(|count| (count.to_string(), at(Arm::Gated, n, *count)))
            .collect();
        json!({
            "config": self.config,
            "cases": self.cases,
            "arms": arms,
            "labelled": labelled,
            "scaling": scaling,
            "comparisons": self.comparisons(config),
            "runs": self.runs.values().collect::<Vec<_>>(),
        })
    }

    fn comparisons(&self, config: &ExperimentConfig) -> BTreeMap<String, Value> {
        let pairs = config.pairs().into_iter();
        pairs
            .filter_map(|arms| {
                let [first, second] = self.pair(arms, config.labelled, config.unlabelled);
                let found = paired_difference(&first, &second)?;
                Some((format!("{} - {}", arms[0].name(), arms[1].name()), json!(found)))
            })
            .collect()
    }

    /// Writes the document.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write(&self, config: &ExperimentConfig, path: &Path) -> Result<(), ExperimentError> {
        let mut text =
            serde_json::to_string(&self.document(config)).expect("numbers and names are representable in JSON");
        text.push('\n');
        Ok(write_atomically(path, text.as_bytes())?)
    }
}

/// Averages numbers; nothing where there are none.
pub(super) fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0.0);
    for value in values {
        sum += value;
        count += 1.0;
    }
    (count > 0.0).then(|| sum / count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(arm: Arm, seed: u64, dsc: [f64; 2]) -> RunRecord {
        RunRecord {
            key: ExperimentConfig::default().arm_key(arm, seed),
            tumour_dsc: dsc.to_vec(),
            organ_dsc: 0.9,
            predicted_over_true: 1.0,
            hosts_share: 0.0,
            synthetic_share: 0.0,
            accepted: None,
            seconds: 1.0,
            model_seconds: None,
            went_on: false,
            data_wait: None,
            calibration: None,
            numerics: None,
            own: None,
        }
    }

    #[test]
    fn what_is_written_is_taken_over_by_the_same_configuration_alone() {
        let config = ExperimentConfig::default();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.json");
        let cases = || vec!["a".to_string(), "b".to_string()];
        let new = |config: i32, own: i32| {
            let own = BTreeMap::from([(Arm::Published, Digest::of_json(&own))]);
            let before = [config - 1, config - 2].map(|config| Digest::of_json(&config));
            Results::new((Digest::of_json(&config), before.to_vec()), own, cases())
        };
        let mut results = new(1, 1);
        for (seed, real) in [(0, 0.4), (1, 0.5), (2, 0.3)] {
            results.insert(record(Arm::RealOnly, seed, [real, real]));
        }
        for seed in [0, 2] {
            results.insert(record(Arm::Gated, seed, [0.6, 0.8]));
        }
        results.insert(RunRecord {
            own: Some(Digest::of_json(&1)),
            ..record(Arm::Published, 0, [0.5, 0.5])
        });
        let document = results.document(&config);
        assert_eq!(
            document["arms"]["real_only"]["tumour_dsc"],
            json!([[0.4, 0.4], [0.5, 0.5], [0.3, 0.3]])
        );
        assert_eq!(document["labelled"]["8"]["gated"]["seeds"], json!([0, 2]));
        // Paired over the seeds that both arms have: 0.7 - (0.4 + 0.3) / 2.
        let difference = document["comparisons"]["gated - real_only"]["difference"]
            .as_f64()
            .unwrap();
        assert!((difference - 0.35).abs() < 1e-12);
        results.write(&config, &path).unwrap();
        let mut same = new(1, 1);
        assert_eq!(same.take_over(&path).unwrap(), Some(0));
        assert_eq!(same, results);
        // What one arm alone is told concerns its runs alone.
        let mut told = new(1, 2);
        assert_eq!(told.take_over(&path).unwrap(), Some(1));
        assert_eq!(told.runs.len(), results.runs.len() - 1);
        let mut other = new(4, 1);
        assert!(other.take_over(&path).unwrap().is_none() && other.runs.is_empty());
        // By revisions before, whose models were others.
        for later in [2, 3] {
            let mut next = new(later, 1);
            assert_eq!(next.take_over(&path).unwrap(), Some(results.runs.len() - 3));
            assert!(next.runs.keys().all(|key| key.arm == Arm::RealOnly) && next.runs.len() == 3);
        }
        let mut same = new(1, 1);
        assert_eq!((same.take_over(&path).unwrap(), &same), (Some(0), &results));
        fs_err::write(&path, "{").unwrap();
        assert!(same.take_over(&path).unwrap_err().to_string().contains("results.json"));
    }
}
