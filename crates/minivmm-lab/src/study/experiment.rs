//! What an experiment is: a claim in its author's words, what would make it true, and what was predicted.
//!
//! Owns the words of the tables; all of it is `const`, so it was written before anything is measured. What
//! the figures then say is [`super::verdict`]'s.

use std::fmt;

use serde::{Serialize, Serializer};

use super::figures::{Measured, Record};
use super::plot::Plot;

/// What somebody has said, word for word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Quote {
    /// The words.
    pub text: &'static str,
    /// Who.
    pub author: &'static str,
    /// Where, and when.
    pub source: &'static str,
}

impl Quote {
    /// From the thread of 8 October 2008 on libvir-list, "PATCH: Disable QEMU drive caching".
    pub const fn of_2008(author: &'static str, text: &'static str) -> Self {
        Self {
            text,
            author,
            source: "libvir-list, \u{201c}PATCH: Disable QEMU drive caching\u{201d}, 8 October 2008",
        }
    }
}

/// What a figure is, which says on which hosts it means something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Operations, requests, lost records.
    Count,
    /// Bytes in a cache, or given to a disk.
    Bytes,
    /// One such figure as a part of another.
    Share,
    /// One speed by another of the same job in the same guest.
    SpeedRatio,
    /// Bytes or operations a second, or one of the guest's by one of the host's.
    Speed,
    /// Seconds.
    Time,
}

impl Kind {
    /// Whether the clock has a part in it.
    pub fn is_timed(self) -> bool {
        matches!(self, Self::SpeedRatio | Self::Speed | Self::Time)
    }

    /// In a word or two.
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

/// A part of the line of numbers, ends included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// From here up.
    AtLeast(f64),
    /// Down from here.
    AtMost(f64),
    /// From, to.
    Between(f64, f64),
}

impl Bound {
    /// Around a value: it, less and more the tolerance.
    pub const fn about(value: f64, tolerance: f64) -> Self {
        Self::Between(value - tolerance, value + tolerance)
    }

    /// Whether the number is in it.
    pub fn contains(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
            Self::Between(least, most) => (least..=most).contains(&value),
        }
    }
}

/// A number as tables have it: three digits that say something.
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

/// What was expected of one case, with its tolerance.
#[derive(Debug, Clone, Copy)]
pub struct Prediction {
    /// A mode, or a mode and what is done in it.
    pub case: &'static str,
    /// Where the figure will be.
    pub expected: Bound,
}

/// A prediction.
pub const fn expect(case: &'static str, expected: Bound) -> Prediction {
    Prediction { case, expected }
}

/// What a figure must be for the claim to be true of a case. It is no prediction: it follows from the
/// claim's words alone.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Which of the experiment's claims, from 0.
    pub claim: usize,
    /// The claim is true where the figure is in it.
    pub is_true: Bound,
    /// Why here.
    pub why: &'static str,
}

/// A quantity that is measured, for several cases.
#[derive(Debug, Clone, Copy)]
pub struct Measure {
    /// Short, of the experiment alone; a part of the JSON.
    pub name: &'static str,
    /// In words.
    pub title: &'static str,
    /// Behind the figures; may be empty.
    pub unit: &'static str,
    /// What it is.
    pub kind: Kind,
    /// How it is measured.
    pub how: &'static str,
    /// What it decides.
    pub rules: &'static [Rule],
    /// If a prediction of it fails, the experiment would not have seen what it looks for, and decides
    /// nothing.
    pub control: bool,
    /// Written beforehand.
    pub predictions: &'static [Prediction],
}

/// One experiment.
pub struct Experiment {
    /// T1 to T11, A1, A2.
    pub id: &'static str,
    /// What it is about.
    pub title: &'static str,
    /// What it judges.
    pub claims: &'static [Quote],
    /// What is done, in some sentences.
    pub what: &'static str,
    /// What else could explain the figures.
    pub confounds: &'static str,
    /// Steps that measure for it ([`super::steps`]).
    pub steps: &'static [&'static str],
    /// What is measured.
    pub measures: &'static [Measure],
    /// The measures' values in a step that was done.
    pub measured: fn(&Record) -> Vec<Measured>,
    /// Pictures, of all steps that were done.
    pub plots: fn(&[Record]) -> Vec<Plot>,
}

impl fmt::Debug for Experiment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id)
    }
}

/// The modes in the order of every table.
pub const MODES: [&str; 5] = ["none", "directsync", "writethrough", "writeback", "unsafe"];

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
