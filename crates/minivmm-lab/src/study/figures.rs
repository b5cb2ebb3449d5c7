//! The figures and curves that a step has measured, by name. Each step is one line of the run's record.
//!
//! Owns the form of the names, `EXPERIMENT.CASE.WHAT`. It knows nothing of their meaning.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The result of one run of a step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Name of the step.
    pub step: String,
    /// Number of the repetition, from 1.
    pub round: u32,
    /// Duration of the step.
    pub seconds: f64,
    /// Why figures are missing; `None` if the step succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Cases that this host cannot have, by name, and why; no figure of them is missing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub unavailable: BTreeMap<String, String>,
    /// Figures by name. A quantity that the step measured several times has several values.
    pub figures: BTreeMap<String, Vec<f64>>,
    /// Curves by name, as points (x, y).
    #[serde(default)]
    pub curves: BTreeMap<String, Vec<(f64, f64)>>,
}

impl StepRecord {
    /// Creates a record without figures.
    pub fn new(step: &str, round: u32) -> Self {
        Self { step: step.to_owned(), round, ..Self::default() }
    }

    /// Adds a figure under this name. A value that is not finite is dropped.
    pub fn put(&mut self, name: &str, value: f64) {
        if value.is_finite() {
            self.figures.entry(name.to_owned()).or_default().push(value);
        }
    }

    /// Returns the first figure of this name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.figures.get(name)?.first().copied()
    }

    /// Returns all figures of this name, in the order of measurement.
    pub fn all(&self, name: &str) -> &[f64] {
        self.figures.get(name).map_or(&[], Vec::as_slice)
    }

    /// Divides each figure named `above` by the figure of the same position named `below`. A pair is skipped if
    /// one is missing or the divisor is 0.
    pub fn ratios(&self, above: &str, below: &str) -> Vec<f64> {
        let both = self.all(above).iter().zip(self.all(below));
        both.filter(|(_, below)| **below != 0.0).map(|(above, below)| above / below).collect()
    }

    /// Returns NAME.after.WHAT minus NAME.before.WHAT for each time that both were measured.
    pub fn growths(&self, name: &str, what: &str) -> Vec<f64> {
        let [before, after] = ["before", "after"].map(|when| self.all(&format!("{name}.{when}.{what}")));
        before.iter().zip(after).map(|(before, after)| after - before).collect()
    }

    /// Divides the summed growth of these quantities ([`Self::growths`]) by the count of the same position.
    /// Returns nothing if one of the quantities was measured less often than `counted`. A count of 0 is
    /// skipped.
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

    /// Returns the mean of all figures of this name, or `None` if there are none.
    pub fn mean(&self, name: &str) -> Option<f64> {
        let all = self.all(name);
        (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
    }

    /// Returns the first figure named `to` minus the first figure named `from`.
    pub fn grown(&self, from: &str, to: &str) -> Option<f64> {
        Some(self.get(to)? - self.get(from)?)
    }
}

/// One value of a measure for one case.
#[derive(Debug, Clone, PartialEq)]
pub struct MeasuredValue {
    /// Name of the measure.
    pub measure: &'static str,
    /// Name of the case.
    pub case: String,
    /// The value.
    pub value: f64,
}

/// Returns the value of a measure for a case, or `None` if there is none or it is not finite.
pub fn value(measure: &'static str, case: &str, value: Option<f64>) -> Option<MeasuredValue> {
    let value = value.filter(|value| value.is_finite())?;
    Some(MeasuredValue { measure, case: case.to_owned(), value })
}

/// Returns several values of a measure for one case.
pub fn values<'a>(
    measure: &'static str,
    case: &'a str,
    found: &'a [f64],
) -> impl Iterator<Item = MeasuredValue> + 'a {
    found.iter().filter_map(move |&found| value(measure, case, Some(found)))
}
