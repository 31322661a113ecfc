//! The labelled organs (liver, pancreas, kidneys), the spleen, the gallbladder and the vessels of the liver.

use super::canvas::{Canvas, Tissue};
use super::field::{LocalField, Point};
use super::form::{Segment, Tube, add_scaled, ellipsoid, union};
use super::{KIDNEY, LIVER, PANCREAS};
use crate::rng::Rng;

/// Draws a small shift of an organ in mm.
fn shift(rng: &mut Rng, by_mm: f64) -> Point {
    std::array::from_fn(|_| rng.range(-by_mm, by_mm) as f32)
}

fn add(a: Point, b: Point) -> Point {
    add_scaled(a, 1.0, b)
}

fn box_around(centre: Point, radii: Point) -> (Point, Point) {
    (add_scaled(centre, -1.0, radii), add_scaled(centre, 1.0, radii))
}

/// Paints the solid organs; kidneys first, because the others make room for them.
pub(super) fn paint_organs(canvas: &mut Canvas, rng: &mut Rng) {
    for side in [1.0, -1.0] {
        paint_kidney(canvas, side, rng);
    }
    paint_pancreas(canvas, rng);
    let centre = add([-26.0, 36.0, 50.0], shift(rng, 6.0));
    let radii = [26.0, 15.0, 13.0].map(|r| r * rng.range(0.7, 1.15) as f32);
    canvas.paint(box_around(centre, radii), Tissue::Bile, |p| {
        ellipsoid(p, centre, radii) > 0.0
    });
    paint_liver(canvas, rng);
    let centre = add([40.0, -30.0, -92.0], shift(rng, 5.0));
    let radii = [42.0, 40.0, 26.0];
    let spleen = canvas.grow(box_around(centre, radii), rng.range(130.0, 290.0) as f32, 8.0, |p| {
        // The hilum faces the stomach.
        ellipsoid(p, centre, radii).min(-ellipsoid(p, [45.0, 10.0, -48.0], [40.0, 34.0, 26.0]))
    });
    for (i, _) in spleen {
        canvas.tissue[i] = Tissue::Spleen;
    }
}

fn paint_kidney(canvas: &mut Canvas, side: f32, rng: &mut Rng) {
    let lower = if side > 0.0 { -44.0 } else { -34.0 };
    let centre = add([lower, -40.0, side * 66.0], shift(rng, 5.0));
    let radii = [52.0, 24.0, 29.0].map(|r| r * rng.range(0.92, 1.08) as f32);
    let sinus = add(centre, [0.0, 4.0, -side * 20.0]);
    let solid = |p: Point| {
        // Upper poles lean towards the spine and backwards.
        let p = [
            p[0],
            p[1] + 0.15 * (p[0] - centre[0]),
            p[2] + side * 0.18 * (p[0] - centre[0]),
        ];
        (ellipsoid(p, centre, radii), ellipsoid(p, sinus, [24.0, 9.0, 17.0]))
    };
    let bounds = box_around(centre, add(radii, [8.0, 12.0, 12.0]));
    let kidney = canvas.grow(bounds, rng.range(130.0, 205.0) as f32, 6.0, |p| {
        let (whole, hilum) = solid(p);
        whole.min(-hilum)
    });
    let pyramids = LocalField::draw(bounds.0, bounds.1, 9.0, rng);
    for (i, depth) in kidney {
        let is_medulla = depth > 7.0 && pyramids.at(canvas.nominal(i)) > -0.25;
        canvas.tissue[i] = if is_medulla { Tissue::Medulla } else { Tissue::Cortex };
        canvas.labels[i] = KIDNEY;
    }
    canvas.paint(bounds, Tissue::OrganFat, |p| solid(p).0 > -5.0);
}

fn paint_pancreas(canvas: &mut Canvas, rng: &mut Rng) {
    let at = shift(rng, 4.0);
    let width = rng.range(0.9, 1.15) as f32;
    let knots: [(Point, f32); 6] = [
        ([-40.0, 6.0, 34.0], 12.0),
        ([-24.0, 13.0, 28.0], 13.5),
        ([-10.0, 22.0, 8.0], 9.5),
        ([0.0, 20.0, -20.0], 11.0),
        ([9.0, 4.0, -46.0], 11.0),
        ([19.0, -14.0, -70.0], 9.5),
    ];
    let curve = |scale: f32, rng: &mut Rng| {
        let knots = knots.map(|(p, radius)| (add(add(p, at), shift(rng, 2.5)), radius * scale));
        Tube::through(&knots)
    };
    let tube = curve(width, rng);
    let bounds = tube.bounds(6.0);
    let lobules = LocalField::draw(bounds.0, bounds.1, 8.0, rng);
    let volume_ml = rng.range(66.0, 112.0) as f32;
    let pancreas = canvas.grow(tube.bounds(0.0), volume_ml, 5.0, |p| {
        tube.distance(p) + 1.3 * lobules.at(p)
    });
    for (i, _) in pancreas {
        canvas.tissue[i] = Tissue::Pancreas;
        canvas.labels[i] = PANCREAS;
    }
    let mut duct = tube;
    let duct_mm = rng.range(0.6, 1.6) as f32;
    duct.0.iter_mut().for_each(|piece| piece.radii = [duct_mm; 2]);
    canvas.visit(duct.bounds(0.0), |tissue, _, p| {
        if *tissue == Tissue::Pancreas && duct.distance(p) > 0.0 {
            *tissue = Tissue::Duct;
        }
    });
}

fn paint_liver(canvas: &mut Canvas, rng: &mut Rng) {
    let right = add([10.0, -4.0, 76.0], shift(rng, 5.0));
    let right_radii = [74.0, 72.0, 58.0].map(|r| r * rng.range(0.93, 1.07) as f32);
    let left = add([44.0, 44.0, 4.0], shift(rng, 7.0));
    let left_radii = [32.0, 32.0, 62.0].map(|r| r * rng.range(0.85, 1.15) as f32);
    let fissure = rng.range(10.0, 24.0) as f32;
    let bounds = (
        add_scaled(right, -1.0, [80.0, 80.0, 140.0]),
        add(right, [80.0, 85.0, 80.0]),
    );
    let liver = canvas.grow(bounds, rng.range(1250.0, 1850.0) as f32, 16.0, |p| {
        let whole = union(ellipsoid(p, right, right_radii), ellipsoid(p, left, left_radii), 18.0);
        // The visceral surface is hollow towards the porta, and the falciform fissure notches the front.
        let hollow = -ellipsoid(p, [-30.0, 10.0, 18.0], [46.0, 40.0, 30.0]);
        let notch = (p[2] - fissure).abs() - 1.5 + 0.10 * (92.0 - p[1]).max(0.0) - 0.02 * p[0];
        whole.min(hollow).min(notch)
    });
    for (i, _) in liver {
        canvas.tissue[i] = Tissue::Liver;
        canvas.labels[i] = LIVER;
    }
    let mut portal = Vec::new();
    let porta = [4.0, 8.0, 36.0];
    for (direction, length) in [([0.25, -0.15, 1.0], 34.0), ([0.5, 0.75, -0.6], 34.0)] {
        branch(&mut portal, porta, direction, (length, 5.5), rng);
    }
    let mut veins = Vec::new();
    for direction in [[-0.5, -0.1, 1.0], [-0.45, 0.8, 0.5], [-0.1, 1.0, -0.6]] {
        branch(&mut veins, [74.0, -14.0, 26.0], direction, (36.0, 5.0), rng);
    }
    for (tree, tissue) in [(portal, Tissue::LiverPortal), (veins, Tissue::LiverVein)] {
        for piece in tree {
            canvas.visit(piece.bounds(0.0), |there, _, p| {
                if *there == Tissue::Liver && piece.distance(p) > 0.0 {
                    *there = tissue;
                }
            });
        }
    }
}

/// Grows a vessel tree: every branch splits in two thinner, shorter ones.
fn branch(tree: &mut Vec<Segment>, from: Point, direction: Point, (length, radius): (f32, f32), rng: &mut Rng) {
    let norm = super::form::dot(direction, direction).sqrt();
    let to = add_scaled(from, length / norm, direction);
    tree.push(Segment {
        from,
        to,
        radii: [radius, radius * 0.85],
    });
    if radius < 1.3 {
        return;
    }
    let sideways = shift(rng, 1.0);
    let unit = direction.map(|v| v / norm);
    for sign in [-1.0, 1.0] {
        let spread = rng.range(0.45, 0.85) as f32;
        let child = add_scaled(add_scaled(unit, sign * spread, sideways), 0.2, shift(rng, 1.0));
        let size = (
            length * rng.range(0.62, 0.85) as f32,
            radius * rng.range(0.68, 0.8) as f32,
        );
        branch(tree, to, child, size, rng);
    }
}
