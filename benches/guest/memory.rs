//! What a VMM takes beyond its guest's memory, from /proc.
//!
//! Owns the parting of the process's memory into guest RAM and the rest. What the kernel holds for it
//! (page tables, KVM's own) is in neither.

use anyhow::{Context, Result};
use serde::Serialize;

/// Memory of a VMM without its guest's RAM.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Beyond {
    /// Proportional set size (a page shared by n processes counts 1/n), in KiB.
    pub pss_kib: u64,
    /// The highest resident set so far less the guest's RAM that is resident now, in KiB.
    pub peak_rss_kib: u64,
    /// The guest's RAM that is resident, in KiB.
    pub guest_rss_kib: u64,
}

/// One mapping of smaps.
#[derive(Default, Clone, Copy)]
struct Mapping {
    from: u64,
    to: u64,
    rss_kib: u64,
    pss_kib: u64,
}

/// Looks at a process whose guest has so much RAM.
pub fn beyond(process: u32, ram_bytes: u64) -> Result<Beyond> {
    let read = |file: &str| {
        let path = format!("/proc/{process}/{file}");
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    };
    let peak_kib =
        read("status")?.lines().find_map(|line| kib(line, "VmHWM:")).context("there is no VmHWM")?;
    let mappings = parse(&read("smaps")?);
    let ram = ram(&mappings, ram_bytes).context("guest RAM is not found in smaps")?;
    let inside = |mapping: &&Mapping| mapping.from >= ram.0 && mapping.to <= ram.1;
    let guest_rss_kib: u64 = mappings.iter().filter(inside).map(|mapping| mapping.rss_kib).sum();
    let outside = mappings.iter().filter(|mapping| !inside(mapping));
    Ok(Beyond {
        pss_kib: outside.map(|mapping| mapping.pss_kib).sum(),
        peak_rss_kib: peak_kib.saturating_sub(guest_rss_kib),
        guest_rss_kib,
    })
}

/// The range of guest RAM: neighbouring mappings that together have its size, the one with the most
/// resident. A VMM may have parted it (advice for a piece of it), and much else may be as large.
fn ram(mappings: &[Mapping], bytes: u64) -> Option<(u64, u64)> {
    let ranges = (0..mappings.len()).filter_map(|first| {
        let from = mappings[first].from;
        let (mut to, mut rss_kib) = (from, 0);
        for mapping in &mappings[first..] {
            if mapping.from != to || to - from >= bytes {
                break;
            }
            to = mapping.to;
            rss_kib += mapping.rss_kib;
        }
        (to - from == bytes).then_some((rss_kib, from, to))
    });
    ranges.max().map(|(_, from, to)| (from, to))
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some((from, to)) = range(line) {
            mappings.push(Mapping { from, to, ..Mapping::default() });
        } else if let Some(mapping) = mappings.last_mut() {
            mapping.rss_kib += kib(line, "Rss:").unwrap_or(0);
            mapping.pss_kib += kib(line, "Pss:").unwrap_or(0);
        }
    }
    mappings
}

/// The range of a line that begins a mapping.
fn range(line: &str) -> Option<(u64, u64)> {
    let (from, to) = line.split_whitespace().next()?.split_once('-')?;
    Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
}

fn kib(line: &str, name: &str) -> Option<u64> {
    line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok()
}
