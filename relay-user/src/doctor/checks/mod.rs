//! What the facts mean: each check is a function of facts alone.

mod asterisk;
mod calls;
mod host;
mod interface;
mod network;
mod programs;
mod receive;

pub(super) use self::{calls::cause, interface::xdp_mtu};
use super::{Finding, Group, Level, facts::Facts};

/// Judges everything that was found out, in the order of the groups.
pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    let mut findings = host::findings(&facts.host);
    match &facts.interface {
        None => findings.push(interface::unnamed()),
        Some(interface) => {
            findings.extend(interface::findings(interface, facts.daemon.as_ref()));
            if let (true, Some(network)) = (interface.index != 0, &facts.network) {
                findings.extend(network::findings(&interface.name, network));
            }
        }
    }
    findings.extend(asterisk::findings(facts));
    findings.extend(calls::findings(facts));
    findings
}

/// Findings of one group.
#[derive(Clone, Copy)]
struct About(Group);

impl About {
    fn ok(self, id: &str, what: impl ToString) -> Finding {
        self.finding(id, Level::Ok, what, None)
    }

    fn warning(self, id: &str, what: impl ToString, mend: impl Into<Option<String>>) -> Finding {
        self.finding(id, Level::Warning, what, mend.into())
    }

    fn problem(self, id: &str, what: impl ToString, mend: impl Into<Option<String>>) -> Finding {
        self.finding(id, Level::Problem, what, mend.into())
    }

    fn finding(self, id: &str, level: Level, what: impl ToString, mend: Option<String>) -> Finding {
        Finding {
            id: id.to_owned(),
            group: self.0,
            level,
            what: what.to_string(),
            mend,
        }
    }
}

/// A name as one word of a shell's command line.
fn word(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.@/+".contains(c);
    if !name.is_empty() && name.chars().all(plain) {
        name.to_owned()
    } else {
        format!("'{}'", name.replace('\'', r"'\''"))
    }
}

/// At most `most` of the names, and how many more there are.
fn some(names: &[&str], most: usize) -> String {
    let shown = names.iter().take(most).copied().collect::<Vec<_>>();
    match names.len().saturating_sub(most) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The finding of this name.
    pub(super) fn found<'a>(findings: &'a [Finding], id: &str) -> &'a Finding {
        findings
            .iter()
            .find(|finding| finding.id == id)
            .unwrap_or_else(|| panic!("no {id} in {findings:#?}"))
    }

    /// What a finding comes to: its level and its remedy.
    pub(super) fn judged<'a>(findings: &'a [Finding], id: &str) -> (Level, Option<&'a str>) {
        let finding = found(findings, id);
        (finding.level, finding.mend.as_deref())
    }

    #[test]
    fn a_name_cannot_break_out_of_a_command() {
        assert_eq!(word("eth0.100"), "eth0.100");
        assert_eq!(word("a;reboot"), "'a;reboot'");
        assert_eq!(word("it's"), r"'it'\''s'");
    }

    #[test]
    fn long_lists_are_cut() {
        assert_eq!(some(&["a", "b"], 2), "a, b");
        assert_eq!(some(&["a", "b", "c", "d"], 2), "a, b and 2 more");
    }
}
