//! What several rounds say together: a median and how far the rounds lie apart; a ratio of two that ran
//! in the same rounds.
//!
//! Owns the arithmetic. Nothing is assumed of how figures are distributed.

use serde::Serialize;

/// An interval is to cover the true median so surely, where there are rounds enough.
const SURE: f64 = 0.95;

/// A figure over rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// How many rounds.
    pub count: usize,
    /// The middle one; of an even number the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// A quarter is below.
    pub lower_quartile: f64,
    /// A quarter is above.
    pub upper_quartile: f64,
    /// The largest.
    pub max: f64,
    /// Standard deviation over mean: the coefficient of variation. Nothing of one round, or of a mean of 0.
    pub variation: Option<f64>,
}

impl Spread {
    /// Of these; nothing of none.
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

    /// The distance between least and most, over the median.
    pub fn relative_range(&self) -> Option<f64> {
        (self.median != 0.0).then(|| (self.max - self.min) / self.median)
    }
}

/// What so many quarters are below: linear between the two neighbours, of sorted values of which there is
/// one at least.
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

/// One figure over another of the same round, over all rounds that have both.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ratio {
    /// How many rounds.
    pub count: usize,
    /// The median of the rounds' ratios: what disturbs a round disturbs both of its figures.
    pub median: f64,
    /// Where the interval begins.
    pub low: f64,
    /// Where it ends.
    pub high: f64,
    /// How surely the interval has the true median in it, whatever the distribution (order statistics).
    /// Below 0.95 there were too few rounds for more, and the interval is all of them.
    pub sure: f64,
}

impl Ratio {
    /// Of pairs (over, under); those under 0 or below have no ratio.
    pub fn of(pairs: impl IntoIterator<Item = (f64, f64)>) -> Option<Self> {
        let ratios = pairs.into_iter().filter(|pair| pair.1 > 0.0).map(|(over, under)| over / under);
        let mut ratios: Vec<f64> = ratios.collect();
        ratios.sort_by(f64::total_cmp);
        let count = ratios.len();
        let spread = Spread::of(ratios.iter().copied())?;
        // The narrowest interval between two of them, the same number left out at either end.
        let mut out = 0;
        while out + 1 < count.div_ceil(2) && covers(count, out + 1) >= SURE {
            out += 1;
        }
        let at = |place: usize| ratios.get(place).copied().unwrap_or(spread.median);
        Some(Self {
            count,
            median: spread.median,
            low: at(out),
            high: at(count - 1 - out),
            sure: covers(count, out),
        })
    }
}

/// The chance that the median of the distribution lies between the smallest and largest of `count` values,
/// `out` left out at either end: at least out + 1 must lie below, and as many above.
fn covers(count: usize, out: usize) -> f64 {
    let mut outside = 0.0;
    // Of the binomial distribution with a chance of one half.
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
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0, 10.0]).unwrap();
        assert_eq!((spread.count, spread.min, spread.median, spread.max), (5, 1.0, 3.0, 10.0));
        assert_eq!((spread.lower_quartile, spread.upper_quartile), (2.0, 4.0));
        assert!((spread.variation.unwrap() - 12.5f64.sqrt() / 4.0).abs() < 1e-12, "{spread:?}");
        assert_eq!(spread.relative_range(), Some(3.0));
        assert_eq!(Spread::of([1.0, 2.0]).unwrap().median, 1.5);
        let one = Spread::of([7.0]).unwrap();
        assert_eq!((one.median, one.lower_quartile, one.variation), (7.0, 7.0, None));
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([0.0, 0.0]).unwrap().variation, None);
    }

    #[test]
    fn a_ratio_is_paired_and_says_how_sure_it_is() {
        // Both fell to a half in one round: the ratio did not.
        let ratio = Ratio::of([(100.0, 200.0), (50.0, 100.0), (101.0, 200.0)]).unwrap();
        assert_eq!((ratio.median, ratio.low, ratio.high, ratio.count), (0.5, 0.5, 0.505, 3));
        assert_eq!(ratio.sure, 0.75);
        assert_eq!(Ratio::of([(1.0, 0.0)]), None);
        // Tables of order statistics: six rounds reach 95 % with all of them, nine leave one out at either end.
        for (count, out, sure) in [(1, 0, 0.0), (5, 0, 0.9375), (6, 0, 0.96875), (9, 1, 0.9609375)] {
            let ratio = Ratio::of((1..=count).map(|value| (f64::from(value), 1.0))).unwrap();
            let expected = (1.0 + f64::from(out), f64::from(count - out), sure);
            assert_eq!((ratio.low, ratio.high, ratio.sure), expected, "{count} rounds");
        }
    }
}
