//! The deliberate mistake of this run, if there is one: MINIVMM_MISTAKE names it.
//!
//! The device makes its own in a copy to which `mistakes.patch` is applied (`tests/mistakes.rs` of the workspace
//! does that, and says what each is). The simulation makes those here: operations that are not what their name says.

use std::sync::OnceLock;

/// Those that whole images alone must find too.
pub const SEEN_BY_IMAGES: [&str; 7] = [
    "sync-before-write",
    "generation-skip",
    "toggle-ignored",
    "no-flush-is-writeback",
    "zeroes-unsynced",
    "directsync-without-sync",
    "short-write-ok",
];

/// Those that a mode without O_DIRECT and with a write cache cannot show: two are about O_DIRECT, the third makes a write
/// cache that is off at a reset stay on.
pub const NOT_IN_WRITEBACK: [&str; 3] = ["directsync-without-sync", "unlocked-rmw", "reset-keeps-writeback"];

/// The mistake of this run.
pub fn made() -> Option<&'static str> {
    static MADE: OnceLock<Option<String>> = OnceLock::new();
    MADE.get_or_init(|| std::env::var("MINIVMM_MISTAKE").ok()).as_deref()
}

/// Whether this mistake is to be made.
pub fn is_made(name: &str) -> bool {
    made() == Some(name)
}
