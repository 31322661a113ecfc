//! A lesion's shape and soft mask per size class, beside the floor of filling its cube with zeros and what an attempt
//! reads from the store; `peers/lesion_scipy.py` times the published way of making a mask.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on should panic")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use freetumor::lesion::{MaskRequest, Shape, ShapeRequest, soft_mask};
use freetumor::nn::CubeSides;
use freetumor::phantom::{PhantomSpec, Phase, Scanner, Tumours, write_store};
use freetumor::rng::{Purpose, Rng};
use freetumor::sampler::{diameters_mm, draw_diameter_mm};
use freetumor::store::{Cases, Store};
use freetumor::stream::recipe::Recipe;
use freetumor::volume::{LabelMap, Organ, Plan, Region, SizeClass};
use ndarray::Array3;

/// The allocator of the binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Lesions that a benchmark walks through, so that it shows their mean.
const LESIONS: u64 = 100;

/// A lesion to be made: its diameter, the key of its form, and the cube it lies in.
struct Wanted {
    diameter_mm: f64,
    key: u64,
    side: usize,
}

/// Draws a lesion of a size class as the sampler does; nothing where the grid has none.
fn draw(size: SizeClass, key: u64, spacing_mm: f64, organ: &Organ) -> Option<Wanted> {
    let side = CubeSides::default().of(size);
    let range = diameters_mm(size, 200.0, [spacing_mm; 3], side as f64 * spacing_mm)?;
    let mut rng = Rng::keyed(key, 0, 0, Purpose::Test);
    Some(Wanted {
        diameter_mm: draw_diameter_mm(&mut rng, organ, range),
        key,
        side,
    })
}

/// Times shape and soft mask, lesion after lesion. A plane cuts a seventh of the cube off, and part of most lesions.
fn time(c: &mut Criterion, name: &str, lesions: &[Wanted], spacing_mm: f64) {
    let form = Recipe::default().lesion;
    let hosts: Vec<Array3<u8>> = lesions
        .iter()
        .map(|wanted| {
            let end = wanted.side * 6 / 5;
            Array3::from_shape_fn([wanted.side; 3], |(_, y, x)| u8::from(x + y < end))
        })
        .collect();
    let mut at = 0;
    c.bench_function(name, |b| {
        b.iter(|| {
            at = (at + 1) % lesions.len();
            let Wanted { diameter_mm, key, side } = lesions[at];
            let request = ShapeRequest {
                diameter_mm,
                form: &form,
            };
            let shape = Shape::draw(&request, &mut Rng::keyed(key, 0, 0, Purpose::Shape));
            black_box(soft_mask(&MaskRequest {
                shape: &shape,
                centre: [side as i64 / 2; 3],
                region: Region::whole([side; 3]),
                spacing_mm: [spacing_mm; 3],
                host: &hosts[at],
                form: &form,
            }))
        });
    });
}

fn masks(c: &mut Criterion) {
    let liver = LabelMap::default().organ("liver").unwrap();
    for spacing_mm in [1.5, 1.0, 3.0] {
        for size in SizeClass::ALL {
            let lesions: Vec<Wanted> = (0..LESIONS)
                .filter_map(|key| draw(size, key, spacing_mm, &liver))
                .collect();
            if !lesions.is_empty() {
                time(
                    c,
                    &format!("mask {spacing_mm} mm {}", size.name()),
                    &lesions,
                    spacing_mm,
                );
            }
        }
        // The largest diameter that is ever asked for in the largest cube.
        let side = CubeSides::default().of(SizeClass::Large);
        let range = diameters_mm(SizeClass::Large, 200.0, [spacing_mm; 3], side as f64 * spacing_mm);
        let largest: Vec<Wanted> = (range.into_iter())
            .flat_map(|[_, diameter_mm]| (0..20).map(move |key| Wanted { diameter_mm, key, side }))
            .collect();
        time(c, &format!("mask {spacing_mm} mm largest"), &largest, spacing_mm);
        let mix = Recipe::default().sizes;
        let mut mixed: Vec<Wanted> = mix
            .iter()
            .flat_map(|(size, share)| (0..(share * LESIONS as f64).round() as u64).map(|key| (*size, key)))
            .filter_map(|(size, key)| draw(size, key, spacing_mm, &liver))
            .collect();
        // In random order, so that a round cut short still shows every class.
        Rng::keyed(0, 0, 0, Purpose::Test).shuffle(&mut mixed);
        time(c, &format!("mask {spacing_mm} mm mix"), &mixed, spacing_mm);
    }
}

fn floor(c: &mut Criterion) {
    for size in SizeClass::ALL {
        let mut cube = vec![1u8; CubeSides::default().of(size).pow(3)];
        c.bench_function(&format!("zeros {}", size.name()), |b| {
            b.iter(|| black_box(&mut cube).fill(0));
        });
    }
}

fn store(c: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let spec = PhantomSpec {
        seed: 1,
        index: 0,
        scanner: Scanner::C,
        phase: Phase::Portal,
        tumours: Tumours::None,
        spacing_mm: [1.5; 3],
    };
    let plan = Plan::default();
    write_store(folder.path(), &plan, &[spec], &|_| ()).unwrap();
    let cases = Store::open(folder.path()).unwrap();
    let liver = plan.labels.organ("liver").unwrap();
    let centre = cases.candidates(0, liver.id).unwrap()[0].voxel.map(i64::from);
    for size in SizeClass::ALL {
        let region = Region::centred(centre, [CubeSides::default().of(size); 3]);
        c.bench_function(&format!("read host {}", size.name()), |b| {
            b.iter(|| black_box(cases.read(0, region).unwrap()));
        });
    }
    c.bench_function("read candidates", |b| {
        b.iter(|| black_box(cases.candidates(0, liver.id).unwrap()));
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = masks, floor, store
}
criterion_main!(benches);
