//! A scan is known again when it was saved differently, and no other is taken for it (promise P7).

#![expect(clippy::print_stderr, reason = "a skipped test and a measurement say so")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it stands")]

#[path = "near_duplicates/changes.rs"]
mod changes;
#[path = "near_duplicates/measure.rs"]
mod measure;

use std::path::{Path, PathBuf};

use freetumor::ingest::nifti::{read_image, write_image};
use freetumor::ingest::orient::orient;
use freetumor::ingest::{Entry, IngestConfig, IngestReport, IngestRequest, Preset, Shard, datalist, ingest};
use freetumor::phantom::{PhantomSpec, cohort, generate};
use freetumor::store::{Cases, DuplicateKind, Store, nearness};
use freetumor::volume::{Affine, Fingerprint, Grid, Outline, Plan};
use ndarray::{Array3, s};

use changes::{Scan, changes};

/// Returns a real CT, or nothing where the folder of data is absent.
pub(crate) fn real(name: &str) -> Option<Scan> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data").join(name);
    if !path.exists() {
        eprintln!("skipped: {} is absent", path.display());
        return None;
    }
    let oriented = orient(read_image(&path).unwrap());
    Some(Scan {
        spacing_mm: oriented.grid.spacing_mm(),
        voxels: oriented.voxels,
    })
}

pub(crate) fn phantom(spec: &PhantomSpec) -> Scan {
    Scan {
        voxels: generate(spec).image,
        spacing_mm: spec.spacing_mm,
    }
}

/// Returns two small patients.
fn patients() -> Vec<Scan> {
    let specs = cohort(11, 2, 0).into_iter().map(|spec| PhantomSpec {
        spacing_mm: [3.0; 3],
        ..spec
    });
    specs.map(|spec| phantom(&spec)).collect()
}

#[test]
fn every_change_of_a_patient_is_found_and_the_other_is_not() {
    let patients = patients();
    let outline = |scan: &Scan| Outline::of(&scan.fingerprint()).unwrap();
    let [first, second] = [0, 1].map(|patient| outline(&patients[patient]));
    assert_eq!(nearness(&first, &second), None);
    for change in changes(&patients[0]) {
        let changed = outline(&change.scan);
        assert!(nearness(&first, &changed).is_some(), "{}", change.name);
        assert_eq!(
            nearness(&first, &changed),
            nearness(&changed, &first),
            "{}",
            change.name
        );
        assert_eq!(nearness(&second, &changed), None, "{}", change.name);
    }
}

#[test]
fn a_real_ct_is_found_again_in_what_was_made_of_it() {
    let [Some(torso), Some(part), Some(other)] = [
        "totalsegmentator/example_ct.nii.gz",
        "totalsegmentator/example_ct_sm.nii.gz",
        "crlm/crlm_ct_1006.nii.gz",
    ]
    .map(real) else {
        return;
    };
    let outline = |scan: &Scan| Outline::of(&scan.fingerprint()).unwrap();
    let [a, b, c] = [&torso, &part, &other].map(outline);
    // The second file holds planes 82 to 111 of the first: nobody here cut them out.
    assert!(nearness(&a, &b).is_some());
    assert_eq!((nearness(&a, &c), nearness(&b, &c)), (None, None));
    for change in changes(&torso) {
        assert!(nearness(&a, &outline(&change.scan)).is_some(), "{}", change.name);
        assert_eq!(nearness(&c, &outline(&change.scan)), None, "{}", change.name);
    }
}

/// A body that both languages make by the same rule in integers.
fn body() -> Scan {
    let shape = [50, 90, 110];
    let voxels = Array3::from_shape_fn(shape, |(z, y, x)| {
        let [z, y, x] = [z, y, x].map(|v| v as i64);
        let away = (y - 44).pow(2) * (14 + z % 9) + (x - 56).pow(2) * 10;
        let noise = (z * 7919 + y * 104_729 + x * 1_299_709) % 41 - 20;
        let hu = match away {
            0..1500 => 400,
            1500..9000 => 60,
            9000..16_000 => -105,
            _ => -1000,
        };
        (hu + noise) as i16
    });
    Scan {
        voxels,
        spacing_mm: [2.5, 1.25, 0.9],
    }
}

#[test]
fn fingerprints_never_change_and_python_makes_the_same() {
    // python/tests/test_ingest_parity.py reads the same file.
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/fingerprints.json");
    let mut found = std::collections::BTreeMap::from([("body".to_string(), body().fingerprint())]);
    for name in ["totalsegmentator/example_ct.nii.gz", "crlm/crlm_ct_1006.nii.gz"] {
        found.extend(real(name).map(|scan| (name.to_string(), scan.fingerprint())));
    }
    if std::env::var_os("FREETUMOR_UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, serde_json::to_string_pretty(&found).unwrap() + "\n").unwrap();
    }
    let expected: std::collections::BTreeMap<String, Fingerprint> =
        serde_json::from_slice(&std::fs::read(&golden).unwrap()).unwrap();
    assert_eq!(expected.len(), 3);
    for (name, fingerprint) in found {
        assert_eq!(expected[&name], fingerprint, "{name}");
    }
}

#[test]
fn what_shows_no_body_has_no_fingerprint() {
    let air = Array3::from_elem([20; 3], -1000_i16);
    assert!(Fingerprint::of(air.view(), [1.0; 3]).is_empty());
    // Neither bytes that are none nor too few slabs are compared.
    assert_eq!(Outline::of(&Fingerprint::default()), None);
    assert_eq!(Outline::of(&Fingerprint::from_bytes(vec![1; 40]).unwrap()), None);
    let few = Array3::from_elem([7, 20, 20], 50_i16);
    assert_eq!(Outline::of(&Fingerprint::of(few.view(), [5.0; 3])), None);
}

struct Files {
    dir: tempfile::TempDir,
    plan: Plan,
}

impl Files {
    fn write(&self, name: &str, scan: &Scan) -> Entry {
        let path: PathBuf = self.dir.path().join(format!("{name}.nii.gz"));
        let grid = Grid {
            shape: scan.voxels.dim().into(),
            affine: Affine::axis_aligned(scan.spacing_mm, [0.0; 3]),
        };
        write_image(&path, scan.voxels.view(), &grid).unwrap();
        datalist::single(&path, None)
    }

    fn ingest(&self, entries: &[Entry], shard: Shard) -> IngestReport {
        let request = IngestRequest {
            entries: entries.to_vec(),
            preset: Preset::named("lits").unwrap(),
            options: IngestConfig::default(),
            shard,
        };
        ingest(&request, &self.dir.path().join("store"), &self.plan, &|_| {}).unwrap()
    }

    fn store(&self) -> Store {
        Store::open(self.dir.path().join("store")).unwrap()
    }
}

/// Returns the pairs of a report, ids in order.
fn pairs(report: &IngestReport) -> Vec<(String, String, DuplicateKind)> {
    let pair = |pair: &freetumor::store::Duplicate| (pair.first.clone(), pair.second.clone(), pair.kind);
    let mut pairs: Vec<_> = report.duplicates.iter().map(pair).collect();
    pairs.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
    pairs
}

#[test]
fn ingest_reports_duplicates_within_a_run_across_shards_and_in_later_runs() {
    let files = Files {
        dir: tempfile::tempdir().unwrap(),
        plan: Plan {
            spacing_mm: [3.0; 3],
            ..Plan::default()
        },
    };
    let patients = patients();
    let cropped = Scan {
        voxels: patients[0].voxels.slice(s![8.., .., ..]).mapv(|hu| hu.clamp(-175, 250)),
        ..patients[0].clone()
    };
    let entries = [
        files.write("a", &patients[0]),
        files.write("b", &cropped),
        files.write("c", &patients[1]),
        files.write("d", &patients[1]),
    ];
    let pair = |a: &str, b: &str, kind| (a.to_string(), b.to_string(), kind);
    let (near, exact) = (
        pair("a", "b", DuplicateKind::Near),
        pair("c", "d", DuplicateKind::Exact),
    );
    // Shard 0 of 2 takes a and c, shard 1 takes b and d: whichever ends later sees the pairs.
    let shard = |index| Shard { index, count: 2 };
    assert_eq!(pairs(&files.ingest(&entries, shard(0))), []);
    assert_eq!(pairs(&files.ingest(&entries, shard(1))), [near.clone(), exact.clone()]);
    let store = files.store();
    let found: Vec<_> = store
        .near_duplicates()
        .iter()
        .map(|pair| (pair.first, pair.second))
        .collect();
    assert_eq!(found, [(0, 1)]);
    // A later run says it again of its own cases, from what the index knows.
    let report = files.ingest(&entries[1..2], Shard::default());
    assert_eq!(pairs(&report), [near]);
    assert!(report.duplicates[0].score.unwrap() >= freetumor::volume::MIN_SCORE);
    // A case that goes takes its pairs along; one that becomes another scan is compared anew.
    std::fs::remove_file(files.dir.path().join("store/cases/a.ftc")).unwrap();
    let entry = files.write("b", &patients[1]);
    let report = files.ingest(&[entry], Shard::default());
    let exact = ["c", "d"].map(|other| pair("b", other, DuplicateKind::Exact));
    assert_eq!(pairs(&report), exact);
    assert!(files.store().near_duplicates().is_empty());
}
