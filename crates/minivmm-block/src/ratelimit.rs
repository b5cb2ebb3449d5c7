//! How often one kind of message may be logged (R18): a guest can cause errors as fast as it likes.

use std::time::{Duration, Instant};

/// Lets a burst of messages pass in each period and counts the rest. The count is reported with the next
/// message that passes, or when this is dropped.
#[derive(Debug)]
pub struct RateLimit {
    what: &'static str,
    period: Duration,
    burst: u32,
    started: Option<Instant>,
    passed: u32,
    held_back: u64,
}

impl RateLimit {
    /// Allows at most `burst` messages in each `period`. `what` begins the message that reports the count at
    /// the end.
    pub fn new(what: &'static str, burst: u32, period: Duration) -> Self {
        Self { what, period, burst, started: None, passed: 0, held_back: 0 }
    }

    /// Returns the limit for one source of guest errors: five messages in ten seconds.
    pub fn for_guest_errors(what: &'static str) -> Self {
        Self::new(what, 5, Duration::from_secs(10))
    }

    /// Returns `Some(n)` if a message may be logged now, where `n` messages were held back before it; else
    /// `None`.
    pub fn pass(&mut self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&mut self, now: Instant) -> Option<u64> {
        if self.started.is_none_or(|started| now.duration_since(started) >= self.period) {
            self.started = Some(now);
            self.passed = 0;
        }
        if self.passed == self.burst {
            self.held_back += 1;
            return None;
        }
        self.passed += 1;
        Some(std::mem::take(&mut self.held_back))
    }
}

impl Drop for RateLimit {
    fn drop(&mut self) {
        if self.held_back > 0 {
            log::warn!("{}: {} more such messages were held back", self.what, self.held_back);
        }
    }
}

/// Logs a warning through a [`RateLimit`], with the number of messages held back before it.
#[macro_export]
macro_rules! warn_limited {
    ($limit:expr, $($arg:tt)+) => {
        match $limit.pass() {
            None => {}
            Some(0) => log::warn!($($arg)+),
            Some(held_back) => log::warn!("{} ({held_back} such messages were held back)", format_args!($($arg)+)),
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_the_rest_is_counted_and_told_in_the_next_period() {
        let mut limit = RateLimit::new("test", 2, Duration::from_secs(10));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let passes: Vec<_> = [0, 1, 2, 3, 10, 11, 12].into_iter().map(|s| limit.pass_at(at(s))).collect();
        assert_eq!(passes, [Some(0), Some(0), None, None, Some(2), Some(0), None]);
    }
}
