//! The prose of `--help`: headings, examples, exit statuses.
//!
//! Owns what clap cannot derive from the arguments themselves.

/// Heading of the options about what the machine runs.
pub const GUEST: &str = "Guest";
/// Heading of the options about the machine itself.
pub const MACHINE: &str = "Machine";
/// Heading of the options about its disks.
pub const DISKS: &str = "Disks";
/// Heading of the options about how the machine is watched and ended.
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
  125    minivmm or the host has failed: an image or output that is refused, a failed
         last fdatasync, an image that was deleted or cut while the VM ran
  126    --timeout has passed
  128+n  ended by signal n (SIGHUP 129, SIGINT 130, SIGTERM 143), in order; the
         first one counts, and later ones change nothing
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

/// Returns the text at the end of `--help`.
pub fn after() -> String {
    format!("{EXAMPLES}\n\n{STATUSES}")
}
