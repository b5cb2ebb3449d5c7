//! `minivmm study`: what was said of disk caching on libvir-list in 2008, as experiments.
//!
//! Each experiment is a file of its own (`t01.rs` to `t11.rs`, `a1.rs`, `a2.rs`) with the claim in its author's
//! words, the prediction with its tolerance, and what the figures mean. [`steps`] measures, several
//! experiments in one boot where they do not disturb each other; [`run`] repeats the steps, [`record`] keeps
//! them, [`verdict`] judges them all by the same rules, [`report`] is the JSON and [`page`] shows it.
//!
//! Runs guests as child processes; knows nothing of KVM (docs/study.md).

pub mod experiment;
pub mod figures;
pub mod machine;
pub mod page;
pub mod plot;
pub mod record;
pub mod report;
pub mod run;
pub mod steps;
pub mod verdict;

pub mod t09;
pub mod t10;

use experiment::Experiment;

/// All experiments, in the order of the page.
pub static EXPERIMENTS: [&Experiment; 2] = [&t09::EXPERIMENT, &t10::EXPERIMENT];

/// The experiment of that name.
pub fn by_id(id: &str) -> Option<&'static Experiment> {
    EXPERIMENTS.iter().find(|experiment| experiment.id.eq_ignore_ascii_case(id)).copied()
}
