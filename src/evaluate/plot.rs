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

/// A curve of a chart: what it shows, and the single values at each of the chart's places.
pub struct Curve {
    /// What it shows.
    pub name: String,
    /// Per place, one point each; a place may have none.
    pub values: Vec<Vec<f64>>,
}

/// Pixels from side to side.
const WIDTH: f64 = 720.0;
/// Where 0 and 1 lie, in pixels.
const SCALE: [f64; 2] = [190.0, 690.0];
/// Pixels of a row.
const ROW: f64 = 26.0;
/// Where 1 and 0 lie in a chart of curves, in pixels.
const HEIGHTS: [f64; 2] = [30.0, 250.0];
/// Where the places of a chart of curves begin and end, in pixels.
const PLACES: [f64; 2] = [60.0, 690.0];
/// One for each curve.
const COLOURS: [&str; 4] = ["#0969da", "#bc4c00", "#1a7f37", "#8250df"];

/// Returns a picture as a file of its own: what a page need not be told, a file must say.
pub fn as_file(picture: &str) -> String {
    picture.replacen("<svg ", "<svg xmlns=\"http://www.w3.org/2000/svg\" ", 1)
}

/// Begins a picture for a page.
fn begin(title: &str, height: f64) -> String {
    format!(
        "<svg role=\"img\" aria-label=\"{}\" width=\"{WIDTH}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {WIDTH} {height:.0}\" font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
        escape(title),
    )
}

/// Draws rows of points on one scale from 0 to 1, each with its mean and interval.
pub fn plot(title: &str, rows: &[Row]) -> String {
    let bottom = ROW * rows.len() as f64 + 8.0;
    let at = |value: f64| SCALE[0] + value.clamp(0.0, 1.0) * (SCALE[1] - SCALE[0]);
    let mut svg = begin(title, bottom + 24.0);
    let mut draw = |element: std::fmt::Arguments| svg.push_str(&element.to_string());
    for tenth in (0..=10).step_by(2) {
        let x = at(f64::from(tenth) / 10.0);
        draw(format_args!(
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{bottom:.0}\" stroke=\"#d8dee4\"/>\
             <text class=\"quiet\" fill=\"#57606a\" x=\"{x:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{:.1}</text>\n",
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

/// Draws curves over named places on a scale from 0 to 1: single values as points, their means joined by a line.
pub fn curves(title: &str, along: &str, places: &[String], curves: &[Curve]) -> String {
    let step = (PLACES[1] - PLACES[0]) / places.len().max(1) as f64;
    let x_of = |place: usize| PLACES[0] + step * (place as f64 + 0.5);
    let mut svg = begin(title, HEIGHTS[1] + 50.0);
    let right = PLACES[1];
    svg += &format!(
        "<text x=\"{right:.0}\" y=\"18\" text-anchor=\"end\">{}</text>\n",
        escape(title)
    );
    (0..=5).for_each(|fifth| svg += &height_line(f64::from(fifth) / 5.0));
    let bottom = HEIGHTS[1];
    for (n, place) in places.iter().enumerate() {
        svg += &label(x_of(n), bottom + 18.0, place);
    }
    svg += &label((PLACES[0] + PLACES[1]) / 2.0, bottom + 40.0, along);
    for (n, (curve, colour)) in curves.iter().zip(COLOURS.iter().cycle()).enumerate() {
        svg += &format!(
            "<text x=\"{:.0}\" y=\"18\" style=\"fill:{colour}\">{}</text>\n",
            PLACES[0] + 140.0 * n as f64,
            escape(&curve.name)
        );
        svg += &points_and_line(curve, colour, x_of);
    }
    svg + "</svg>\n"
}

/// Returns where a value lies in a chart of curves.
fn y_of(value: f64) -> f64 {
    let [top, bottom] = HEIGHTS;
    bottom - value.clamp(0.0, 1.0) * (bottom - top)
}

fn height_line(value: f64) -> String {
    let ([left, right], y) = (PLACES, y_of(value));
    format!(
        "<line x1=\"{left:.0}\" x2=\"{right:.0}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#d8dee4\"/>\
         <text class=\"quiet\" fill=\"#57606a\" x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{value:.1}</text>\n",
        left - 8.0,
        y + 4.0
    )
}

fn label(x: f64, y: f64, text: &str) -> String {
    let text = escape(text);
    format!("<text x=\"{x:.1}\" y=\"{y:.0}\" text-anchor=\"middle\">{text}</text>\n")
}

fn points_and_line(curve: &Curve, colour: &str, x_of: impl Fn(usize) -> f64) -> String {
    let (mut points, mut line) = (String::new(), Vec::new());
    for (place, values) in curve.values.iter().enumerate() {
        let x = x_of(place);
        for value in values {
            let y = y_of(*value);
            points +=
                &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\" fill-opacity=\"0.35\"/>\n");
        }
        if !values.is_empty() {
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            line.push(format!("{x:.1},{:.1}", y_of(mean)));
        }
    }
    let line = line.join(" ");
    points + &format!("<polyline points=\"{line}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_joins_the_means_of_the_places_that_have_values() {
        let places = ["4", "8", "<16>"].map(String::from);
        let curve = Curve {
            name: "real & true".into(),
            values: vec![vec![0.25, 0.75], vec![], vec![1.0]],
        };
        let svg = curves("Dice", "patients", &places, &[curve]);
        // A third of 630 pixels each from 60 on; 0 lies at 250 and 1 at 30.
        assert!(svg.contains("<polyline points=\"165.0,140.0 585.0,30.0\""), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.contains("&lt;16&gt;") && svg.contains("real &amp; true"));
        assert!(svg.starts_with("<svg role=") && svg.ends_with("</svg>\n"));
        assert!(as_file(&svg).starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\" role="));
    }
}
