//! What `relay-user doctor` prints for people.

use std::fmt::Write as _;

use super::{Style, clean};
use crate::doctor::{Finding, Group, Level, Report};

/// All findings by group, each with what mends it, and how many there are of each level.
pub fn report(report: &Report, style: Style) -> String {
    let width = report
        .findings
        .iter()
        .map(|finding| finding.id.len())
        .max()
        .unwrap_or_default();
    let mut text = String::new();
    let mut last = None;
    // Writing to a string cannot fail.
    for finding in &report.findings {
        if last != Some(finding.group) {
            let gap = if last.is_some() { "\n" } else { "" };
            let _ = writeln!(text, "{gap}{}", heading(finding.group, report));
            last = Some(finding.group);
        }
        let level = painted(finding.level, style);
        let _ = writeln!(
            text,
            "  {level}  {:width$}  {}",
            finding.id,
            clean(&finding.what)
        );
        if let Some(mend) = &finding.mend {
            let _ = writeln!(text, "  {:7}  {:width$}  mend: {}", "", "", clean(mend));
        }
    }
    let _ = writeln!(text, "\n{}", summary(&report.findings));
    text
}

fn heading(group: Group, report: &Report) -> String {
    match (group, &report.interface) {
        (Group::Host, _) => "HOST".to_owned(),
        (Group::Interface, Some(name)) => format!("INTERFACE {}", clean(name)),
        (Group::Interface, None) => "INTERFACE".to_owned(),
        (Group::Network, _) => "NETWORK".to_owned(),
        (Group::Asterisk, _) => "ASTERISK".to_owned(),
        (Group::Calls, _) => "CALLS".to_owned(),
    }
}

/// As wide as the longest.
fn painted(level: Level, style: Style) -> String {
    let (name, colour) = match level {
        Level::Ok => ("ok", "32"),
        Level::Warning => ("warning", "33"),
        Level::Problem => ("problem", "31"),
    };
    if style.colour {
        format!("\x1b[{colour}m{name:7}\x1b[0m")
    } else {
        format!("{name:7}")
    }
}

fn summary(findings: &[Finding]) -> String {
    let count = |level| {
        findings
            .iter()
            .filter(|finding| finding.level == level)
            .count()
    };
    let [ok, warnings, problems] = [Level::Ok, Level::Warning, Level::Problem].map(count);
    let plural = |count| if count == 1 { "" } else { "s" };
    format!(
        "{ok} ok, {warnings} warning{}, {problems} problem{}",
        plural(warnings),
        plural(problems)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of docs/api.md.
    fn example() -> Report {
        let description = include_str!("../../../docs/api.md");
        let section = description
            .split("\n## The doctor")
            .nth(1)
            .expect("section");
        let block = section.split("```json\n").nth(1).expect("example");
        serde_json::from_str(block.split("```").next().expect("its end")).expect("a report")
    }

    #[test]
    fn findings_stand_in_groups_with_their_remedies() {
        let mut found = example();
        found.findings[0].what = "Linux\x1b[2J 6.1".to_owned();
        let text = report(&found, Style::PLAIN);
        let expected = "\
HOST
  ok       kernel_version  Linux\u{fffd}[2J 6.1

INTERFACE eth0
  warning  lro             on: the card merges packets, and its driver refuses native XDP
                           mend: ethtool -K eth0 lro off

1 ok, 1 warning, 0 problems
";
        assert_eq!(text, expected);
    }

    #[test]
    fn levels_are_in_colour_where_that_is_wanted() {
        let style = Style {
            lines: true,
            colour: true,
        };
        let text = report(&example(), style);
        assert!(text.contains("\x1b[33mwarning\x1b[0m"), "{text}");
    }
}
