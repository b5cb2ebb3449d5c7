//! What the bundled test guest gets that another guest does not: a quiet kernel, the terminal as hvc0, its
//! kernel's modules, a system on a disk booted by `root=`.
//!
//! Owns when each of them applies. The guest's side is its init (docs/guest-images.md).

use std::path::{Path, PathBuf};

use super::find_guest::ModulesNotFound;
use super::{Args, find_guest};
use crate::boot::cmdline;
use crate::terminal;

impl Args {
    /// The kernel command line as the user has given it.
    fn asked_cmdline(&self) -> String {
        self.append.iter().fold(self.cmdline.clone(), |line, more| cmdline::append(&line, more))
    }

    /// Why a `root=` on the kernel command line cannot be what the user wants: the test guest's init boots it
    /// only where it has no command to run.
    pub(super) fn unbootable_root(&self) -> Option<String> {
        let line = self.asked_cmdline();
        let root = cmdline::value(&line, "root").filter(|_| self.job.is_given() && self.initrd.is_none())?;
        Some(format!(
            "a COMMAND runs in the test guest's own root, so root={root} would be ignored: leave out COMMAND to \
             boot the system on {root}, or leave out root= and mount it: -- sh -c 'mount /dev/vda /mnt && \
             chroot /mnt COMMAND'"
        ))
    }

    /// Whether a terminal is to be hvc0: where the test guest's own shell, and no other program, will be at it.
    pub(super) fn wants_hvc(&self, bundled: bool) -> bool {
        let line = self.asked_cmdline();
        let others = ["root", "init", "rdinit", "minivmm.demo"];
        bundled && !self.job.is_given() && !others.iter().any(|name| cmdline::has(&line, name))
    }

    /// The command line of a run without COMMAND. One of the user's own stays as it is.
    pub(super) fn terminal_cmdline(&self, bundled: bool) -> String {
        match bundled && self.cmdline == cmdline::DEFAULT {
            true => cmdline::for_terminal(&self.cmdline, self.verbose > 0, terminal_kind().as_deref()),
            false => self.cmdline.clone(),
        }
    }
}

/// The archive of modules for `kernel`, where one is asked for.
pub fn modules(asked: Option<Option<PathBuf>>, kernel: &Path) -> Result<Option<PathBuf>, ModulesNotFound> {
    match asked {
        Some(None) => find_guest::modules_beside(kernel).map(Some),
        Some(path) => Ok(path),
        None => Ok(None),
    }
}

/// The kind of terminal on standard input, as programs call it.
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
