//! minivmm with io_uring audited: what the kernel's tracepoints show of the ring, by the rules that
//! strace's calls are judged by.
//!
//! Owns the way from what the eye has seen to what was done to the image; docs/auditor.md tells what
//! is read where.

use std::path::Path;
use std::process::Command;

use crate::eye::{Eye, Operation};
use crate::host::{Host, Output, Sync, Write};
use crate::machine::*;
use crate::minivmm::{MODES, must_find_everything};
use crate::rules::Audit;
use crate::NEGOTIATIONS;

/// The files that the eye is shown, in this order.
const IMAGE: usize = 0;
const CONSOLE: usize = 1;

const RWF_SYNCS: u64 = (libc::RWF_DSYNC | libc::RWF_SYNC) as u64;
const O_SYNCS: u64 = (libc::O_DSYNC | libc::O_SYNC) as u64;
const ERASES: u64 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) as u64;
const SHARED_FOR_WRITING: u64 = libc::PROT_WRITE as u64 | (libc::MAP_SHARED as u64) << 32;

/// What was done to the image and said on the console.
pub fn host(operations: &[Operation]) -> Result<Host, String> {
    let mut host = Host::default();
    for operation in operations {
        let (entry, exit) = (operation.entry, operation.exit.unwrap_or(usize::MAX));
        let time = format!("event {entry}");
        let moved = u64::try_from(operation.result).unwrap_or(0);
        match operation.file {
            Some(CONSOLE) if operation.name == "write" => {
                if operation.bytes.len() as u64 != operation.length {
                    return Err(format!("{time}: more on the console at once than the eye reads"));
                }
                let moved = usize::try_from(moved).unwrap_or(0);
                let bytes = operation.bytes[..moved.min(operation.bytes.len())].to_vec();
                host.console.push(Output { bytes, entry, exit, time });
            }
            _ if hides(operation) => *host.hidden.entry(operation.name.into()).or_default() += 1,
            Some(IMAGE) if operation.exit.is_some() => match operation.name {
                name if name.contains("WRITE") || name.contains("pwrite") => {
                    let bytes = operation.offset..operation.offset.saturating_add(moved);
                    let dsync = operation.flags & RWF_SYNCS != 0 || operation.file_flags & O_SYNCS != 0;
                    host.writes.push(Write { bytes, entry, exit, dsync: dsync && moved > 0 });
                }
                "fallocate" | "IORING_OP_FALLOCATE"
                    if operation.flags & ERASES != 0 && operation.result == 0 =>
                {
                    let bytes = operation.offset..operation.offset.saturating_add(operation.length);
                    host.writes.push(Write { bytes, entry, exit, dsync: false });
                }
                "fsync" | "fdatasync" | "IORING_OP_FSYNC" => {
                    let error = [libc::EIO, libc::ENOSPC, libc::EDQUOT]
                        .into_iter()
                        .find(|&errno| operation.has_failed_with(errno))
                        .map(|errno| std::io::Error::from_raw_os_error(errno).to_string());
                    if operation.result == 0 || error.is_some() {
                        host.syncs.push(Sync { entry, exit, error, time });
                    }
                }
                _ => {}
            },
            _ => {}
        }
    }
    Ok(host)
}

/// Reaches the image, perhaps, in a way that the rules cannot place.
fn hides(operation: &Operation) -> bool {
    let on_image = operation.file == Some(IMAGE);
    match operation.name {
        "io_submit" | "sync" | "syncfs" | "msync" => true,
        "mmap" => on_image && operation.flags & SHARED_FOR_WRITING == SHARED_FOR_WRITING,
        "write" | "writev" | "sendfile" | "copy_file_range" | "splice" | "ioctl(BLKZEROOUT)" => on_image,
        "another entry" | "IORING_OP_SPLICE" => on_image,
        // Of a part of the file only.
        "IORING_OP_FSYNC" => on_image && (operation.waits || operation.length != 0),
        name if name.contains("WRITE") || name == "pwritev2" => {
            on_image && (operation.waits || operation.offset == u64::MAX)
        }
        _ => false,
    }
}

/// An eye, or why there is none.
pub fn eye() -> Option<Eye> {
    Eye::open().map_err(|reason| skip(&format!("{reason}; io_uring is not audited"))).ok()
}

/// Runs a VMM whose console goes to this file, and audits its image.
pub fn audit(mut eye: Eye, image: &Path, console: &Path, command: &mut Command, status: i32) -> Audit {
    let what = format!("{command:?}");
    std::fs::write(console, "").unwrap();
    eye.shows(image);
    eye.shows(console);
    eye.watches(command);
    run(command, b"").expect(status, &what);
    let audit = eye.operations().and_then(|seen| host(&seen)).and_then(Audit::of_host);
    audit.unwrap_or_else(|error| panic!("{what}: {error}"))
}

/// minivmm with this disk, which lies at `image`.
fn audit_minivmm(eye: Eye, image: &Path, keys: &str, words: &str, status: i32) -> Audit {
    let scratch = scratch();
    let console = scratch.path().join("console");
    let mut command = minivmm();
    start(&mut command, Entry::Pvh, &format!("scenario=audit {words}"));
    command.arg("--console").arg(format!("file={}", console.display())).args(["--timeout", "60", "--disk"]);
    command.arg(format!("{},{keys}", image.display()));
    audit(eye, image, &console, &mut command, status)
}

#[test]
fn through_the_ring_every_mode_keeps_what_it_acknowledges_and_unsafe_does_not() {
    if !kvm() {
        return;
    }
    for (mode, write_cache, honours_flush) in MODES {
        for stable in ["dsync", "fdatasync", "group", "auto"] {
            for (words, stable_with_cache) in NEGOTIATIONS {
                let Some(eye) = eye() else { return };
                let keys = format!("cache={mode},engine=io_uring,stable={stable}");
                let image = Image::new();
                let audit = audit_minivmm(eye, &image.path, &keys, words, exit(0x2a));
                println!("{keys} {words:14} {audit}");
                let what = format!("{keys} {words}: {audit}");
                let flushes = !words.contains("noflush");
                let stable = stable_with_cache || !write_cache;
                assert_eq!(audit.writes, 8, "{what}");
                assert_eq!(audit.flushes, if flushes { 6 } else { 0 }, "{what}");
                assert_eq!(audit.stable_writes, if stable { 8 } else { 0 }, "{what}");
                assert_eq!(audit.hidden, Vec::<String>::new(), "{what}");
                if honours_flush {
                    assert_eq!(audit.findings, [], "{what}");
                } else {
                    must_find_everything(&audit, flushes, stable, &what);
                }
            }
        }
    }
}
