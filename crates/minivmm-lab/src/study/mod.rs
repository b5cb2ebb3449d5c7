//! `minivmm study` repeats what was said about disk caching on libvir-list in 2008 as experiments.
//!
//! Each experiment is a file of its own (`t01.rs` to `t11.rs`, `a1.rs`, `a2.rs`). It holds the claim in its
//! author's words, the prediction with its tolerance, and what the figures mean. [`steps`] measures;
//! experiments that do not disturb each other share one boot. [`run`] repeats the steps, [`record`] stores
//! their figures, [`verdict`] judges all experiments by the same rules, [`report`] writes the JSON and [`page`]
//! displays it.
//!
//! Runs guests as child processes and uses no KVM itself (docs/study.md).

pub mod experiment;
pub mod figures;
pub mod guest;
pub mod machine;
pub mod page;
pub mod plot;
pub mod record;
pub mod report;
pub mod run;
pub mod steps;
pub mod verdict;

pub mod a1;
pub mod a2;
pub mod t01;
pub mod t02;
pub mod t03;
pub mod t04;
pub mod t05;
pub mod t06;
pub mod t07;
pub mod t08;
pub mod t09;
pub mod t10;
pub mod t11;

use experiment::Experiment;

/// All experiments, in the order of the page.
pub static EXPERIMENTS: [&Experiment; 13] = [
    &t01::EXPERIMENT,
    &t02::EXPERIMENT,
    &t03::EXPERIMENT,
    &t04::EXPERIMENT,
    &t05::EXPERIMENT,
    &t06::EXPERIMENT,
    &t07::EXPERIMENT,
    &t08::EXPERIMENT,
    &t09::EXPERIMENT,
    &t10::EXPERIMENT,
    &t11::EXPERIMENT,
    &a1::EXPERIMENT,
    &a2::EXPERIMENT,
];

/// Returns the experiment with this id, in upper or lower case.
pub fn by_id(id: &str) -> Option<&'static Experiment> {
    EXPERIMENTS.iter().find(|experiment| experiment.id.eq_ignore_ascii_case(id)).copied()
}
