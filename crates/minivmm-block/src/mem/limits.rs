//! Why this host does not let a process have memory.
//!
//! Owns the two limits that there are, and what is left of them: the process's own, and the host's if the host
//! promises no more memory than it has.

use std::fs;

const MIB: u64 = 1 << 20;

/// Formats a number of bytes as `--memory` takes it.
pub fn size(bytes: u64) -> String {
    match bytes % (1 << 30) {
        0 => format!("{}G", bytes >> 30),
        _ => format!("{}M", bytes >> 20),
    }
}

/// Describes the limit that is in the way, with its figure.
pub fn in_the_way() -> String {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit fills the structure that it is given.
    let is_known = unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) } == 0;
    if is_known && limit.rlim_cur != libc::RLIM_INFINITY {
        return format!(
            "this process may have {}M of address space in all (ulimit -v), so ask for less or raise that",
            limit.rlim_cur / MIB
        );
    }
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    if read("/proc/sys/vm/overcommit_memory").trim() == "2"
        && let Some(left) = left_to_promise(&read("/proc/meminfo"))
    {
        return format!(
            "this host promises no more memory than it has (vm.overcommit_memory=2), and {}M are left: ask for less, \
             or let it promise more (vm.overcommit_ratio)",
            left / MIB
        );
    }
    "the host does not give it: ask for less".to_owned()
}

/// Returns how many bytes this host can still promise, according to its /proc/meminfo.
fn left_to_promise(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().trim_end_matches("kB").trim().parse().ok()
    };
    Some(kib("CommitLimit")?.saturating_sub(kib("Committed_AS")?) << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_to_promise_is_read() {
        let text = "MemTotal:  9 kB\nCommitLimit:    12345678 kB\nCommitted_AS:    2345678 kB\n";
        assert_eq!(left_to_promise(text), Some(10_000_000 << 10));
        assert_eq!(left_to_promise("CommitLimit: 5 kB\nCommitted_AS: 6 kB\n"), Some(0));
        assert_eq!(left_to_promise("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn sizes_are_told_as_they_are_given() {
        assert_eq!((size(3 << 30), size(512 << 20)), ("3G".to_owned(), "512M".to_owned()));
    }
}
