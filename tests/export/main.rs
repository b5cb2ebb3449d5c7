//! `minivmm export` as a front end sees it that is honest, hostile or unlucky: every message, byte by byte.
//!
//! A module is a suite: `cargo test --test export -- hostile::` runs one. The front end here is written from the
//! specification (QEMU's docs/interop/vhost-user.rst) and shares nothing with the code under test.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, reason = "tests may")]

mod daemon;
mod front_end;
mod hostile;
mod protocol;
mod restart;
mod sockets;
