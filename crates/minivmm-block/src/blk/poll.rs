//! Spinning instead of blocking, for as long as it pays.
//!
//! Owns the decision how long a worker polls its ring and its engine before it blocks. A wake-up costs 5 to 30
//! us on a virtual machine, which is often more than a disk needs to complete a request. Polling in vain costs
//! a CPU. So the polling time adapts: an event soon after the worker blocked makes it longer. An event that
//! took long makes it shorter, down to zero on an idle disk.

use std::time::{Duration, Instant};

/// The first polling time after zero.
const STEP: Duration = Duration::from_micros(4);
/// Number of polls between two readings of the clock.
const POLLS: u32 = 8;

/// Decides how long one worker spins before it blocks.
#[derive(Debug)]
pub struct Poller {
    max: Duration,
    window: Duration,
}

impl Poller {
    /// Creates a poller that spins for at most `max`; zero means never.
    pub fn new(max: Duration) -> Self {
        Self { max, window: max }
    }

    /// Returns `true` if the poller ever spins.
    pub fn is_on(&self) -> bool {
        !self.max.is_zero()
    }

    /// Spins until `ready` returns `true` or the time is over. Returns `true` if it was ready.
    pub fn spin(&self, mut ready: impl FnMut() -> bool) -> bool {
        if self.window.is_zero() {
            return false;
        }
        let since = Instant::now();
        loop {
            for _ in 0..POLLS {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if since.elapsed() >= self.window {
                return false;
            }
        }
    }

    /// Adapts the polling time to an event that came `took` after the worker began to spin or block.
    pub fn learn(&mut self, took: Duration) {
        if took > self.max {
            self.window /= 2;
            if self.window < STEP {
                self.window = Duration::ZERO;
            }
        } else if took > self.window {
            self.window = (self.window * 2).max(STEP).min(self.max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(40);

    #[test]
    fn it_gives_up_on_an_idle_disk_and_comes_back_when_it_would_have_paid() {
        let mut poller = Poller::new(MAX);
        for _ in 0..10 {
            poller.learn(Duration::from_millis(5));
        }
        assert!(!poller.spin(|| panic!("it does not even poll")));
        poller.learn(Duration::from_micros(30));
        assert_eq!(poller.window, STEP);
        for _ in 0..10 {
            poller.learn(Duration::from_micros(39));
        }
        assert!(poller.window >= Duration::from_micros(32) && poller.window <= MAX);
    }

    #[test]
    fn what_comes_in_time_changes_nothing() {
        let mut poller = Poller::new(MAX);
        poller.learn(Duration::from_micros(10));
        assert_eq!(poller.window, MAX);
        let mut polls = 0;
        assert!(poller.spin(|| {
            polls += 1;
            polls == 5
        }));
        assert!(!poller.spin(|| false));
    }

    #[test]
    fn off_is_off() {
        let mut poller = Poller::new(Duration::ZERO);
        assert!(!poller.is_on());
        poller.learn(Duration::ZERO);
        poller.learn(Duration::from_micros(1));
        assert!(!poller.spin(|| true));
    }
}
