//! What is appended to the initrd: one more archive, in pieces.
//!
//! Owns its length. What it contains is the caller's business.

use std::path::Path;

/// A piece of what is appended to the initrd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// The content of this file, and the length that it had when the archive was planned.
    File(&'a Path, u64),
}

/// What is appended to the initrd: one more archive.
#[derive(Debug, Clone, Default)]
pub struct Tail<'a> {
    /// The pieces, in order.
    pub pieces: Vec<Piece<'a>>,
    /// The bytes of guest memory that it takes once it is unpacked.
    pub unpacked_bytes: u64,
}

impl Tail<'_> {
    /// Returns the length of all pieces in bytes.
    pub fn total_bytes(&self) -> u64 {
        let len = |piece: &Piece<'_>| match piece {
            Piece::Bytes(bytes) => bytes.len() as u64,
            Piece::File(_, len) => *len,
        };
        self.pieces.iter().map(len).fold(0, u64::saturating_add)
    }
}
