//! From requests and host operations to findings.
//!
//! Owns the rules: what an acknowledgement promises, and which calls keep it. Every comparison is
//! made so that a finding is certain where the log's two directions hold (guest.rs); what is missed
//! for it is told in docs/auditor.md.

use std::fmt;
use std::ops::Range;

use super::guest::{Ended, Kind, Request, requests};
use super::host::{File, Host, Sync, Write};
use super::parse::{Position, calls};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// The FLUSH was acknowledged, and a write that the guest had seen complete before it submitted
    /// the FLUSH was not stable (virtio 5.2.6.2 (c)).
    FlushDoesNotCover { flush: u64, write: u64, at: String },
    /// The write was acknowledged under a write-through cache and was not stable (5.2.6.2 (a), (b)).
    WriteNotStable { write: u64, at: String },
    /// The write was acknowledged, and the calls that wrote for it failed or ended short.
    NotWritten { write: u64, at: String },
    /// A sync had failed before, so nothing acknowledged since then can be called stable.
    AfterFailedSync { request: u64, error: String, failed_at: String, at: String },
    /// No successful sync lies between submission and acknowledgement of the FLUSH. Whatever it had
    /// to cover was stable all the same, or is a finding of its own.
    NoSyncOfItsOwn { flush: u64, at: String },
    /// No call wrote these bytes between submission and acknowledgement: the trace does not show how
    /// this VMM writes, and nothing is said of this write.
    Unseen { write: u64, at: String },
}

impl Finding {
    /// Is data in danger that the guest believes safe?
    pub fn is_broken_promise(&self) -> bool {
        !matches!(self, Self::NoSyncOfItsOwn { .. } | Self::Unseen { .. })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FlushDoesNotCover { flush, write, at } => {
                write!(
                    f,
                    "FLUSH {flush:#x} acknowledged at {at}, but the completed write {write:#x} was not stable"
                )
            }
            Self::WriteNotStable { write, at } => {
                write!(f, "write {write:#x} acknowledged at {at} under a write-through cache, but not stable")
            }
            Self::NotWritten { write, at } => {
                write!(f, "write {write:#x} acknowledged at {at}, but not all of it was written")
            }
            Self::AfterFailedSync { request, error, failed_at, at } => {
                write!(
                    f,
                    "request {request:#x} acknowledged at {at}, after a sync failed with {error} at {failed_at}"
                )
            }
            Self::NoSyncOfItsOwn { flush, at } => {
                write!(f, "FLUSH {flush:#x} acknowledged at {at} without a sync of its own")
            }
            Self::Unseen { write, at } => {
                write!(
                    f,
                    "write {write:#x} acknowledged at {at}: the trace does not show it, nothing is said of it"
                )
            }
        }
    }
}

/// What an audit has looked at and found.
#[derive(Debug)]
pub struct Audit {
    pub writes: usize,
    pub flushes: usize,
    /// Writes whose completion promised stability.
    pub stable_writes: usize,
    pub findings: Vec<Finding>,
    /// Calls through which the image can be reached without our seeing it.
    pub hidden: Vec<String>,
}

impl Audit {
    /// Audits one image of a trace against the guest's log in it.
    pub fn of(trace: &str, image: &str, console: &File) -> Result<Self, String> {
        Self::of_host(Host::new(&calls(trace)?, image, console)?)
    }

    /// Audits what was done to an image, however that was seen.
    pub fn of_host(host: Host) -> Result<Self, String> {
        let requests = requests(&host.console)?;
        let findings = requests.iter().flat_map(|request| judge(request, &requests, &host)).collect();
        let acknowledged = |wanted: fn(&Kind) -> bool| {
            requests
                .iter()
                .filter(|request| wanted(&request.kind) && request.acknowledged().is_some())
                .count()
        };
        Ok(Self {
            writes: acknowledged(|kind| matches!(kind, Kind::Write { .. })),
            flushes: acknowledged(|kind| matches!(kind, Kind::Flush)),
            stable_writes: acknowledged(|kind| matches!(kind, Kind::Write { stable: true, .. })),
            findings,
            hidden: host.hidden.iter().map(|(name, times)| format!("{name} ({times} times)")).collect(),
        })
    }

    pub fn broken_promises(&self) -> Vec<&Finding> {
        self.findings.iter().filter(|finding| finding.is_broken_promise()).collect()
    }

    pub fn verdict(&self) -> &'static str {
        if !self.broken_promises().is_empty() {
            "broken promises"
        } else if self.findings.iter().any(|finding| matches!(finding, Finding::Unseen { .. })) {
            "inconclusive"
        } else {
            "kept"
        }
    }
}

impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} writes acknowledged, {} of them as stable; {} FLUSHes",
            self.verdict(),
            self.writes,
            self.stable_writes,
            self.flushes
        )?;
        for finding in &self.findings {
            writeln!(f, "  {finding}")?;
        }
        if !self.findings.is_empty() && !self.hidden.is_empty() {
            writeln!(f, "  not seen into: {}", self.hidden.join(", "))?;
        }
        Ok(())
    }
}

fn judge(request: &Request, all: &[Request], host: &Host) -> Vec<Finding> {
    let Some(end) = request.acknowledged() else { return Vec::new() };
    let mut found = match &request.kind {
        Kind::Flush => judge_flush(request, end, all, host),
        Kind::Write { bytes, stable } => judge_write(request, bytes, *stable, end, host),
    };
    let promises = !matches!(request.kind, Kind::Write { stable: false, .. });
    if let (true, Some(failed)) = (promises, failure_before(request, end, host)) {
        found.push(Finding::AfterFailedSync {
            request: request.number,
            error: failed.error.clone().unwrap_or_default(),
            failed_at: failed.time.clone(),
            at: end.time.clone(),
        });
    }
    found
}

fn judge_write(
    request: &Request,
    bytes: &Range<u64>,
    stable: bool,
    end: &Ended,
    host: &Host,
) -> Vec<Finding> {
    let (write, at) = (request.number, end.time.clone());
    if !seen(request, bytes, end, host) {
        let touched = inside(request, end, host).any(|call| bytes.contains(&call.bytes.start));
        vec![if touched { Finding::NotWritten { write, at } } else { Finding::Unseen { write, at } }]
    } else if stable && !stable_by(request, bytes, end.position, host) {
        vec![Finding::WriteNotStable { write, at }]
    } else {
        Vec::new()
    }
}

fn judge_flush(request: &Request, end: &Ended, all: &[Request], host: &Host) -> Vec<Finding> {
    let flush = request.number;
    let own = host
        .syncs
        .iter()
        .any(|sync| sync.error.is_none() && sync.entry > request.submitted && sync.exit < end.position);
    let mut found = Vec::new();
    if !own {
        found.push(Finding::NoSyncOfItsOwn { flush, at: end.time.clone() });
    }
    for write in all {
        let (Kind::Write { bytes, .. }, Some(write_end)) = (&write.kind, write.acknowledged()) else {
            continue;
        };
        // The guest's own order, whatever the console's delay.
        if write_end.order < request.submitted_order
            && seen(write, bytes, write_end, host)
            && !stable_by(write, bytes, end.position, host)
        {
            found.push(Finding::FlushDoesNotCover { flush, write: write.number, at: end.time.clone() });
        }
    }
    found
}

/// A sync that had failed before the acknowledgement, and before anything of this request's own that
/// could make it stable had begun. A later sync that succeeds means nothing: the kernel has dropped the
/// data and called the pages clean.
fn failure_before<'a>(request: &Request, end: &Ended, host: &'a Host) -> Option<&'a Sync> {
    let syncs = host.syncs.iter().filter(|sync| sync.error.is_none()).map(|sync| (sync.entry, sync.exit));
    let writes = host.writes.iter().filter(|call| call.dsync).map(|call| (call.entry, call.exit));
    let own = syncs.chain(writes).filter(|&(entry, exit)| entry > request.submitted && exit < end.position);
    let first_own = own.map(|(entry, _)| entry).min().unwrap_or(Position::MAX);
    let failed = |sync: &&Sync| sync.error.is_some() && sync.exit < end.position.min(first_own);
    host.syncs.iter().find(failed)
}

/// Did calls write all of it between its submission and its end?
fn seen(write: &Request, bytes: &Range<u64>, end: &Ended, host: &Host) -> bool {
    covered(bytes, inside(write, end, host).map(|call| &call.bytes))
}

/// The calls that may have written for it.
fn inside<'a>(write: &Request, end: &Ended, host: &'a Host) -> impl Iterator<Item = &'a Write> {
    let (from, to) = (write.submitted, end.position);
    host.writes.iter().filter(move |call| call.entry > from && call.exit < to)
}

/// Was each byte stable by `limit`, in this version or a later one? A call is stable that was DSYNC, or
/// that had ended before a successful sync began which has ended by then.
fn stable_by(write: &Request, bytes: &Range<u64>, limit: Position, host: &Host) -> bool {
    let synced = |exit: Position| {
        host.syncs.iter().any(|sync| sync.error.is_none() && sync.entry > exit && sync.exit < limit)
    };
    let stable = host.writes.iter().filter(|call| {
        call.entry > write.submitted && call.exit < limit && (call.dsync || synced(call.exit))
    });
    covered(bytes, stable.map(|call| &call.bytes))
}

/// Do the pieces together contain all of `wanted`?
fn covered<'a>(wanted: &Range<u64>, pieces: impl Iterator<Item = &'a Range<u64>>) -> bool {
    let mut pieces: Vec<&Range<u64>> = pieces.collect();
    pieces.sort_by_key(|piece| piece.start);
    let mut at = wanted.start;
    for piece in pieces {
        if piece.start <= at {
            at = at.max(piece.end);
        }
    }
    at >= wanted.end
}
