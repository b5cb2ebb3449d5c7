//! How much longer something takes: estimates that stay true while a step takes longer than expected.
//!
//! Owns the arithmetic and the words. An estimate is computed anew each time it is shown: an estimate made at
//! the beginning of a step would not change while the step runs. The caller owns the progress bar.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use minivmm::sync::unpoisoned;

/// Steps that run one after the other. Equal names mean equal work.
#[derive(Debug, Default)]
pub struct Steps {
    /// The steps that have not begun, in order.
    rest: VecDeque<String>,
    /// The step that runs; `None` between steps.
    current: Option<String>,
    /// The last duration of each step, in seconds.
    took: HashMap<String, f64>,
    /// The sum of all measured durations in seconds, and how many there are.
    total_seconds: f64,
    measured: u32,
}

impl Steps {
    /// Returns steps that will run in this order.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self { rest: names.into_iter().collect(), ..Self::default() }
    }

    /// Begins the next step.
    pub fn begin(&mut self) {
        self.current = self.rest.pop_front();
    }

    /// Skips the next step, which was done before.
    pub fn skip(&mut self) {
        self.rest.pop_front();
    }

    /// Ends the running step, which took `took`.
    pub fn end(&mut self, took: Duration) {
        let Some(name) = self.current.take() else { return };
        let seconds = took.as_secs_f64();
        self.took.insert(name, seconds);
        self.total_seconds += seconds;
        self.measured += 1;
    }

    /// Returns the time left in words, if the current step has run for `running`.
    pub fn left(&self, running: Duration) -> String {
        if self.measured == 0 {
            return "time left not known yet".into();
        }
        let rest: f64 = self.rest.iter().map(|name| self.expected(name)).sum();
        let current = self.current.as_ref().map_or(0.0, |name| self.expected(name));
        let running = running.as_secs_f64();
        if running <= current {
            return about(current - running + rest);
        }
        // Longer than expected: only the time of the remaining steps is known.
        match self.rest.is_empty() {
            true => format!("the last step, for {}", words(running)),
            false => format!("more than {} left", words(rest)),
        }
    }

    /// Returns how many seconds a step will take: its last duration, or else the mean of all durations.
    fn expected(&self, name: &str) -> f64 {
        let mean = self.total_seconds / f64::from(self.measured.max(1));
        self.took.get(name).copied().unwrap_or(mean)
    }
}

/// Steps and the start of the current one, shared with a bar that is redrawn repeatedly.
#[derive(Debug, Clone)]
pub struct Clock(Arc<Mutex<(Steps, Instant)>>);

impl Clock {
    /// Returns steps that will run in this order, with none begun.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self(Arc::new(Mutex::new((Steps::new(names), Instant::now()))))
    }

    fn inside(&self) -> MutexGuard<'_, (Steps, Instant)> {
        unpoisoned(self.0.lock())
    }

    /// Begins the next step now.
    pub fn begin(&self) {
        let mut inside = self.inside();
        inside.0.begin();
        inside.1 = Instant::now();
    }

    /// Ends the current step now.
    pub fn end(&self) {
        let mut inside = self.inside();
        let took = inside.1.elapsed();
        inside.0.end(took);
        inside.1 = Instant::now();
    }

    /// Skips the next step, which was done before.
    pub fn skip(&self) {
        self.inside().0.skip();
    }

    /// Returns the time left now, in words.
    pub fn left(&self) -> String {
        let inside = self.inside();
        inside.0.left(inside.1.elapsed())
    }
}

/// Many pieces of similar work, shared with a bar that is redrawn repeatedly.
#[derive(Debug, Clone)]
pub struct Rate {
    begun: Instant,
    /// The number done at the last call, and the time since which it has been that number.
    last: Arc<Mutex<(u64, Instant)>>,
}

impl Rate {
    /// Begins the work now.
    pub fn begin() -> Self {
        let begun = Instant::now();
        Self { begun, last: Arc::new(Mutex::new((0, begun))) }
    }

    /// Returns the time left now, in words, if `done` of `total` are done.
    pub fn left(&self, done: u64, total: u64) -> String {
        let mut last = unpoisoned(self.last.lock());
        if last.0 != done {
            *last = (done, Instant::now());
        }
        by_rate(done, total, self.begun.elapsed(), last.1.elapsed())
    }
}

/// Returns the time left for many pieces of similar work, in words. `done` of `total` took `elapsed`, and the
/// last of them ended `idle` ago.
pub fn by_rate(done: u64, total: u64, elapsed: Duration, idle: Duration) -> String {
    let rest = total.saturating_sub(done);
    if done == 0 && rest > 0 {
        return "time left not known yet".into();
    }
    let each = (elapsed.saturating_sub(idle)).as_secs_f64() / done.max(1) as f64;
    if rest > 0 && idle.as_secs_f64() > (4.0 * each).max(5.0) {
        return format!("time left not known: nothing has ended for {}", words(idle.as_secs_f64()));
    }
    about((each * rest as f64 - idle.as_secs_f64()).max(0.0))
}

fn about(seconds: f64) -> String {
    format!("about {} left", words(seconds))
}

fn words(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 100.0 => format!("{seconds:.0} s"),
        seconds if seconds < 100.0 * 60.0 => format!("{:.0} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn an_estimate_goes_down_while_a_step_runs_and_never_stands_still() {
        let mut steps = Steps::new(["a", "b", "a", "b"].map(String::from));
        steps.begin();
        assert_eq!(steps.left(seconds(1)), "time left not known yet");
        steps.end(seconds(10));
        steps.begin();
        // b is expected to take what a took, and so is each remaining step.
        assert_eq!(steps.left(seconds(0)), "about 30 s left");
        assert_eq!(steps.left(seconds(4)), "about 26 s left");
        assert_eq!(steps.left(seconds(500)), "more than 20 s left", "10 s of a, 10 s of b");
        steps.end(seconds(600));
        steps.begin();
        assert_eq!(steps.left(seconds(0)), "about 10 min left", "a took 10 s, b 600 s");
        steps.end(seconds(10));
        steps.begin();
        assert_eq!(steps.left(seconds(590)), "about 10 s left");
        // Never "0 s left" for minutes.
        assert_eq!(steps.left(seconds(720)), "the last step, for 12 min");
    }

    #[test]
    fn steps_that_were_done_before_are_no_work() {
        let mut steps = Steps::new(["a", "b", "c"].map(String::from));
        steps.skip();
        steps.begin();
        steps.end(seconds(7));
        assert_eq!(steps.left(seconds(0)), "about 7 s left");
        steps.skip();
        assert_eq!(steps.left(seconds(0)), "about 0 s left");
    }

    #[test]
    fn a_rate_that_comes_to_a_halt_promises_nothing() {
        assert_eq!(by_rate(0, 10, seconds(50), seconds(50)), "time left not known yet");
        assert_eq!(by_rate(5, 10, seconds(10), seconds(0)), "about 10 s left");
        assert_eq!(by_rate(5, 10, seconds(14), seconds(4)), "about 6 s left");
        assert_eq!(
            by_rate(9, 10, seconds(209), seconds(200)),
            "time left not known: nothing has ended for 3 min"
        );
        assert_eq!(by_rate(10, 10, seconds(10), seconds(0)), "about 0 s left");
        assert_eq!(by_rate(0, 0, seconds(0), seconds(0)), "about 0 s left");
        assert_eq!(by_rate(1, 100_000, seconds(1), seconds(0)), "about 27.8 h left");
    }
}
