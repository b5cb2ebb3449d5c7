//! Shows where the data is: the host's page cache of an image, the guest's view of its own cache, the I/O of
//! the host's disk, and what follows from them (docs/observing.md).
//!
//! Owns the measurements ([`cache`], [`host`], [`guest`]), their combination ([`sample`]), the file that
//! records them ([`csv`], [`observer`], read by [`follow`]), and what is done to a cache before a guest starts
//! ([`control`], [`limit`]). It decides nothing about requests: an observed disk works like any other.

pub mod cache;
pub mod control;
pub mod csv;
pub mod follow;
pub mod guest;
pub mod host;
pub mod limit;
pub mod observer;
pub mod sample;

pub use cache::Residency;
pub use observer::Observer;
pub use sample::Sample;
