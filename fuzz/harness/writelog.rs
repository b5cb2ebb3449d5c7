//! Write logs: whatever the file says, it is read or refused; and what is read keeps to the file and
//! to the disk, in every state that a loss of power may leave.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use minivmm::disk::writelog::format::{Header, Superblock};
use minivmm_lab::crash::legal::{Pending, StateName};
use minivmm_lab::crash::log::WriteLog;
use minivmm_lab::crash::plan::{Breadth, Plan};
use minivmm_lab::crash::points::{At, points};
use minivmm_lab::crash::{legal, list};

use super::input::Input;

const ENTRIES_MAX: u64 = 24;
const STATES_MAX: usize = 12;

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (point, torn, seed) = (usize::from(input.u8()), input.flag(), u64::from(input.u16()));
    let bytes = match input.below(4) {
        0 => input.rest().to_vec(),
        _ => compose(&mut input),
    };
    let file = in_memory("log", &bytes);
    let path = path_of(&file);
    match WriteLog::open(&path) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(log) => {
            check_log(&log, bytes.len() as u64);
            check_states(&log, point % (log.entries.len() + 2), torn, seed);
        }
    }
}

/// A file that is on no disk.
pub fn in_memory(name: &str, bytes: &[u8]) -> File {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: a name that ends with NUL.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "a file in memory");
    // SAFETY: just made, and owned by nobody else.
    let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    file.write_all_at(bytes, 0).expect("memory");
    file
}

pub fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// A log that is mostly sound.
fn compose(input: &mut Input<'_>) -> Vec<u8> {
    let sector_bytes = input.pick(&[512, 512, 512, 4096, 1024, 100, 1 << 21]);
    let count = 1 + u64::from(input.u8()) % ENTRIES_MAX;
    let told = if input.once_in(8) { input.edgy() } else { count };
    let sector = if sector_bytes == 1 << 21 { 512 } else { sector_bytes as usize };
    let mut bytes = Superblock { entries: told, sector_bytes }.encode().to_vec();
    bytes.resize(sector, 0);
    for _ in 0..count {
        if input.is_empty() {
            break;
        }
        let flags = match input.below(10) {
            0..=3 => 0,
            4 => 2,
            5 | 6 => 1,
            7 => 4,
            8 => 8,
            _ => input.edgy(),
        };
        let sectors = match input.below(8) {
            0 => 0,
            1 => input.edgy(),
            _ if flags & 4 != 0 => u64::from(input.u16()),
            _ => u64::from(input.u8() & 7),
        };
        let text = input.bytes(20);
        let header = Header {
            sector: if input.once_in(8) { input.edgy() } else { u64::from(input.u8() & 63) },
            sectors: if flags == 1 && input.flag() { 0 } else { sectors },
            flags,
            text_bytes: if input.once_in(16) { input.edgy() } else { text.len() as u64 },
        };
        let at = bytes.len();
        bytes.extend(header.encode());
        bytes.extend(text);
        bytes.resize(at + sector, 0);
        if header.has_data() {
            let data = usize::try_from(sectors.min(8)).unwrap() * sector;
            bytes.resize(bytes.len() + data, input.u8());
        }
    }
    if input.once_in(8) {
        bytes.truncate(bytes.len() - input.below(bytes.len().min(256)));
    }
    bytes
}

fn check_log(log: &WriteLog, file_bytes: u64) {
    assert!(log.entries.len() as u64 * 512 <= file_bytes, "more entries than the file has room for");
    for entry in &log.entries {
        assert!(entry.offset.checked_add(entry.bytes).is_some());
        assert!(!entry.kind().is_empty());
        if let Some(at) = entry.data_at {
            assert!(at + entry.bytes <= file_bytes, "the data lies beyond the file");
            let mut last = [0];
            if entry.bytes > 0 {
                log.read_data(entry, entry.bytes - 1, &mut last).expect("its last byte is there");
            }
        }
    }
    assert!(list::to_json(log).is_ok());
    assert!(!list::to_text(log).is_empty());
}

fn check_states(log: &WriteLog, point: usize, torn: bool, seed: u64) {
    let pending = Pending::at(log, point, torn);
    assert!(pending.settled <= log.entries.len());
    for name in pending.names(STATES_MAX, seed).take(STATES_MAX) {
        assert_eq!(name.to_string().parse(), Ok(name), "a state's name leads back to it");
        let extents = pending.extents(name).expect("a state that was named");
        assert_eq!(Some(&extents), pending.extents(name).as_ref());
        let mut end = 0;
        for extent in &extents {
            assert!(extent.offset >= end && extent.bytes > 0, "extents overlap: {extents:?}");
            end = extent.offset + extent.bytes;
            let entry = &log.entries[extent.entry];
            assert!(extent.entry >= pending.settled && extent.entry < point, "from another time");
            assert_eq!(extent.offset, entry.offset + extent.skip);
            assert!(extent.skip + extent.bytes <= entry.bytes);
        }
        assert!(pending.lost(name).iter().all(|entry| (pending.settled..point).contains(entry)));
        let _ = legal::fingerprint(pending.settled, &extents);
    }
    for odd in ["x0", "tx1", "s5", "ts5", "xffffffffffffffff"] {
        let name: StateName = odd.parse().unwrap();
        let _ = (pending.extents(name), pending.lost(name));
    }
    let places = ["all", "flushes", "marks", "end", "3"].map(|place| place.parse::<At>());
    let places: Vec<At> = places.into_iter().flatten().collect();
    if let Ok(found) = points(&log.entries, &places, seed) {
        assert!(found.iter().all(|point| *point <= log.entries.len()));
        let plan = Plan::new(log, found, Breadth::default());
        let (points, most) = (plan.points(), plan.at_most());
        assert!(points as u64 <= most || most == 0);
        assert!(plan.take(64).count() as u64 <= most);
    }
}
