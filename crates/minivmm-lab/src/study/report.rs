//! The study as one document: machine, claims, predictions, figures, verdicts and plots.
//!
//! Owns the schema and its version (docs/reference/study-json.md lists the fields). The page shows only what is
//! in this document. Fields may be added under the same version. Removing a field or changing its meaning
//! requires a new version.

use std::collections::BTreeMap;

use serde::Serialize;

use super::experiment::{Bound, Experiment, FigureKind, Measure, Quote};
use super::figures::StepRecord;
use super::machine::StudyMachine;
use super::plot::Plot;
use super::verdict::{ClaimVerdict, Decision, Outcome, Spread, judge, within};

/// The version of the schema.
pub const SCHEMA_VERSION: u32 = 1;

/// The whole document.
#[derive(Debug, Clone, Serialize)]
pub struct StudyReport {
    /// Always "minivmm-study".
    pub schema: &'static str,
    /// [`SCHEMA_VERSION`].
    pub version: u32,
    /// Version of minivmm.
    pub minivmm: &'static str,
    /// The machine that was measured.
    pub machine: StudyMachine,
    /// True for a quick run.
    pub quick: bool,
    /// Number of complete repetitions.
    pub rounds: u32,
    /// True if at least one repetition is complete and the run was not interrupted.
    pub complete: bool,
    /// Sum of the durations of all steps.
    pub seconds: f64,
    /// The experiments, judged.
    pub experiments: Vec<JudgedExperiment>,
    /// The steps with their figures.
    pub steps: Vec<StepRecord>,
}

/// One judged experiment.
#[derive(Debug, Clone, Serialize)]
pub struct JudgedExperiment {
    /// T1 to T11, A1 or A2.
    pub id: &'static str,
    /// What the experiment is about.
    pub title: &'static str,
    /// What is done.
    pub what: &'static str,
    /// What else could explain the figures.
    pub confounds: &'static str,
    /// The claims and their verdicts.
    pub claims: Vec<JudgedClaim>,
    /// The measured quantities.
    pub measures: Vec<JudgedMeasure>,
    /// The plots that have content.
    pub plots: Vec<Plot>,
    /// Why figures are missing.
    pub problems: Vec<String>,
}

/// One claim and its verdict.
#[derive(Debug, Clone, Serialize)]
pub struct JudgedClaim {
    /// The claim in its author's words.
    #[serde(flatten)]
    pub quote: Quote,
    /// The verdict.
    pub verdict: ClaimVerdict,
}

/// One measured quantity.
#[derive(Debug, Clone, Serialize)]
pub struct JudgedMeasure {
    /// Short name of the measure.
    pub name: &'static str,
    /// Title that the page shows.
    pub title: &'static str,
    /// Unit of the figures; empty if there is none.
    pub unit: &'static str,
    /// The nature of the figures.
    pub kind: FigureKind,
    /// How the figures are measured.
    pub how: &'static str,
    /// False if such figures are meaningless on this host: times and speeds on an emulated one.
    pub means_something: bool,
    /// True if nothing is decided when a prediction of this measure fails.
    pub control: bool,
    /// Which figures make a claim true of a case.
    pub rules: Vec<ReportedRule>,
    /// The cases.
    pub cases: Vec<JudgedCase>,
}

/// States which figures make a claim true of a case.
#[derive(Debug, Clone, Serialize)]
pub struct ReportedRule {
    /// Index of the claim in [`JudgedExperiment::claims`].
    pub claim: usize,
    /// The claim is true of a case if the figure is in this range.
    pub is_true: Bound,
    /// The reason for the range.
    pub why: &'static str,
}

/// One case of a measured quantity.
#[derive(Debug, Clone, Serialize)]
pub struct JudgedCase {
    /// A cache mode, or a mode and what is done in it.
    pub case: &'static str,
    /// The prediction.
    pub expected: Bound,
    /// The figures; `None` if nothing was measured.
    pub found: Option<Spread>,
    /// Whether the prediction was right.
    pub prediction: Decision,
    /// For each rule, whether the claim is true of this case.
    pub claims: Vec<Decision>,
}

impl StudyReport {
    /// Judges the figures of these steps.
    pub fn of(
        experiments: &[&'static Experiment],
        machine: StudyMachine,
        steps: Vec<StepRecord>,
        run: &RunSummary,
    ) -> Self {
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

    /// Returns the errors of the failed steps, each once.
    pub fn failures(&self) -> Vec<&str> {
        let mut failures: Vec<&str> = Vec::new();
        for error in self.steps.iter().filter_map(|step| step.error.as_deref()) {
            if !failures.contains(&error) {
                failures.push(error);
            }
        }
        failures
    }

    /// Returns the document as JSON.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// Returns the verdicts for the terminal, one line per claim.
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
        for (case, why) in unavailable(&self.steps) {
            text += &format!("{case} is not available here, because {why}\n");
        }
        text
    }
}

/// How the run went.
#[derive(Debug, Clone, Copy)]
pub struct RunSummary {
    /// True for a quick run.
    pub quick: bool,
    /// Number of complete repetitions.
    pub rounds: u32,
    /// True if at least one repetition is complete and the run was not interrupted.
    pub complete: bool,
}

impl JudgedExperiment {
    /// Returns the predictions that were wrong, as measure and case.
    pub fn failed(&self) -> impl Iterator<Item = String> + '_ {
        self.measures.iter().flat_map(|measure| {
            let failed = measure.cases.iter().filter(|case| case.prediction == Decision::No);
            failed.map(|case| format!("{}, {}", measure.title, case.case))
        })
    }
}

fn judged(experiment: &Experiment, steps: &[StepRecord], machine: &StudyMachine) -> JudgedExperiment {
    let own: Vec<StepRecord> =
        steps.iter().filter(|step| experiment.steps.contains(&step.step.as_str())).cloned().collect();
    let found: Vec<_> = own.iter().flat_map(|step| (experiment.measured)(step)).collect();
    let values = |measure: &str, case: &str| -> Vec<f64> {
        let of = found.iter().filter(|found| found.measure == measure && found.case == case);
        of.map(|found| found.value).collect()
    };
    let unavailable = unavailable(&own);
    let measures: Vec<JudgedMeasure> = experiment
        .measures
        .iter()
        .map(|measure| judged_measure(measure, values, &unavailable, machine.host.emulated))
        .collect();
    let blind: Vec<String> = measures
        .iter()
        .filter(|measure| measure.control)
        .flat_map(|measure| measure.cases.iter().map(move |case| (measure, case)))
        .filter(|(_, case)| !matches!(case.prediction, Decision::Yes | Decision::Unavailable(_)))
        .map(|(measure, case)| format!("{}, {}", measure.title, case.case))
        .collect();
    let claims = experiment
        .claims
        .iter()
        .enumerate()
        .map(|(at, quote)| JudgedClaim { quote: *quote, verdict: judge(&decisions(&measures, at), &blind) })
        .collect();
    let mut problems: Vec<String> = own.iter().filter_map(|step| step.error.clone()).collect();
    problems.dedup();
    JudgedExperiment {
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

/// Returns the cases that the host cannot have, and why.
fn unavailable(steps: &[StepRecord]) -> BTreeMap<&str, &str> {
    let all = steps.iter().flat_map(|step| &step.unavailable);
    all.map(|(case, why)| (case.as_str(), why.as_str())).collect()
}

fn judged_measure(
    measure: &Measure,
    values: impl Fn(&str, &str) -> Vec<f64>,
    unavailable: &BTreeMap<&str, &str>,
    emulated: bool,
) -> JudgedMeasure {
    let cases = measure.predictions.iter().map(|prediction| {
        let found = Spread::of(&values(measure.name, prediction.case));
        let decision = |bound| match (&found, unavailable.get(prediction.case)) {
            (None, Some(why)) => Decision::Unavailable((*why).to_owned()),
            _ => within(found.as_ref(), bound, measure.kind, emulated),
        };
        JudgedCase {
            case: prediction.case,
            expected: prediction.expected,
            prediction: decision(prediction.expected),
            claims: measure.rules.iter().map(|rule| decision(rule.is_true)).collect(),
            found,
        }
    });
    JudgedMeasure {
        name: measure.name,
        title: measure.title,
        unit: measure.unit,
        kind: measure.kind,
        how: measure.how,
        means_something: !(emulated && matches!(measure.kind, FigureKind::Speed | FigureKind::Time)),
        control: measure.control,
        rules: measure
            .rules
            .iter()
            .map(|rule| ReportedRule { claim: rule.claim, is_true: rule.is_true, why: rule.why })
            .collect(),
        cases: cases.collect(),
    }
}

/// Collects the answers of all measures for one claim.
fn decisions(measures: &[JudgedMeasure], claim: usize) -> Vec<(String, Decision)> {
    let mut decisions = Vec::new();
    for measure in measures {
        for (at, _) in measure.rules.iter().enumerate().filter(|(_, rule)| rule.claim == claim) {
            for case in &measure.cases {
                decisions
                    .extend(case.claims.get(at).map(|decision| (case.case.to_owned(), decision.clone())));
            }
        }
    }
    decisions
}

impl Outcome {
    /// Returns the name of the CSS class.
    pub fn class(self) -> &'static str {
        match self {
            Self::Confirmed => "confirmed",
            Self::Refuted => "refuted",
            Self::InPart => "in-part",
            Self::Inconclusive => "inconclusive",
        }
    }
}
