//! Numbered records that a guest writes: its program, what it has said, and what is found of it (records.c has the
//! grammar and the layout).

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use crate::places;

const BLOCK: usize = 4096;
const MAGIC: &[u8; 8] = b"RECORDMV";

/// Returns the path of the guests' program, a static one, which the first call builds.
pub fn program() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let program = places::tmp().join("records");
        let made = Command::new("gcc")
            .args(["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&program)
            .arg(places::root().join("crates/minivmm-testkit/src/records.c"))
            .status()
            .unwrap();
        assert!(made.success());
        program
    };
    BUILT.get_or_init(build).clone()
}

/// What a guest has said.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// The disk declares write-through, so each write that is done is promised.
    pub through: bool,
    /// Records 1 to this are written.
    pub written: u64,
    /// Records 1 to this are flushed.
    pub flushed: u64,
}

impl Claim {
    /// Takes one line of the guest's.
    ///
    /// # Panics
    ///
    /// Where the line begins like one of the program's and has no number.
    pub fn hear(&mut self, line: &str) {
        let number = |text: &str| text.trim().parse().unwrap_or_else(|_| panic!("the guest says {line:?}"));
        match line.split_once(' ') {
            Some(("declares", what)) => self.through = what.trim() == "through",
            Some(("w" | "end", count)) => self.written = number(count),
            Some(("f", count)) => self.flushed = number(count),
            _ => {}
        }
    }

    /// Returns the number of the last record that must be there, with all before it.
    pub fn promised(&self) -> u64 {
        if self.through { self.written } else { self.flushed }
    }
}

/// The records of an image that are whole.
#[derive(Debug, Default)]
pub struct Found(HashSet<u64>);

impl Found {
    /// Looks for whole records in the blocks of an image.
    pub fn in_image(image: &[u8]) -> Self {
        let whole = |(at, block): (usize, &[u8])| {
            let number = |from: usize| u64::from_le_bytes(block[from..from + 8].try_into().unwrap());
            let sum = u32::from_le_bytes(block[24..28].try_into().unwrap());
            let n = number(8);
            let rest = block[32..].chunks(8).all(|word| word == n.to_le_bytes());
            let is_whole = block.starts_with(MAGIC) && sum == crc32(&block[..24]) && number(16) == at as u64;
            (is_whole && rest).then_some(n)
        };
        Self(image.chunks_exact(BLOCK).enumerate().filter_map(whole).collect())
    }

    /// Whether record `n` is whole.
    pub fn has(&self, n: u64) -> bool {
        self.0.contains(&n)
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 })
    })
}

#[test]
fn a_whole_record_is_found_and_a_torn_one_is_not() {
    let mut image = vec![0; 3 * BLOCK];
    let (n, at) = (7_u64, 1_u64);
    let block = &mut image[BLOCK..2 * BLOCK];
    for word in block.chunks_mut(8) {
        word.copy_from_slice(&n.to_le_bytes());
    }
    block[..8].copy_from_slice(MAGIC);
    block[16..24].copy_from_slice(&at.to_le_bytes());
    let sum = crc32(&block[..24]);
    block[24..28].copy_from_slice(&sum.to_le_bytes());
    assert!(Found::in_image(&image).has(7));
    image[BLOCK + 2048] ^= 1;
    assert!(!Found::in_image(&image).has(7), "torn");
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
}

#[test]
fn the_claim_is_what_was_said_last() {
    let mut claim = Claim::default();
    for line in ["declares back", "w 8", "w 32", "f 32", "w 40", "[ 1.2 ] noise"] {
        claim.hear(line);
    }
    assert_eq!(claim, Claim { through: false, written: 40, flushed: 32 });
    assert_eq!(claim.promised(), 32);
    claim.hear("declares through");
    assert_eq!(claim.promised(), 40);
}
