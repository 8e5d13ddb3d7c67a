//! `--check`: whether a packet takes more of the datapath's instructions than when suite `program` was last run.
//!
//! Both are seen as a ratio to the floor of their own time. Counts are exact, on whatever machine and however busy.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use crate::{
    program::{self, INSTRUCTIONS, SWAP},
    report::{Report, grouped},
};

/// How much a ratio may grow.
const TOLERANCE: f64 = 0.03;

/// Instructions of a packet by the names of the rows.
type Counts<'a> = [(&'a str, f64)];

/// Counts and compares.
///
/// # Errors
/// Some row is worse: the text says which, and how to accept it. Or nothing is recorded.
pub(crate) fn run(folder: &Path) -> Result<()> {
    let record = Report::read(folder, program::NAME)?;
    let record = record.with_context(|| {
        format!(
            "{} has no record of suite `{}`: run `cargo xtask bench program` and commit it",
            folder.display(),
            program::NAME
        )
    })?;
    let before = record
        .tables
        .iter()
        .find_map(|table| table.column(INSTRUCTIONS));
    let before = before.context("the record has no instruction counts")?;
    let counts = program::counts()?;
    let now: Vec<_> = counts
        .iter()
        .map(|(name, count)| (&name[..], *count as f64))
        .collect();
    let faults = compare(&before, &now)?;
    ensure!(
        faults.is_empty(),
        "the datapath's instructions for a packet:\n  {}\nIf that is as it should be: run `cargo xtask bench program` \
         and commit bench/report and bench/RESULTS.md",
        faults.join("\n  ")
    );
    println!(
        "{} instruction counts are at most {} % above those of bench/report/{}.json",
        now.len(),
        TOLERANCE * 100.0,
        program::NAME
    );
    Ok(())
}

/// What is worse now, in words.
fn compare(before: &Counts<'_>, now: &Counts<'_>) -> Result<Vec<String>> {
    let find = |counts: &Counts<'_>, name| {
        let row = counts.iter().find(|(row, _)| *row == name);
        row.map(|&(_, count)| count)
    };
    let floor = |counts| find(counts, SWAP).with_context(|| format!("no count of `{SWAP}`"));
    let (floor_before, floor_now) = (floor(before)?, floor(now)?);
    let mut faults = Vec::new();
    for &(name, count) in now {
        let Some(old) = find(before, name) else {
            faults.push(format!("{name}: {}, and none recorded", grouped(count, 0)));
            continue;
        };
        let (ratio, old_ratio) = (count / floor_now, old / floor_before);
        let growth = ratio / old_ratio - 1.0;
        if growth > TOLERANCE {
            faults.push(format!(
                "{name}: {} before, {} now ({old_ratio:.2} and {ratio:.2} times the floor: {:+.1} %)",
                grouped(old, 0),
                grouped(count, 0),
                growth * 100.0
            ));
        }
    }
    for (name, _) in before {
        if find(now, name).is_none() {
            faults.push(format!("{name}: recorded, and not counted any more"));
        }
    }
    Ok(faults)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: [(&str, f64); 2] = [(SWAP, 10.0), ("relayed", 300.0)];

    fn faults(now: &Counts<'_>) -> Vec<String> {
        compare(&BEFORE, now).expect("there is a floor")
    }

    #[test]
    fn three_percent_more_are_too_many() {
        assert_eq!(faults(&BEFORE), [""; 0]);
        assert_eq!(faults(&[(SWAP, 10.0), ("relayed", 308.0)]), [""; 0]);
        assert_eq!(
            faults(&[(SWAP, 10.0), ("relayed", 310.0)]),
            ["relayed: 300 before, 310 now (30.00 and 31.00 times the floor: +3.3 %)"]
        );
    }

    #[test]
    fn a_count_is_seen_beside_its_own_floor() {
        assert_eq!(faults(&[(SWAP, 20.0), ("relayed", 600.0)]), [""; 0]);
        assert!(compare(&BEFORE, &[("relayed", 300.0)]).is_err());
    }

    #[test]
    fn a_record_names_the_same_rows() {
        let now = [(SWAP, 10.0), ("captured", 400.0)];
        assert_eq!(
            faults(&now),
            [
                "captured: 400, and none recorded",
                "relayed: recorded, and not counted any more"
            ]
        );
    }
}
