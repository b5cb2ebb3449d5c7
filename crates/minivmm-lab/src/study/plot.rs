//! A picture as data: what is drawn, not how (`page::svg` draws it).
//!
//! Owns its kinds. Plots are a part of the JSON.

use serde::Serialize;

/// How the points are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// By straight lines.
    Lines,
    /// As steps: a value holds until the next.
    Steps,
    /// Parts of events that took no longer: y from 0 to 1.
    Distribution,
    /// Bars in groups: x is the number of the group.
    Bars,
}

/// One curve, or one bar of each group.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Series {
    /// What it is; a mode's name gives it the mode's colour.
    pub name: String,
    /// In the order of x.
    pub points: Vec<(f64, f64)>,
}

/// One picture.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plot {
    /// Above it.
    pub title: String,
    /// How.
    pub form: Form,
    /// Below the axis, with its unit.
    pub x: String,
    /// Beside the axis, with its unit.
    pub y: String,
    /// Whether x grows by powers of ten.
    pub log_x: bool,
    /// Names of the groups of bars.
    pub groups: Vec<String>,
    /// What is drawn.
    pub series: Vec<Series>,
    /// What must be known to read it.
    pub note: String,
}

impl Plot {
    /// Curves over x.
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

    /// Bars, a group for each of these names.
    pub fn bars(title: &str, y: &str, groups: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let groups = groups.into_iter().map(Into::into).collect();
        Self { form: Form::Bars, groups, ..Self::lines(title, "", y) }
    }

    /// The same in another form.
    pub fn form(self, form: Form) -> Self {
        Self { form, ..self }
    }

    /// With a note.
    pub fn note(self, note: &str) -> Self {
        Self { note: note.to_owned(), ..self }
    }

    /// With one more curve, if it has any points.
    pub fn with(mut self, name: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let finite = |point: &(f64, f64)| point.0.is_finite() && point.1.is_finite();
        let points: Vec<_> = points.into_iter().filter(finite).collect();
        if !points.is_empty() {
            self.series.push(Series { name: name.into(), points });
        }
        self
    }

    /// Whether there is anything in it.
    pub fn is_empty(&self) -> bool {
        self.series.is_empty()
    }
}
