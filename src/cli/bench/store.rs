//! `freetumor bench store`: how fast patches are read, beside a plain copy of such patches out of RAM.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ndarray::{Array3, s};

use crate::cli::{say, say_json};
use crate::config::Config;
use crate::ingest::nifti::{write_image, write_labels};
use crate::rng::{Purpose, Rng};
use crate::store::{CaseInput, Cases, Compression, Store, StoreConfig, StoreWriter};
use crate::volume::{Plan, Region, Shape};

/// Phantoms lie on 1.5 mm axial voxels and 0.75 mm slices: real scans hold more slices than the phantom's trunk is long.
const SPACING_MM: [f64; 3] = [0.75, 1.5, 1.5];
/// The cohort's labelled and healthy phantoms.
const PHANTOMS: [usize; 2] = [4, 3];

/// Measure reads of random patches from raw and zstd stores, on one thread with a warm page cache
///
/// Without --store, seven phantoms of about 250 x 180 x 220 voxels are made. Image and labels of random boxes that lie
/// inside a volume go into the same two buffers; beside it, the same boxes are copied out of arrays in RAM.
///
/// Example: freetumor bench store --seconds 5 --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    /// Measure with the volumes of this store, written again as raw and zstd
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Where the two stores go and stay; a temporary folder without it
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Write the volumes as NIfTI (ID.nii.gz and ID_label.nii.gz) into this folder, for other readers
    #[arg(long, value_name = "DIR")]
    export: Option<PathBuf>,
    /// Voxels along each side of a patch
    #[arg(long, default_value_t = 96)]
    side: usize,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(serde::Serialize)]
struct Report {
    cases: usize,
    voxels: usize,
    patch: Shape,
    raw_per_s: f64,
    zstd_per_s: f64,
    /// As `zstd_per_s`, with the default memory for unpacked chunks.
    cached_per_s: f64,
    ram_copy_per_s: f64,
    raw_bytes_per_case: u64,
    /// Of the zstd store.
    bytes_per_case: u64,
    zstd_bytes_per_voxel: f64,
}

/// A volume in RAM.
struct Loaded {
    image: Array3<i16>,
    labels: Array3<u8>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    ensure!(
        args.side >= 1 && args.side <= 512,
        "--side: expected 1 to 512, got {}",
        args.side
    );
    ensure!(
        (0.01..=3600.0).contains(&args.seconds),
        "--seconds: expected 0.01 to 3600, got {}",
        args.seconds
    );
    let temporary = tempfile::tempdir()?;
    let dir = args.dir.as_deref().unwrap_or(temporary.path());
    let source = match &args.store {
        Some(store) => store.clone(),
        None => make_phantoms(&dir.join("phantoms"))?,
    };
    let source = Store::open(&source).with_context(|| format!("cannot open {}", source.display()))?;
    let volumes = load(&source)?;
    if let Some(export) = &args.export {
        export_volumes(&source, &volumes, export)?;
    }
    let raw = rewrite(&source, &volumes, &dir.join("raw"), Compression::Raw)?;
    let zstd = rewrite(&source, &volumes, &dir.join("zstd"), Compression::Zstd)?;
    let bench = Bench {
        side: args.side,
        time: Duration::from_secs_f64(args.seconds),
        volumes: &volumes,
    };
    let voxels = volumes.iter().map(|volume| volume.image.len()).sum();
    let zstd_bytes = case_bytes(&dir.join("zstd"))?;
    let report = Report {
        cases: volumes.len(),
        voxels,
        patch: [args.side; 3],
        raw_per_s: bench.store(&raw)?,
        zstd_per_s: bench.store(&zstd)?,
        cached_per_s: bench.store(&zstd.with_config(&StoreConfig::default()))?,
        ram_copy_per_s: bench.ram(),
        raw_bytes_per_case: case_bytes(&dir.join("raw"))? / volumes.len() as u64,
        bytes_per_case: zstd_bytes / volumes.len() as u64,
        zstd_bytes_per_voxel: zstd_bytes as f64 / voxels as f64,
    };
    print(&report, args.json)?;
    Ok(ExitCode::SUCCESS)
}

fn print(report: &Report, json: bool) -> anyhow::Result<()> {
    if json {
        return say_json(report);
    }
    say(&format!(
        "patches of {:?} from {} cases, per second:",
        report.patch, report.cases
    ));
    for (name, rate) in [
        ("raw store", report.raw_per_s),
        ("zstd store", report.zstd_per_s),
        ("zstd store, chunks kept", report.cached_per_s),
        ("copy from RAM", report.ram_copy_per_s),
    ] {
        say(&format!("  {name:24} {rate:8.0}"));
    }
    say(&format!(
        "bytes per case: {} raw, {} zstd ({:.3} per voxel)",
        report.raw_bytes_per_case, report.bytes_per_case, report.zstd_bytes_per_voxel
    ));
    Ok(())
}

/// Makes the phantoms' store and returns its folder.
fn make_phantoms(dir: &Path) -> anyhow::Result<PathBuf> {
    let plan = Plan {
        spacing_mm: SPACING_MM,
        ..Plan::default()
    };
    let config = Config {
        plan,
        ..Config::default()
    };
    crate::cli::phantom::make(dir, &config, PHANTOMS, 1)?;
    Ok(dir.into())
}

fn load(source: &Store) -> anyhow::Result<Vec<Loaded>> {
    ensure!(!source.records().is_empty(), "the store holds no case");
    let whole = |(case, record): (usize, &crate::store::CaseRecord)| {
        let crop = source.read(case, Region::whole(record.grid.shape))?;
        Ok(Loaded {
            image: crop.image,
            labels: crop.labels,
        })
    };
    source.records().iter().enumerate().map(whole).collect()
}

fn export_volumes(source: &Store, volumes: &[Loaded], dir: &Path) -> anyhow::Result<()> {
    fs_err::create_dir_all(dir)?;
    for (record, volume) in source.records().iter().zip(volumes) {
        let path = |suffix: &str| dir.join(format!("{}{suffix}.nii.gz", record.id));
        write_image(&path(""), volume.image.view(), &record.grid)?;
        write_labels(&path("_label"), volume.labels.view(), &record.grid)?;
    }
    Ok(())
}

/// Writes the volumes into a store of their own.
fn rewrite(source: &Store, volumes: &[Loaded], dir: &Path, compression: Compression) -> anyhow::Result<Store> {
    let writer = StoreWriter::create(dir, source.plan())?.compression(compression);
    for (record, volume) in source.records().iter().zip(volumes) {
        writer.write(CaseInput {
            id: record.id.clone(),
            kind: record.kind,
            grid: record.grid,
            annotation: record.annotation.clone(),
            patient: record.patient.clone(),
            labels_by: record.labels_by.clone(),
            source_hash: record.source_hash,
            fingerprint: record.fingerprint.clone(),
            source: record.source.clone(),
            image: volume.image.clone(),
            labels: volume.labels.clone(),
        })?;
    }
    writer.finish()?;
    let store = Store::open(dir)?;
    ensure!(
        store.records().len() == volumes.len(),
        "{}: holds other cases; expected an empty or new folder",
        dir.display()
    );
    Ok(store)
}

fn case_bytes(dir: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs_err::read_dir(dir.join("cases"))? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes)
}

struct Bench<'a> {
    side: usize,
    time: Duration,
    volumes: &'a [Loaded],
}

impl Bench<'_> {
    /// Times `read` over random boxes; a box is as large as the patch or the volume, whichever is smaller.
    fn rate(&self, mut read: impl FnMut(usize, Region) -> anyhow::Result<()>) -> anyhow::Result<f64> {
        let mut rng = Rng::keyed(1, 0, 0, Purpose::Test);
        let mut draw = || {
            let case = rng.below(self.volumes.len());
            let shape: Shape = self.volumes[case].image.dim().into();
            let size = shape.map(|side| side.min(self.side));
            let start = std::array::from_fn(|axis| rng.below(shape[axis] - size[axis] + 1) as i64);
            (case, Region { start, size })
        };
        // Opens every file and faults its pages in.
        for _ in 0..20 * self.volumes.len() {
            let (case, region) = draw();
            read(case, region)?;
        }
        let (start, mut reads) = (Instant::now(), 0);
        while start.elapsed() < self.time {
            let (case, region) = draw();
            read(case, region)?;
            reads += 1;
        }
        Ok(f64::from(reads) / start.elapsed().as_secs_f64())
    }

    fn store(&self, store: &Store) -> anyhow::Result<f64> {
        let (mut image, mut labels) = (vec![0; self.side.pow(3)], vec![0; self.side.pow(3)]);
        self.rate(|case, region| {
            let voxels = region.voxels();
            store.read_into(case, region, &mut image[..voxels], &mut labels[..voxels])?;
            Ok(())
        })
    }

    fn ram(&self) -> f64 {
        let mut image = Array3::zeros([self.side; 3]);
        let mut labels = Array3::zeros([self.side; 3]);
        let rate = self.rate(|case, region| {
            let [z, y, x] = region.start.map(|v| v as usize);
            let [d, h, w] = region.size;
            let window = s![z..z + d, y..y + h, x..x + w];
            let into = s![..d, ..h, ..w];
            image.slice_mut(into).assign(&self.volumes[case].image.slice(window));
            labels.slice_mut(into).assign(&self.volumes[case].labels.slice(window));
            Ok(())
        });
        std::hint::black_box((&image, &labels));
        rate.expect("a copy cannot fail")
    }
}
