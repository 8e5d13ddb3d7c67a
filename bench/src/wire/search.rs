//! Search for the highest rate that passes.

/// A binary search on a logarithmic scale.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Search {
    /// The highest rate that passed, if any did.
    passed: Option<f64>,
    /// The lowest rate that failed, if any did.
    failed: Option<f64>,
    first: f64,
    step: f64,
    ceiling: f64,
}

/// Where passed and failed are so near to each other, the search is over.
const RESOLUTION: f64 = 1.02;
/// No step is wider.
const WIDEST: f64 = 2.0;
/// Nothing is tried below, packets per second.
const FLOOR: f64 = 1000.0;

impl Search {
    /// A search that begins at a rate, and tries none above a ceiling (packets per second). Until the other side is found,
    /// it goes on by a factor, and by as much again each time.
    pub(crate) fn new(first: f64, step: f64, ceiling: f64) -> Self {
        Self {
            passed: None,
            failed: None,
            first: first.min(ceiling),
            step,
            ceiling,
        }
    }

    /// The rate to try next; none where the search is over.
    pub(crate) fn next(&self) -> Option<f64> {
        let step = |from: f64| {
            let apart = (from / self.first).max(self.first / from);
            apart.max(self.step).min(WIDEST)
        };
        match (self.passed, self.failed) {
            (None, None) => Some(self.first),
            (Some(passed), None) if passed >= self.ceiling => None,
            (Some(passed), None) => Some((passed * step(passed)).min(self.ceiling)),
            (None, Some(failed)) if failed <= FLOOR => None,
            (None, Some(failed)) => Some((failed / step(failed)).max(FLOOR)),
            (Some(passed), Some(failed)) if failed / passed <= RESOLUTION => None,
            (Some(passed), Some(failed)) => Some((passed * failed).sqrt()),
        }
    }

    /// Notes what became of a rate.
    pub(crate) fn note(&mut self, rate: f64, passes: bool) {
        if passes {
            self.passed = Some(self.passed.map_or(rate, |passed| passed.max(rate)));
        } else {
            self.failed = Some(self.failed.map_or(rate, |failed| failed.min(rate)));
        }
    }

    /// The highest rate that passed.
    pub(crate) const fn found(&self) -> Option<f64> {
        self.passed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rate found, and how many were tried.
    fn search(first: f64, step: f64, limit: f64) -> (Option<f64>, u32) {
        let mut search = Search::new(first, step, 2e6);
        let mut tried = 0;
        while let Some(rate) = search.next() {
            search.note(rate, rate <= limit);
            tried += 1;
            assert!(tried < 40, "{search:?}");
        }
        (search.found(), tried)
    }

    #[test]
    fn the_limit_is_found_within_the_resolution() {
        for first in [1000.0, 50_000.0, 2e6] {
            for limit in [1500.0, 44_000.0, 123_456.0, 1_900_000.0] {
                let (found, _) = search(first, 1.5, limit);
                let found = found.expect("a rate passes");
                assert!(
                    found <= limit && limit / found <= RESOLUTION,
                    "{found} of {limit}"
                );
            }
        }
    }

    #[test]
    fn a_good_guess_takes_few_trials() {
        assert!(search(200_000.0, 1.04, 204_000.0).1 <= 5);
    }

    #[test]
    fn the_search_ends_at_its_bounds() {
        assert_eq!(search(100_000.0, 1.5, 1e9).0, Some(2e6));
        assert_eq!(search(100_000.0, 1.5, 0.0).0, None);
    }
}
