//! The prose of `--help`: headings, examples, exit statuses.
//!
//! Owns what clap cannot derive from the arguments themselves.

use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::disk::DiskOptions;

/// What the machine runs.
pub const GUEST: &str = "Guest";
/// What the machine is.
pub const MACHINE: &str = "Machine";
/// Its disks.
pub const DISKS: &str = "Disks";
/// How it is watched, and ended.
pub const RUNNING: &str = "Running";

const EXAMPLES: &str = "\
Examples:
  minivmm check
      can this machine run Linux guests?
  minivmm --disk disk.img,cache=none
      the test guest, with disk.img as /dev/vda past the host's page cache
  minivmm --disk disk.img,cache=writeback,host-cache=drop --observe a.csv
      keep in a.csv what host and guest cache of it; `minivmm top a.csv` shows it
  minivmm --explain --disk disk.img,cache=writethrough
      which system calls that will make, without running anything
  minivmm bench --disk scratch.img --size 1G --modes none,writeback
      fio in the guest and on this host; says which figures are a cache's
  minivmm --disk a.img --disk b.img,readonly,serial=archive --memory 2G --cpus 2
      two disks, /dev/vda and /dev/vdb
  minivmm --disk disk.img,cache=none -- fio --name=t --filename=/dev/vda --rw=randread --direct=1
      a command as the guest's only job: its output and its exit status are minivmm's
  minivmm --kernel bzImage --initrd none --append root=/dev/vda --disk root.img
      a kernel and a root file system of your own";

const STATUSES: &str = "\
Exit status:
  0      the guest has powered off or reset (or Ctrl-A x)
  2      usage
  124    the guest has panicked
  125    minivmm or the host has failed; a failed last fdatasync is one
  126    --timeout has passed
  128+n  ended by signal n (SIGHUP 129, SIGINT 130, SIGTERM 143), in order
With a COMMAND its own status is minivmm's, and besides:
  123    also for its own 124, 125 and 126, with a word on standard error
  125    also where the guest has never reported (--boot-timeout), has ended without telling how
         the command ended, or had no memory for what was added
  127    the command was not found in the guest, or could not be started
  128+n  also where signal n has killed the command, with a word on standard error
Without one:
  2v+1   a guest has written v to the exit port 0xf4 (modulo 256: v = 0x3e, 0x40,
         0x47 and v + 0x80 give a number that has another meaning too)
  check: 0 where Linux guests run, 1 where they do not
  crash: 0 where all disks were good, 1 where some were not";

/// What stands at the end of `--help`.
pub fn after() -> String {
    format!("{EXAMPLES}\n\n{STATUSES}")
}

/// A word where clap expects none: a key of a disk, most likely, or a disk if there is such a file, or
/// else a command for the guest.
pub fn improve(mut error: clap::Error) -> clap::Error {
    let place = match error.kind() {
        ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
        ErrorKind::UnknownArgument => ContextKind::InvalidArg,
        _ => return error,
    };
    let Some(ContextValue::String(word)) = error.get(place) else { return error };
    let tip = if let Some(name) = word.strip_prefix("--") {
        if !is_disk_key(name) {
            return error;
        }
        format!("{name} is a key of --disk: --disk IMAGE,{name}=VALUE")
    } else if word.starts_with('-') {
        return error;
    } else if Path::new(word).exists() {
        format!("to give the guest a disk: --disk {word}")
    } else {
        format!(
            "a command for the guest stands behind --: minivmm [OPTIONS] -- {word}; minivmm's own are 'bench', 'check', 'crash', 'log' and 'top'"
        )
    };
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    error
}

fn is_disk_key(name: &str) -> bool {
    let key = format!("  {name}=");
    !name.is_empty() && DiskOptions::keys_help().lines().any(|line| line.starts_with(&key))
}
