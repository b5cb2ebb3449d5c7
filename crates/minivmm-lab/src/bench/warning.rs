//! A warning about figures, and the kinds of warnings.
//!
//! Owns the table of kinds. [`super::warn`] finds which of them apply.

use serde::Serialize;

/// Something that a reader of the figures must know.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Warning {
    /// The kind of warning, from [`ABOUT`].
    pub code: &'static str,
    /// The job; `None` if the warning is about all jobs.
    pub job: Option<String>,
    /// The competitor; `None` if the warning is about all of them.
    pub who: Option<String>,
    /// The figure that caused the warning.
    pub value: Option<f64>,
    /// The text for people.
    pub text: String,
}

/// The codes and what they mean, in the order in which they are printed.
pub static ABOUT: [(&str, &str); 15] = [
    ("stopped", "not everything was measured"),
    ("emulated", ""),
    ("virtual", ""),
    ("host-cache", "reads that the host's page cache served: memory's speed, not the disk's"),
    ("guest-cache", "reads or writes that never left the guest's own page cache (direct=0)"),
    ("faster", "faster than the host itself at the very same job: a cache is in the figure"),
    ("dirty", "written, reported done, and still in nothing but the host's memory when the job had ended"),
    (
        "ignored",
        "FLUSHes that were acknowledged and never done: the guest's last sync, which is to be in the figure, is not",
    ),
    (
        "short",
        "shorter than the host waits before it writes back by itself: all the writing back was the last sync's, and a \
         longer run would show another rate",
    ),
    ("flush", "whether a FLUSH gets as far as the disk"),
    ("disk", "the image"),
    (
        "spread",
        "rounds that lie far apart, least to most over the median: take more of them, or a quieter machine",
    ),
    ("rounds", ""),
    ("busy", ""),
    ("shared", ""),
];
