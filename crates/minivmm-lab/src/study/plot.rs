//! A plot as data: what is drawn. `page::svg` decides how.
//!
//! Owns the kinds of plots. Plots are part of the JSON.

use serde::Serialize;

/// How the points are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// By straight lines.
    Lines,
    /// As steps: a value holds until the next one.
    Steps,
    /// As a cumulative distribution: y is the share of events that took at most x.
    Distribution,
    /// As bars in groups: x is the index of the group.
    Bars,
}

/// One curve, or one bar in each group.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Series {
    /// Name in the legend. The name of a cache mode selects the colour of that mode.
    pub name: String,
    /// The points, in the order of x.
    pub points: Vec<(f64, f64)>,
}

/// One plot.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plot {
    /// Title above the plot.
    pub title: String,
    /// How the points are joined.
    pub form: Form,
    /// Label of the x axis, with its unit.
    pub x: String,
    /// Label of the y axis, with its unit.
    pub y: String,
    /// True if the x axis is logarithmic.
    pub log_x: bool,
    /// Names of the groups of bars.
    pub groups: Vec<String>,
    /// The curves or bars.
    pub series: Vec<Series>,
    /// What a reader must know to understand the plot.
    pub note: String,
}

impl Plot {
    /// Creates an empty plot of curves.
    pub fn lines(title: &str, x: &str, y: &str) -> Self {
        Self {
            title: title.to_owned(),
            form: Form::Lines,
            x: x.to_owned(),
            y: y.to_owned(),
            log_x: false,
            groups: Vec::new(),
            series: Vec::new(),
            note: String::new(),
        }
    }

    /// Creates an empty plot of bars with these groups.
    pub fn bars(title: &str, y: &str, groups: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let groups = groups.into_iter().map(Into::into).collect();
        Self { form: Form::Bars, groups, ..Self::lines(title, "", y) }
    }

    /// Changes how the points are joined.
    pub fn form(self, form: Form) -> Self {
        Self { form, ..self }
    }

    /// Sets the note.
    pub fn note(self, note: &str) -> Self {
        Self { note: note.to_owned(), ..self }
    }

    /// Adds a curve, unless it has no finite points.
    pub fn with(mut self, name: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let finite = |point: &(f64, f64)| point.0.is_finite() && point.1.is_finite();
        let points: Vec<_> = points.into_iter().filter(finite).collect();
        if !points.is_empty() {
            self.series.push(Series { name: name.into(), points });
        }
        self
    }

    /// Returns `true` if there is nothing to draw.
    pub fn is_empty(&self) -> bool {
        self.series.is_empty()
    }
}
