//! Being built.

/// A queue's rings.
pub struct Ring;
