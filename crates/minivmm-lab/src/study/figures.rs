//! What a step has measured: figures and curves by name, a line of the record each.
//!
//! Owns the names' form, `EXPERIMENT.CASE.WHAT`, and nothing of their meaning.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A step that is done.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Which.
    pub step: String,
    /// The repetition, from 1.
    pub round: u32,
    /// How long it took.
    pub seconds: f64,
    /// Why there is nothing, or not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Numbers by name. What was measured several times in one step has several.
    pub figures: BTreeMap<String, Vec<f64>>,
    /// Curves by name: points of x and y.
    #[serde(default)]
    pub curves: BTreeMap<String, Vec<(f64, f64)>>,
}

impl Record {
    /// Nothing yet.
    pub fn new(step: &str, round: u32) -> Self {
        Self { step: step.to_owned(), round, ..Self::default() }
    }

    /// One more figure of this name.
    pub fn put(&mut self, name: &str, value: f64) {
        if value.is_finite() {
            self.figures.entry(name.to_owned()).or_default().push(value);
        }
    }

    /// The first figure of this name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.figures.get(name)?.first().copied()
    }

    /// All of them.
    pub fn all(&self, name: &str) -> &[f64] {
        self.figures.get(name).map_or(&[], Vec::as_slice)
    }

    /// One figure by another, in their order; nothing where one is missing or would be divided by 0.
    pub fn ratios(&self, above: &str, below: &str) -> Vec<f64> {
        let both = self.all(above).iter().zip(self.all(below));
        both.filter(|(_, below)| **below != 0.0).map(|(above, below)| above / below).collect()
    }

    /// How much NAME.after.WHAT is above NAME.before.WHAT, each time that it was measured.
    pub fn growths(&self, name: &str, what: &str) -> Vec<f64> {
        let [before, after] = ["before", "after"].map(|when| self.all(&format!("{name}.{when}.{what}")));
        before.iter().zip(after).map(|(before, after)| after - before).collect()
    }

    /// How much these have grown together ([`Self::growths`]) for each of what is counted, time by time; nothing
    /// where one of them was not always measured.
    pub fn growths_for_each(&self, name: &str, what: &[&str], counted: &[f64]) -> Vec<f64> {
        let mut sums = vec![0.0; counted.len()];
        for what in what {
            let grown = self.growths(name, what);
            if grown.len() < sums.len() {
                return Vec::new();
            }
            sums.iter_mut().zip(grown).for_each(|(sum, grown)| *sum += grown);
        }
        let pairs = sums.iter().zip(counted).filter(|(_, counted)| **counted > 0.0);
        pairs.map(|(sum, counted)| sum / counted).collect()
    }

    /// The mean of all figures of this name.
    pub fn mean(&self, name: &str) -> Option<f64> {
        let all = self.all(name);
        (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
    }

    /// How much a figure has grown from one name to another.
    pub fn grown(&self, from: &str, to: &str) -> Option<f64> {
        Some(self.get(to)? - self.get(from)?)
    }
}

/// A value of a measure.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The measure's name.
    pub measure: &'static str,
    /// The case.
    pub case: String,
    /// The value.
    pub value: f64,
}

/// The value of a measure for a case, if there is one.
pub fn value(measure: &'static str, case: &str, value: Option<f64>) -> Option<Measured> {
    let value = value.filter(|value| value.is_finite())?;
    Some(Measured { measure, case: case.to_owned(), value })
}

/// Several of them.
pub fn values<'a>(
    measure: &'static str,
    case: &'a str,
    found: &'a [f64],
) -> impl Iterator<Item = Measured> + 'a {
    found.iter().filter_map(move |&found| value(measure, case, Some(found)))
}
