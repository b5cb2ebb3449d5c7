//! Spinning instead of blocking, where that pays.
//!
//! Owns the decision whether and how long a worker polls its virtqueue and its engine before it blocks. A wake-up costs 5
//! to 30 us on a virtual machine, which is often more than a disk needs to complete a request. But a spinning thread
//! takes a CPU, or half of one, from the driver and from the kernel, and a deep queue has no wake-ups to save. Whether
//! the gain or the cost is larger depends on machine and load, so the poller measures a request's cost with spinning
//! and with sleeping ([`Trials`]).

use std::time::{Duration, Instant};

/// The shortest polling time.
const WINDOW_MIN: Duration = Duration::from_micros(4);
/// Polls between two readings of the clock.
const POLLS_PER_CLOCK_READ: u32 = 8;
/// Waits of one window, the unit of measuring and of the pauses between trials.
const WINDOW: u32 = 256;
/// Windows after a change of the way that do not count: the host's scheduler moves the two threads apart, or together on
/// one CPU, and takes its time.
const SETTLING: u32 = 4;
/// Windows that count, after those.
const MEASURED: u32 = 4;
/// A trial of the other way is over at once if a window of it costs less than `CLEAR` of the present way, or more than
/// 1 / `CLEAR` of it. The first window does not count.
const CLEAR: f64 = 0.75;
/// The shortest and the longest pause between two trials, in windows. The pause doubles after each trial that changes
/// nothing, because a trial may be slower. The longest pause limits how long a wrong choice lasts.
const PAUSE_WINDOWS: std::ops::RangeInclusive<u32> = 16..=1024;
/// A wait that is longer than the longest polling time by this factor counts as no longer: the guest was idle.
const IDLE: u32 = 4;
/// While sleeping: change to spinning if it costs less than this share of sleeping. A small gain does not justify the
/// CPU, and the gap between the two limits keeps noise from changing the choice.
const SPIN_BELOW: f64 = 0.9;
/// While spinning: change to sleeping if it costs less than this share of spinning.
const SLEEP_BELOW: f64 = 1.03;

/// Decides whether and how long one worker spins before it blocks.
#[derive(Debug)]
pub struct Poller {
    max: Duration,
    /// How long the next spin may last. Doubles after a spin that paid and halves after one that did not, so that an
    /// idle queue hardly spins.
    window: Duration,
    trials: Trials,
}

impl Poller {
    /// Creates a poller that spins for at most `max`; zero means never.
    pub fn new(max: Duration) -> Self {
        Self { max, window: max, trials: Trials::new(max * IDLE) }
    }

    /// Returns `true` if the worker is to spin before it blocks.
    pub fn spins(&self) -> bool {
        !self.max.is_zero() && self.trials.spins()
    }

    /// Spins until `ready` returns `true` or the time is over. Returns `true` if it was ready.
    pub fn spin(&mut self, mut ready: impl FnMut() -> bool) -> bool {
        let since = Instant::now();
        loop {
            for _ in 0..POLLS_PER_CLOCK_READ {
                if ready() {
                    self.window = (self.window * 2).min(self.max);
                    return true;
                }
                std::hint::spin_loop();
            }
            if since.elapsed() >= self.window {
                self.window = (self.window / 2).max(WINDOW_MIN).min(self.max);
                return false;
            }
        }
    }

    /// Records that a wait begins. Call it before spinning, so that the spin counts as part of the wait.
    pub fn waits(&mut self) {
        if !self.max.is_zero() && self.trials.is_measuring() {
            self.trials.begins(Instant::now());
        }
    }

    /// Records that the wait has ended, and that `completed` requests were completed since the last call.
    pub fn waited(&mut self, completed: u32) {
        if self.max.is_zero() {
            return;
        }
        self.trials.ends(completed, Instant::now);
    }
}

/// Compares the two ways by what a request costs, in time from one to the next. Sleeping is the first one.
///
/// Most of the time nothing is measured. In a trial the present way, the other one and the present way again follow one
/// another. The other one is compared with both, so that a load that changes slowly does not look like a difference
/// between the ways.
#[derive(Debug)]
struct Trials {
    /// A longer wait counts as this long: the guest was idle.
    wait_max: Duration,
    /// `true` if spinning is the present way.
    spinning: bool,
    phase: Phase,
    /// Waits that are left of this window.
    waits: u32,
    /// Windows of this phase that have ended.
    windows: u32,
    /// Windows between trials.
    pause: u32,
    /// What is measured of this window.
    window: Window,
    /// The sum of the costs of the windows of this phase that count.
    sum: f64,
    /// What a request cost in the present way, before the other one.
    before: f64,
    /// What it cost with the other way.
    other: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The present way, unmeasured.
    Steady,
    Before,
    Other,
    After,
}

/// What is measured of one window.
#[derive(Debug, Default)]
struct Window {
    since: Option<Instant>,
    wait_since: Option<Instant>,
    /// Time of waits beyond `wait_max`, which does not count.
    idle: Duration,
    completed: u32,
}

impl Trials {
    fn new(wait_max: Duration) -> Self {
        Self {
            wait_max,
            spinning: false,
            phase: Phase::Before,
            waits: WINDOW,
            windows: 0,
            pause: *PAUSE_WINDOWS.start(),
            window: Window::default(),
            sum: 0.0,
            before: 0.0,
            other: 0.0,
        }
    }

    fn spins(&self) -> bool {
        self.spinning != (self.phase == Phase::Other)
    }

    fn is_measuring(&self) -> bool {
        self.phase != Phase::Steady
    }

    fn begins(&mut self, now: Instant) {
        self.window.since.get_or_insert(now);
        self.window.wait_since = Some(now);
    }

    /// Counts a wait that has ended. `now` is called only if something is measured.
    fn ends(&mut self, completed: u32, now: impl FnOnce() -> Instant) {
        self.waits -= 1;
        if self.is_measuring() {
            self.window.completed += completed;
            let now = now();
            if let Some(since) = self.window.wait_since {
                self.window.idle += now.saturating_duration_since(since).saturating_sub(self.wait_max);
            }
            if self.waits == 0 {
                self.waits = WINDOW;
                let window = std::mem::take(&mut self.window);
                // Without a completion there is no cost, so the window is repeated.
                if let Some(cost) = window.cost(now) {
                    self.window_ends(cost);
                }
            }
        } else if self.waits == 0 {
            self.waits = WINDOW;
            self.windows += 1;
            if self.windows >= self.pause {
                self.enter(Phase::Before);
            }
        }
    }

    fn enter(&mut self, phase: Phase) {
        (self.phase, self.windows, self.sum) = (phase, 0, 0.0);
    }

    /// Records what a request cost in the window that has ended, and enters the next phase when it is time.
    fn window_ends(&mut self, cost: f64) {
        self.windows += 1;
        // Before the other way everything is settled but the very first window.
        let settling = if self.phase == Phase::Before { 1 } else { SETTLING };
        if self.windows > settling {
            self.sum += cost;
        }
        let is_over = self.windows == settling + MEASURED;
        let mean = self.sum / f64::from(MEASURED);
        match self.phase {
            Phase::Before if is_over => {
                self.before = mean;
                self.enter(Phase::Other);
            }
            Phase::Other => {
                let now = cost / self.before;
                if self.windows > 1 && !(CLEAR..=1.0 / CLEAR).contains(&now) {
                    self.conclude_trial(now);
                } else if is_over {
                    self.other = mean;
                    self.enter(Phase::After);
                }
            }
            Phase::After if is_over => self.conclude_trial(self.other / ((self.before + mean) / 2.0)),
            Phase::Steady | Phase::Before | Phase::After => {}
        }
    }

    /// Concludes a trial in which the other way cost `other`, as a share of the present one.
    fn conclude_trial(&mut self, other: f64) {
        let limit = if self.spinning { SLEEP_BELOW } else { SPIN_BELOW };
        if other < limit {
            self.spinning = !self.spinning;
            self.pause = *PAUSE_WINDOWS.start();
        } else {
            self.pause = (self.pause * 2).min(*PAUSE_WINDOWS.end());
        }
        self.enter(Phase::Steady);
    }
}

impl Window {
    /// Returns the mean seconds from one completed request to the next, without the guest's idle time. `None` if no
    /// request completed.
    fn cost(&self, now: Instant) -> Option<f64> {
        let took = now.saturating_duration_since(self.since?).saturating_sub(self.idle);
        (self.completed > 0).then(|| took.as_secs_f64() / f64::from(self.completed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(40);

    /// Makes `windows` windows of waits in which a request takes `spinning` or `sleeping` microseconds. Returns in how
    /// many windows the worker spun.
    fn live(trials: &mut Trials, windows: u32, spinning: u64, sleeping: u64) -> u32 {
        let mut now = Instant::now();
        let mut spun = 0;
        for _ in 0..windows * WINDOW {
            if trials.is_measuring() {
                trials.begins(now);
            }
            spun += u32::from(trials.spins());
            now += Duration::from_micros(if trials.spins() { spinning } else { sleeping });
            trials.ends(1, || now);
        }
        spun / WINDOW
    }

    #[test]
    fn it_spins_where_that_is_faster() {
        for (spinning, at_least) in [(30, 940), (20, 980)] {
            let mut trials = Trials::new(MAX * IDLE);
            let spun = live(&mut trials, 1000, spinning, 40);
            assert!(trials.spinning && spun > at_least, "{spinning}: {spun}");
        }
    }

    #[test]
    fn it_sleeps_where_spinning_is_slower_or_gains_little() {
        for (spinning, at_most) in [(100, 14), (31, 50), (30, 50), (28, 50)] {
            let mut trials = Trials::new(MAX * IDLE);
            let spun = live(&mut trials, 1000, spinning, 30);
            assert!(!trials.spinning && spun < at_most, "{spinning}: {spun}");
        }
    }

    #[test]
    fn it_changes_over_when_the_load_changes() {
        let mut trials = Trials::new(MAX * IDLE);
        live(&mut trials, 1000, 30, 40);
        live(&mut trials, 1100, 40, 30);
        assert!(!trials.spinning);
        live(&mut trials, 1100, 30, 40);
        assert!(trials.spinning);
    }

    /// As a scheduler does that moves two threads together on one CPU, and apart again.
    #[test]
    fn what_changes_only_after_a_while_is_seen() {
        let mut trials = Trials::new(MAX * IDLE);
        let (mut now, mut since_change, mut spun_before) = (Instant::now(), 0, false);
        let mut spun = 0;
        for _ in 0..1000 * WINDOW {
            if trials.is_measuring() {
                trials.begins(now);
            }
            let spins = trials.spins();
            since_change = if spins == spun_before { since_change + 1 } else { 0 };
            spun_before = spins;
            let is_settled = since_change > 3 * WINDOW / 2;
            // Spinning looks better for a while, and sleeping after it worse.
            now += Duration::from_micros(match (spins, is_settled) {
                (true, true) | (false, false) => 60,
                (true, false) | (false, true) => 50,
            });
            spun += u32::from(spins);
            trials.ends(1, || now);
        }
        assert!(!trials.spinning && spun / WINDOW < 60, "{}", spun / WINDOW);
    }

    #[test]
    fn the_time_of_an_idle_guest_does_not_count() {
        let mut trials = Trials::new(MAX * IDLE);
        let mut now = Instant::now();
        for wait in 0..200 * WINDOW {
            if trials.is_measuring() {
                trials.begins(now);
            }
            // Now and then the guest does nothing for a while, whichever way the worker waits.
            now += Duration::from_micros(if wait % 37 == 0 { 5000 } else { 0 });
            now += Duration::from_micros(if trials.spins() { 20 } else { 40 });
            trials.ends(1, || now);
        }
        assert!(trials.spinning);
    }

    #[test]
    fn a_window_without_a_completion_is_repeated() {
        let mut trials = Trials::new(MAX * IDLE);
        let now = Instant::now();
        for _ in 0..100 * WINDOW {
            trials.begins(now);
            trials.ends(0, || now);
        }
        assert_eq!((trials.phase, trials.windows), (Phase::Before, 0));
    }

    #[test]
    fn what_is_never_ready_is_polled_for_less_and_less() {
        let mut poller = Poller::new(MAX);
        for _ in 0..10 {
            assert!(!poller.spin(|| false));
        }
        assert_eq!(poller.window, WINDOW_MIN);
        for _ in 0..10 {
            assert!(poller.spin(|| true));
        }
        assert_eq!(poller.window, MAX);
    }

    #[test]
    fn off_is_off() {
        let mut poller = Poller::new(Duration::ZERO);
        for _ in 0..1000 {
            assert!(!poller.spins());
            poller.waits();
            poller.waited(1);
        }
    }
}
