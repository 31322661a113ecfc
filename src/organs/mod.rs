//! Organ labels for cases that have none: what a network predicts, kept where it looks like the organ.
//!
//! ```text
//! a network's label ids -> anatomy.rs: what is known of organs; plausible.rs: pieces, volume, HU -> labels of one case
//!                          label.rs: case by case through a store, written again with `labels_by = pseudo:<hash>`
//! ```
//!
//! Knows nothing of networks: whoever calls brings a function that predicts.

mod anatomy;
mod label;
mod plausible;

pub use anatomy::Anatomy;
pub use label::{CaseOutcome, CaseStatus, LabelReport, LabelRequest, Predict, Progress, label_organs};
pub use plausible::{OrganReport, OrganVerdict, Proposal, Scan, propose};
