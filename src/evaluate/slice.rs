//! A slice of a scored case as a picture: the image, and the image with the borders of truth and prediction.

use base64::Engine;
use ndarray::{Array2, ArrayView2, Axis};

use super::held_out::Scored;
use crate::volume::{HuWindow, LabelMap};

/// The border of the truth.
const TRUTH: [u8; 3] = [64, 220, 96];
/// The border of the prediction.
const PREDICTION: [u8; 3] = [240, 72, 220];
/// Where both borders run.
const BOTH: [u8; 3] = [255, 255, 255];

/// A picture of a case for a report.
#[derive(Clone, Debug)]
pub struct Slice {
    /// The case's id.
    pub case: String,
    /// Which slice, from the lowest.
    pub number: usize,
    /// The PNG as a data URI.
    pub uri: String,
    /// Pixels of the two panels together.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// How much higher than wide a pixel is.
    pub aspect: f64,
}

impl Slice {
    /// Draws the slice with the most true tumour, else the most predicted tumour, else the most of any true class. As
    /// radiologists look at it: Anterior is up, the patient's right is on the left.
    pub fn of(scored: &Scored, labels: &LabelMap, window: HuWindow) -> Self {
        let tumours: Vec<u8> = labels.organs().iter().map(|organ| organ.tumour_id).collect();
        let is_tumour = |id: &u8| tumours.contains(id);
        let number = fullest(scored.truth, is_tumour)
            .or_else(|| fullest(scored.prediction, is_tumour))
            .or_else(|| fullest(scored.truth, |id| *id != 0))
            .unwrap_or(scored.truth.len_of(Axis(0)) / 2);
        let image = scored.image.index_axis(Axis(0), number);
        let borders = [scored.truth, scored.prediction].map(|ids| borders(ids.index_axis(Axis(0), number)));
        let (height, width) = image.dim();
        let mut pixels = Vec::with_capacity(height * width * 6);
        for y in (0..height).rev() {
            for panel in 0..2 {
                for x in (0..width).rev() {
                    let grey = (window.normalise(image[[y, x]]) * 255.0) as u8;
                    let [truth, prediction] = [0, 1].map(|side| panel == 1 && borders[side][[y, x]]);
                    pixels.extend(match (truth, prediction) {
                        (true, true) => BOTH,
                        (true, false) => TRUTH,
                        (false, true) => PREDICTION,
                        (false, false) => [grey; 3],
                    });
                }
            }
        }
        let spacing_mm = scored.spacing_mm;
        Self {
            case: scored.score.case.clone(),
            number,
            uri: data_uri(&pixels, [height, 2 * width]),
            width: 2 * width,
            height,
            aspect: spacing_mm[1] / spacing_mm[2],
        }
    }
}

/// Returns the slice with the most voxels of a kind, the lowest of several; nothing where there is none.
fn fullest(ids: &ndarray::Array3<u8>, is_counted: impl Fn(&u8) -> bool) -> Option<usize> {
    let counts = ids
        .outer_iter()
        .map(|slice| slice.iter().filter(|id| is_counted(id)).count());
    let (number, count) = counts
        .enumerate()
        .max_by_key(|(number, count)| (*count, std::cmp::Reverse(*number)))?;
    (count > 0).then_some(number)
}

/// Marks the pixels of a class that touch another class with less of it: the inner side of every border.
fn borders(ids: ArrayView2<u8>) -> Array2<bool> {
    Array2::from_shape_fn(ids.dim(), |(y, x)| {
        let steps = [(0, 1), (1, 0), (0, -1), (-1, 0)];
        let id = ids[[y, x]];
        let differs = |(dy, dx): (isize, isize)| {
            ids.get([y.wrapping_add_signed(dy), x.wrapping_add_signed(dx)])
                .is_some_and(|other| *other < id)
        };
        id != 0 && steps.into_iter().any(differs)
    })
}

fn data_uri(rgb: &[u8], [height, width]: [usize; 2]) -> String {
    let mut png = Vec::new();
    let mut encoder = png::Encoder::new(&mut png, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder
        .write_header()
        .and_then(|mut writer| writer.write_image_data(rgb))
        .expect("three bytes per pixel, written to memory");
    let text = base64::engine::general_purpose::STANDARD.encode(png);
    format!("data:image/png;base64,{text}")
}
