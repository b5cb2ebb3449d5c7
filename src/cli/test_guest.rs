//! What only the bundled test guest gets: a quiet kernel, the terminal as hvc0, its kernel's modules, a
//! system on a disk that `root=` boots.
//!
//! Owns when each of them applies. The guest's side is its init (docs/guest-images.md).

use std::path::{Path, PathBuf};

use super::find_guest::ModulesNotFound;
use super::{Args, find_guest};
use crate::boot::cmdline;
use crate::terminal;

impl Args {
    /// Returns the kernel command line with what the user appended.
    fn asked_cmdline(&self) -> String {
        self.append.iter().fold(self.cmdline.clone(), |line, more| cmdline::append(&line, more))
    }

    /// Returns why a `root=` on the kernel command line would be ignored, or `None`. The test guest's init
    /// boots it only if there is no command to run.
    pub(super) fn unbootable_root(&self) -> Option<String> {
        let line = self.asked_cmdline();
        let root = cmdline::value(&line, "root").filter(|_| self.job.is_given() && self.initrd.is_none())?;
        Some(format!(
            "a COMMAND runs in the test guest's own root, so root={root} would be ignored: leave out COMMAND to \
             boot the system on {root}, or leave out root= and mount it: -- sh -c 'mount /dev/vda /mnt && \
             chroot /mnt COMMAND'"
        ))
    }

    /// Returns `true` if the terminal is to become hvc0: only if the test guest's own shell, and no other
    /// program, uses it.
    pub(super) fn wants_hvc(&self, bundled: bool) -> bool {
        let line = self.asked_cmdline();
        let others = ["root", "init", "rdinit", "minivmm.demo"];
        bundled && !self.job.is_given() && !others.iter().any(|name| cmdline::has(&line, name))
    }

    /// Returns the command line of a run without COMMAND. One given by the user stays unchanged.
    pub(super) fn terminal_cmdline(&self, bundled: bool) -> String {
        match bundled && self.cmdline == cmdline::DEFAULT {
            true => cmdline::for_terminal(&self.cmdline, self.verbose > 0, terminal_kind().as_deref()),
            false => self.cmdline.clone(),
        }
    }
}

/// Returns the archive of modules for `kernel`, or `None` if none was asked for.
pub fn modules(asked: Option<Option<PathBuf>>, kernel: &Path) -> Result<Option<PathBuf>, ModulesNotFound> {
    match asked {
        Some(None) => find_guest::modules_beside(kernel).map(Some),
        Some(path) => Ok(path),
        None => Ok(None),
    }
}

/// Returns the type of the terminal on standard input, as in `TERM`; `None` if it is no terminal.
fn terminal_kind() -> Option<String> {
    (terminal::input() == terminal::Input::Terminal).then(|| std::env::var("TERM").ok()).flatten()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn args(words: &[&str]) -> Args {
        Args::try_parse_from(std::iter::once(&"minivmm").chain(words)).unwrap()
    }

    #[test]
    fn the_test_guest_is_quiet_unless_messages_or_a_line_of_ones_own_are_wanted() {
        let quiet = |words: &[&str], bundled| cmdline::has(&args(words).terminal_cmdline(bundled), "quiet");
        assert!(quiet(&[], true));
        assert!(!quiet(&["-v"], true));
        assert!(!quiet(&[], false), "another kernel's messages are wanted");
        assert!(!quiet(&["--cmdline", "console=ttyS0"], true));
    }

    #[test]
    fn the_terminal_is_hvc0_only_where_the_test_guests_shell_is_at_it() {
        assert!(args(&[]).wants_hvc(true));
        assert!(!args(&[]).wants_hvc(false));
        for line in ["root=/dev/vda", "rdinit=/bin/sh", "init=/x", "minivmm.demo"] {
            assert!(!args(&["--append", line]).wants_hvc(true), "{line}");
        }
        assert!(!args(&["--", "true"]).wants_hvc(true));
    }

    #[test]
    fn a_root_that_would_be_ignored_is_refused() {
        let why = args(&["--append", "root=/dev/vda rw", "--", "true"]).unbootable_root().unwrap();
        assert!(why.contains("root=/dev/vda") && why.contains("mount /dev/vda"), "{why}");
        assert_eq!(args(&["--append", "root=/dev/vda"]).unbootable_root(), None);
        assert_eq!(
            args(&["--append", "root=/dev/vda", "--initrd", "x", "--", "true"]).unbootable_root(),
            None
        );
    }
}
