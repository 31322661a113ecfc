//! The phantom's validity, measured: organ volumes, tumour sizes and contrasts, and that no threshold finds tumours.

use std::time::Instant;

use super::*;
use crate::store::{CaseKind, Cases, Store};
use crate::volume::{Plan, Region};

fn labelled(n: usize) -> Vec<PhantomVolume> {
    cohort(7, n, 0).iter().map(generate).collect()
}

fn millilitres(volume: &PhantomVolume, ids: &[u8]) -> f64 {
    let voxels = volume.labels.iter().filter(|label| ids.contains(label)).count();
    voxels as f64 * volume.grid.spacing_mm().iter().product::<f64>() / 1000.0
}

/// Writes every eighth slice of a few volumes as PNG in the folder named by `FREETUMOR_PHANTOM_PICTURES`.
#[test]
fn pictures_for_the_eye() {
    let Ok(folder) = std::env::var("FREETUMOR_PHANTOM_PICTURES") else {
        return;
    };
    let mut specs = cohort(7, 4, 2);
    specs[1].phase = Phase::NonContrast;
    for spec in &specs {
        let start = Instant::now();
        let volume = generate(spec);
        eprintln!(
            "{spec:?}: {:.2} s, {:?}",
            start.elapsed().as_secs_f64(),
            volume.grid.shape
        );
        let [liver, pancreas, kidney] = [1, 3, 5].map(|id| millilitres(&volume, &[id, id + 1]));
        eprintln!("  liver {liver:.0} pancreas {pancreas:.0} kidneys {kidney:.0} mL");
        for tumour in &volume.tumours {
            eprintln!("  {tumour:?}");
        }
        write_slices(&volume, &format!("{folder}/phantom_{}.png", spec.index));
    }
}

/// Writes a mosaic of four by three axial slices, anterior up and the patient's right on the left, labels outlined.
fn write_slices(volume: &PhantomVolume, path: &str) {
    let (depth, height, width) = volume.image.dim();
    let (columns, rows) = (4, 3);
    let mut pixels = vec![0u8; columns * width * rows * height * 3];
    for tile in 0..columns * rows {
        let z = (tile * 2 + 1) * depth / (2 * columns * rows);
        for y in 0..height {
            for x in 0..width {
                let at = [z, height - 1 - y, width - 1 - x];
                let grey = ((f64::from(volume.image[at]) + 160.0) / 400.0 * 255.0).clamp(0.0, 255.0) as u8;
                let label = volume.labels[at];
                let is_edge = label != 0
                    && [[0, 1], [1, 0]].iter().any(|[dy, dx]| {
                        volume
                            .labels
                            .get([at[0], at[1] + dy, at[2] + dx])
                            .is_some_and(|other| *other != label)
                    });
                let tint = [
                    [grey; 3],
                    [255, 0, 0],
                    [255, 255, 0],
                    [0, 255, 0],
                    [255, 0, 255],
                    [0, 128, 255],
                    [255, 128, 0],
                ];
                let colour = if is_edge && tile % 2 == 1 {
                    tint[usize::from(label)]
                } else {
                    [grey; 3]
                };
                let place = ((tile / columns * height + y) * columns + tile % columns) * width + x;
                pixels[3 * place..3 * place + 3].copy_from_slice(&colour);
            }
        }
    }
    let file = fs_err::File::create(path).unwrap();
    let mut encoder = png::Encoder::new(file, (columns * width) as u32, (rows * height) as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
}

#[test]
fn equal_specifications_give_equal_volumes() {
    let spec = &cohort(7, 1, 0)[0];
    let inside = std::thread::spawn({
        let spec = spec.clone();
        move || generate(&spec)
    });
    assert_eq!(generate(spec), inside.join().unwrap());
}

#[test]
fn sizes_are_those_of_patients() {
    for volume in labelled(3) {
        let [liver, pancreas, kidney] = [1, 3, 5].map(|id| millilitres(&volume, &[id, id + 1]));
        assert!((1150.0..1950.0).contains(&liver), "liver {liver}");
        assert!((55.0..150.0).contains(&pancreas), "pancreas {pancreas}");
        assert!((230.0..560.0).contains(&kidney), "kidneys {kidney}");
    }
}

/// Best Dice of "tumour = HU below t" or "above t" inside the organ and its tumour, over all volumes together.
fn best_threshold_dice(volumes: &[PhantomVolume], organ: u8) -> f64 {
    let bins = 4096;
    let mut counts = vec![[0u64; 2]; bins];
    for volume in volumes {
        for (hu, label) in volume.image.iter().zip(&volume.labels) {
            if *label == organ || *label == organ + 1 {
                counts[(*hu + 1024) as usize][usize::from(*label - organ)] += 1;
            }
        }
    }
    let total: [u64; 2] = [0, 1].map(|k| counts.iter().map(|c| c[k]).sum());
    let dice = |[healthy, tumour]: [u64; 2]| 2.0 * tumour as f64 / (healthy + tumour + total[1]) as f64;
    let mut below = [0u64; 2];
    let mut best = (0.0f64, String::new());
    for (hu, count) in counts.into_iter().enumerate() {
        below = [below[0] + count[0], below[1] + count[1]];
        let above = [total[0] - below[0], total[1] - below[1]];
        for (kind, candidate) in [("below", dice(below)), ("above", dice(above))] {
            if candidate > best.0 {
                best = (candidate, format!("{kind} {}", hu as i32 - 1024));
            }
        }
    }
    let all = dice(total);
    eprintln!(
        "organ {organ}: best single threshold Dice {:.3} at {}, all voxels {all:.3}",
        best.0, best.1
    );
    best.0
}

#[test]
fn no_threshold_finds_the_tumours() {
    let volumes = labelled(14);
    let mut worst = 0.0f64;
    for organ in [LIVER, PANCREAS, KIDNEY] {
        let dice = best_threshold_dice(&volumes, organ);
        worst = worst.max(dice);
    }
    let tumours: Vec<_> = volumes.iter().flat_map(|volume| &volume.tumours).collect();
    let share = |is: &dyn Fn(&PhantomTumour) -> bool| {
        tumours.iter().filter(|tumour| is(tumour)).count() as f64 / tumours.len() as f64
    };
    let small = share(&|t| t.diameter_mm < 20.0);
    let faint = share(&|t| t.contrast_hu.abs() < 15.0);
    let bright = share(&|t| t.contrast_hu > 15.0);
    eprintln!(
        "{} tumours, under 20 mm {small:.2}, under 15 HU {faint:.2}, bright {bright:.2}",
        tumours.len()
    );
    for label in [2, 4, 6] {
        let mut sizes: Vec<_> = tumours
            .iter()
            .filter(|t| t.label == label)
            .map(|t| t.diameter_mm.round())
            .collect();
        sizes.sort_by(f64::total_cmp);
        eprintln!("  label {label}: {sizes:?}");
    }
    assert!(worst < 0.30, "a threshold scores {worst:.3}");
    assert!(small >= 0.4, "{small}");
    assert!((0.15..0.40).contains(&faint), "{faint}");
    assert!((0.05..0.30).contains(&bright), "{bright}");
}

#[test]
fn labels_are_sane() {
    for volume in labelled(4) {
        let labels = &volume.labels;
        assert!(labels.iter().all(|label| *label <= 6));
        for (organ, pieces) in [(LIVER, 1), (PANCREAS, 1), (KIDNEY, 2)] {
            assert_eq!(large_pieces(labels, &[organ, organ + 1]), pieces, "organ {organ}");
        }
        for tumour in &volume.tumours {
            assert_eq!(labels[tumour.voxel], tumour.label);
        }
        let per_class = |label| {
            volume
                .tumours
                .iter()
                .filter(|t| t.label == label)
                .map(|t| t.voxels)
                .sum::<usize>()
        };
        for label in [2, 4, 6] {
            // A later tumour never takes an earlier one's voxels.
            assert_eq!(
                labels.iter().filter(|l| **l == label).count(),
                per_class(label),
                "label {label}"
            );
        }
    }
    let healthy = generate(&cohort(7, 0, 1)[0]);
    assert!(healthy.tumours.is_empty() && healthy.labels.iter().all(|label| [0, 1, 3, 5].contains(label)));
}

/// Counts face-connected pieces that hold at least 1 % of the voxels with one of the labels.
fn large_pieces(labels: &Array3<u8>, wanted: &[u8]) -> usize {
    let mut open = labels.mapv(|label| wanted.contains(&label));
    let total = open.iter().filter(|is| **is).count();
    let starts: Vec<_> = open.indexed_iter().filter(|(_, is)| **is).map(|(at, _)| at).collect();
    let mut pieces = 0;
    for start in starts {
        let mut queue = vec![start];
        let mut size = 0;
        while let Some((z, y, x)) = queue.pop() {
            if open.get((z, y, x)).copied() != Some(true) {
                continue;
            }
            open[(z, y, x)] = false;
            size += 1;
            let minus = |v: usize| v.wrapping_sub(1);
            queue.extend([
                (z + 1, y, x),
                (minus(z), y, x),
                (z, y + 1, x),
                (z, minus(y), x),
                (z, y, x + 1),
                (z, y, minus(x)),
            ]);
        }
        pieces += usize::from(size * 100 >= total);
    }
    pieces
}

#[test]
fn cohorts_of_one_seed_share_their_patients() {
    let (small, large) = (cohort(3, 1, 2), cohort(3, 5, 4));
    assert!(small.iter().all(|spec| large.contains(spec)));
    assert_eq!(large.iter().filter(|spec| spec.tumours == Tumours::Labelled).count(), 5);
}

/// One liver with one large tumour, and as many nodules.
fn look_alikes(nodules: bool, rim_hu: f64) -> PhantomSettings {
    let law = LesionLaw {
        counts: vec![0.0, 0.0, 1.0],
        ln_mean: 3.4,
        ln_sd: 0.1,
        range_mm: [25.0, 45.0],
    };
    PhantomSettings {
        plain_every: 0,
        tumours: [("liver".to_string(), law.clone())].into(),
        nodules: nodules.then(|| ("liver".to_string(), law)).into_iter().collect(),
        rim: RimLaw {
            share: f64::from(u8::from(rim_hu > 0.0)),
            hu: rim_hu,
        },
        ..PhantomSettings::default()
    }
}

#[test]
fn nodules_are_labelled_as_their_organ_and_twins_share_them() {
    let spec = |tumours| PhantomSpec {
        tumours,
        spacing_mm: [4.0; 3],
        ..cohort(5, 1, 0).remove(0)
    };
    let [plain, healthy] = [false, true].map(|nodules| generate_with(&look_alikes(nodules, 0.0), &spec(Tumours::None)));
    assert_eq!(plain.labels, healthy.labels);
    let changed = plain.image.iter().zip(&healthy.image).filter(|(a, b)| a != b).count();
    // Two of about 30 mm are 440 voxels of 4 mm; the scanner's blur carries them a little further.
    assert!((200..3000).contains(&changed), "{changed}");
    let sick = generate_with(&look_alikes(true, 0.0), &spec(Tumours::Labelled));
    let tumour = sick.labels.iter().filter(|label| **label == LIVER + 1).count();
    let apart = healthy.image.iter().zip(&sick.image).filter(|(a, b)| a != b).count();
    assert!(
        tumour > 200 && apart < 4 * tumour,
        "{apart} voxels changed for {tumour}"
    );
}

#[test]
fn a_hidden_tumour_is_in_the_image_and_not_in_the_labels() {
    let folder = tempfile::tempdir().unwrap();
    let plan = Plan {
        spacing_mm: [6.0; 3],
        ..Plan::default()
    };
    let specs = [Tumours::None, Tumours::Hidden, Tumours::Labelled].map(|tumours| PhantomSpec {
        tumours,
        spacing_mm: plan.spacing_mm,
        ..cohort(5, 1, 0).remove(0)
    });
    write_cohort(folder.path(), &plan, (&look_alikes(false, 0.0), &specs), &|_| ()).unwrap();
    let store = Store::open(folder.path()).unwrap();
    let [none, hidden, labelled] = specs.map(|spec| {
        let case = store.find(&case_id(&spec)).unwrap();
        let whole = Region {
            start: [0; 3],
            size: store.records()[case].grid.shape,
        };
        (store.records()[case].clone(), store.read(case, whole).unwrap())
    });
    assert_eq!(hidden.1.image, labelled.1.image);
    assert_ne!(hidden.1.image, none.1.image);
    assert_eq!(
        hidden.1.labels,
        labelled
            .1
            .labels
            .mapv(|id| if id % 2 == 0 { id.saturating_sub(1) } else { id })
    );
    assert!(labelled.1.labels.iter().filter(|id| **id == LIVER + 1).count() > 10);
    assert_eq!(
        (hidden.0.kind, labelled.0.kind),
        (CaseKind::Unlabelled, CaseKind::Labelled)
    );
    assert_eq!(
        [&none.0, &hidden.0].map(|record| record.annotation.assumed_tumour_free),
        [true, false]
    );
    assert_eq!(hidden.0.annotation.classes, none.0.annotation.classes);
}

#[test]
fn nodules_may_differ_from_their_organ_in_another_way_than_tumours() {
    let spec = PhantomSpec {
        tumours: Tumours::None,
        spacing_mm: [4.0; 3],
        ..cohort(5, 1, 0).remove(0)
    };
    let mut settings = look_alikes(false, 0.0);
    let without = generate_with(&settings, &spec);
    settings.nodules = look_alikes(true, 0.0).nodules;
    let change = |bright: f64| {
        let law = ContrastLaw {
            iso: 0.0,
            bright,
            ..ContrastLaw::default()
        };
        let settings = PhantomSettings {
            nodule_contrast: Some(law),
            ..settings.clone()
        };
        let with = generate_with(&settings, &spec);
        let hu = |(a, b): (&i16, &i16)| i64::from(*a) - i64::from(*b);
        with.image.iter().zip(&without.image).map(hu).sum::<i64>()
    };
    // Two of about 30 mm are 440 voxels of 4 mm, at least 22 HU off.
    let [dark, bright] = [0.0, 1.0].map(change);
    assert!(dark < -5000 && bright > 5000, "{dark} {bright}");
}

#[test]
fn rims_are_brighter_than_cores() {
    let spec = PhantomSpec {
        spacing_mm: [2.0; 3],
        ..cohort(5, 1, 0).remove(0)
    };
    let rim_over_core = |rim_hu| {
        let volume = generate_with(&look_alikes(false, rim_hu), &spec);
        let is_tumour = |at: [usize; 3]| volume.labels[at] == LIVER + 1;
        let (mut rim, mut core) = (Vec::new(), Vec::new());
        for ((z, y, x), hu) in volume.image.indexed_iter() {
            let around = [
                [z - z.min(1), y, x],
                [z + 1, y, x],
                [z, y - y.min(1), x],
                [z, y + 1, x],
                [z, y, x - x.min(1)],
                [z, y, x + 1],
            ];
            match is_tumour([z, y, x]) {
                true if around.into_iter().all(is_tumour) => core.push(f64::from(*hu)),
                true => rim.push(f64::from(*hu)),
                false => {}
            }
        }
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        mean(&rim) - mean(&core)
    };
    // Where the tumour ends the scanner mixes it with the brighter liver, rim or not.
    let (without, with) = (rim_over_core(0.0), rim_over_core(100.0));
    assert!(with - without > 40.0, "{with} {without}");
}
