//! The table as a picture: prefill above, decode below, over the depth of context; decode over the
//! number of sessions if there is one depth alone.

use anyhow::Result;
use plotters::{coord::Shift, prelude::*};

use super::report::{Report, Row};

const SIZE: (u32, u32) = (900, 800);
const FONT: &str = "sans-serif";
/// Space beside the first and the last place, and above the highest point.
const ROOM: f64 = 1.15;

/// Okabe and Ito's, which most people can tell apart.
const COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const DEPTHS: &str = "tokens of context";

/// A line of a plot: its name and its points.
#[derive(Debug, PartialEq)]
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// The plot as an SVG file.
pub fn svg(report: &Report) -> Result<String> {
    let mut svg = String::new();
    draw(report, SVGBackend::with_string(&mut svg, SIZE))?;
    Ok(svg)
}

fn draw(report: &Report, svg: SVGBackend<'_>) -> Result<()> {
    let root = svg.into_drawing_area();
    root.fill(&WHITE)?;
    let title = format!("{} on {}", report.model, report.machine.device);
    let (above, below) = root.titled(&title, (FONT, 20))?.split_vertically(50.percent_height());
    plot(&above, "prefill, tokens/s", DEPTHS, &[prefill(report)])?;
    let caption = "decode, tokens/s of all sessions";
    match decode_by_sessions(report) {
        Some((place, line)) => plot(&below, caption, &place, &[line])?,
        None => plot(&below, caption, DEPTHS, &decode_by_depth(report))?,
    }
    Ok(root.present()?)
}

fn prefill(report: &Report) -> Line {
    let point = |row: &Row| Some((row.ctx_tokens as f64, row.prefill.as_ref()?.per_second()));
    Line { name: String::new(), points: report.rows.iter().filter_map(point).collect() }
}

/// What the line's places are, and the line, if there are several numbers of sessions at one depth.
fn decode_by_sessions(report: &Report) -> Option<(String, Line)> {
    let [first, others @ ..] = &report.rows[..] else { return None };
    if others.is_empty() || others.iter().any(|row| row.ctx_tokens != first.ctx_tokens) {
        return None;
    }
    let place = format!("sessions, each with {} {DEPTHS}", place_label(first.ctx_tokens as f64));
    let points = report.rows.iter().map(|row| (row.sessions as f64, row.decode_per_second()));
    Some((place, Line { name: String::new(), points: points.collect() }))
}

/// A line for each number of sessions.
fn decode_by_depth(report: &Report) -> Vec<Line> {
    let mut lines: Vec<(usize, Line)> = Vec::new();
    for row in &report.rows {
        let index = lines.iter().position(|(sessions, _)| *sessions == row.sessions);
        let index = index.unwrap_or_else(|| {
            let plural = if row.sessions == 1 { "" } else { "s" };
            let name = format!("{} session{plural}", row.sessions);
            lines.push((row.sessions, Line { name, points: Vec::new() }));
            lines.len() - 1
        });
        lines[index].1.points.push((row.ctx_tokens as f64, row.decode_per_second()));
    }
    lines.into_iter().map(|(_, line)| line).collect()
}

/// A picture whose lines are over `places`.
fn plot(area: &Area<'_>, caption: &str, places: &str, lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let (first, last) =
        points().fold((f64::MAX, 1.0), |(low, high), (x, _)| (x.min(low), x.max(high)));
    let highest = points().fold(1.0, |high, (_, y)| y.max(high));
    let range = (first.min(last) / ROOM..last * ROOM).log_scale().base(2.0);
    let mut chart = ChartBuilder::on(area)
        .caption(caption, (FONT, 16))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(60)
        .build_cartesian_2d(range, 0.0..highest * ROOM)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|place| place_label(*place))
        .y_label_formatter(&|rate| format!("{rate}"))
        .x_desc(places)
        .draw()?;
    for (i, line) in lines.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        let style = color.stroke_width(2);
        let drawn = chart.draw_series(LineSeries::new(line.points.iter().copied(), style))?;
        if !line.name.is_empty() {
            drawn.label(&line.name).legend(move |(x, y)| {
                PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2))
            });
        }
        let dots = line.points.iter().map(|point| Circle::new(*point, 3, color.filled()));
        chart.draw_series(dots)?;
    }
    if lines.len() > 1 {
        let mut names = chart.configure_series_labels();
        names.position(SeriesLabelPosition::UpperLeft).background_style(WHITE.mix(0.8)).draw()?;
    }
    Ok(())
}

/// Such as `32k` or `500`.
fn place_label(n: f64) -> String {
    if n >= 1024.0 { format!("{}k", n / 1024.0) } else { format!("{n}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::report::tests::{report, row};

    #[test]
    fn each_number_of_sessions_has_a_line() {
        let lines =
            decode_by_depth(&report(vec![row(512, 1), row(512, 4), row(1024, 1), row(1024, 4)]));
        let names: Vec<_> = lines.iter().map(|line| line.name.as_str()).collect();
        assert_eq!(names, ["1 session", "4 sessions"]);
        assert_eq!(lines[1].points, [(512.0, 8.0), (1024.0, 8.0)]);
    }

    #[test]
    fn sessions_at_one_depth_are_one_line() {
        let (place, line) = decode_by_sessions(&report(vec![row(2048, 1), row(2048, 4)])).unwrap();
        assert_eq!(place, "sessions, each with 2k tokens of context");
        assert_eq!(line.points, [(1.0, 2.0), (4.0, 8.0)]);
        for rows in [vec![], vec![row(512, 4)], vec![row(512, 1), row(1024, 1)]] {
            assert_eq!(decode_by_sessions(&report(rows)), None);
        }
    }

    #[test]
    fn the_plot_is_drawn_whatever_was_measured() {
        let two = svg(&report(vec![row(2048, 1), row(4096, 1)])).unwrap();
        assert!(two.starts_with("<svg") && two.ends_with("</svg>\n"), "{two}");
        assert!(two.contains("tiny on 2 threads") && two.contains("<polyline"), "{two}");
        assert!(two.contains("\n2k\n") && two.contains("\n4k\n"), "{two}");
        let one = svg(&report(vec![Row { prefill: None, gen_tokens: 0, ..row(512, 1) }])).unwrap();
        assert!(one.contains("<circle"), "{one}");
        assert!(svg(&report(Vec::new())).is_ok());
    }
}
