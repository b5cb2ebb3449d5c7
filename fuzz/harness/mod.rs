//! What is fuzzed, as functions from bytes: each takes an input apart, drives a part of minivmm with it,
//! and panics where a property does not hold (`docs/fuzzing.md` lists them).
//!
//! Used by the libFuzzer targets beside this directory and by `tests/fuzz.rs`, which replays the corpora.

mod block;
mod chain;
mod console;
mod engine;
mod input;
mod kernel;
mod lane;
mod logs;
mod memory;
mod messages;
mod options;
mod registers;
mod spy;
mod walk;
mod writelog;

/// A target: its name, which is that of its corpus, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 8] = [
    ("mmio", block::over_mmio),
    ("pci", block::over_pci),
    ("chain", chain::run),
    ("console", console::run),
    ("kernel", kernel::run),
    ("options", options::run),
    ("messages", messages::run),
    ("writelog", writelog::run),
];

/// Runs the target of that name.
#[allow(dead_code, reason = "the targets' own, not the test's")]
pub fn run(name: &str, data: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a target's name");
    target(data);
}
