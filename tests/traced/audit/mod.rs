//! The black-box auditor: does a VMM keep what it acknowledges? From `strace` of the process and the
//! guest's log of submissions and acknowledgements, which is in the same trace as the VMM's writes to
//! its console.
//!
//! `parse` makes calls of lines, `host` and `guest` make operations and requests of calls, `rules`
//! judges; none of them runs anything, so that they can become a program of their own. `recorded`
//! tries them on small traces; `minivmm` and `qemu` audit real processes. docs/auditor.md tells how
//! to audit another VMM.

mod guest;
mod host;
mod minivmm;
mod parse;
mod qemu;
mod recorded;
mod ring;
mod rules;

use std::process::Command;

use minivmm_testkit::machine;

use self::host::File;
use self::rules::Audit;

/// The calls that an audit needs, and those that hide some; a name that the machine does not know is
/// passed over.
pub const TRACED: &str = "trace=?open,openat,?openat2,close,?dup,?dup2,dup3,fcntl,write,writev,\
    pwrite64,pwritev,pwritev2,fallocate,fdatasync,fsync,sync,syncfs,sync_file_range,msync,mmap,ioctl,\
    sendfile,copy_file_range,splice,io_submit,io_uring_setup,io_uring_enter";

/// `strace` with what an audit needs; the VMM's command line follows.
pub fn strace(log: &std::path::Path) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-tt", "-T", "-y", "-s", "256", "-e", TRACED, "-o"]).arg(log);
    strace
}

/// Says that tests are skipped where it is not.
pub fn strace_is_here() -> bool {
    let here = Command::new("strace").arg("-V").output().is_ok();
    if !here {
        machine::skip("strace", "strace is not installed, nothing is audited");
    }
    here
}

/// What a guest negotiates: words of its command line, and whether its writes must then be stable
/// before they complete where the device's write cache is on.
pub const NEGOTIATIONS: [(&str, bool); 4] =
    [("", false), ("noflush nowce", true), ("noflush", true), ("wb=0", true)];

/// `AUDIT_TRACE=vmm.strace AUDIT_IMAGE=/path/disk.img AUDIT_CONSOLE=/path/console.log` (or a
/// descriptor's number) audits a trace that the user brings.
#[test]
fn a_trace_named_in_the_environment_keeps_its_promises() {
    let named = |name| std::env::var(name).ok();
    let Some(trace) = named("AUDIT_TRACE") else { return };
    let image = named("AUDIT_IMAGE").expect("AUDIT_IMAGE names the image as strace does");
    let console = named("AUDIT_CONSOLE").expect("AUDIT_CONSOLE names the console's file or descriptor");
    let console = console.parse().map_or(File::Path(console), File::Number);
    let trace = std::fs::read(&trace).unwrap_or_else(|error| panic!("cannot read {trace}: {error}"));
    let audit = Audit::of(&String::from_utf8_lossy(&trace), &image, &console).unwrap();
    println!("{audit}");
    assert_eq!(audit.verdict(), "kept", "{audit}");
}
