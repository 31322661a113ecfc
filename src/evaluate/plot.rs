//! Plots of scores from 0 to 1 as SVG text.

use super::report::escape;

/// A row of a plot: what it shows, single values, their mean and its interval.
pub struct Row {
    /// What it shows.
    pub name: String,
    /// One point each.
    pub values: Vec<f64>,
    /// The mean or the pooled value.
    pub centre: Option<f64>,
    /// Its 95 % interval.
    pub interval: Option<[f64; 2]>,
}

/// Where 0 and 1 lie, in pixels.
const SCALE: [f64; 2] = [190.0, 690.0];
/// Pixels of a row.
const ROW: f64 = 26.0;

/// Draws rows of points on one scale from 0 to 1, each with its mean and interval.
pub fn plot(title: &str, rows: &[Row]) -> String {
    let bottom = ROW * rows.len() as f64 + 8.0;
    let at = |value: f64| SCALE[0] + value.clamp(0.0, 1.0) * (SCALE[1] - SCALE[0]);
    let mut svg = format!(
        "<svg role=\"img\" aria-label=\"{}\" width=\"720\" height=\"{:.0}\" viewBox=\"0 0 720 {:.0}\">\n",
        escape(title),
        bottom + 24.0,
        bottom + 24.0
    );
    let mut draw = |element: std::fmt::Arguments| svg.push_str(&element.to_string());
    for tenth in (0..=10).step_by(2) {
        let x = at(f64::from(tenth) / 10.0);
        draw(format_args!(
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{bottom:.0}\" stroke=\"#d8dee4\"/>\
             <text class=\"quiet\" x=\"{x:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{:.1}</text>\n",
            bottom + 18.0,
            f64::from(tenth) / 10.0
        ));
    }
    for (n, row) in rows.iter().enumerate() {
        let y = ROW * (n as f64 + 0.5) + 4.0;
        draw(format_args!(
            "<text x=\"180\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
            y + 4.0,
            escape(&row.name)
        ));
        for value in &row.values {
            let x = at(*value);
            draw(format_args!(
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"#0969da\" fill-opacity=\"0.35\"/>\n"
            ));
        }
        if let Some([low, high]) = row.interval.map(|ends| ends.map(at)) {
            draw(format_args!(
                "<line x1=\"{low:.1}\" x2=\"{high:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#1b1f24\" stroke-width=\"2\"/>\n"
            ));
        }
        if let Some(x) = row.centre.map(at) {
            draw(format_args!(
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"4\" height=\"14\" fill=\"#1b1f24\"/>\n",
                x - 2.0,
                y - 7.0
            ));
        }
    }
    svg + "</svg>\n"
}
