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
/// Waits of one epoch.
const EPOCH: u32 = 64;
/// The longest pause between two trials, in epochs. The pause doubles after each trial that changes nothing, because
/// a trial may be slower. The bound limits how long a wrong choice lasts.
const PAUSE_EPOCHS_MAX: u32 = 64;
/// A wait that is longer than the longest polling time by this factor counts as no longer: the guest was idle.
const IDLE: u32 = 4;
/// While sleeping: change to spinning if it costs less than this share of sleeping. The gap between the two limits
/// keeps noise from changing the choice.
const SPIN_BELOW: f64 = 0.97;
/// While spinning: change to sleeping if it costs less than this share of spinning. It is above 1, because equal speed
/// does not justify the CPU.
const SLEEP_BELOW: f64 = 1.01;

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

/// Compares the two ways by what a request costs, in time from one to the next.
///
/// Most of the time nothing is measured. In a trial three epochs follow one another: the present way, the other one,
/// the present way again. The middle one is compared with its neighbours, so that a load that changes slowly does
/// not look like a difference between the ways.
#[derive(Debug)]
struct Trials {
    /// A longer wait counts as this long: the guest was idle.
    wait_max: Duration,
    /// `true` if spinning is the present way.
    spinning: bool,
    phase: Phase,
    /// Waits that are left of this epoch.
    waits: u32,
    /// Epochs until the next trial.
    epochs_left: u32,
    /// Epochs between trials.
    pause: u32,
    /// What is measured of this epoch.
    epoch: Epoch,
    /// What a request cost in the epoch before the other way.
    cost_before: f64,
    /// What it cost with the other way.
    cost_other: f64,
    /// What the other way costs, as a share of the present one: a mean of the last trials. `None` before the first.
    other: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Steady,
    Before,
    Other,
    After,
}

#[derive(Debug, Default)]
struct Epoch {
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
            spinning: true,
            phase: Phase::Steady,
            waits: EPOCH,
            epochs_left: 1,
            pause: 1,
            epoch: Epoch::default(),
            cost_before: 0.0,
            cost_other: 0.0,
            other: None,
        }
    }

    fn spins(&self) -> bool {
        self.spinning != (self.phase == Phase::Other)
    }

    fn is_measuring(&self) -> bool {
        self.phase != Phase::Steady
    }

    fn begins(&mut self, now: Instant) {
        self.epoch.since.get_or_insert(now);
        self.epoch.wait_since = Some(now);
    }

    /// Counts a wait that has ended. `now` is called only if something is measured.
    fn ends(&mut self, completed: u32, now: impl FnOnce() -> Instant) {
        self.waits -= 1;
        if !self.is_measuring() {
            if self.waits == 0 {
                self.steady_epoch_ends();
            }
            return;
        }
        self.epoch.completed += completed;
        let now = now();
        if let Some(since) = self.epoch.wait_since {
            self.epoch.idle += now.saturating_duration_since(since).saturating_sub(self.wait_max);
        }
        if self.waits == 0 {
            self.waits = EPOCH;
            let epoch = std::mem::take(&mut self.epoch);
            // Without a completion there is no cost, so the epoch is repeated.
            if let Some(cost) = epoch.cost(now) {
                self.record_cost(cost);
            }
        }
    }

    fn steady_epoch_ends(&mut self) {
        self.waits = EPOCH;
        self.epochs_left -= 1;
        if self.epochs_left == 0 {
            self.phase = Phase::Before;
        }
    }

    /// Records what a request cost in the epoch that has ended, and starts the next phase.
    fn record_cost(&mut self, cost: f64) {
        self.phase = match self.phase {
            Phase::Steady | Phase::Before => {
                self.cost_before = cost;
                Phase::Other
            }
            Phase::Other => {
                self.cost_other = cost;
                Phase::After
            }
            Phase::After => {
                self.conclude_trial(self.cost_other / ((self.cost_before + cost) / 2.0));
                Phase::Steady
            }
        };
    }

    /// Concludes a trial in which the other way cost `other`, as a share of the present one. Changes over if the mean of
    /// the trials is below the limit.
    fn conclude_trial(&mut self, other: f64) {
        let mean = self.other.map_or(other, |mean| mean + (other - mean) / 3.0);
        let limit = if self.spinning { SLEEP_BELOW } else { SPIN_BELOW };
        self.pause = if mean < limit {
            self.spinning = !self.spinning;
            self.other = None;
            1
        } else {
            self.other = Some(mean);
            (self.pause * 2).min(PAUSE_EPOCHS_MAX)
        };
        self.epochs_left = self.pause;
    }
}

impl Epoch {
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

    /// Makes `epochs` epochs of waits in which a request takes `spinning` or `sleeping` microseconds.
    fn live(trials: &mut Trials, epochs: u32, spinning: u64, sleeping: u64) -> u32 {
        let mut now = Instant::now();
        let mut spun = 0;
        for _ in 0..epochs * EPOCH {
            if trials.is_measuring() {
                trials.begins(now);
            }
            spun += u32::from(trials.spins());
            now += Duration::from_micros(if trials.spins() { spinning } else { sleeping });
            trials.ends(1, || now);
        }
        spun / EPOCH
    }

    #[test]
    fn it_spins_where_that_is_faster() {
        let mut trials = Trials::new(MAX * IDLE);
        let spun = live(&mut trials, 1000, 30, 40);
        assert!(trials.spinning && spun > 970, "{spun}");
    }

    #[test]
    fn it_sleeps_where_spinning_is_slower_or_gains_nothing() {
        for spinning in [100, 31, 30] {
            let mut trials = Trials::new(MAX * IDLE);
            let spun = live(&mut trials, 1000, spinning, 30);
            assert!(!trials.spinning && spun < 30, "{spinning}: {spun}");
        }
    }

    #[test]
    fn it_changes_over_when_the_load_changes() {
        let mut trials = Trials::new(MAX * IDLE);
        live(&mut trials, 1000, 30, 40);
        live(&mut trials, 300, 40, 30);
        assert!(!trials.spinning);
        live(&mut trials, 300, 30, 40);
        assert!(trials.spinning);
    }

    #[test]
    fn the_time_of_an_idle_guest_does_not_count() {
        let mut trials = Trials::new(MAX * IDLE);
        let mut now = Instant::now();
        for wait in 0..200 * EPOCH {
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
    fn an_epoch_without_a_completion_is_repeated() {
        let mut trials = Trials::new(MAX * IDLE);
        let now = Instant::now();
        for _ in 0..100 * EPOCH {
            trials.begins(now);
            trials.ends(0, || now);
        }
        assert_eq!(trials.phase, Phase::Before);
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
