//! The study as one document: machine, claims, predictions, figures, verdicts, pictures.
//!
//! Owns the schema and its version (docs/reference/study-json.md lists the fields). The page shows this and nothing else.
//! Fields may be added under the same version; whoever removes one or changes what it means raises it.

use serde::Serialize;

use super::experiment::{Bound, Experiment, Kind, Measure, Quote};
use super::figures::Record;
use super::machine::Machine;
use super::plot::Plot;
use super::verdict::{Answer, Outcome, Spread, Verdict, judge, within};

/// The version of the schema.
pub const SCHEMA_VERSION: u32 = 1;

/// All of it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Always "minivmm-study".
    pub schema: &'static str,
    /// [`SCHEMA_VERSION`].
    pub version: u32,
    /// The program's.
    pub minivmm: &'static str,
    /// Where it was measured.
    pub machine: Machine,
    /// Whether this was a quick run.
    pub quick: bool,
    /// Repetitions that are whole.
    pub rounds: u32,
    /// Whether steps are missing.
    pub complete: bool,
    /// Time that all steps took together, in seconds.
    pub seconds: f64,
    /// The experiments.
    pub experiments: Vec<Judged>,
    /// The steps, with their figures.
    pub steps: Vec<Record>,
}

/// One experiment.
#[derive(Debug, Clone, Serialize)]
pub struct Judged {
    /// T1 to T11, A1, A2.
    pub id: &'static str,
    /// What it is about.
    pub title: &'static str,
    /// What is done.
    pub what: &'static str,
    /// What else could explain the figures.
    pub confounds: &'static str,
    /// Claims, and what becomes of them.
    pub claims: Vec<JudgedClaim>,
    /// Quantities.
    pub measures: Vec<JudgedMeasure>,
    /// Pictures.
    pub plots: Vec<Plot>,
    /// Why something is missing.
    pub problems: Vec<String>,
}

/// One claim.
#[derive(Debug, Clone, Serialize)]
pub struct JudgedClaim {
    /// The words, and who has said them.
    #[serde(flatten)]
    pub quote: Quote,
    /// What becomes of it.
    pub verdict: Verdict,
}

/// One quantity.
#[derive(Debug, Clone, Serialize)]
pub struct JudgedMeasure {
    /// Its name.
    pub name: &'static str,
    /// In words.
    pub title: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// What kind of figure it is.
    pub kind: Kind,
    /// How it is measured.
    pub how: &'static str,
    /// Whether such a figure means something on this host.
    pub means_something: bool,
    /// Whether nothing is decided if it is not as predicted.
    pub control: bool,
    /// When a claim is true.
    pub rules: Vec<ToldRule>,
    /// Cases.
    pub cases: Vec<JudgedCase>,
}

/// When a claim is true of a case.
#[derive(Debug, Clone, Serialize)]
pub struct ToldRule {
    /// Which claim, from 0.
    pub claim: usize,
    /// It is where the figure is within.
    pub is_true: Bound,
    /// Why.
    pub why: &'static str,
}

/// One case of a quantity.
#[derive(Debug, Clone, Serialize)]
pub struct JudgedCase {
    /// A mode, mostly.
    pub case: &'static str,
    /// The prediction.
    pub expected: Bound,
    /// The figures.
    pub found: Option<Spread>,
    /// Whether the prediction has held.
    pub prediction: Answer,
    /// For each rule, whether the claim is true of this case.
    pub claims: Vec<Answer>,
}

impl Report {
    /// Judges what was measured.
    pub fn of(experiments: &[&'static Experiment], machine: Machine, steps: Vec<Record>, run: &Run) -> Self {
        let judged = experiments.iter().map(|experiment| judged(experiment, &steps, &machine)).collect();
        Self {
            schema: "minivmm-study",
            version: SCHEMA_VERSION,
            minivmm: env!("CARGO_PKG_VERSION"),
            machine,
            quick: run.quick,
            rounds: run.rounds,
            complete: run.complete,
            seconds: steps.iter().map(|step| step.seconds).sum(),
            experiments: judged,
            steps,
        }
    }

    /// Why steps have failed, each error once; their experiments are not decided.
    pub fn failures(&self) -> Vec<&str> {
        let mut failures: Vec<&str> = Vec::new();
        for error in self.steps.iter().filter_map(|step| step.error.as_deref()) {
            if !failures.contains(&error) {
                failures.push(error);
            }
        }
        failures
    }

    /// As JSON.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// For the terminal: a line a claim.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for experiment in &self.experiments {
            for claim in &experiment.claims {
                let (id, title) = (experiment.id, experiment.title);
                text += &format!("{id:<4}{title} ({}): {}\n", claim.quote.author, claim.verdict.words);
            }
            for case in experiment.failed() {
                text += &format!("      predicted otherwise: {case}\n");
            }
            for problem in &experiment.problems {
                text += &format!("      {problem}\n");
            }
        }
        text
    }
}

/// How the run went.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// Whether it was a quick one.
    pub quick: bool,
    /// Repetitions that are whole.
    pub rounds: u32,
    /// Whether nothing is missing.
    pub complete: bool,
}

impl Judged {
    /// Predictions that have not held.
    pub fn failed(&self) -> impl Iterator<Item = String> + '_ {
        self.measures.iter().flat_map(|measure| {
            let failed = measure.cases.iter().filter(|case| case.prediction == Answer::No);
            failed.map(|case| format!("{}, {}", measure.title, case.case))
        })
    }
}

fn judged(experiment: &Experiment, steps: &[Record], machine: &Machine) -> Judged {
    let own: Vec<Record> =
        steps.iter().filter(|step| experiment.steps.contains(&step.step.as_str())).cloned().collect();
    let found: Vec<_> = own.iter().flat_map(|step| (experiment.measured)(step)).collect();
    let values = |measure: &str, case: &str| -> Vec<f64> {
        let of = found.iter().filter(|found| found.measure == measure && found.case == case);
        of.map(|found| found.value).collect()
    };
    let measures: Vec<JudgedMeasure> = experiment
        .measures
        .iter()
        .map(|measure| judged_measure(measure, values, machine.host.emulated))
        .collect();
    let blind: Vec<String> = measures
        .iter()
        .filter(|measure| measure.control)
        .flat_map(|measure| measure.cases.iter().map(move |case| (measure, case)))
        .filter(|(_, case)| case.prediction != Answer::Yes)
        .map(|(measure, case)| format!("{}, {}", measure.title, case.case))
        .collect();
    let claims = experiment
        .claims
        .iter()
        .enumerate()
        .map(|(at, quote)| JudgedClaim { quote: *quote, verdict: judge(&answers(&measures, at), &blind) })
        .collect();
    let mut problems: Vec<String> = own.iter().filter_map(|step| step.error.clone()).collect();
    problems.dedup();
    Judged {
        id: experiment.id,
        title: experiment.title,
        what: experiment.what,
        confounds: experiment.confounds,
        claims,
        measures,
        plots: (experiment.plots)(&own).into_iter().filter(|plot| !plot.is_empty()).collect(),
        problems,
    }
}

fn judged_measure(
    measure: &Measure,
    values: impl Fn(&str, &str) -> Vec<f64>,
    emulated: bool,
) -> JudgedMeasure {
    let cases = measure.predictions.iter().map(|prediction| {
        let found = Spread::of(&values(measure.name, prediction.case));
        let answer = |bound| within(found.as_ref(), bound, measure.kind, emulated);
        JudgedCase {
            case: prediction.case,
            expected: prediction.expected,
            prediction: answer(prediction.expected),
            claims: measure.rules.iter().map(|rule| answer(rule.is_true)).collect(),
            found,
        }
    });
    JudgedMeasure {
        name: measure.name,
        title: measure.title,
        unit: measure.unit,
        kind: measure.kind,
        how: measure.how,
        means_something: !(emulated && matches!(measure.kind, Kind::Speed | Kind::Time)),
        control: measure.control,
        rules: measure
            .rules
            .iter()
            .map(|rule| ToldRule { claim: rule.claim, is_true: rule.is_true, why: rule.why })
            .collect(),
        cases: cases.collect(),
    }
}

/// What all measures say of one claim.
fn answers(measures: &[JudgedMeasure], claim: usize) -> Vec<(String, Answer)> {
    let mut answers = Vec::new();
    for measure in measures {
        for (at, _) in measure.rules.iter().enumerate().filter(|(_, rule)| rule.claim == claim) {
            for case in &measure.cases {
                answers.extend(case.claims.get(at).map(|answer| (case.case.to_owned(), answer.clone())));
            }
        }
    }
    answers
}

impl Outcome {
    /// As a class of the style sheet.
    pub fn class(self) -> &'static str {
        match self {
            Self::Confirmed => "confirmed",
            Self::Refuted => "refuted",
            Self::InPart => "in-part",
            Self::Inconclusive => "inconclusive",
        }
    }
}
