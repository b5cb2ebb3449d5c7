//! What an experiment consists of: a claim in its author's words, what would make the claim true, and what was
//! predicted.
//!
//! Owns the texts of the tables. All of them are `const`, so they were written before anything is measured.
//! [`super::verdict`] decides what the figures then mean.

use std::fmt;

use serde::{Serialize, Serializer};

use super::figures::{MeasuredValue, StepRecord};
use super::plot::Plot;

/// Something that somebody wrote, word for word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Quote {
    /// The words.
    pub text: &'static str,
    /// Who wrote them.
    pub author: &'static str,
    /// Where and when they were written.
    pub source: &'static str,
}

impl Quote {
    /// Returns a quote from the thread "PATCH: Disable QEMU drive caching" on libvir-list, 8 October 2008.
    pub const fn of_2008(author: &'static str, text: &'static str) -> Self {
        Self {
            text,
            author,
            source: "libvir-list, \u{201c}PATCH: Disable QEMU drive caching\u{201d}, 8 October 2008",
        }
    }
}

/// The nature of a figure, which determines on which hosts the figure is meaningful.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FigureKind {
    /// Number of operations, requests or lost records.
    Count,
    /// Bytes in a cache, or bytes written to a disk.
    Bytes,
    /// A count or a number of bytes divided by another.
    Share,
    /// The ratio of two speeds of the same job in the same guest.
    SpeedRatio,
    /// Bytes or operations per second, or a speed of the guest divided by one of the host.
    Speed,
    /// Seconds.
    Time,
}

impl FigureKind {
    /// Returns `true` if the figure depends on a clock.
    pub fn is_timed(self) -> bool {
        matches!(self, Self::SpeedRatio | Self::Speed | Self::Time)
    }

    /// Returns the name that the page shows.
    pub fn name(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::Bytes => "bytes",
            Self::Share => "share",
            Self::SpeedRatio => "ratio of speeds",
            Self::Speed => "speed",
            Self::Time => "time",
        }
    }
}

/// A range of numbers, ends included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// This number or more.
    AtLeast(f64),
    /// This number or less.
    AtMost(f64),
    /// From the first number to the second.
    Between(f64, f64),
}

impl Bound {
    /// Returns the range from `value - tolerance` to `value + tolerance`.
    pub const fn about(value: f64, tolerance: f64) -> Self {
        Self::Between(value - tolerance, value + tolerance)
    }

    /// Returns `true` if `value` is in the range.
    pub fn contains(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
            Self::Between(least, most) => (least..=most).contains(&value),
        }
    }
}

/// Formats a number as the tables show it, with about three significant digits.
pub fn number(value: f64) -> String {
    let size = value.abs();
    let places = if size >= 100.0 || size == size.round() && size < 1e6 {
        0
    } else if size >= 10.0 {
        1
    } else if size >= 0.1 {
        2
    } else {
        4
    };
    format!("{value:.places$}")
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::AtLeast(least) => write!(f, "\u{2265} {}", number(least)),
            Self::AtMost(most) => write!(f, "\u{2264} {}", number(most)),
            Self::Between(least, most) => write!(f, "{} to {}", number(least), number(most)),
        }
    }
}

impl Serialize for Bound {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (least, most) = match *self {
            Self::AtLeast(least) => (Some(least), None),
            Self::AtMost(most) => (None, Some(most)),
            Self::Between(least, most) => (Some(least), Some(most)),
        };
        #[derive(Serialize)]
        struct Ends {
            least: Option<f64>,
            most: Option<f64>,
        }
        Ends { least, most }.serialize(serializer)
    }
}

/// The expected figure of one case, with its tolerance.
#[derive(Debug, Clone, Copy)]
pub struct Prediction {
    /// A cache mode, or a mode and what is done in it.
    pub case: &'static str,
    /// The range in which the figure is expected.
    pub expected: Bound,
}

/// Creates a prediction.
pub const fn expect(case: &'static str, expected: Bound) -> Prediction {
    Prediction { case, expected }
}

/// States which figures make a claim true of a case. A rule is no prediction: it follows from the words of the
/// claim alone.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Index of the claim in [`Experiment::claims`].
    pub claim: usize,
    /// The claim is true of a case if the figure is in this range.
    pub is_true: Bound,
    /// The reason for the range.
    pub why: &'static str,
}

/// A quantity that is measured for several cases.
#[derive(Debug, Clone, Copy)]
pub struct Measure {
    /// Short name, unique within the experiment. It appears in the JSON.
    pub name: &'static str,
    /// Title that the page shows.
    pub title: &'static str,
    /// Unit that follows the figures; empty if there is none.
    pub unit: &'static str,
    /// The nature of the figures.
    pub kind: FigureKind,
    /// How the figures are measured.
    pub how: &'static str,
    /// The claims that this quantity decides, and when they are true.
    pub rules: &'static [Rule],
    /// True if the experiment is blind when a prediction of this measure fails. It then decides nothing.
    pub control: bool,
    /// Predictions, written before the measurement. They define the cases.
    pub predictions: &'static [Prediction],
}

/// One experiment of the study.
pub struct Experiment {
    /// T1 to T11, A1 or A2.
    pub id: &'static str,
    /// What the experiment is about.
    pub title: &'static str,
    /// The claims that it judges.
    pub claims: &'static [Quote],
    /// What is done, in a few sentences.
    pub what: &'static str,
    /// What else could explain the figures.
    pub confounds: &'static str,
    /// Names of the steps that measure for it ([`super::steps`]).
    pub steps: &'static [&'static str],
    /// The quantities that are measured.
    pub measures: &'static [Measure],
    /// Computes the values of the measures from the record of one step.
    pub measured: fn(&StepRecord) -> Vec<MeasuredValue>,
    /// Draws the plots from the records of all completed steps.
    pub plots: fn(&[StepRecord]) -> Vec<Plot>,
}

impl fmt::Debug for Experiment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id)
    }
}

/// The cache modes, in the order of every table.
pub const MODES: [&str; 6] = ["none", "directsync", "writethrough", "writeback", "dontcache", "unsafe"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_say_what_they_are() {
        for (value, text) in [
            (0.0, "0"),
            (2048.0, "2048"),
            (0.98765, "0.99"),
            (0.01234, "0.0123"),
            (12.34, "12.3"),
            (1234.5, "1234"),
            (-0.5, "-0.50"),
            (1.0, "1"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn bounds_have_their_ends() {
        assert!(Bound::AtLeast(1.0).contains(1.0) && !Bound::AtLeast(1.0).contains(0.99));
        assert!(Bound::AtMost(1.0).contains(1.0) && !Bound::AtMost(1.0).contains(1.01));
        assert!(Bound::about(1.0, 0.5).contains(0.5) && !Bound::about(1.0, 0.5).contains(1.51));
    }
}
