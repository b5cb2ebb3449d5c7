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
      the test guest, with disk.img as /dev/vda, bypassing the host's page cache
  minivmm --disk disk.img,cache=writeback,host-cache=drop --observe a.csv
      record in a.csv what host and guest cache of it; `minivmm top a.csv` displays it
  minivmm --explain --disk disk.img,cache=writethrough
      print the system calls that this will make, without running anything
  minivmm bench --disk scratch.img --size 1G --modes none,writeback
      run fio in the guest and on this host, and mark the figures that measure a cache
  minivmm --disk a.img --disk b.img,readonly,serial=archive --memory 2G --cpus 2
      two disks, /dev/vda and /dev/vdb
  minivmm --disk disk.img,cache=none -- fio --name=t --filename=/dev/vda --rw=randread --direct=1
      run a command as the guest's only job; its output and exit status become minivmm's
  minivmm --kernel bzImage --initrd none --append root=/dev/vda --disk root.img
      a kernel and a root file system of your own";

const STATUSES: &str = "\
Exit status:
  0      the guest has powered off or reset (or Ctrl-A x)
  2      usage
  124    the guest has panicked
  125    minivmm or the host has failed: an image or output was refused, the last
         fdatasync failed, an image was deleted or cut while the VM ran
  126    --timeout has passed
  128+n  stopped in order by signal n (SIGHUP 129, SIGINT 130, SIGTERM 143); the
         first signal counts, and later ones change nothing
With a COMMAND, minivmm exits with the command's status, except:
  123    also if the command exits with 124, 125 or 126; standard error says which
  125    also if the guest never reported (--boot-timeout), ended without reporting how
         the command ended, or had too little memory for the added files
  127    the command was not found in the guest, or could not be started
  128+n  also if signal n killed the command; standard error says so
Without a COMMAND:
  2v+1   a guest has written v to the exit port 0xf4 (modulo 256: v = 0x3e, 0x40,
         0x47 and v + 0x80 give a number that has another meaning too)
  check: 0 if Linux guests run, 1 if they do not
  crash: 0 if all disks were good, 1 if some were not";

/// Returns the text at the end of `--help`.
pub fn after() -> String {
    format!("{EXAMPLES}\n\n{STATUSES}")
}
