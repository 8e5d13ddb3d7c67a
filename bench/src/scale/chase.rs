//! What a line of memory costs that no cache holds.

use std::{hint::black_box, time::Instant};

/// Bytes that a processor reads from memory at once.
const LINE: usize = 64;

/// Reads that are timed.
const READS: u32 = 1_000_000;

/// A line that says which one is read next.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(u32);

const _: () = assert!(size_of::<Line>() == LINE);

/// Mean time of reading a line of as many bytes as these, ns, when each line says which is read next, in random order:
/// what a look-up pays that has to wait for memory once.
pub(super) fn time_of_a_line(bytes: u64) -> f64 {
    let count = (bytes / LINE as u64).clamp(2, u64::from(u32::MAX)) as u32;
    let mut order: Vec<u32> = (0..count).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut order);
    let mut lines = vec![Line(0); count as usize];
    for pair in order.windows(2) {
        lines[pair[0] as usize] = Line(pair[1]);
    }
    let last = order[order.len() - 1];
    lines[last as usize] = Line(order[0]);
    let mut at = order[0];
    let begin = Instant::now();
    for _ in 0..READS {
        at = lines[at as usize].0;
    }
    black_box(at);
    begin.elapsed().as_nanos() as f64 / f64::from(READS)
}
