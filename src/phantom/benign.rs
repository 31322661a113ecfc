//! What looks like a tumour and is none: cysts, fatty patches, focal sparing and calcifications, labelled as organ.

use super::canvas::{Canvas, Tissue};
use super::field::{Point, smooth_field};
use super::form::{dot, sub};
use super::{KIDNEY, LIVER, PANCREAS};
use crate::rng::Rng;

/// Lists an organ's voxels.
fn voxels_of(canvas: &Canvas, organ: u8) -> Vec<usize> {
    let voxels = canvas.labels.iter().enumerate();
    voxels.filter(|(_, label)| **label == organ).map(|(i, _)| i).collect()
}

/// Puts water-filled balls into an organ; must run before intensities are painted.
pub(super) fn paint_cysts(canvas: &mut Canvas, rng: &mut Rng) {
    for (organ, counts) in [
        (LIVER, [0.35, 0.3, 0.2, 0.15]),
        (KIDNEY, [0.4, 0.3, 0.2, 0.1]),
        (PANCREAS, [0.8, 0.2, 0.0, 0.0]),
    ] {
        let host = voxels_of(canvas, organ);
        let count = rng.weighted(&counts).unwrap_or(0);
        for _ in 0..if host.is_empty() { 0 } else { count } {
            let centre = canvas.frame.position(canvas.frame.voxel(host[rng.below(host.len())]));
            let radius = libm::exp(1.5 + 0.45 * rng.normal()).clamp(2.2, 14.0) as f32;
            let reach = [radius; 3];
            let (low, high) = (sub(centre, reach), centre.map(|mm| mm + radius));
            canvas.frame.visit(low, high, |i, p| {
                let off = sub(p, centre);
                if canvas.labels[i] == organ && dot(off, off) < radius * radius {
                    canvas.tissue[i] = Tissue::Cyst;
                }
            });
        }
    }
}

/// Changes the HU of patches of healthy tissue; `hu` is the painted image.
pub(super) fn paint_patches(canvas: &Canvas, hu: &mut [f32], rng: &mut Rng) {
    let field = smooth_field(&canvas.frame, 12.0, rng);
    for (organ, patches) in [(LIVER, 3), (PANCREAS, 1), (KIDNEY, 1)] {
        let host = voxels_of(canvas, organ);
        if host.is_empty() {
            continue;
        }
        for _ in 0..rng.below(patches + 1) {
            let centre = canvas.frame.position(canvas.frame.voxel(host[rng.below(host.len())]));
            let reach: Point = std::array::from_fn(|_| rng.range(6.0, 18.0) as f32);
            // Fatty infiltration is dark, sparing and perfusion differences are bright.
            let change = if rng.chance(0.6) {
                rng.range(-38.0, -14.0)
            } else {
                rng.range(10.0, 24.0)
            } as f32;
            let edge = |p: Point, i: usize| {
                let off: Point = std::array::from_fn(|axis| (p[axis] - centre[axis]) / reach[axis]);
                (1.3 - dot(off, off).sqrt() + 0.25 * field[i]).clamp(0.0, 0.5) * 2.0
            };
            let grown = reach.map(|mm| mm * 1.6);
            canvas.frame.visit(
                sub(centre, grown),
                std::array::from_fn(|a| centre[a] + grown[a]),
                |i, p| {
                    if canvas.labels[i] == organ && canvas.tissue[i] != Tissue::Cyst {
                        hu[i] += change * edge(p, i);
                    }
                },
            );
        }
        for _ in 0..rng.below(3) {
            let i = host[rng.below(host.len())];
            hu[i] = rng.range(180.0, 420.0) as f32;
        }
    }
}
