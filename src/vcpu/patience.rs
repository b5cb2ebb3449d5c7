//! How long a vCPU tolerates EAGAIN from KVM_RUN.
//!
//! Owns the pauses between attempts, and the moment at which EAGAIN becomes a failure. KVM returns EAGAIN in
//! two cases. A CPU that another one has just started (INIT, SIPI) gets it once or twice. KVM_RUN also
//! returns it if the host refuses KVM a kernel thread (`kvm_mmu_start_lpage_recovery`), for as long as the
//! cause lasts.

use std::time::{Duration, Instant};

/// The number of attempts without a pause: enough for a CPU that has just been started.
const PROMPT: u32 = 3;
/// The pause after those attempts; it doubles each time, up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// The longest pause. A vCPU that is told to stop is late by at most this much.
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// A started CPU gives up after this time, but not before it has made [`ATTEMPTS`].
const LIMIT: Duration = Duration::from_secs(1);
/// The minimum number of attempts: on a suspended or busy host, time passes without attempts.
const ATTEMPTS: u32 = 12;

/// What to do about another EAGAIN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Enter KVM again after this pause.
    Retry(Duration),
    /// Report the failure: the cause lasts.
    GiveUp,
}

/// Counts consecutive EAGAINs of one vCPU.
#[derive(Debug, Default)]
pub struct Patience {
    count: u32,
    since: Option<Instant>,
}

impl Patience {
    /// Forgets the EAGAINs so far, because KVM_RUN has returned something else.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Decides about another EAGAIN. `is_started` is `false` for a CPU that no other CPU has started yet;
    /// such a CPU never gives up. KVM returns EAGAIN to it for as long as the guest likes: a pending NMI
    /// suffices.
    pub fn judge(&mut self, now: Instant, is_started: bool) -> Verdict {
        let since = *self.since.get_or_insert(now);
        self.count = self.count.saturating_add(1);
        if is_started && self.count >= ATTEMPTS && now.saturating_duration_since(since) >= LIMIT {
            return Verdict::GiveUp;
        }
        let Some(paused) = self.count.checked_sub(PROMPT + 1) else { return Verdict::Retry(Duration::ZERO) };
        Verdict::Retry(PAUSE_MIN.saturating_mul(1 << paused.min(16)).min(PAUSE_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets EAGAIN last for `most`. Returns the number of attempts, and the time after which the vCPU gave
    /// up.
    fn last(most: Duration, is_started: bool) -> (u32, Option<Duration>) {
        let (begin, mut passed, mut patience) = (Instant::now(), Duration::ZERO, Patience::default());
        let mut attempt = 1;
        loop {
            match patience.judge(begin + passed, is_started) {
                Verdict::GiveUp => return (attempt, Some(passed)),
                Verdict::Retry(_) if passed >= most => return (attempt, None),
                Verdict::Retry(pause) => passed += pause,
            }
            attempt += 1;
        }
    }

    #[test]
    fn an_eagain_that_lasts_is_given_up_after_a_second_and_a_few_dozen_attempts() {
        let (attempts, after) = last(Duration::from_secs(60), true);
        let after = after.unwrap();
        assert!(after >= LIMIT && after < LIMIT + 2 * PAUSE_MAX, "{after:?}");
        assert!((ATTEMPTS..50).contains(&attempts), "{attempts}");
    }

    #[test]
    fn a_cpu_that_nobody_has_started_waits_for_ever_without_burning_time() {
        let (attempts, after) = last(Duration::from_secs(60), false);
        assert_eq!(after, None);
        assert!(attempts < 1300, "{attempts} attempts a minute");
    }

    #[test]
    fn a_cpu_that_was_just_started_is_entered_again_at_once() {
        let (now, mut patience) = (Instant::now(), Patience::default());
        for _ in 0..PROMPT {
            assert_eq!(patience.judge(now, true), Verdict::Retry(Duration::ZERO));
        }
        assert_eq!(patience.judge(now, true), Verdict::Retry(PAUSE_MIN));
        patience.reset();
        assert_eq!(patience.judge(now + Duration::from_secs(9), true), Verdict::Retry(Duration::ZERO));
    }

    #[test]
    fn time_that_passes_without_attempts_is_no_reason_to_give_up() {
        let (now, mut patience) = (Instant::now(), Patience::default());
        patience.judge(now, true);
        for _ in 2..ATTEMPTS {
            assert!(matches!(patience.judge(now + Duration::from_secs(3600), true), Verdict::Retry(_)));
        }
        assert_eq!(patience.judge(now + Duration::from_secs(3600), true), Verdict::GiveUp);
    }
}
