//! What the host's kernel offers beyond what minivmm requires: io_uring, locked memory, huge pages,
//! cachestat, RWF_DONTCACHE, Landlock, seccomp.
//!
//! Owns the queries, each by a harmless call. None of the results decides anything.

use std::fs::{self, File};
use std::io;
use std::sync::Arc;

use super::{Row, Status};
use crate::disk::geometry::takes_rw_flags;

/// cachestat(2), Linux 6.5; the number is the same on all architectures.
const SYS_CACHESTAT: libc::c_long = 451;
/// The flag with which landlock_create_ruleset(2) returns its version.
const LANDLOCK_CREATE_RULESET_VERSION: libc::c_uint = 1;

/// Returns all rows.
pub fn rows() -> Vec<Row> {
    vec![io_uring(), memlock(), huge_pages(), cachestat(), dontcache(), landlock(), seccomp()]
}

fn note(key: &str, found: impl Into<String>) -> Row {
    Row::new("features", key, Status::Note, found)
}

/// Returns the kernel's result, or its errno as the error.
fn answer(result: libc::c_long) -> Result<libc::c_long, i32> {
    if result < 0 { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { Ok(result) }
}

fn io_uring() -> Row {
    const SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";
    let sysctl = fs::read_to_string(SYSCTL).map(|text| text.trim().to_owned()).ok();
    // struct io_uring_params: 120 bytes, all of which may be 0.
    let mut params = [0_u64; 15];
    // SAFETY: `params` is as large as what the kernel reads and writes, and outlives the call.
    let made = answer(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) });
    let because = match sysctl.as_deref() {
        None | Some("0") => String::new(),
        Some(value) => format!(" (sysctl kernel.io_uring_disabled={value})"),
    };
    match made {
        Ok(fd) => {
            if let Ok(fd) = i32::try_from(fd) {
                // SAFETY: the descriptor was created above, and nothing else owns it.
                unsafe { libc::close(fd) };
            }
            note("io_uring", format!("may be used{because}")).with(1)
        }
        Err(libc::ENOSYS) => note("io_uring", "not in this kernel, or filtered").with(0),
        Err(libc::EPERM) => {
            let because = if because.is_empty() { " (a container's filter?)".into() } else { because };
            note("io_uring", format!("forbidden{because}")).with(0)
        }
        Err(errno) => note("io_uring", io::Error::from_raw_os_error(errno).to_string()).with(0),
    }
}

fn memlock() -> Row {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for writes.
    if unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } != 0 {
        return note("RLIMIT_MEMLOCK", "cannot be read");
    }
    let words = |bytes: libc::rlim_t| match bytes {
        libc::RLIM_INFINITY => "unlimited".to_owned(),
        bytes => format!("{} KiB", bytes >> 10),
    };
    let found = format!("{}, at most {}", words(limit.rlim_cur), words(limit.rlim_max));
    note("RLIMIT_MEMLOCK", found).with(limit.rlim_cur)
}

fn huge_pages() -> Row {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = text.split(['[', ']']).nth(1);
    note("transparent huge pages", chosen.unwrap_or("not in this kernel"))
}

fn cachestat() -> Row {
    // SAFETY: with a descriptor that cannot exist, the kernel accesses no pointer.
    let result = answer(unsafe { libc::syscall(SYS_CACHESTAT, -1_i32, 0_usize, 0_usize, 0_u32) });
    match result {
        Err(libc::EBADF) => note("cachestat", "there").with(1),
        Err(libc::ENOSYS) => note("cachestat", "not in this kernel (6.5 has it)").with(0),
        Err(errno) => note("cachestat", io::Error::from_raw_os_error(errno).to_string()).with(0),
        Ok(_) => note("cachestat", "answers strangely").with(0),
    }
}

/// Each file system has RWF_DONTCACHE or has it not, and the kernel does not say which: here one file is tried.
fn dontcache() -> Row {
    const TRIED: &str = "/proc/self/exe";
    let tried = File::open(TRIED).and_then(|file| {
        let end = file.metadata()?.len();
        takes_rw_flags(&Arc::new(file), end, libc::RWF_DONTCACHE)
    });
    let key = "RWF_DONTCACHE";
    match tried {
        Ok(true) => note(key, "there for files beside minivmm's own (cache=dontcache)").with(1),
        Ok(false) => {
            let found = "not for files beside minivmm's own; cache=dontcache needs it (xfs since Linux 6.15, ext4 since 6.17)";
            note(key, found).with(0)
        }
        Err(error) => note(key, format!("cannot be tried on {TRIED}: {error}")),
    }
}

fn landlock() -> Row {
    // SAFETY: with this flag the kernel uses no pointer.
    let result = answer(unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, 0_usize, 0_usize, LANDLOCK_CREATE_RULESET_VERSION)
    });
    match result {
        Ok(version) => note("Landlock", format!("ABI {version}")).with(u64::try_from(version).unwrap_or(0)),
        Err(libc::ENOSYS) => note("Landlock", "not in this kernel").with(0),
        Err(libc::EOPNOTSUPP) => note("Landlock", "in this kernel, but not switched on").with(0),
        Err(errno) => note("Landlock", io::Error::from_raw_os_error(errno).to_string()).with(0),
    }
}

fn seccomp() -> Row {
    // asm-generic: SECCOMP_GET_ACTION_AVAIL.
    const GET_ACTION_AVAIL: libc::c_uint = 2;
    let action: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the kernel reads one u32 from the pointer, which is valid for it.
    let result = answer(unsafe { libc::syscall(libc::SYS_seccomp, GET_ACTION_AVAIL, 0, &raw const action) });
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let filtered =
        status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"));
    let inside = if filtered { "; this process is under a filter already" } else { "" };
    match result {
        Ok(_) => note("seccomp", format!("filters may be set{inside}")).with(1),
        Err(_) => note("seccomp", format!("no filters that end a process{inside}")).with(0),
    }
}
