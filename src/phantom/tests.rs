//! The phantom's validity, measured: organ volumes, tumour sizes and contrasts, and that no threshold finds tumours.

use std::time::Instant;

use super::*;

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
