//! Our types <-> the protobuf headers.

use super::codec::Encoding;
use super::frame::{self, FrameError, Kind, Parts, VERSION};
use super::payload::payload;
use super::proto;
use crate::digest::canonical_json;
use crate::sampler::Pool;
use crate::stream::cursor::Cursor;
use crate::stream::delivery::Delivery;
use crate::stream::patch::{LesionMeta, Outcome, PatchMeta};
use crate::stream::{Batch, Resolved};
use crate::volume::{ContrastBin, Plan, SizeClass};
use bytes::Bytes;

/// Returns the header of a stream.
pub fn stream_header(
    resolved: &Resolved,
    plan: &Plan,
    delivery: &Delivery,
    first_index: u64,
    batches: u64,
) -> proto::StreamHeader {
    proto::StreamHeader {
        protocol: VERSION.into(),
        recipe: resolved.hash.to_string(),
        snapshot: resolved.snapshot.to_string(),
        bundle: resolved.bundle.to_string(),
        revision: resolved.revision,
        recipe_json: canonical_json(&resolved.recipe),
        labels: resolved
            .labels
            .iter()
            .map(|(name, id)| (name.into(), id.into()))
            .collect(),
        window_low_hu: plan.window_hu.low,
        window_high_hu: plan.window_hu.high,
        spacing_mm: plan.spacing_mm.to_vec(),
        patch: resolved.patch.map(|side| side as u32).to_vec(),
        patches_per_epoch: resolved.patches_per_epoch,
        batches,
        rank: delivery.rank,
        world: delivery.world,
        batch_size: delivery.batch_size,
        numerics: resolved.numerics.clone(),
        first_index,
    }
}

/// Returns the frame of a batch.
///
/// # Errors
/// [`FrameError`] where the patches differ in shape or the frame is over the limit.
pub fn batch_frame(batch: &Batch, encoding: &Encoding) -> Result<Parts, FrameError> {
    let (tensors, payload) = payload(&batch.patches, batch.shape, encoding)?;
    let header = proto::BatchHeader {
        step: batch.step,
        tensors,
        patches: batch.patches.iter().map(|patch| (&patch.meta).into()).collect(),
        next: Some((&batch.next).into()),
        reused: batch.reused.clone(),
    };
    frame::parts(Kind::Batch, &header, payload)
}

/// Returns the last frame of a stream that ended as it should.
pub fn end_frame(reason: proto::EndReason, cursor: &Cursor) -> Bytes {
    let end = proto::End {
        reason: reason.into(),
        cursor: Some(cursor.into()),
    };
    frame::encode(Kind::End, &end, &[]).expect("an end frame has a bounded size")
}

/// Returns the frame sent while a batch is not ready.
pub fn heartbeat_frame(waiting_seconds: u32) -> Bytes {
    frame::encode(Kind::Heartbeat, &proto::Heartbeat { waiting_seconds }, &[])
        .expect("a heartbeat frame has a bounded size")
}

impl From<&Cursor> for proto::Cursor {
    fn from(cursor: &Cursor) -> Self {
        Self {
            recipe: cursor.recipe.to_string(),
            snapshot: cursor.snapshot.to_string(),
            bundle: cursor.bundle.to_string(),
            revision: cursor.revision,
            next_index: cursor.next_index,
        }
    }
}

impl TryFrom<&proto::Cursor> for Cursor {
    type Error = FrameError;

    fn try_from(cursor: &proto::Cursor) -> Result<Self, FrameError> {
        let digest = |field: &str, text: &str| {
            text.parse()
                .map_err(|error| FrameError::Header(format!("cursor field {field}: {error}")))
        };
        Ok(Self {
            recipe: digest("recipe", &cursor.recipe)?,
            snapshot: digest("snapshot", &cursor.snapshot)?,
            bundle: digest("bundle", &cursor.bundle)?,
            revision: cursor.revision,
            next_index: cursor.next_index,
        })
    }
}

impl From<Pool> for proto::Pool {
    fn from(pool: Pool) -> Self {
        match pool {
            Pool::LabelledReal => Self::LabelledReal,
            Pool::LabelledHost => Self::LabelledHost,
            Pool::UnlabelledHost => Self::UnlabelledHost,
        }
    }
}

impl From<Outcome> for proto::Outcome {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Real => Self::Real,
            Outcome::Accepted => Self::Accepted,
            Outcome::HealthyAfterK => Self::HealthyAfterK,
            Outcome::BestAfterK => Self::BestAfterK,
            Outcome::RealAfterK => Self::RealAfterK,
            Outcome::Unplaceable => Self::Unplaceable,
        }
    }
}

impl From<SizeClass> for proto::SizeClass {
    fn from(size: SizeClass) -> Self {
        match size {
            SizeClass::Tiny => Self::Tiny,
            SizeClass::Small => Self::Small,
            SizeClass::Medium => Self::Medium,
            SizeClass::Large => Self::Large,
        }
    }
}

impl From<ContrastBin> for proto::ContrastBin {
    fn from(contrast: ContrastBin) -> Self {
        match contrast {
            ContrastBin::Dark => Self::Dark,
            ContrastBin::Dim => Self::Dim,
            ContrastBin::Iso => Self::Iso,
            ContrastBin::Bright => Self::Bright,
        }
    }
}

impl From<&LesionMeta> for proto::Lesion {
    fn from(lesion: &LesionMeta) -> Self {
        Self {
            instance: lesion.instance.into(),
            organ: lesion.organ.clone(),
            centre: lesion.centre.to_vec(),
            size: proto::SizeClass::from(lesion.size).into(),
            contrast: proto::ContrastBin::from(lesion.contrast).into(),
            diameter_mm: lesion.diameter_mm,
            radii_mm: lesion.radii_mm.to_vec(),
            requested_hu: lesion.requested_hu,
            realised_hu: lesion.realised_hu,
            gate: lesion.gate.map(|gate| proto::GateScores {
                recall: gate.recall,
                precision: gate.precision,
                before: gate.before,
                recall_threshold: gate.recall_threshold,
                precision_threshold: gate.precision_threshold,
                realism_threshold: gate.realism_threshold,
            }),
            discriminator: lesion.discriminator,
        }
    }
}

impl From<&PatchMeta> for proto::PatchMeta {
    fn from(meta: &PatchMeta) -> Self {
        Self {
            index: meta.index,
            case_id: meta.case.clone(),
            pool: proto::Pool::from(meta.pool).into(),
            organ: meta.organ.clone(),
            region: Some(proto::Region {
                start: meta.region.start.to_vec(),
                size: meta.region.size.map(|side| side as u32).to_vec(),
            }),
            affine: meta.affine.0.concat(),
            outcome: proto::Outcome::from(meta.outcome).into(),
            attempts: meta.attempts,
            host_suspect: meta.host_suspect,
            borderline: meta.borderline,
            ignored_voxels: meta.ignored_voxels,
            labels_by: meta.labels_by.clone(),
            lesions: meta.lesions.iter().map(Into::into).collect(),
            failed: meta.failed.clone(),
        }
    }
}
