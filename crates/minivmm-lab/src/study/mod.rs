//! `minivmm study` repeats what was said about disk caching on libvir-list in 2008 as experiments.
//!
//! Each experiment is a file of its own, named after what it measures. The file holds the claim in its author's
//! words, the prediction with its tolerance, and what the figures mean. [`steps`] measures; experiments that do
//! not disturb each other share one boot. [`run`] repeats the steps, [`record`] stores their figures,
//! [`verdict`] judges all experiments by the same rules, [`report`] writes the JSON and [`page`] displays it.
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

pub mod bulk_writes;
pub mod deferred_writes;
pub mod dirty_pages;
pub mod double_caching;
pub mod full_cache;
pub mod host_crash;
pub mod log_appends;
pub mod read_ahead;
pub mod steadiness;
pub mod sync_mechanisms;
pub mod uncached_speed;
pub mod unsynced_data;
pub mod warm_cache;

use experiment::Experiment;

/// All experiments, in the order of the page.
pub static EXPERIMENTS: [&Experiment; 13] = [
    &double_caching::EXPERIMENT,
    &host_crash::EXPERIMENT,
    &unsynced_data::EXPERIMENT,
    &uncached_speed::EXPERIMENT,
    &steadiness::EXPERIMENT,
    &warm_cache::EXPERIMENT,
    &read_ahead::EXPERIMENT,
    &full_cache::EXPERIMENT,
    &dirty_pages::EXPERIMENT,
    &sync_mechanisms::EXPERIMENT,
    &deferred_writes::EXPERIMENT,
    &log_appends::EXPERIMENT,
    &bulk_writes::EXPERIMENT,
];

/// Returns the experiment with this id, in upper or lower case.
pub fn by_id(id: &str) -> Option<&'static Experiment> {
    EXPERIMENTS.iter().find(|experiment| experiment.id.eq_ignore_ascii_case(id)).copied()
}
