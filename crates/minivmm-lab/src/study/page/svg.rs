//! Draws plots as inline SVG: axes, ticks, curves, bars and a legend. Uses no script and no external image.
//!
//! Owns the drawing. Colours are classes of the style sheet, so that they follow the theme. Every curve has a
//! dash pattern too, for readers who cannot tell the colours apart.

use std::fmt::Write;

use super::escape;
use crate::study::experiment::number;
use crate::study::plot::{Form, Plot};

/// Width of the picture in SVG units. The page scales it.
const WIDTH: f64 = 400.0;
const TOP: f64 = 12.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 12.0;
const INNER_HEIGHT: f64 = 170.0;
/// Height of a line in the legend.
const LEGEND_LINE: f64 = 16.0;
/// Approximate width of a letter.
const LETTER: f64 = 6.0;

/// An axis: its range and its ticks.
struct Axis {
    from: f64,
    to: f64,
    log: bool,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// Returns a linear axis from 0 to a round number that is at least `most`, or nearly.
    fn linear(most: f64) -> Self {
        let most = if most > 0.0 { most } else { 1.0 };
        let rough = most / 4.0;
        let power = 10f64.powf(rough.log10().floor());
        let factor = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|factor| factor * power >= rough * 0.999);
        let step = factor.unwrap_or(10.0) * power;
        let count = (most / step * 0.999).ceil().max(1.0);
        let mut ticks = Vec::new();
        let mut at = 0.0;
        while at <= count + 0.5 {
            ticks.push((at * step, tick(at * step)));
            at += 1.0;
        }
        Self { from: 0.0, to: count * step, log: false, ticks }
    }

    /// Returns a logarithmic axis between powers of ten that enclose both values.
    fn logarithmic(least: f64, most: f64) -> Self {
        let from = least.max(1e-9).log10().floor();
        let to = most.max(1e-9).log10().ceil().max(from + 1.0);
        let mut ticks = Vec::new();
        let mut at = from;
        while at <= to {
            ticks.push((10f64.powf(at), tick(10f64.powf(at))));
            at += 1.0;
        }
        Self { from, to, log: true, ticks }
    }

    /// Returns the position of a value on the axis, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let value = if self.log { value.max(1e-9).log10() } else { value };
        ((value - self.from) / (self.to - self.from)).clamp(0.0, 1.0)
    }
}

fn tick(value: f64) -> String {
    for (unit, letter) in [(1e9, "G"), (1e6, "M"), (1e3, "k")] {
        if value.abs() >= unit {
            return format!("{}{letter}", number(value / unit));
        }
    }
    let text = number(value);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// Returns the CSS class of a series: that of its cache mode, or one chosen by its index.
fn class(name: &str, at: usize) -> String {
    let mode = super::MODES.iter().find(|mode| name == **mode || name.starts_with(&format!("{mode} ")));
    mode.map_or_else(|| format!("c{}", at % 6), |mode| format!("m-{mode}"))
}

struct Frame {
    x: Axis,
    y: Axis,
}

impl Frame {
    fn of(plot: &Plot) -> Self {
        let points = || plot.series.iter().flat_map(|series| series.points.iter().copied());
        let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0f64, f64::max);
        let y = match plot.form {
            Form::Distribution => Axis::linear(1.0),
            _ => Axis::linear(most(&mut points().map(|point| point.1))),
        };
        let x_most = most(&mut points().map(|point| point.0));
        let x = match plot.log_x {
            true => {
                let least = points().map(|point| point.0).filter(|x| *x > 0.0).fold(f64::MAX, f64::min);
                Axis::logarithmic(least.min(x_most), x_most)
            }
            false => Axis::linear(x_most),
        };
        Self { x, y }
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        TOP + (1.0 - self.y.place(value)) * INNER_HEIGHT
    }
}

/// Returns the plot as SVG.
pub fn draw(plot: &Plot) -> String {
    let frame = Frame::of(plot);
    let bottom = TOP + INNER_HEIGHT;
    let legend = legend(plot, bottom + 44.0);
    let height = bottom + 44.0 + legend.1 as f64 * LEGEND_LINE;
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        svg,
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\"><title>{}</title>",
        escape(&plot.title),
        escape(&plot.title),
    );
    grid(&mut svg, plot, &frame);
    match plot.form {
        Form::Bars => bars(&mut svg, plot, &frame),
        Form::Lines | Form::Steps | Form::Distribution => curves(&mut svg, plot, &frame),
    }
    svg.push_str(&legend.0);
    svg.push_str("</svg>");
    svg
}

fn grid(svg: &mut String, plot: &Plot, frame: &Frame) {
    let (right, bottom) = (WIDTH - RIGHT, TOP + INNER_HEIGHT);
    for (value, text) in &frame.y.ticks {
        let y = frame.y(*value);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
            LEFT - 5.0,
            y + 4.0,
        );
    }
    if plot.form != Form::Bars {
        for (value, text) in &frame.x.ticks {
            let x = frame.x(*value);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom}\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
                bottom + 15.0,
            );
        }
    }
    let middle = TOP + INNER_HEIGHT / 2.0;
    let _ = write!(
        svg,
        "<line class=\"axis\" x1=\"{LEFT}\" y1=\"{bottom}\" x2=\"{right}\" y2=\"{bottom}\"/>\
         <text class=\"label\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text class=\"label\" transform=\"translate(12 {middle:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        (LEFT + right) / 2.0,
        bottom + 32.0,
        escape(&plot.x),
        escape(&plot.y),
    );
}

fn curves(svg: &mut String, plot: &Plot, frame: &Frame) {
    for (at, series) in plot.series.iter().enumerate() {
        let mut path = String::new();
        let mut last = None;
        for &(x, y) in &series.points {
            let (x, y) = (frame.x(x), frame.y(y));
            match (last, plot.form) {
                (None, _) => drop(write!(path, "M{x:.1} {y:.1}")),
                (Some(before), Form::Steps) => drop(write!(path, "L{x:.1} {before:.1}L{x:.1} {y:.1}")),
                _ => drop(write!(path, "L{x:.1} {y:.1}")),
            }
            last = Some(y);
        }
        let class = class(&series.name, at);
        let _ = write!(svg, "<path class=\"curve {class}\" d=\"{path}\"/>");
        if series.points.len() <= 16 {
            for &(x, y) in &series.points {
                let _ = write!(
                    svg,
                    "<circle class=\"dot {class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\"/>",
                    frame.x(x),
                    frame.y(y),
                );
            }
        }
    }
}

fn bars(svg: &mut String, plot: &Plot, frame: &Frame) {
    let groups = plot.groups.len().max(1) as f64;
    let room = (WIDTH - LEFT - RIGHT) / groups;
    let each = room * 0.8 / plot.series.len().max(1) as f64;
    let bottom = TOP + INNER_HEIGHT;
    for (at, group) in plot.groups.iter().enumerate() {
        let x = LEFT + room * (at as f64 + 0.5);
        let _ = write!(
            svg,
            "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            bottom + 15.0,
            escape(group),
        );
    }
    for (at, series) in plot.series.iter().enumerate() {
        for &(group, value) in &series.points {
            let x = LEFT + room * (group + 0.1) + each * at as f64;
            let y = frame.y(value);
            // If there is only one series, each bar has the colour of its group.
            let alone = plot.groups.get(plot.series.len() - 1).filter(|_| plot.series.len() == 1);
            let name = match alone {
                Some(_) => {
                    plot.groups.iter().enumerate().find(|(at, _)| *at as f64 == group).map(|found| found.1)
                }
                None => None,
            };
            let _ = write!(
                svg,
                "<rect class=\"bar {}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{}: {}</title></rect>\
                 <text class=\"value\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                class(name.unwrap_or(&series.name), at),
                each * 0.94,
                (bottom - y).max(0.8),
                escape(&series.name),
                number(value),
                x + each * 0.47,
                y - 3.0,
                tick(value),
            );
        }
    }
}

/// Returns the SVG of the legend below `top`, and its number of lines. A single series needs no legend.
fn legend(plot: &Plot, top: f64) -> (String, usize) {
    if plot.series.len() < 2 {
        return (String::new(), 0);
    }
    let (mut svg, mut x, mut line) = (String::new(), LEFT, 0usize);
    for (at, series) in plot.series.iter().enumerate() {
        let width = 26.0 + series.name.chars().count() as f64 * LETTER + 10.0;
        if x + width > WIDTH && x > LEFT {
            x = LEFT;
            line += 1;
        }
        let y = top + line as f64 * LEGEND_LINE;
        let class = class(&series.name, at);
        let mark = match plot.form {
            Form::Bars => format!(
                "<rect class=\"bar {class}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"20\" height=\"8\"/>",
                y + 1.0
            ),
            _ => format!(
                "<path class=\"curve {class}\" d=\"M{x:.1} {:.1}L{:.1} {:.1}\"/>",
                y + 5.0,
                x + 20.0,
                y + 5.0
            ),
        };
        let _ = write!(
            svg,
            "{mark}<text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            x + 25.0,
            y + 9.0,
            escape(&series.name),
        );
        x += width;
    }
    (svg, line + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_ticks_around_all_values() {
        for (most, to, ticks) in
            [(1.0, 1.0, 5), (0.0, 1.0, 5), (97.0, 100.0, 5), (2048.0, 3000.0, 4), (3.0, 3.0, 4)]
        {
            let axis = Axis::linear(most);
            assert!((axis.to - to).abs() < 1e-9, "{most}: {}", axis.to);
            assert_eq!(axis.ticks.len(), ticks, "{most}: {:?}", axis.ticks);
        }
        let axis = Axis::logarithmic(3e-5, 0.2);
        assert_eq!((axis.from, axis.to), (-5.0, 0.0));
        assert_eq!(axis.place(1.0), 1.0);
    }

    #[test]
    fn a_plot_is_drawn_within_its_frame() {
        let plot =
            Plot::lines("a < b", "s", "MiB").with("none", [(0.0, 0.0), (1.0, 5.0)]).with("x", [(2.0, 1.0)]);
        let svg = draw(&plot);
        assert!(svg.contains("a &lt; b") && svg.contains("m-none") && svg.contains("c1"), "{svg}");
        let bars = Plot::bars("t", "n", ["none", "unsafe"]).with("all", [(0.0, 3.0), (1.0, 0.0)]);
        let svg = draw(&bars);
        assert_eq!(svg.matches("<rect").count(), 2, "{svg}");
        assert!(svg.contains("m-unsafe"), "a single series has the colours of its groups: {svg}");
    }
}
