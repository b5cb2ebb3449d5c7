//! What tests need that send signals to minivmm: signals that it does not ignore, and chance that repeats itself.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Gives the command's signals their default effects: whoever started the tests may have ignored them (nohup, a job in
/// the background), which minivmm would keep.
pub fn with_default_signals(command: &mut Command) -> &mut Command {
    // SAFETY: signal(2) may be called between fork and exec, and takes numbers.
    unsafe {
        command.pre_exec(|| {
            for signal in
                [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU]
            {
                libc::signal(signal, libc::SIG_DFL);
            }
            Ok(())
        })
    }
}

/// xorshift: the same numbers for the same seed.
pub struct Chance(u64);

impl Chance {
    /// Begins the numbers of this seed.
    pub fn new(seed: u64) -> Self {
        Self(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed))
    }

    /// The next number, from 0 to `limit` less one.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
