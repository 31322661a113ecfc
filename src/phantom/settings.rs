//! What a cohort's patients have in common: phases, and which tumours grow in them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{KIDNEY, LIVER, PANCREAS, Phase};
use crate::rng::Rng;

/// What a cohort's patients have in common. The defaults are those of `docs/phantom.md`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PhantomSettings {
    /// Every so many-th patient is scanned without contrast agent, the others in the portal venous phase; 0: none.
    pub plain_every: usize,
    /// Tumours by organ (`liver`, `pancreas`, `kidney`); organs that are not named grow none.
    pub tumours: BTreeMap<String, LesionLaw>,
    /// How much tumours differ from their organs.
    pub contrast: ContrastLaw,
    /// Benign nodules by organ, labelled as the organ: grown as tumours are, but even inside.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub nodules: BTreeMap<String, LesionLaw>,
    /// How much nodules differ from their organs; as tumours do where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodule_contrast: Option<ContrastLaw>,
    /// The tumours' bright rims.
    #[serde(skip_serializing_if = "RimLaw::is_default")]
    pub rim: RimLaw,
}

/// How many lesions an organ grows, and how large.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LesionLaw {
    /// Shares of patients with 0, 1, 2, ... of them in this organ.
    pub counts: Vec<f64>,
    /// Mean of the logarithm of the equivalent-sphere diameter in mm.
    pub ln_mean: f64,
    /// Standard deviation of that logarithm.
    pub ln_sd: f64,
    /// Smallest and largest diameter in mm.
    pub range_mm: [f64; 2],
}

/// Shares and ranges of the mean difference between a tumour and its organ; what is neither of the first two is dark.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ContrastLaw {
    /// Share of tumours that hardly differ.
    pub iso: f64,
    /// Most that they differ, in HU, either way.
    pub iso_hu: f64,
    /// Share of bright tumours.
    pub bright: f64,
    /// Least and most that they are brighter, in HU.
    pub bright_hu: [f64; 2],
    /// Least and most that dark tumours are darker, in HU.
    pub dark_hu: [f64; 2],
}

/// How often tumours have a rim, and how bright it is. Nodules have none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RimLaw {
    /// Share of tumours with a rim of `hu`, of those that are two voxels deep; the others have the patterns that chance gives them.
    pub share: f64,
    /// By how much the outermost layer of voxels is brighter than the rest.
    pub hu: f64,
}

/// The organs that may grow tumours, in the order in which they do.
pub(super) const ORGANS: [(&str, u8); 3] = [("liver", LIVER), ("pancreas", PANCREAS), ("kidney", KIDNEY)];

impl Default for PhantomSettings {
    fn default() -> Self {
        let law = |counts: &[f64], ln_mean, ln_sd, range_mm| LesionLaw {
            counts: counts.to_vec(),
            ln_mean,
            ln_sd,
            range_mm,
        };
        let liver = law(&[0.17, 0.25, 0.22, 0.14, 0.1, 0.07, 0.05], 2.68, 0.79, [5.0, 75.0]);
        let pancreas = law(&[0.4, 0.6], 3.12, 0.34, [9.0, 45.0]);
        let kidney = law(&[0.45, 0.55], 3.58, 0.62, [9.0, 50.0]);
        Self {
            plain_every: 3,
            tumours: [("liver", liver), ("pancreas", pancreas), ("kidney", kidney)]
                .map(|(organ, law)| (organ.to_string(), law))
                .into(),
            contrast: ContrastLaw::default(),
            nodules: BTreeMap::new(),
            nodule_contrast: None,
            rim: RimLaw::default(),
        }
    }
}

impl Default for ContrastLaw {
    fn default() -> Self {
        Self {
            iso: 0.19,
            iso_hu: 13.0,
            bright: 0.14,
            bright_hu: [24.0, 62.0],
            dark_hu: [22.0, 76.0],
        }
    }
}

impl PhantomSettings {
    /// Returns the contrast phase of a patient by its number.
    pub fn phase(&self, number: usize) -> Phase {
        match number.checked_rem(self.plain_every) {
            Some(rest) if rest + 1 == self.plain_every => Phase::NonContrast,
            _ => Phase::Portal,
        }
    }

    /// Tells what is wrong with the settings, naming the key, or nothing.
    pub fn refusal(&self) -> Option<String> {
        let refuse = |key: &str, expected: &str, got: String| format!("phantom.{key}: expected {expected}, got {got}");
        let of_kind = |kind: &str, laws: &BTreeMap<String, LesionLaw>| {
            laws.iter().find_map(|(organ, law)| {
                if !ORGANS.iter().any(|(known, _)| known == organ) {
                    return Some(refuse(kind, "liver, pancreas or kidney", format!("{organ:?}")));
                }
                Some(refuse(&format!("{kind}.{organ}"), law.refusal()?, format!("{law:?}")))
            })
        };
        let contrast = |key: &str, law: &ContrastLaw| Some(refuse(key, law.refusal()?, format!("{law:?}")));
        let rim = || Some(refuse("rim", self.rim.refusal()?, format!("{:?}", self.rim)));
        of_kind("tumours", &self.tumours)
            .or_else(|| of_kind("nodules", &self.nodules))
            .or_else(|| contrast("contrast", &self.contrast))
            .or_else(|| contrast("nodule_contrast", self.nodule_contrast.as_ref()?))
            .or_else(rim)
    }
}

impl LesionLaw {
    fn refusal(&self) -> Option<&'static str> {
        let is_share = |share: &f64| (0.0..=1e6).contains(share);
        let counts = (1..=16).contains(&self.counts.len()) && self.counts.iter().all(is_share);
        let [least, most] = self.range_mm;
        let sizes = (1.0..=most).contains(&least) && most <= 100.0 && (0.0..=5.0).contains(&self.ln_mean);
        let checks = [
            (
                counts && self.counts.iter().sum::<f64>() > 0.0,
                "1 to 16 counts of at least 0, one of them above 0",
            ),
            (sizes, "ln_mean from 0 to 5 and a range_mm within 1 to 100"),
            ((0.0..=2.0).contains(&self.ln_sd), "ln_sd from 0 to 2"),
        ];
        checks.into_iter().find(|(ok, _)| !ok).map(|(_, expected)| expected)
    }

    /// Draws how many tumours a patient has.
    pub(super) fn draw_count(&self, rng: &mut Rng) -> usize {
        // Two counts are one toss, heads first, as it was before counts could be set: cohorts keep their voxels.
        match self.counts[..] {
            [none, one] => usize::from(rng.chance(one / (none + one))),
            _ => rng.weighted(&self.counts).unwrap_or(0),
        }
    }

    /// Draws an equivalent-sphere diameter in mm.
    pub(super) fn draw_mm(&self, rng: &mut Rng) -> f32 {
        let [least, most] = self.range_mm;
        // Drawn again outside the range: clamping would pile tumours up at its ends.
        let mut draws = (0..16).map(|_| libm::exp(self.ln_mean + self.ln_sd * rng.normal()));
        draws.find(|mm| (least..=most).contains(mm)).unwrap_or(most) as f32
    }
}

impl RimLaw {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    fn refusal(&self) -> Option<&'static str> {
        let ok = (0.0..=1.0).contains(&self.share) && (0.0..=200.0).contains(&self.hu);
        (!ok).then_some("a share from 0 to 1 and hu from 0 to 200")
    }
}

impl ContrastLaw {
    fn refusal(&self) -> Option<&'static str> {
        let is_range = |[low, high]: [f64; 2]| 0.0 <= low && low < high && high <= 500.0;
        let checks = [
            (
                self.iso >= 0.0 && self.bright >= 0.0 && self.iso + self.bright <= 1.0,
                "shares whose sum is at most 1",
            ),
            (self.iso_hu > 0.0 && self.iso_hu <= 500.0, "iso_hu above 0, at most 500"),
            (
                is_range(self.bright_hu) && is_range(self.dark_hu),
                "ranges within 0 to 500 HU",
            ),
        ];
        checks.into_iter().find(|(ok, _)| !ok).map(|(_, expected)| expected)
    }

    /// Draws a mean difference in HU.
    pub(super) fn draw(&self, rng: &mut Rng) -> f64 {
        let kind = rng.uniform();
        let [low, high] = self.bright_hu;
        let [least, most] = self.dark_hu;
        match kind {
            k if k < self.iso => rng.range(-self.iso_hu, self.iso_hu),
            k if k < self.iso + self.bright => rng.range(low, high),
            _ => -rng.range(least, most),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_range_are_refused_by_name() {
        assert_eq!(PhantomSettings::default().refusal(), None);
        let refused = |text: &str| {
            let settings: PhantomSettings = toml::from_str(text).unwrap();
            settings.refusal().unwrap_or_default()
        };
        let law = |law: &str| refused(&format!("[tumours.liver]\n{law}"));
        assert!(
            refused("[tumours.spleen]\ncounts = [1]\nln_mean = 3\nln_sd = 1\nrange_mm = [5, 9]").contains("spleen")
        );
        assert!(
            law("counts = [0]\nln_mean = 3\nln_sd = 1\nrange_mm = [5, 9]").contains("tumours.liver: expected 1 to 16")
        );
        assert!(law("counts = [1]\nln_mean = 3\nln_sd = 1\nrange_mm = [9, 5]").contains("range_mm"));
        assert!(law("counts = [1]\nln_mean = 3\nln_sd = 9\nrange_mm = [5, 9]").contains("ln_sd"));
        assert!(refused("[nodules.lung]\ncounts = [1]\nln_mean = 3\nln_sd = 1\nrange_mm = [5, 9]").contains("nodules"));
        assert!(refused("[rim]\nshare = 2.0").contains("rim: expected a share"));
        assert!(refused("[contrast]\niso = 0.7\nbright = 0.7").contains("contrast: expected shares"));
        assert!(refused("[contrast]\ndark_hu = [7, 3]").contains("contrast: expected ranges"));
        assert!(refused("[nodule_contrast]\niso_hu = 0.0").contains("nodule_contrast: expected iso_hu"));
    }
}
