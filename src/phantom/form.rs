//! Signed distances of the phantom's primitive solids, positive inside, in mm.

use super::field::Point;

/// Returns `a - b`.
pub(super) fn sub(a: Point, b: Point) -> Point {
    std::array::from_fn(|axis| a[axis] - b[axis])
}

/// Returns `a + scale * b`.
pub(super) fn add_scaled(a: Point, scale: f32, b: Point) -> Point {
    std::array::from_fn(|axis| a[axis] + scale * b[axis])
}

/// Returns the scalar product.
pub(super) fn dot(a: Point, b: Point) -> f32 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

/// Returns about the distance to the surface of an axis-aligned ellipsoid.
pub(super) fn ellipsoid(p: Point, centre: Point, radii: Point) -> f32 {
    let d = sub(p, centre);
    let scaled: Point = std::array::from_fn(|axis| d[axis] / radii[axis]);
    let twice: Point = std::array::from_fn(|axis| scaled[axis] / radii[axis]);
    let (k, slope) = (dot(scaled, scaled).sqrt(), dot(twice, twice).sqrt());
    if slope < 1e-6 {
        return radii[0].min(radii[1]).min(radii[2]);
    }
    k * (1.0 - k) / slope
}

/// Returns the larger of two distances, rounded over `width` where they are alike: a union without a crease.
pub(super) fn union(a: f32, b: f32, width: f32) -> f32 {
    let h = (width - (a - b).abs()).max(0.0) / width;
    a.max(b) + h * h * width / 4.0
}

/// A piece of a tube whose radius changes linearly.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) from: Point,
    pub(super) to: Point,
    pub(super) radii: [f32; 2],
}

impl Segment {
    /// Returns the distance to the surface.
    pub(super) fn distance(&self, p: Point) -> f32 {
        let (axis, d) = (sub(self.to, self.from), sub(p, self.from));
        let t = (dot(axis, d) / dot(axis, axis).max(1e-6)).clamp(0.0, 1.0);
        let off = add_scaled(d, -t, axis);
        self.radii[0] + t * (self.radii[1] - self.radii[0]) - dot(off, off).sqrt()
    }

    /// Returns the box around the piece, grown by `margin`.
    pub(super) fn bounds(&self, margin: f32) -> (Point, Point) {
        let reach = self.radii[0].max(self.radii[1]) + margin;
        (
            std::array::from_fn(|axis| self.from[axis].min(self.to[axis]) - reach),
            std::array::from_fn(|axis| self.from[axis].max(self.to[axis]) + reach),
        )
    }
}

/// A bent tube.
#[derive(Clone, Debug)]
pub(super) struct Tube(pub(super) Vec<Segment>);

impl Tube {
    /// Builds a tube through points with a radius at each; Catmull-Rom curves round the bends.
    pub(super) fn through(knots: &[(Point, f32)]) -> Self {
        const PIECES: usize = 6;
        let knot = |i: isize| knots[i.clamp(0, knots.len() as isize - 1) as usize];
        let mut curve = vec![knots[0]];
        for i in 0..knots.len() as isize - 1 {
            let four = [knot(i - 1), knot(i), knot(i + 1), knot(i + 2)];
            curve.extend((1..=PIECES).map(|k| catmull_rom(four, k as f32 / PIECES as f32)));
        }
        Self(
            curve
                .windows(2)
                .map(|pair| Segment {
                    from: pair[0].0,
                    to: pair[1].0,
                    radii: [pair[0].1, pair[1].1],
                })
                .collect(),
        )
    }

    /// Returns the distance to the surface.
    pub(super) fn distance(&self, p: Point) -> f32 {
        let distances = self.0.iter().map(|segment| segment.distance(p));
        distances.fold(f32::NEG_INFINITY, f32::max)
    }

    /// Returns the box around the tube, grown by `margin`.
    pub(super) fn bounds(&self, margin: f32) -> (Point, Point) {
        let all = self.0.iter().map(|segment| segment.bounds(margin));
        all.reduce(|(low, high), (l, h)| {
            (
                std::array::from_fn(|axis| low[axis].min(l[axis])),
                std::array::from_fn(|axis| high[axis].max(h[axis])),
            )
        })
        .expect("a tube has at least one piece")
    }
}

fn catmull_rom(knots: [(Point, f32); 4], t: f32) -> (Point, f32) {
    let (t2, t3) = (t * t, t * t * t);
    let weights = [
        (-t3 + 2.0 * t2 - t) / 2.0,
        (3.0 * t3 - 5.0 * t2 + 2.0) / 2.0,
        (-3.0 * t3 + 4.0 * t2 + t) / 2.0,
        (t3 - t2) / 2.0,
    ];
    let mix = |of: &dyn Fn(&(Point, f32)) -> f32| knots.iter().zip(weights).map(|(knot, w)| w * of(knot)).sum::<f32>();
    (
        std::array::from_fn(|axis| mix(&|knot| knot.0[axis])),
        mix(&|knot| knot.1),
    )
}
