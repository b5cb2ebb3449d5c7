//! The time limits of a run: `--timeout`, and the limits for a guest that can no longer report on its
//! command.
//!
//! Owns the clocks. A guest whose init has reported may run its command for ever; only `--timeout` limits
//! that. How the VM ends when a limit expires is `vmm`'s.

use std::time::{Duration, Instant};

/// How long a guest may take until its init reports, if `--boot-timeout` is not given. Boots take less than a
/// second on hardware.
pub const BOOT_MAX: Duration = Duration::from_secs(60);
/// How long a kernel that panicked may take to reset, or to report to pvpanic.
const PANIC_MAX: Duration = Duration::from_secs(10);
/// How long a guest may take to power off once it has reported how its command ended. If it has used a disk
/// in that time, the limit starts anew: unmounting may have much to write.
const OFF_MAX: Duration = Duration::from_secs(60);

/// How long the guest's init may take to report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootTimeout {
    /// `BOOT_MAX`, and longer on a slow machine.
    Default,
    /// The time that the user gave.
    Given(Duration),
    /// No limit.
    Never,
}

/// What the guest has reported of its command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// Nothing.
    Nothing,
    /// Its init has reported.
    Arrived,
    /// There is no more to report: the command has ended, or could not be started.
    Ended,
}

/// The state of the guest at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Standing {
    /// The moment.
    pub at: Instant,
    /// What the guest has reported; `None` if there is no command.
    pub heard: Option<Heard>,
    /// `true` if the kernel printed that it panics.
    pub panicked: bool,
    /// A number that changes with each disk request.
    pub requests: u64,
}

/// The limit that expired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// `--timeout`.
    Timeout,
    /// The init did not report within this time.
    Boot(Duration),
    /// The kernel panicked, and did not reset.
    Panic,
    /// The command ended, and the guest did not power off within this time.
    Off(Duration),
}

/// A time limit, which may be extended once on a slow machine.
#[derive(Debug, Clone, Copy)]
struct Limit {
    from: Instant,
    length: Duration,
    /// `true` if `length` is to be multiplied by the machine's slowness when it first expires.
    grows: bool,
}

impl Limit {
    fn new(from: Instant, length: Duration, grows: bool) -> Self {
        Self { from, length, grows }
    }

    /// Returns when the limit expires, or `None` if that is farther away than the clock counts.
    fn end(&self) -> Option<Instant> {
        self.from.checked_add(self.length)
    }

    /// Returns `true` if the limit has expired at `at`, after extending it if it `grows`.
    fn is_over(&mut self, at: Instant, slowness: fn() -> u32) -> bool {
        let is_over = |limit: &Self| limit.end().is_some_and(|end| at >= end);
        if is_over(self) && std::mem::take(&mut self.grows) {
            self.length = self.length.saturating_mul(slowness().max(1));
        }
        is_over(self)
    }
}

/// The limits of one run.
pub struct Limits {
    timeout: Option<Limit>,
    boot: Option<Limit>,
    panic: Option<Limit>,
    off: Option<(Limit, u64)>,
    slowness: fn() -> u32,
}

impl Limits {
    /// Starts the limits at `at`, when the CPUs start.
    pub fn begin(at: Instant, timeout: Option<Duration>, boot: BootTimeout, slowness: fn() -> u32) -> Self {
        let boot = match boot {
            BootTimeout::Default => Some(Limit::new(at, BOOT_MAX, true)),
            BootTimeout::Given(length) => Some(Limit::new(at, length, false)),
            BootTimeout::Never => None,
        };
        let timeout = timeout.map(|length| Limit::new(at, length, false));
        Self { timeout, boot, panic: None, off: None, slowness }
    }

    /// Returns the limit that has expired, or `None`. Call this after every event, and when the time that
    /// [`Self::wait`] returns has passed.
    pub fn check(&mut self, now: Standing) -> Option<Over> {
        let slowness = self.slowness;
        let is_over = |limit: &mut Option<Limit>| limit.as_mut().is_some_and(|l| l.is_over(now.at, slowness));
        if is_over(&mut self.timeout) {
            return Some(Over::Timeout);
        }
        let heard = now.heard?;
        if heard != Heard::Nothing {
            self.boot = None;
        }
        match now.panicked {
            true => _ = self.panic.get_or_insert(Limit::new(now.at, PANIC_MAX, false)),
            false => self.panic = None,
        }
        if is_over(&mut self.panic) {
            return Some(Over::Panic);
        }
        if is_over(&mut self.boot) {
            return self.boot.map(|boot| Over::Boot(boot.length));
        }
        if heard != Heard::Ended {
            return None;
        }
        let fresh = (Limit::new(now.at, OFF_MAX, false), now.requests);
        let (off, requests) = self.off.get_or_insert(fresh);
        if !off.is_over(now.at, slowness) {
            return None;
        }
        if *requests == now.requests {
            return Some(Over::Off(off.length));
        }
        self.off = Some(fresh);
        None
    }

    /// Returns the time until a limit may expire, or `None` if no limit is set.
    pub fn wait(&self, at: Instant) -> Option<Duration> {
        let limits = [self.timeout, self.boot, self.panic, self.off.map(|(limit, _)| limit)];
        let ends = limits.iter().flatten().filter_map(Limit::end);
        ends.min().map(|end| end.saturating_duration_since(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    struct Clock {
        begin: Instant,
        limits: Limits,
    }

    impl Clock {
        fn new(timeout: Option<Duration>, boot: BootTimeout, slowness: fn() -> u32) -> Self {
            let begin = Instant::now();
            Self { begin, limits: Limits::begin(begin, timeout, boot, slowness) }
        }

        fn at(&mut self, seconds: u32, heard: impl Into<Option<Heard>>) -> Option<Over> {
            self.standing(seconds, heard, false, 0)
        }

        fn standing(
            &mut self,
            seconds: u32,
            heard: impl Into<Option<Heard>>,
            panicked: bool,
            requests: u64,
        ) -> Option<Over> {
            let at = self.begin + SECOND * seconds;
            self.limits.check(Standing { at, heard: heard.into(), panicked, requests })
        }
    }

    #[test]
    fn a_guest_that_never_reports_is_ended_and_one_that_has_may_take_for_ever() {
        let mut clock = Clock::new(None, BootTimeout::Default, || 1);
        assert_eq!(clock.at(59, Heard::Nothing), None);
        assert_eq!(clock.limits.wait(clock.begin + 59 * SECOND), Some(SECOND));
        assert_eq!(clock.at(60, Heard::Nothing), Some(Over::Boot(BOOT_MAX)));
        let mut clock = Clock::new(None, BootTimeout::Default, || 1);
        assert_eq!(clock.at(59, Heard::Arrived), None);
        assert_eq!(clock.at(1_000_000, Heard::Arrived), None);
        assert_eq!(clock.limits.wait(clock.begin), None);
        // Without a command no report is expected.
        let mut clock = Clock::new(None, BootTimeout::Default, || 1);
        assert_eq!(clock.at(1_000_000, None), None);
    }

    #[test]
    fn a_slow_machine_has_more_time_unless_the_user_has_said_how_much() {
        let mut clock = Clock::new(None, BootTimeout::Default, || 10);
        assert_eq!(clock.at(60, Heard::Nothing), None);
        assert_eq!(clock.limits.wait(clock.begin + 60 * SECOND), Some(540 * SECOND));
        assert_eq!(clock.at(600, Heard::Nothing), Some(Over::Boot(600 * SECOND)));
        let mut clock = Clock::new(None, BootTimeout::Given(2 * SECOND), || 10);
        assert_eq!(clock.at(2, Heard::Nothing), Some(Over::Boot(2 * SECOND)));
        let mut clock = Clock::new(None, BootTimeout::Never, || 10);
        assert_eq!(clock.at(1_000_000, Heard::Nothing), None);
        let mut clock = Clock::new(None, BootTimeout::Given(Duration::MAX), || 1);
        assert_eq!(clock.at(1_000_000, Heard::Nothing), None);
    }

    #[test]
    fn the_timeout_comes_first_and_needs_no_command() {
        let mut clock = Clock::new(Some(5 * SECOND), BootTimeout::Given(5 * SECOND), || 1);
        assert_eq!(clock.at(5, Heard::Nothing), Some(Over::Timeout));
        let mut clock = Clock::new(Some(5 * SECOND), BootTimeout::Default, || 1);
        assert_eq!(clock.at(5, None), Some(Over::Timeout));
    }

    #[test]
    fn a_kernel_that_panics_and_stays_is_not_waited_for() {
        let mut clock = Clock::new(None, BootTimeout::Default, || 1);
        assert_eq!(clock.standing(20, Heard::Arrived, true, 0), None);
        assert_eq!(clock.standing(29, Heard::Arrived, true, 0), None);
        assert_eq!(clock.standing(30, Heard::Arrived, true, 0), Some(Over::Panic));
        // It was a reboot after all.
        let mut clock = Clock::new(None, BootTimeout::Default, || 1);
        assert_eq!(clock.standing(20, Heard::Arrived, true, 0), None);
        assert_eq!(clock.standing(21, Heard::Arrived, false, 0), None);
        assert_eq!(clock.standing(31, Heard::Arrived, false, 0), None);
    }

    #[test]
    fn a_guest_that_stays_on_is_ended_unless_its_disks_are_busy() {
        let mut clock = Clock::new(None, BootTimeout::Default, || 1);
        assert_eq!(clock.standing(10, Heard::Ended, false, 5), None);
        assert_eq!(clock.standing(70, Heard::Ended, false, 6), None);
        assert_eq!(clock.standing(129, Heard::Ended, false, 6), None);
        assert_eq!(clock.standing(130, Heard::Ended, false, 6), Some(Over::Off(OFF_MAX)));
    }
}
