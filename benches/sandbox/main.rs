//! What a thread's filter adds to a system call, in nanoseconds, by role.
//!
//! Owns the calls and the turns; how many instructions the filter takes is counted beside ([`steps`]). Each call is one that the kernel answers at once (a descriptor that cannot be,
//! nothing to wake), so what differs between a thread with and a thread without a filter is the filter. The two
//! take turns; the figure is the median of the rounds' differences. `make bench-sandbox`; asserts nothing.
#![allow(clippy::print_stdout, reason = "it is a program")]

#[path = "../common/median.rs"]
mod median;
mod steps;

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use minivmm::sandbox::{self, Mode, Role, SandboxEntry};

use median::median;

/// Measures what the sandbox adds to each system call.
#[derive(Debug, Parser)]
struct Arguments {
    /// Rounds; in each every call is measured without and with its filter
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Calls in a round
    #[arg(long, default_value_t = 300_000)]
    calls: u32,
    /// Few rounds: whether it works, not how fast
    #[arg(long)]
    quick: bool,
    /// What cargo says to every bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// A call by its name, and with arguments that end it at once.
type Call = (&'static str, i64, [i64; 6]);

const NOWHERE: i64 = -1;
const KVM_RUN: i64 = 0xae80;

const IOCTL: Call = ("ioctl KVM_RUN", libc::SYS_ioctl, [NOWHERE, KVM_RUN, 0, 0, 0, 0]);
const READ: Call = ("read", libc::SYS_read, [NOWHERE, 0, 0, 0, 0, 0]);
const WRITE: Call = ("write", libc::SYS_write, [NOWHERE, 0, 0, 0, 0, 0]);
const POLL: Call = ("poll", libc::SYS_poll, [0; 6]);
const ENTER: Call = ("io_uring_enter", libc::SYS_io_uring_enter, [NOWHERE, 0, 0, 0, 0, 0]);
const PREADV: Call = ("preadv2", libc::SYS_preadv2, [NOWHERE, 0, 0, 0, 0, 0]);
const PWRITEV: Call = ("pwritev2", libc::SYS_pwritev2, [NOWHERE, 0, 0, 0, 0, 0]);
const SYNC: Call = ("fdatasync", libc::SYS_fdatasync, [NOWHERE, 0, 0, 0, 0, 0]);
const MPROTECT: Call = ("mprotect", libc::SYS_mprotect, [1, 0, 0, 0, 0, 0]);
const PREAD: Call = ("pread64", libc::SYS_pread64, [NOWHERE, 0, 0, 0, 0, 0]);
const WRITEV: Call = ("writev", libc::SYS_writev, [NOWHERE, 0, 0, 0, 0, 0]);

/// What each role does often. Main is the last: it lowers the limits of the whole process.
const HOT: [(Role, &[Call]); 6] = [
    (Role::Vcpu, &[IOCTL, WRITE]),
    (Role::Worker, &[ENTER, READ, WRITE, PREADV, PWRITEV, SYNC, MPROTECT]),
    (Role::Console, &[POLL, READ, WRITEV]),
    (Role::Observe, &[PREAD]),
    (Role::End, &[SYNC]),
    (Role::Main, &[POLL, READ]),
];

/// What this thread has had of a CPU, in nanoseconds: others that take its CPU do not count.
fn cpu_time() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, which is there.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}

/// Nanoseconds a call.
fn time(call: &Call, calls: u32) -> f64 {
    let (_, number, [a, b, c, d, e, f]) = *call;
    let begin = cpu_time();
    for _ in 0..calls {
        // SAFETY: the arguments make the kernel refuse, or do nothing with no memory.
        unsafe { libc::syscall(number, a, b, c, d, e, f) };
    }
    (cpu_time() - begin) / f64::from(calls)
}

/// A thread in the sandbox, which measures what it is asked.
struct Filtered {
    ask: Sender<Call>,
    answer: Receiver<f64>,
    thread: JoinHandle<()>,
}

impl Filtered {
    fn start(role: Role, calls: u32) -> Result<Self> {
        let (ask, asked) = mpsc::channel::<Call>();
        let (give, answer) = mpsc::channel();
        let entry = SandboxEntry::new(role);
        let work = move || {
            entry.enter();
            for call in asked {
                if give.send(time(&call, calls)).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().spawn(work).context("cannot start a thread")?;
        sandbox::wait_for_all();
        Ok(Self { ask, answer, thread })
    }

    fn time(&self, call: &Call) -> Result<f64> {
        self.ask.send(*call)?;
        Ok(self.answer.recv()?)
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let (rounds, calls) = if arguments.quick { (3, 20_000) } else { (arguments.rounds, arguments.calls) };
    ensure!(rounds > 0 && calls > 0, "--rounds and --calls are at least 1");
    sandbox::arm(Mode::On, &Role::OF_VM, sandbox::VM_SPARE_DESCRIPTORS)?;
    println!("Median of {rounds} rounds of {calls} calls, in nanoseconds a call.\n");
    println!("| thread | call | without | with | added (least to most) | instructions of the filter |");
    println!("|---|---|---|---|---|---|");
    for (role, hot) in HOT {
        let filtered = Filtered::start(role, calls)?;
        for call in hot {
            let (mut without, mut with, mut added) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..rounds {
                let pair = (time(call, calls), filtered.time(call)?);
                without.push(pair.0);
                with.push(pair.1);
                added.push(pair.1 - pair.0);
            }
            let least = added.iter().copied().fold(f64::INFINITY, f64::min);
            let most = added.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let [without, with, added] =
                [without, with, added].map(|values| median(values).unwrap_or(f64::NAN));
            let steps = steps::of(role, call.1, call.2).context("a call that the filter forbids")?;
            let kept = if steps.kept { ", kept by the kernel" } else { "" };
            let (role, name, instructions) = (role.name(), call.0, steps.instructions);
            println!(
                "| {role} | `{name}` | {without:.0} | {with:.0} | {added:+.0} ({least:+.0} to {most:+.0}) | {instructions}{kept} |"
            );
        }
        drop(filtered.ask);
        let _ = filtered.thread.join();
    }
    Ok(())
}
