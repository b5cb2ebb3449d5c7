//! Where the data is: the host's page cache of an image, the guest's view of its own, the host disk's
//! I/O, and what follows from them (docs/observing.md).
//!
//! Owns the looking ([`cache`], [`host`], [`guest`]), the joining ([`sample`]), the file that keeps it
//! ([`csv`], [`sampler`], read by [`follow`]) and what is done to a cache before a guest starts ([`control`], [`limit`]).
//! Decides nothing about requests: a disk that is observed works as one that is not.

pub mod cache;
pub mod control;
pub mod csv;
pub mod follow;
pub mod guest;
pub mod host;
pub mod limit;
pub mod sample;
pub mod sampler;

pub use cache::Residency;
pub use sample::Sample;
pub use sampler::Observer;
