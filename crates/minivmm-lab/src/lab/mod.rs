//! What an experiment with real guests needs: a boot with its figures, images that measure honestly, the
//! machine told, fio's figures, and what several rounds say together.
//!
//! Owns one boot ([`boot`]) under minivmm as a child process, on the machine where the tool itself runs;
//! which boots make an experiment is `bench`'s and `study`'s. Part of minivmm-tools, of no VMM.

pub mod boot;
pub mod child;
pub mod extents;
pub mod fio;
pub mod host;
pub mod image;
pub mod spread;

pub use boot::{Boot, BootError, DiskSpec, Outcome};
pub use child::How;
pub use host::Host;
pub use spread::{Ratio, Spread};
