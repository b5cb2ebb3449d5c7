//! Statistics over several rounds: a median and the distance between rounds, and the ratio of two figures that
//! were measured in the same rounds.
//!
//! Owns the arithmetic. It assumes nothing about the distribution of the figures.

use serde::Serialize;

/// Confidence level of the interval, if there are enough rounds.
const SURE: f64 = 0.95;

/// The distribution of a figure over rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Distribution {
    /// Number of rounds.
    pub count: usize,
    /// The median. For an even number of values it is the mean of the two in the middle.
    pub median: f64,
    /// The smallest value.
    pub min: f64,
    /// The first quartile.
    pub lower_quartile: f64,
    /// The third quartile.
    pub upper_quartile: f64,
    /// The largest value.
    pub max: f64,
    /// Coefficient of variation: standard deviation divided by mean. `None` for one round or a mean of 0.
    pub variation: Option<f64>,
}

impl Distribution {
    /// Computes the distribution of these values; `None` if there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        Some(Self {
            count: values.len(),
            median: quantile(&values, 2),
            min,
            lower_quartile: quantile(&values, 1),
            upper_quartile: quantile(&values, 3),
            max,
            variation: variation(&values),
        })
    }

    /// Returns the range divided by the median; `None` if the median is 0.
    pub fn relative_range(&self) -> Option<f64> {
        (self.median != 0.0).then(|| (self.max - self.min) / self.median)
    }
}

/// Returns the value below which this many quarters of the values lie, interpolated linearly between two
/// neighbours. `sorted` must not be empty.
fn quantile(sorted: &[f64], quarters: usize) -> f64 {
    let place = quarters * (sorted.len() - 1);
    let at = |place: usize| sorted.get(place).copied().unwrap_or_default();
    let (below, above) = (at(place / 4), at(place.div_ceil(4)));
    below + (above - below) * (place % 4) as f64 / 4.0
}

fn variation(values: &[f64]) -> Option<f64> {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    if values.len() < 2 || mean == 0.0 {
        return None;
    }
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    Some((squares / (values.len() - 1) as f64).sqrt() / mean.abs())
}

/// One figure divided by another of the same round, over all rounds that have both.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ratio {
    /// Number of rounds.
    pub count: usize,
    /// The median of the rounds' ratios. A disturbance of a round affects both of its figures.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Confidence that the interval contains the true median, for any distribution (order statistics). If it is
    /// below 0.95 there were too few rounds, and the interval covers all of them.
    pub sure: f64,
}

impl Ratio {
    /// Computes the ratios of pairs (dividend, divisor). A pair whose divisor is 0 or less is skipped. Returns
    /// `None` without a pair.
    pub fn of(pairs: impl IntoIterator<Item = (f64, f64)>) -> Option<Self> {
        let ratios = pairs.into_iter().filter(|pair| pair.1 > 0.0).map(|(over, under)| over / under);
        let mut ratios: Vec<f64> = ratios.collect();
        ratios.sort_by(f64::total_cmp);
        let count = ratios.len();
        let distribution = Distribution::of(ratios.iter().copied())?;
        // Find the narrowest interval that leaves out the same number of ratios at both ends.
        let mut out = 0;
        while out + 1 < count.div_ceil(2) && covers(count, out + 1) >= SURE {
            out += 1;
        }
        let at = |place: usize| ratios.get(place).copied().unwrap_or(distribution.median);
        Some(Self {
            count,
            median: distribution.median,
            low: at(out),
            high: at(count - 1 - out),
            sure: covers(count, out),
        })
    }
}

/// Returns the probability that the median of the distribution lies between the smallest and the largest of
/// `count` values after `out` values are left out at each end. At least out + 1 of all values must lie below
/// the median, and as many above.
fn covers(count: usize, out: usize) -> f64 {
    let mut outside = 0.0;
    // Terms of the binomial distribution with probability one half.
    let mut term = 0.5f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    for below in 0..=out {
        outside += 2.0 * term;
        term *= (count - below) as f64 / (below + 1) as f64;
    }
    (1.0 - outside).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_of_all_rounds() {
        let distribution = Distribution::of([4.0, 1.0, 3.0, 2.0, 10.0]).unwrap();
        assert_eq!(
            (distribution.count, distribution.min, distribution.median, distribution.max),
            (5, 1.0, 3.0, 10.0)
        );
        assert_eq!((distribution.lower_quartile, distribution.upper_quartile), (2.0, 4.0));
        assert!((distribution.variation.unwrap() - 12.5f64.sqrt() / 4.0).abs() < 1e-12, "{distribution:?}");
        assert_eq!(distribution.relative_range(), Some(3.0));
        assert_eq!(Distribution::of([1.0, 2.0]).unwrap().median, 1.5);
        let one = Distribution::of([7.0]).unwrap();
        assert_eq!((one.median, one.lower_quartile, one.variation), (7.0, 7.0, None));
        assert_eq!(Distribution::of([]), None);
        assert_eq!(Distribution::of([0.0, 0.0]).unwrap().variation, None);
    }

    #[test]
    fn a_ratio_is_paired_and_says_how_sure_it_is() {
        // Both figures fell to a half in one round, and the ratio did not.
        let ratio = Ratio::of([(100.0, 200.0), (50.0, 100.0), (101.0, 200.0)]).unwrap();
        assert_eq!((ratio.median, ratio.low, ratio.high, ratio.count), (0.5, 0.5, 0.505, 3));
        assert_eq!(ratio.sure, 0.75);
        assert_eq!(Ratio::of([(1.0, 0.0)]), None);
        // Tables of order statistics: six rounds reach 95 % with all of them, nine leave out one at each end.
        for (count, out, sure) in [(1, 0, 0.0), (5, 0, 0.9375), (6, 0, 0.96875), (9, 1, 0.9609375)] {
            let ratio = Ratio::of((1..=count).map(|value| (f64::from(value), 1.0))).unwrap();
            let expected = (1.0 + f64::from(out), f64::from(count - out), sure);
            assert_eq!((ratio.low, ratio.high, ratio.sure), expected, "{count} rounds");
        }
    }
}
