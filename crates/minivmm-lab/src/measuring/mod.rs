//! What an experiment with real guests needs: boots and their figures, images that measure honestly, a
//! description of the machine, the figures of fio, and statistics over rounds.
//!
//! Owns a single boot ([`boot`]) under minivmm as a child process, on the machine where the tool runs. `bench`
//! and `study` decide which boots make an experiment. Part of minivmm-tools and of no VMM.

pub mod boot;
pub mod child;
pub mod extents;
pub mod fio;
pub mod host;
pub mod image;
pub mod rounds;

pub use boot::{Boot, BootError, BootOutcome, DiskSpec};
pub use child::EndCause;
pub use host::Host;
pub use rounds::{Distribution, Ratio};
