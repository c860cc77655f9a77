//! Medians, intervals and the order of turns. Plain arithmetic: nothing here measures.

/// Draws for one interval.
const DRAWS: usize = 2000;

/// The middle value; the mean of the two middle ones of an even number. NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value below which the part `q` (0 to 1) of the values lies, interpolated. NaN of nothing.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let at = q.clamp(0.0, 1.0) * last as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

/// A median and the interval that holds it with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// The median.
    pub median: f64,
    /// Lower end.
    pub lo: f64,
    /// Upper end.
    pub hi: f64,
}

/// The interval by bootstrap: medians of samples drawn with replacement. The same values always give the same interval.
pub fn interval(values: &[f64]) -> Interval {
    let middle = median(values);
    if values.len() < 2 {
        return Interval {
            median: middle,
            lo: middle,
            hi: middle,
        };
    }
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut drawn = vec![0.0; values.len()];
    let medians: Vec<f64> = (0..DRAWS)
        .map(|_| {
            for value in &mut drawn {
                *value = values[random.below(values.len())];
            }
            median(&drawn)
        })
        .collect();
    Interval {
        median: middle,
        lo: quantile(&medians, 0.025),
        hi: quantile(&medians, 0.975),
    }
}

/// The ratios round by round, `of` to `to`. A round in which either is missing or `to` is zero has none.
pub fn ratios(of: &[Option<f64>], to: &[Option<f64>]) -> Vec<f64> {
    of.iter()
        .zip(to)
        .filter_map(|(of, to)| Some((*of)? / (*to).filter(|to| *to > 0.0)?))
        .collect()
}

/// Who takes which turn in a round of `count` modes.
///
/// The first place moves on from round to round, and every other round goes backwards, so that nobody always follows the same one.
pub fn order(round: usize, count: usize) -> Vec<usize> {
    let mut turns: Vec<usize> = (0..count)
        .map(|turn| (turn + round / 2 + (round % 2) * (count / 2)) % count.max(1))
        .collect();
    if round % 2 == 1 {
        turns.reverse();
    }
    turns
}

/// SplitMix64: enough for drawing, and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        ((u128::from(mixed) * limit as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_numbers() {
        assert_eq!(median(&[3.0, 1.0, 2.0]).to_bits(), 2.0_f64.to_bits());
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]).to_bits(), 2.5_f64.to_bits());
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn quantiles_are_interpolated() {
        let values = [0.0, 10.0, 20.0, 30.0, 40.0];
        for (q, expected) in [
            (0.0, 0.0),
            (0.25, 10.0),
            (0.5, 20.0),
            (0.9, 36.0),
            (1.0, 40.0),
        ] {
            assert!((quantile(&values, q) - expected).abs() < 1e-9, "{q}");
        }
    }

    #[test]
    fn one_wild_value_moves_neither_median_nor_interval_far() {
        let calm = [1.00, 1.01, 0.99, 1.02, 0.98, 1.00, 1.01, 0.99, 1.00];
        let mut wild = calm;
        wild[4] = 50.0;
        let wild = interval(&wild);
        assert!((wild.median - 1.0).abs() < 0.02, "{wild:?}");
        assert!(wild.lo > 0.97 && wild.hi < 1.03, "{wild:?}");
    }

    #[test]
    fn an_interval_holds_its_median_and_repeats() {
        let values = [2.0, 3.0, 5.0, 7.0, 11.0];
        let first = interval(&values);
        assert!(first.lo <= first.median && first.median <= first.hi);
        assert!(first.lo < first.hi);
        assert_eq!(first, interval(&values));
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let of = [Some(2.0), Some(9.0), None, Some(4.0)];
        let to = [Some(1.0), Some(3.0), Some(1.0), Some(0.0)];
        assert_eq!(ratios(&of, &to), [2.0, 3.0]);
    }

    #[test]
    fn every_mode_takes_one_turn_in_every_round() {
        for count in 1..12 {
            for round in 0..30 {
                let mut turns = order(round, count);
                turns.sort_unstable();
                assert_eq!(turns, (0..count).collect::<Vec<_>>(), "{count} {round}");
            }
        }
    }

    #[test]
    fn the_first_place_goes_round_and_so_do_neighbours() {
        let first: Vec<usize> = (0..6).map(|round| order(round, 3)[0]).collect();
        for mode in 0..3 {
            assert!(first.contains(&mode), "{first:?}");
        }
        let follows = |before, after| {
            (0..6).any(|round| {
                order(round, 3)
                    .windows(2)
                    .any(|pair| pair == [before, after])
            })
        };
        assert!(follows(0, 1) && follows(1, 0));
    }
}
