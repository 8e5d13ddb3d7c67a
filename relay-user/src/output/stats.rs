//! Packets by verdict and reason: what `stats` prints.

use comfy_table::{Cell, CellAlignment, Color};

use super::{Style, drawn, number, text, verdict};
use crate::stats::{StatsReport, Traffic};

/// Every verdict with its reasons below it.
pub fn stats(stats: &StatsReport, style: Style) -> String {
    let all = stats.packets();
    if all == 0 {
        return "no packets yet\n".to_owned();
    }
    let mut header = vec!["VERDICT", "REASON", "PACKETS", "BYTES", "SHARE"];
    if stats.seconds.is_some() {
        header.extend(["PACKETS/S", "BIT/S"]);
    }
    let mut table = style.columns(&header);
    let mut add = |name: Cell, reason: Cell, traffic: &Traffic| {
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let mut row = vec![
            name,
            reason,
            number(traffic.packets),
            number(traffic.bytes),
            right(format!(
                "{:.2}%",
                traffic.packets as f64 * 100.0 / all as f64
            )),
        ];
        if stats.seconds.is_some() {
            let rate = |rate: Option<f64>| rate.map_or("-".to_owned(), |rate| format!("{rate:.0}"));
            row.push(right(rate(traffic.packets_per_second)));
            row.push(right(rate(traffic.bits_per_second)));
        }
        table.add_row(row);
    };
    for row in &stats.verdicts {
        let (name, colour): (_, Color) = verdict(row.verdict);
        add(
            style.paint(Cell::new(name), colour),
            Cell::new("all"),
            &row.total,
        );
        for reason in &row.reasons {
            add(Cell::new(""), text(&reason.reason), &reason.traffic);
        }
    }
    drawn(&table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::examples::{example, rows};

    #[test]
    fn reasons_stand_below_their_verdict_and_fit_80_columns() {
        let stats_report: StatsReport = example("Statistics");
        let with_rates = stats(&stats_report, Style::PLAIN);
        let table = rows(&with_rates);
        assert_eq!(
            table[0],
            [
                "VERDICT",
                "REASON",
                "PACKETS",
                "BYTES",
                "SHARE",
                "PACKETS/S",
                "BIT/S"
            ]
        );
        assert_eq!(
            table[1],
            ["relayed", "all", "3003", "642642", "5.54%", "100", "171200"]
        );
        assert_eq!(table[2][0], "relayed");
        assert_eq!(table[3][..2], ["passed", "all"]);
        assert!(
            with_rates.lines().all(|line| line.len() <= 80),
            "{with_rates}"
        );

        let first = StatsReport {
            seconds: None,
            ..stats_report
        };
        assert!(!stats(&first, Style::PLAIN).contains("BIT/S"));
        let nothing = StatsReport {
            verdicts: Vec::new(),
            ..first
        };
        assert_eq!(stats(&nothing, Style::PLAIN), "no packets yet\n");
    }
}
