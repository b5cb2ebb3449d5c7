//! Decides what the figures say about a claim.
//!
//! Owns the rules of judging, which are the same for all experiments:
//!
//! - A figure is judged by its spread and not by its median alone. The spread reaches from the least to the
//!   greatest value, or from the first to the third quartile if there are [`QUARTILES_FROM`] values or more.
//!   All of it must be on one side of the bound.
//! - On an emulated host a time or a speed decides nothing. There, and if there are fewer than [`FEW`] values,
//!   a ratio of speeds decides only if it clears its bound by a factor of [`MARGIN`]. If both are so, it
//!   decides nothing.
//! - If a control fails, nothing is decided.
//! - A case that the host cannot have counts neither for nor against a claim, and makes no control fail.

use serde::Serialize;

use super::experiment::{Bound, FigureKind};
use crate::measuring;

/// With this many values or more, the spread is given by their quartiles.
pub const QUARTILES_FROM: usize = 5;
/// Factor by which a ratio of speeds must clear its bound on an emulated host or with few values.
pub const MARGIN: f64 = 2.0;
/// With fewer values than this, the spread of a speed is unknown.
pub const FEW: usize = 3;

/// Several values of one figure, and their spread.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Spread {
    /// The values in the order of measurement.
    pub values: Vec<f64>,
    /// The median of the values.
    pub median: f64,
    /// The lower end of the spread.
    pub low: f64,
    /// The upper end of the spread.
    pub high: f64,
}

impl Spread {
    /// Computes the spread of these values; `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let found = measuring::Distribution::of(values.iter().copied())?;
        let (low, high) = match found.count >= QUARTILES_FROM {
            true => (found.lower_quartile, found.upper_quartile),
            false => (found.min, found.max),
        };
        Some(Self { values: values.to_vec(), median: found.median, low, high })
    }
}

/// Whether a statement is true of a case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "is", content = "why")]
pub enum Decision {
    /// The statement is true.
    Yes,
    /// The statement is false.
    No,
    /// It cannot be decided here, for this reason.
    Open(String),
    /// The host cannot have the case, for this reason.
    Unavailable(String),
}

/// Decides whether figures of this kind are within `bound`.
pub fn within(found: Option<&Spread>, bound: Bound, kind: FigureKind, emulated: bool) -> Decision {
    let open = |why: &str| Decision::Open(why.to_owned());
    let Some(found) = found else { return open("not measured") };
    let few = found.values.len() < FEW;
    match kind {
        FigureKind::Speed | FigureKind::Time if emulated => return open("a time, and the host is emulated"),
        // Two runs on an emulated host differed by a factor of ten in the same ratio, because the machine had
        // other work.
        FigureKind::SpeedRatio if emulated && few => {
            return open("a ratio of speeds from few runs, and the host is emulated");
        }
        FigureKind::Speed | FigureKind::Time if few => {
            return open("too few runs to know the spread of a time");
        }
        _ => {}
    }
    let wary = kind == FigureKind::SpeedRatio && (emulated || few);
    let (inside, outside) = if wary { sides_with_margin(found, bound) } else { sides(found, bound) };
    match (inside, outside) {
        (true, _) => Decision::Yes,
        (_, true) => Decision::No,
        _ if wary && emulated => {
            open("a ratio of speeds that does not clear its bound twice, and the host is emulated")
        }
        _ if wary => open("a ratio of speeds that does not clear its bound twice, from few runs"),
        _ => open("too much spread: values on both sides"),
    }
}

/// Returns whether all of the spread is inside the bound, and whether all of it is outside.
fn sides(found: &Spread, bound: Bound) -> (bool, bool) {
    let (low, high) = (found.low, found.high);
    let inside = bound.contains(low) && bound.contains(high);
    let outside = match bound {
        Bound::AtLeast(least) => high < least,
        Bound::AtMost(most) => low > most,
        Bound::Between(least, most) => high < least || low > most,
    };
    (inside, outside)
}

fn sides_with_margin(found: &Spread, bound: Bound) -> (bool, bool) {
    let (low, high) = (found.low, found.high);
    match bound {
        Bound::AtLeast(least) => (low >= least * MARGIN, high < least / MARGIN),
        Bound::AtMost(most) => (high <= most / MARGIN, low > most * MARGIN),
        // No value can clear both ends of a range from inside by this factor.
        Bound::Between(least, most) => (false, high < least / MARGIN || low > most * MARGIN),
    }
}

/// The result for a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// True of every case, and every case could be decided.
    Confirmed,
    /// False of every case, and every case could be decided.
    Refuted,
    /// True of some cases and false of others.
    InPart,
    /// Not decided here.
    Inconclusive,
}

/// A judged claim.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClaimVerdict {
    /// The result.
    pub outcome: Outcome,
    /// The result as the page and the terminal show it.
    pub words: String,
    /// Cases of which the claim is true.
    pub true_of: Vec<String>,
    /// Cases of which the claim is false.
    pub false_of: Vec<String>,
    /// Cases that could not be decided.
    pub open: Vec<String>,
    /// Cases that the host cannot have.
    pub unavailable: Vec<String>,
}

/// Judges a claim by the decisions on its cases. A case has several decisions if several measures decide it.
/// `blind` names the controls that failed.
pub fn judge(decisions: &[(String, Decision)], blind: &[String]) -> ClaimVerdict {
    let mut cases: Vec<&String> = Vec::new();
    for (case, _) in decisions {
        if !cases.contains(&case) {
            cases.push(case);
        }
    }
    let (mut true_of, mut false_of, mut open, mut unavailable) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for case in cases {
        let mut of_case = decisions.iter().filter(|(name, _)| name == case).map(|(_, decision)| decision);
        // One `No` is enough to make the claim false of the case.
        let list = if of_case.clone().any(|decision| *decision == Decision::No) {
            &mut false_of
        } else if of_case.clone().any(|decision| matches!(decision, Decision::Unavailable(_))) {
            &mut unavailable
        } else if of_case.all(|decision| *decision == Decision::Yes) {
            &mut true_of
        } else {
            &mut open
        };
        list.push(case.clone());
    }
    let outcome = match (true_of.is_empty(), false_of.is_empty(), open.is_empty()) {
        _ if !blind.is_empty() => Outcome::Inconclusive,
        (false, false, _) => Outcome::InPart,
        (false, true, true) => Outcome::Confirmed,
        (true, false, true) => Outcome::Refuted,
        _ => Outcome::Inconclusive,
    };
    let rest = if open.is_empty() { String::new() } else { format!(". Open: {}", open.join("; ")) };
    let words = match outcome {
        Outcome::Confirmed => "confirmed".to_owned(),
        Outcome::Refuted => "refuted".to_owned(),
        Outcome::InPart => format!("confirmed for these only: {}{rest}", true_of.join("; ")),
        Outcome::Inconclusive if !blind.is_empty() => {
            format!("inconclusive here: a control has failed ({})", blind.join(", "))
        }
        Outcome::Inconclusive => {
            let part = match (true_of.is_empty(), false_of.is_empty()) {
                (false, _) => format!(". So far true of {}", true_of.join("; ")),
                (_, false) => format!(". So far not true of {}", false_of.join("; ")),
                _ => String::new(),
            };
            format!("inconclusive here{part}{rest}")
        }
    };
    let words = match unavailable.is_empty() {
        true => words,
        false => format!("{words} (not available here: {})", unavailable.join("; ")),
    };
    ClaimVerdict { outcome, words, true_of, false_of, open, unavailable }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(values: &[f64]) -> Option<Spread> {
        Spread::of(values)
    }

    fn decided(values: &[f64], bound: Bound, kind: FigureKind, emulated: bool) -> &'static str {
        match within(at(values).as_ref(), bound, kind, emulated) {
            Decision::Yes => "yes",
            Decision::No => "no",
            Decision::Open(_) => "open",
            Decision::Unavailable(_) => "unavailable",
        }
    }

    #[test]
    fn few_values_stand_with_all_of_them_and_many_with_their_quartiles() {
        let few = at(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((few.low, few.median, few.high), (1.0, 2.0, 3.0));
        let many = at(&[100.0, 1.0, 2.0, 3.0, 4.0]).unwrap();
        assert_eq!((many.low, many.median, many.high), (2.0, 3.0, 4.0));
        let even = at(&[1.0, 2.0]).unwrap();
        assert_eq!(even.median, 1.5);
        assert_eq!(at(&[]), None);
    }

    #[test]
    fn a_figure_decides_only_where_its_kind_means_something() {
        use Bound::{AtLeast, AtMost, Between};
        for (values, bound, kind, emulated, expected) in [
            // Counts and shares decide on any host, and one value is enough.
            (vec![1.0], AtLeast(0.5), FigureKind::Share, true, "yes"),
            (vec![0.1], AtLeast(0.5), FigureKind::Share, true, "no"),
            (vec![0.4, 0.6], AtLeast(0.5), FigureKind::Share, false, "open"),
            (vec![5.0], Between(1.0, 4.0), FigureKind::Count, false, "no"),
            // Times decide neither on an emulated host nor from few values.
            (vec![1.0, 1.0, 1.0], AtMost(2.0), FigureKind::Time, true, "open"),
            (vec![1.0, 1.0], AtMost(2.0), FigureKind::Time, false, "open"),
            (vec![1.0, 1.0, 1.0], AtMost(2.0), FigureKind::Time, false, "yes"),
            // Ratios of speeds must clear their bound by a margin there.
            (vec![1.3, 1.3, 1.3], AtLeast(1.2), FigureKind::SpeedRatio, false, "yes"),
            (vec![1.3, 1.3, 1.3], AtLeast(1.2), FigureKind::SpeedRatio, true, "open"),
            (vec![2.5, 2.5, 2.5], AtLeast(1.2), FigureKind::SpeedRatio, true, "yes"),
            (vec![0.5, 0.5, 0.5], AtLeast(1.2), FigureKind::SpeedRatio, true, "no"),
            (vec![1.3], AtLeast(1.2), FigureKind::SpeedRatio, false, "open"),
            (vec![2.5], AtLeast(1.2), FigureKind::SpeedRatio, false, "yes"),
            (vec![9.0], AtLeast(1.2), FigureKind::SpeedRatio, true, "open"),
            (vec![1.0, 1.0, 1.0], Between(0.75, 1.25), FigureKind::SpeedRatio, true, "open"),
            (vec![0.3, 0.3, 0.3], Between(0.75, 1.25), FigureKind::SpeedRatio, true, "no"),
        ] {
            assert_eq!(
                decided(&values, bound, kind, emulated),
                expected,
                "{values:?} {bound} {kind:?} {emulated}"
            );
        }
        assert_eq!(
            within(None, AtLeast(0.0), FigureKind::Count, false),
            Decision::Open("not measured".into())
        );
    }

    #[test]
    fn a_claim_is_confirmed_refuted_true_of_some_or_open() {
        let open = || Decision::Open("why".into());
        let unavailable = || Decision::Unavailable("why".into());
        for (decisions, blind, outcome) in [
            (vec![("a", Decision::Yes), ("b", Decision::Yes)], "", Outcome::Confirmed),
            (vec![("a", Decision::No), ("b", Decision::No)], "", Outcome::Refuted),
            (vec![("a", Decision::Yes), ("b", Decision::No)], "", Outcome::InPart),
            (vec![("a", Decision::Yes), ("b", Decision::No), ("c", open())], "", Outcome::InPart),
            (vec![("a", Decision::Yes), ("b", open())], "", Outcome::Inconclusive),
            // A case that the host cannot have leaves the others' verdict as it is.
            (vec![("a", Decision::Yes), ("b", unavailable())], "", Outcome::Confirmed),
            (vec![("a", Decision::No), ("b", unavailable())], "", Outcome::Refuted),
            (vec![("a", Decision::Yes), ("b", unavailable()), ("c", open())], "", Outcome::Inconclusive),
            (vec![("b", unavailable())], "", Outcome::Inconclusive),
            (vec![("a", Decision::No), ("b", open())], "", Outcome::Inconclusive),
            (vec![], "", Outcome::Inconclusive),
            (vec![("a", Decision::Yes)], "control", Outcome::Inconclusive),
            // Two measures of one case must agree that the claim is true.
            (vec![("a", Decision::Yes), ("a", Decision::No)], "", Outcome::Refuted),
            (vec![("a", Decision::Yes), ("a", open())], "", Outcome::Inconclusive),
            (vec![("a", open()), ("a", Decision::No)], "", Outcome::Refuted),
        ] {
            let decisions: Vec<_> =
                decisions.into_iter().map(|(case, decision)| (case.to_owned(), decision)).collect();
            let blind: Vec<String> = blind.split_whitespace().map(str::to_owned).collect();
            assert_eq!(judge(&decisions, &blind).outcome, outcome, "{decisions:?}");
        }
    }
}
