//! What the host can do where fio has no such load: the same system call again and again, one at a time.
//!
//! Owns the loop. Its calls are those that the device makes for a FLUSH and a DISCARD.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;

use crate::counted;
use crate::driver::Times;
use crate::fio::Fio;
use crate::load::{Load, Pattern};
use crate::random::Random;

/// Runs the loop once.
pub fn run(load: &Load, image: &Path, (warm_up, window): (Duration, Duration)) -> Result<Fio> {
    let direct = if load.direct() { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new().read(true).write(true).custom_flags(direct).open(image)?;
    let (fd, block) = (file.as_raw_fd(), i64::from(load.block_bytes));
    let blocks = file.metadata()?.len() / u64::from(load.block_bytes);
    let mut random = Random::new(1);
    let mut call = || match load.pattern {
        // SAFETY: no memory is involved.
        Pattern::Flush => unsafe { libc::fdatasync(fd) },
        _ => {
            let offset = random.below(blocks) as i64 * block;
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: no memory is involved.
            unsafe { libc::fallocate(fd, mode, offset, block) }
        }
    };
    if !matches!(load.pattern, Pattern::Flush | Pattern::Discard) || load.depth != 1 {
        bail!("the host's loop makes one FLUSH or DISCARD at a time");
    }
    let mut times = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?;
    let begin = Instant::now();
    while begin.elapsed() < warm_up {
        call();
    }
    let (opened, cpu) = (Instant::now(), counted::cpu_seconds(libc::CLOCK_THREAD_CPUTIME_ID)?);
    let mut before = opened;
    while before.duration_since(opened) < window {
        if call() != 0 {
            return Err(io::Error::last_os_error()).context("the host's loop failed");
        }
        let now = Instant::now();
        times.saturating_record(now.duration_since(before).as_nanos() as u64);
        before = now;
    }
    let seconds = before.duration_since(opened).as_secs_f64();
    Ok(Fio {
        iops: times.len() as f64 / seconds,
        times: Times::of(&times),
        flush_times: None,
        cpu_share: (counted::cpu_seconds(libc::CLOCK_THREAD_CPUTIME_ID)? - cpu) / seconds,
        huge_bytes: None,
    })
}
