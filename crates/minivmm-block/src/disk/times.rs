//! Times of one kind of event, kept as a histogram.
//!
//! Owns what is kept of the times. Number, sum, shortest and longest are exact; all others are kept to two digits.
//! A [`Times`] takes about 18 KiB from the start, and never more.

use std::time::Duration;

use hdrhistogram::Histogram;

/// The longest time that the histogram distinguishes. Longer ones count as this long there.
const LONGEST: Duration = Duration::from_secs(3600);
/// The shortest time that the histogram distinguishes.
const SHORTEST: Duration = Duration::from_nanos(1);
/// Significant decimal digits in the histogram.
const DIGITS: u8 = 2;

/// The times of a set of events.
#[derive(Debug, Clone)]
pub struct Times {
    count: u64,
    sum_ns: u64,
    min_ns: u64,
    max_ns: u64,
    /// In nanoseconds. `None` only if its bounds were wrong, which a test excludes.
    histogram: Option<Histogram<u32>>,
}

/// The figures that are reported of a set of times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The number of events.
    pub count: u64,
    /// The shortest time.
    pub min: Duration,
    /// The arithmetic mean.
    pub mean: Duration,
    /// The 10th percentile: a tenth of the events took no longer.
    pub p10: Duration,
    /// The 25th percentile.
    pub p25: Duration,
    /// The median.
    pub p50: Duration,
    /// The 75th percentile.
    pub p75: Duration,
    /// The 90th percentile.
    pub p90: Duration,
    /// The 99th percentile.
    pub p99: Duration,
    /// The 99.9th percentile.
    pub p99_9: Duration,
    /// The longest time.
    pub max: Duration,
}

impl Default for Times {
    fn default() -> Self {
        let histogram = Histogram::new_with_bounds(nanos(SHORTEST), nanos(LONGEST), DIGITS).ok();
        Self { count: 0, sum_ns: 0, min_ns: u64::MAX, max_ns: 0, histogram }
    }
}

impl Times {
    /// Adds one event that took `took`.
    pub fn record(&mut self, took: Duration) {
        let took_ns = nanos(took);
        self.count += 1;
        self.sum_ns = self.sum_ns.saturating_add(took_ns);
        self.min_ns = self.min_ns.min(took_ns);
        self.max_ns = self.max_ns.max(took_ns);
        if let Some(histogram) = &mut self.histogram {
            histogram.saturating_record(took_ns);
        }
    }

    /// Adds all events of `other`.
    pub fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        self.min_ns = self.min_ns.min(other.min_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
        if let (Some(histogram), Some(more)) = (&mut self.histogram, &other.histogram) {
            // Both have the same bounds, so this cannot fail.
            let _ = histogram.add(more);
        }
    }

    /// Returns the figures to report. They mean something only if there was an event.
    pub fn summary(&self) -> Summary {
        let of = Duration::from_nanos;
        // The histogram rounds up, so a quantile is limited to the longest time.
        let quantile = |part| {
            let found = self.histogram.as_ref().map(|found| found.value_at_quantile(part));
            of(found.map_or(self.max_ns, |found| found.max(self.min_ns).min(self.max_ns)))
        };
        Summary {
            count: self.count,
            min: of(self.min_ns),
            mean: of(self.sum_ns.checked_div(self.count).unwrap_or(0)),
            p10: quantile(0.1),
            p25: quantile(0.25),
            p50: quantile(0.5),
            p75: quantile(0.75),
            p90: quantile(0.9),
            p99: quantile(0.99),
            p99_9: quantile(0.999),
            max: of(self.max_ns),
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_right_to_two_digits() {
        let mut times = Times::default();
        assert!(times.histogram.is_some(), "its bounds are right");
        for millis in 1..=1000 {
            times.record(Duration::from_millis(millis));
        }
        times.record(LONGEST * 2);
        let found = times.summary();
        assert_eq!((found.count, found.min, found.max), (1001, Duration::from_millis(1), LONGEST * 2));
        for (found, exact) in [
            (found.p10, 101.0),
            (found.p90, 901.0),
            (found.p50, 501.0),
            (found.p99, 991.0),
            (found.p99_9, 1000.0),
        ] {
            let millis = found.as_secs_f64() * 1000.0;
            assert!((millis / exact - 1.0).abs() < 0.01, "{millis} for {exact}");
        }
        let mut one = Times::default();
        one.record(Duration::from_nanos(3));
        let found = one.summary();
        let all = [found.min, found.mean, found.p10, found.p50, found.p99, found.p99_9, found.max];
        assert_eq!(all, [Duration::from_nanos(3); 7]);
    }

    #[test]
    fn added_up_they_are_what_they_would_have_been_together() {
        let (mut even, mut odd, mut all) = (Times::default(), Times::default(), Times::default());
        for micros in 1..500 {
            let half = if micros % 2 == 0 { &mut even } else { &mut odd };
            half.record(Duration::from_micros(micros));
            all.record(Duration::from_micros(micros));
        }
        even.add(&odd);
        assert_eq!(even.summary(), all.summary());
    }
}
