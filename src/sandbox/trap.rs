//! SIGSYS: a system call that the thread's filter does not allow.
//!
//! Owns the handler, which reports the call and the thread and ends minivmm; with `--sandbox=log` it makes
//! the call and goes on. The handler allocates nothing and takes no lock, because it may interrupt the thread
//! anywhere.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::roles::Role;
use super::{ARMED, Mode};

/// minivmm's exit status if minivmm or the host failed (`cli::ExitStatus::Failure`).
pub const EXIT_STATUS: i32 = 125;

/// Calls with a number below this are reported once, others each time.
const NUMBERS: usize = 512;
const WORDS: usize = NUMBERS / 64;

thread_local! {
    static ROLE: Cell<Option<Role>> = const { Cell::new(None) };
}

/// The calls that have been reported, by role, with one bit per call.
static TOLD: [[AtomicU64; WORDS]; Role::ALL.len()] =
    [const { [const { AtomicU64::new(0) }; WORDS] }; Role::ALL.len()];

/// Records this thread's role, for the handler's message.
pub(super) fn this_thread_is(role: Role) {
    ROLE.set(Some(role));
}

/// Handles SIGSYS from now on.
pub(super) fn install() -> io::Result<()> {
    // SAFETY: zero is a valid value of this plain structure: an empty mask, no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_forbidden as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    // SAFETY: the structure is complete, and the handler calls only async-signal-safe functions.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

std::arch::global_asm!(
    ".globl minivmm_sandbox_call",
    ".globl minivmm_sandbox_passage",
    "minivmm_sandbox_call:",
    "mov rax, rdi",
    "mov rdi, [rsi]",
    "mov rdx, [rsi + 16]",
    "mov r10, [rsi + 24]",
    "mov r8, [rsi + 32]",
    "mov r9, [rsi + 40]",
    "mov rsi, [rsi + 8]",
    "syscall",
    "minivmm_sandbox_passage:",
    "ret",
);

unsafe extern "C" {
    /// Makes the system call `number` with six arguments. Returns the kernel's answer; errors are negative
    /// numbers.
    fn minivmm_sandbox_call(number: i64, arguments: *const [i64; 6]) -> i64;
    /// The address after the `syscall` instruction above, which a filter sees as the instruction pointer.
    fn minivmm_sandbox_passage();
}

/// Returns the address that [`Mode::Log`]'s filter lets pass.
pub(super) fn passage() -> usize {
    minivmm_sandbox_passage as *const () as usize
}

extern "C" fn on_forbidden(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the third argument is the context of this thread, which nobody else uses.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = |register: libc::c_int| registers[register.unsigned_abs() as usize];
    let number = at(libc::REG_RAX);
    let role = ROLE.get();
    let logs = ARMED.get().is_some_and(|armed| armed.mode == Mode::Log);
    if logs {
        if first_time(role, number) {
            tell(number, role, "; with --sandbox=on that would end minivmm\n");
        }
        let arguments =
            [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8, libc::REG_R9].map(at);
        // SAFETY: this is the call that the thread was about to make, with its own arguments.
        registers[libc::REG_RAX as usize] = unsafe { minivmm_sandbox_call(number, &raw const arguments) };
        return;
    }
    crate::terminal::restore();
    tell(
        number,
        role,
        ", which the sandbox does not let it: a defect of minivmm's, or somebody has taken it over. \
         What the guest has not flushed may be lost. --sandbox=log tells what is missing\n",
    );
    // SAFETY: the call ends the process, of which nothing runs any more.
    unsafe { libc::_exit(EXIT_STATUS) }
}

fn first_time(role: Option<Role>, number: i64) -> bool {
    let Some(number) = usize::try_from(number).ok().filter(|number| *number < NUMBERS) else { return true };
    let told = &TOLD[role.map_or(0, |role| role as usize)][number / 64];
    let bit = 1 << (number % 64);
    told.fetch_or(bit, Ordering::Relaxed) & bit == 0
}

/// Prints one line with one write(2), from a buffer on the stack.
fn tell(number: i64, role: Option<Role>, consequence: &str) {
    let mut line = Line { bytes: [0; 512], used: 0 };
    line.add("minivmm: a ");
    line.add(role.map_or("thread", Role::name));
    line.add(" thread has called ");
    let known = usize::try_from(number).ok().and_then(syscalls::Sysno::new);
    line.add(known.map_or("an unknown system call", |call| call.name()));
    line.add(" (");
    line.add_number(number.unsigned_abs());
    line.add(")");
    line.add(consequence);
    // SAFETY: the call writes as many bytes as the buffer holds. Whether anybody reads them does not matter.
    let _ = unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.used) };
}

struct Line {
    bytes: [u8; 512],
    used: usize,
}

impl Line {
    /// Appends text. What does not fit is cut off.
    fn add(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.used) {
                *place = byte;
                self.used += 1;
            }
        }
    }

    fn add_number(&mut self, number: u64) {
        let mut digits = [0u8; 20];
        let (mut left, mut at) = (number, digits.len());
        while at == digits.len() || left > 0 {
            at -= 1;
            digits[at] = b'0' + u8::try_from(left % 10).unwrap_or_default();
            left /= 10;
        }
        self.add(std::str::from_utf8(&digits[at..]).unwrap_or_default());
    }
}
