//! The proof: what the relay takes over from a PBX, and what it must not.

use std::thread;

use relay_common::stream::Event;
use relay_tests::{
    proof::{
        Host, InKernel,
        fuzz::{Outcome, trial},
        streams,
    },
    tables::timeless,
};

/// What many trials came to.
#[derive(Debug, Default)]
struct Tally {
    trials: u64,
    taken_over: u64,
    relayed: u64,
    /// Seeds of the trials with a wrong takeover, and what was wrong.
    wrong: Vec<(u64, Vec<String>)>,
    /// Seeds of those where a plain PBX's stream was not taken over.
    missed: Vec<u64>,
}

impl Tally {
    fn add(&mut self, seed: u64, outcome: Outcome) {
        self.trials += 1;
        self.taken_over += u64::from(outcome.taken_over);
        self.relayed += u64::from(outcome.relayed);
        if !outcome.wrong.is_empty() {
            self.wrong.push((seed, outcome.wrong));
        }
        if outcome.missed {
            self.missed.push(seed);
        }
    }

    fn plus(mut self, other: Self) -> Self {
        self.trials += other.trials;
        self.taken_over += other.taken_over;
        self.relayed += other.relayed;
        self.wrong.extend(other.wrong);
        self.missed.extend(other.missed);
        self
    }

    /// Prints it, and sees that nothing is wrong with it.
    fn judge(&self, place: &str) {
        let Self {
            trials,
            taken_over,
            relayed,
            wrong,
            missed,
        } = self;
        println!(
            "fuzzed PBX, {place}: {trials} trials, {taken_over} takeovers, {relayed} packets relayed, {} wrong takeovers",
            wrong.len()
        );
        let first = |count| &wrong[..wrong.len().min(count)];
        assert!(wrong.is_empty(), "by seed: {:#?}", first(5));
        let first = |count| &missed[..missed.len().min(count)];
        assert!(missed.is_empty(), "not taken over: {:?}", first(5));
        // Where nothing is taken over, nothing can be taken over wrongly.
        assert!(*taken_over > trials / 2 && *relayed > trials * 3);
    }
}

#[test]
fn no_fuzzed_pbx_provokes_a_wrong_takeover() {
    const TRIALS: u64 = 100_000;
    const THREADS: u64 = 4;
    let part = |first| {
        move || {
            let mut host = Host::new(&streams(8));
            let mut tally = Tally::default();
            for seed in (first..TRIALS).step_by(THREADS as usize) {
                tally.add(seed, trial(seed, &mut host).expect("memory runs"));
            }
            tally
        }
    };
    let threads: Vec<_> = (0..THREADS)
        .map(|first| thread::spawn(part(first)))
        .collect();
    let parts = threads
        .into_iter()
        .map(|thread| thread.join().expect("a tally"));
    let tally = parts.fold(Tally::default(), Tally::plus);
    assert_eq!(tally.trials, TRIALS);
    tally.judge("host");
}

/// The programs in the kernel come to the same, trial by trial.
#[test]
fn nor_in_the_kernel() {
    const TRIALS: u64 = 2_000;
    let mut kernel = InKernel::load().expect("the kernel takes the datapath (tests need root)");
    let mut host = Host::new(&streams(8));
    let mut tally = Tally::default();
    for seed in 0..TRIALS {
        let hosts = trial(seed, &mut host).expect("memory runs");
        let kernels = trial(seed, &mut kernel).expect("the kernel runs");
        assert_eq!(
            kernels.states.map(timeless),
            hosts.states.map(timeless),
            "trial {seed}"
        );
        assert_eq!(kernels.relayed, hosts.relayed, "trial {seed}");
        let events = kernel.take_events().expect("events");
        let kinds = |events: Vec<Event>| -> Vec<_> {
            let kinds = events.into_iter();
            kinds
                .map(|event| (event.kind, event.slot, event.epoch, event.payload_type))
                .collect()
        };
        assert_eq!(kinds(events), kinds(host.take_events()), "trial {seed}");
        tally.add(seed, kernels);
    }
    tally.judge("kernel");
}
