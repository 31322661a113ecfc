//! The pipeline of one case, run over many: bounded in memory, resumable, and deaf to the failure of a neighbour.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use ndarray::{Array3, s};

use super::built_in;
use super::datalist::Entry;
use super::files::{hash_of, image_files, patient_of, read_image};
use super::labels::LabelReader;
use super::ledger::{Ledger, LedgerEntry};
use super::orient::{orient, source_hash};
use super::planned::onto_plan;
use super::preset::Preset;
use super::report::{CaseProgress, CaseReport, IngestReport, Status, StoredCase};
use super::shard::Shard;
use super::{IngestConfig, IngestError, looks_like};
use crate::digest::Digest;
use crate::panic::panic_text;
use crate::store::{self, CaseInput, CaseKind, CaseRecord, Duplicate, StoreWriter};
use crate::volume::resample::resample_labels;
use crate::volume::{Fingerprint, Grid, Plan, Region};

/// Raised whenever the same files would become another case: it makes every case be made again.
const INGEST_REVISION: u32 = 2;
/// How many volumes are in memory at once.
const CASES_AT_ONCE: usize = 2;
/// Everything denser is taken for patient (or table); air and most of the padding are below.
const BODY_HU: i16 = -500;
/// What is kept around the body, in mm.
const CROP_MARGIN_MM: f64 = 10.0;
/// From this many labelled cases on, a class that none of them has is worth a word.
const CASES_THAT_TELL: usize = 3;

/// What to ingest.
#[derive(Clone, Debug)]
pub struct IngestRequest {
    /// The cases.
    pub entries: Vec<Entry>,
    /// What ids in label files mean.
    pub preset: Preset,
    /// What becomes of unusual files.
    pub options: IngestConfig,
    /// Which part of the cases this call takes.
    pub shard: Shard,
}

/// Ingests cases into a store, several at a time; one that cannot be stored is reported and stops no other.
///
/// # Errors
/// [`IngestError`] only where nothing can be stored at all: a preset that does not fit the plan, a store of another
/// plan, a folder that cannot be written.
pub fn ingest(
    request: &IngestRequest,
    store_dir: &Path,
    plan: &Plan,
    progress: &(dyn Fn(&CaseProgress) + Sync),
) -> Result<IngestReport, IngestError> {
    let pipeline = Pipeline {
        labels: LabelReader::new(&request.preset, plan, &request.options)?,
        writer: StoreWriter::create(store_dir, plan)?,
        ledger: Ledger::open(store_dir)?,
        plan,
    };
    let Shard { index, count } = request.shard;
    let mine: Vec<&Entry> = request.entries.iter().skip(index).step_by(count.max(1)).collect();
    let done = AtomicUsize::new(0);
    let one = |entry: &Entry| {
        let case = pipeline.run(entry);
        progress(&CaseProgress {
            case: &case,
            done: done.fetch_add(1, Ordering::Relaxed) + 1,
            total: mine.len(),
        });
        case
    };
    let cases = longest_first(&mine, |entry| one(entry))?;
    let warnings = pipeline.unused_classes(&mine, &cases);
    let finished = pipeline.writer.finish()?;
    let mine: HashSet<&str> = cases.iter().map(|case| case.id.as_str()).collect();
    let is_mine = |pair: &Duplicate| mine.contains(pair.first.as_str()) || mine.contains(pair.second.as_str());
    Ok(IngestReport {
        duplicates: finished.duplicates.into_iter().filter(is_mine).collect(),
        warnings,
        cases,
        indexed: finished.cases,
        damaged: finished.damaged.iter().map(ToString::to_string).collect(),
    })
}

/// Runs cases on a few threads, whose number bounds memory; returns the outcomes in the cases' order. Large files go first,
/// so that no thread is left with one while the others have ended.
fn longest_first<T: Send>(cases: &[&Entry], run: impl Fn(&Entry) -> T + Sync) -> Result<Vec<T>, IngestError> {
    // What cannot be read counts nothing here, and is refused by name when its turn comes.
    let bytes_of = |path: &PathBuf| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let bytes = |entry: &Entry| image_files(&entry.image).map_or(0, |files| files.iter().map(bytes_of).sum());
    let mut order: Vec<(u64, usize)> = cases.iter().map(|entry| bytes(entry)).zip(0..).collect();
    order.sort_unstable_by_key(|(bytes, number)| (Reverse(*bytes), *number));
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::with_capacity(cases.len()));
    let work = || {
        while let Some((_, number)) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = run(cases[*number]);
            outcomes
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push((*number, outcome));
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..CASES_AT_ONCE.min(cases.len()) {
            std::thread::Builder::new()
                .name(format!("ingest-{thread}"))
                .spawn_scoped(scope, work)
                .map_err(|error| IngestError::Threads(error.to_string()))?;
        }
        Ok::<_, IngestError>(())
    })?;
    let mut outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    outcomes.sort_unstable_by_key(|(number, _)| *number);
    Ok(outcomes.into_iter().map(|(_, outcome)| outcome).collect())
}

struct Pipeline<'a> {
    labels: LabelReader<'a>,
    writer: StoreWriter,
    ledger: Ledger,
    plan: &'a Plan,
}

impl Pipeline<'_> {
    fn run(&self, entry: &Entry) -> CaseReport {
        let started = Instant::now();
        // A panic is a defect, but it must not take the other cases along.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.case(entry))).unwrap_or_else(|panic| {
            Err(IngestError::Internal {
                path: entry.image.clone(),
                what: panic_text(panic.as_ref()),
            })
        });
        let mut report = CaseReport {
            id: entry.id.clone(),
            image: entry.image.clone(),
            status: Status::Refused,
            warnings: Vec::new(),
            reason: None,
            label_ids: BTreeSet::new(),
            seconds: started.elapsed().as_secs_f64(),
            stored: None,
        };
        match outcome {
            Ok((status, made, record)) => {
                report.status = status;
                report.warnings = made.warnings;
                report.label_ids = made.label_ids;
                report.stored = Some(StoredCase::of(&record, self.plan));
            }
            Err(error) => {
                let stays = match self.writer.existing(&entry.id) {
                    Some(_) => "; an older version of the case stays in the store",
                    None => "",
                };
                report.reason = Some(format!("{error}{stays}"));
            }
        }
        report
    }

    fn case(&self, entry: &Entry) -> Result<(Status, LedgerEntry, CaseRecord), IngestError> {
        store::check_id(&entry.id)?;
        let key = self.key(entry)?;
        if let Some(mut known) = self.ledger.entry(&entry.id)
            && known.key == key
            && let Some(record) = self.writer.existing(&entry.id)
            && (record.content_hash == known.content_hash || record.has_pseudo_labels())
        {
            if known.image.as_ref() != Some(&entry.image) {
                known.image = Some(entry.image.clone());
                self.ledger.write(&entry.id, &known)?;
            }
            return Ok((Status::Skipped, known, record));
        }
        let (input, mut warnings, label_ids) = self.prepare(entry)?;
        self.check_scan(entry, input.source_hash)?;
        let record = self.writer.write(input)?;
        warnings.extend(self.remarks(&record));
        let made = LedgerEntry {
            key,
            content_hash: record.content_hash,
            warnings,
            label_ids,
            image: Some(entry.image.clone()),
        };
        self.ledger.write(&entry.id, &made)?;
        Ok((Status::Ok, made, record))
    }

    /// Refuses a case whose id another scan of another file has: two data sets may number their files alike.
    fn check_scan(&self, entry: &Entry, source_hash: Digest) -> Result<(), IngestError> {
        let before = self.ledger.entry(&entry.id).and_then(|known| known.image);
        let Some(path) = before.filter(|path| *path != entry.image) else {
            return Ok(());
        };
        match self.writer.existing(&entry.id) {
            Some(record) if record.source_hash != source_hash => Err(IngestError::OtherScan {
                path: entry.image.clone(),
                id: entry.id.clone(),
                before: path,
            }),
            _ => Ok(()),
        }
    }

    /// Returns the digest of everything that decides what the case becomes.
    fn key(&self, entry: &Entry) -> Result<Digest, IngestError> {
        let labels = entry.labels.as_deref().map(|path| hash_of(&self.labels.files(path)?));
        let labels = labels.transpose()?;
        let key = (
            INGEST_REVISION,
            hash_of(&image_files(&entry.image)?)?,
            labels,
            (entry.section, &entry.patient),
            self.labels.preset,
            self.labels.options,
            self.plan,
        );
        Ok(Digest::of_json(&key))
    }

    /// Reads, checks, orients, resamples and crops a case.
    fn prepare(&self, entry: &Entry) -> Result<(CaseInput, Vec<String>, BTreeSet<u8>), IngestError> {
        let (scan, mut warnings) = read_image(&entry.image, self.labels.options)?;
        let image = orient(scan);
        let labels = entry
            .labels
            .as_deref()
            .map(|path| self.labels.read(path, &entry.image, &image, &mut warnings))
            .transpose()?;
        let (labels, label_ids) = match labels {
            Some(labels) => (Some(labels.voxels), labels.ids),
            None => (None, BTreeSet::new()),
        };
        let hash = source_hash(&image.voxels);
        let fingerprint = Fingerprint::of(image.voxels.view(), image.grid.spacing_mm());
        let (resampled, grid) = onto_plan(&entry.image, image.voxels, &image.grid, self.plan)?;
        let labels = labels.map(|labels| resample_labels(&labels, &image.grid, &grid));
        let labels_or_none = labels.unwrap_or_else(|| Array3::zeros(grid.shape));
        let body = body_box(&resampled, &labels_or_none, &grid).unwrap_or_else(|| {
            warnings.push(format!("no voxel above {BODY_HU} HU: not cropped"));
            Region::whole(grid.shape)
        });
        let (kind, annotation) = self.labels.annotation(entry);
        let input = CaseInput {
            id: entry.id.clone(),
            kind,
            grid: Grid {
                shape: body.size,
                affine: grid.affine.shifted(body.start),
            },
            annotation,
            patient: entry.patient.clone().map_or_else(|| patient_of(&entry.image), Ok)?,
            labels_by: String::new(),
            source_hash: hash,
            fingerprint,
            source: image.source,
            image: cropped(&resampled, body),
            labels: cropped(&labels_or_none, body),
        };
        Ok((input, warnings, label_ids))
    }

    /// Names the classes that were annotated in several cases and occur in none: the preset may be another data set's.
    fn unused_classes(&self, entries: &[&Entry], cases: &[CaseReport]) -> Vec<String> {
        let labelled: Vec<_> = (entries.iter().zip(cases))
            .filter(|(_, case)| !case.label_ids.is_empty())
            .collect();
        let all: BTreeSet<u8> = labelled
            .iter()
            .flat_map(|(_, case)| case.label_ids.iter().copied())
            .collect();
        let unused = |class: &String| {
            let of_class = |id: &u8| self.labels.preset.map.get(id) == Some(class);
            let is_annotated = |entry: &Entry| self.labels.annotation(entry).1.classes.contains(class);
            let looked = labelled.iter().filter(|(entry, _)| is_annotated(entry)).count();
            (looked >= CASES_THAT_TELL && !all.iter().any(of_class)).then(|| {
                let others: Vec<_> = built_in::candidates(&all)
                    .into_iter()
                    .filter(|name| *name != self.labels.preset.name)
                    .collect();
                let ids: Vec<_> = all.iter().map(ToString::to_string).collect();
                format!(
                    "preset {}: {class} occurs in none of {looked} cases; the ids found are {}{}",
                    self.labels.preset.name,
                    ids.join(", "),
                    looks_like(&others)
                )
            })
        };
        let classes = &self.labels.resolved.annotation.classes;
        classes.iter().filter_map(unused).collect()
    }

    fn remarks(&self, record: &CaseRecord) -> Vec<String> {
        let mut remarks = Vec::new();
        if record.organs.is_empty() {
            remarks.push("no organ labels: stored, refused as a host for synthesis".into());
        }
        let (shape, patch) = (record.grid.shape, self.plan.patch);
        if (0..3).any(|axis| shape[axis] < patch[axis]) {
            remarks.push(format!(
                "{shape:?} voxels, smaller than the patch {patch:?}: patches are padded with air"
            ));
        }
        if record.kind == CaseKind::Unlabelled && !record.tumours.is_empty() {
            remarks.push(format!(
                "{} tumours in labels that count as without: kept, and lesions are placed away from them",
                record.tumours.len()
            ));
        }
        remarks
    }
}

/// Returns the box around everything denser than air or labelled, with a margin; nothing where there is no such voxel.
pub(super) fn body_box(image: &Array3<i16>, labels: &Array3<u8>, grid: &Grid) -> Option<Region> {
    let (mut low, mut high) = ([usize::MAX; 3], [0; 3]);
    let mut meet = |at: [usize; 3]| {
        for axis in 0..3 {
            low[axis] = low[axis].min(at[axis]);
            high[axis] = high[axis].max(at[axis]);
        }
    };
    for (z, (plane, label_plane)) in image.outer_iter().zip(labels.outer_iter()).enumerate() {
        for (y, (row, label_row)) in plane.outer_iter().zip(label_plane.outer_iter()).enumerate() {
            let holds = |(hu, label): (&i16, &u8)| *hu > BODY_HU || *label != 0;
            let first = row.iter().zip(&label_row).position(holds);
            let last = row.iter().rev().zip(label_row.iter().rev()).position(holds);
            if let (Some(first), Some(last)) = (first, last) {
                meet([z, y, first]);
                meet([z, y, row.len() - 1 - last]);
            }
        }
    }
    if low[0] == usize::MAX {
        return None;
    }
    let tight = Region {
        start: low.map(|v| v as i64),
        size: std::array::from_fn(|axis| high[axis] - low[axis] + 1),
    };
    let margin = grid.spacing_mm().map(|mm| libm::ceil(CROP_MARGIN_MM / mm) as usize);
    Some(tight.grown(margin).intersect(&Region::whole(grid.shape)))
}

pub(super) fn cropped<T: Clone>(volume: &Array3<T>, region: Region) -> Array3<T> {
    let [z, y, x] = region.start.map(|v| v as usize);
    let [d, h, w] = region.size;
    volume.slice(s![z..z + d, y..y + h, x..x + w]).to_owned()
}
