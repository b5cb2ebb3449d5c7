//! The write log of one disk: what the host's storage was given, and what it has promised to keep.
//!
//! Owns the order of the entries, for all queues of the disk together. A change stands before a flush only if
//! it had completed before that fdatasync was submitted to an engine. A flush, or a write with RWF_DSYNC,
//! counts only once every sync that overlapped it has been judged ([`super::sync_ledger`], E7). After a failed
//! sync nothing in the log is marked stable any more.
//!
//! ```text
//! change completes ─────────────┐
//! fdatasync is submitted: [S] ──┴→ line ── front is settled ──→ file
//! fdatasync completes: S may become a FLUSH, once every sync that overlapped it is judged
//! ```
//!
//! So the line stays short: it holds what completed while a sync was in flight. [`engine`] sees operations
//! begin and complete; [`mod@file`] owns the file and [`mod@format`] its format.

pub mod engine;
mod file;
pub mod format;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use super::geometry::SECTOR;
use super::problem::ImageProblem;
use super::sync_ledger::{SyncLedger, SyncTicket};
use crate::mem::Iov;
use crate::sync::unpoisoned;
pub use file::as_output;
use file::{Data, LogFile};
use format::{DISCARD, FLUSH, FUA, Header, MARK};

/// The last mark of a log whose VM was shut down in order.
pub const END_MARK: &str = "minivmm-end";

/// The log of one disk.
#[derive(Debug)]
pub struct WriteLog {
    path: PathBuf,
    line: Mutex<Line>,
}

/// A completed operation that changes the disk.
#[derive(Debug)]
pub enum Change {
    /// These bytes were written.
    Bytes(Iov),
    /// This many bytes are zeroes now.
    Zeroes(u64),
    /// This many bytes were given back to the host.
    Discarded(u64),
}

#[derive(Debug)]
struct Line {
    /// `None` once the file cannot be written any more.
    file: Option<LogFile>,
    waiting: VecDeque<Item>,
    syncs: SyncLedger,
    /// `true` once a sync has failed.
    distrusted: bool,
    entries: u64,
    error: Option<(io::ErrorKind, String)>,
}

#[derive(Debug)]
enum Item {
    Change { offset: u64, change: Change, claim: Claim },
    Sync { number: SyncTicket, claim: Claim },
}

/// Whether an item may be marked stable, or as making stable what precedes it.
#[derive(Debug, Clone, Copy)]
enum Claim {
    /// It may not.
    Nothing,
    /// Not known yet, because the sync has not completed.
    Open,
    /// It may, once this sync and all before it are judged.
    After(Option<SyncTicket>),
}

impl WriteLog {
    /// Creates an empty log at `path` for the disk that `image` is. Replaces an older log there.
    pub(super) fn create(path: &Path, image: &File) -> Result<Self, ImageProblem> {
        let line = Line {
            file: Some(LogFile::begin(path, image)?),
            waiting: VecDeque::new(),
            syncs: SyncLedger::default(),
            distrusted: false,
            entries: 0,
            error: None,
        };
        Ok(Self { path: path.to_owned(), line: Mutex::new(line) })
    }

    /// Returns the path of the log.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns how many entries the file has so far.
    pub fn entries(&self) -> u64 {
        self.line().entries
    }

    /// Returns why nothing is recorded any more; `None` while the log is being written.
    pub fn error(&self) -> Option<io::Error> {
        self.line().error.as_ref().map(|(kind, text)| io::Error::new(*kind, text.clone()))
    }

    /// Records that a sync is about to be submitted to an engine.
    pub fn sync_starts(&self) -> SyncTicket {
        self.line().sync_starts(true)
    }

    /// Records that a write with its own sync is about to be submitted to an engine.
    pub fn stable_write_starts(&self) -> SyncTicket {
        self.line().sync_starts(false)
    }

    /// Records the result of a sync: `true` if it succeeded, `false` if it failed. `None` says nothing about
    /// stability: the sync was never begun, was interrupted, or the host has no RWF_DSYNC.
    pub fn sync_ends(&self, number: SyncTicket, is_stable: Option<bool>) {
        let mut line = self.line();
        let claim = line.judge(number, is_stable);
        if let Some(Item::Sync { claim: its, .. }) =
            line.waiting.iter_mut().find(|item| matches!(item, Item::Sync { number: n, .. } if *n == number))
        {
            *its = claim;
        }
        line.drain(&self.path);
    }

    /// Records that a change at this offset in bytes has completed. `sync` is its ticket if it is its own sync.
    pub fn change_ends(&self, offset: u64, change: Change, sync: Option<SyncTicket>) {
        let mut line = self.line();
        let claim = sync.map_or(Claim::Nothing, |number| line.judge(number, Some(true)));
        if line.file.is_some() {
            line.waiting.push_back(Item::Change { offset, change, claim });
        }
        line.drain(&self.path);
    }

    /// Ends the log with a mark and syncs it. Call it when nothing is in flight. Returns the error that ended
    /// the recording, now or earlier.
    pub(super) fn end(&self) -> io::Result<()> {
        let mut line = self.line();
        line.drain(&self.path);
        let text_bytes = END_MARK.len() as u64;
        line.append(
            &self.path,
            Header { flags: MARK, text_bytes, ..Header::default() },
            &Data::Text(END_MARK),
        );
        let synced = line.file.as_ref().map_or(Ok(()), LogFile::sync);
        line.note(&self.path, synced);
        drop(line);
        self.error().map_or(Ok(()), Err)
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        unpoisoned(self.line.lock())
    }
}

impl Line {
    fn sync_starts(&mut self, stands_in_line: bool) -> SyncTicket {
        let number = self.syncs.open();
        if stands_in_line && self.file.is_some() {
            self.waiting.push_back(Item::Sync { number, claim: Claim::Open });
        }
        number
    }

    /// Judges a sync, and returns what it may claim.
    fn judge(&mut self, number: SyncTicket, is_stable: Option<bool>) -> Claim {
        self.syncs.judge(number);
        match is_stable {
            Some(true) => Claim::After(self.syncs.horizon()),
            Some(false) => {
                self.distrusted = true;
                Claim::Nothing
            }
            None => Claim::Nothing,
        }
    }

    /// Returns `true` if it is decided whether the claim holds.
    fn is_settled(&self, claim: Claim) -> bool {
        match claim {
            Claim::Nothing | Claim::After(None) => true,
            Claim::Open => false,
            Claim::After(Some(horizon)) => self.syncs.is_settled(horizon),
        }
    }

    /// Writes the items that are decided, in order.
    fn drain(&mut self, path: &Path) {
        while let Some(Item::Change { claim, .. } | Item::Sync { claim, .. }) = self.waiting.front()
            && self.is_settled(*claim)
            && let Some(item) = self.waiting.pop_front()
        {
            self.write(path, item);
        }
    }

    fn write(&mut self, path: &Path, item: Item) {
        let claims = |claim| !self.distrusted && matches!(claim, Claim::After(_));
        match item {
            Item::Sync { claim, .. } => {
                if claims(claim) {
                    self.append(path, Header { flags: FLUSH, ..Header::default() }, &Data::None);
                }
            }
            Item::Change { offset, change, claim } => {
                let fua = if claims(claim) { FUA } else { 0 };
                // No host has ever stopped a write inside a sector. If one does, the partial sector is not
                // logged: the continued write would write that sector again, as a whole.
                let whole = |bytes: u64| bytes - bytes % SECTOR;
                let (bytes, flags, data) = match change {
                    Change::Bytes(iov) => {
                        let bytes = whole(iov.bytes());
                        (bytes, fua, Data::Bytes(iov.part(0, bytes, usize::MAX)))
                    }
                    Change::Zeroes(bytes) => (bytes, fua, Data::Zeroes(whole(bytes))),
                    Change::Discarded(bytes) => (bytes, fua | DISCARD, Data::None),
                };
                let (sector, sectors) = (offset / SECTOR, bytes / SECTOR);
                if sectors == 0 {
                    return;
                }
                self.append(path, Header { sector, sectors, flags, text_bytes: 0 }, &data);
            }
        }
    }

    fn append(&mut self, path: &Path, header: Header, data: &Data) {
        let Some(file) = &mut self.file else { return };
        let appended = file.append(header, data);
        self.entries = file.entries();
        self.note(path, appended);
    }

    /// Keeps the first error. Nothing is written after an error, so that the log remains a true prefix.
    fn note(&mut self, path: &Path, result: io::Result<()>) {
        let Err(error) = result else { return };
        log::error!(
            "disk: cannot write the log {}: {error}. It ends with entry {}; the guest goes on, and minivmm will end \
             with an error",
            path.display(),
            self.entries
        );
        self.file = None;
        self.waiting.clear();
        self.error.get_or_insert((error.kind(), error.to_string()));
    }
}
