//! How good a network is on held-out cases.
//!
//! ```text
//! sliding_window.rs: case -> labels -> case.rs: dice.rs, surface.rs, lesion_level.rs -> summary.rs: statistics.rs
//!                                                                                  report.rs: plot.rs, slice.rs
//! ```
//!
//! `docs/evaluation.md` defines every measure.

mod case;
mod dice;
mod held_out;
mod lesion_level;
mod plot;
mod report;
mod slice;
mod sliding_window;
mod statistics;
mod summary;
mod surface;
mod tolerance;

pub use case::{CaseScore, ClassMeasures, Comparison, Measures};
pub use dice::{ClassMasks, Overlap, overlap};
pub use held_out::{Examination, HeldOut, HeldOutSettings, Scored, chosen, score_case, score_held_out};
pub use lesion_level::{LesionCounts, LesionScore, lesion_level};
pub use plot::{Curve, Row as PlotRow, as_file, curves, plot};
pub use report::{HD95_VARIANT, LeftOut, ReportHead, html};
pub use slice::Slice;
pub(crate) use sliding_window::forward;
pub use sliding_window::{Blending, FlipAxis, Predictor, SlidingWindow, argmax, predict};
pub use statistics::{Bootstrap, Summary};
pub use summary::{ClassScore, FalsePositives, LesionRates, OrganLesions, Rate};
pub use surface::{SurfaceDistances, SurfaceOverlap};
pub use tolerance::Tolerances;

/// Why a case cannot be scored.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// It cannot be read.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    /// Its classes are not those of the plan.
    #[error(transparent)]
    Label(#[from] crate::volume::LabelError),
    /// Who watches asked to stop.
    #[error("stopped before every case was scored")]
    Stopped,
}
