//! What a recipe says of synthesis and of the gate.

use serde::{Deserialize, Serialize};

/// What synthesizes lesions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum SynthesizerKind {
    /// Hand-crafted contrast and texture; needs no weights.
    Analytic,
    /// Real tumours of the labelled cases, cut out and put elsewhere; needs no weights.
    CopyPaste,
    /// The paper's equation and generator; what contrast comes of it is the network's to decide.
    Published,
    /// Our mask-, organ-, size- and contrast-conditioned generator.
    #[default]
    Conditional,
}

impl SynthesizerKind {
    /// Tells whether it needs trained weights.
    pub fn is_trained(self) -> bool {
        matches!(self, Self::Published | Self::Conditional)
    }
}

/// How attempts are judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum GateRule {
    /// Two-sided scores against thresholds calibrated on real lesions, per organ, size and contrast bin.
    #[default]
    Calibrated,
    /// Two-sided scores against `recall` and `precision`.
    Fixed,
    /// The paper's rule: more than 0.7 of the mask is called any tumour class.
    Published,
}

/// The gate's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GateSettings {
    /// Whether attempts are judged at all.
    pub enabled: bool,
    /// The rule.
    pub rule: GateRule,
    /// Least recall under `fixed`, in [0, 1].
    pub recall: f64,
    /// Least precision under `fixed`, in [0, 1].
    pub precision: f64,
    /// Asks that lesions look real to the discriminator, too: as real as all but this share of the real lesions that it did not learn
    /// from, in [0, 1]. 0 does not ask it; `published` never does.
    #[serde(skip_serializing_if = "is_zero")]
    pub realism: f64,
    /// Attempts after the first, 0 to 15.
    pub retries: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference")]
fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

impl Default for GateSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            rule: GateRule::default(),
            recall: 0.5,
            precision: 0.3,
            realism: 0.0,
            retries: 3,
        }
    }
}
