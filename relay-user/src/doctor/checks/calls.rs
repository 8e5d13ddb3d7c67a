//! The calls that are up: how many of them the relay takes, and why not the others.

use super::{About, Finding, Group};
use crate::doctor::facts::{CallFacts, Facts};

const CALLS: About = About(Group::Calls);

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let finding = match &facts.calls {
        None => return Vec::new(),
        Some(calls) => offloadable(calls),
    };
    vec![finding]
}

fn offloadable(calls: &CallFacts) -> Finding {
    let id = "offloadable";
    let kept: u64 = calls.kept.values().sum();
    if calls.total == 0 {
        return CALLS.ok(id, "no call is up");
    }
    let verb = match calls.told_by.as_str() {
        "daemon" => "relayed",
        _ => "fit to be relayed",
    };
    let mut what = format!("{} of {} calls are {verb}", calls.relayed, calls.total);
    if calls.waiting > 0 {
        what += &format!(", {} wait", calls.waiting);
    }
    if kept == 0 {
        return CALLS.ok(id, what);
    }
    let mut causes: Vec<_> = calls.kept.iter().collect();
    causes.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let causes: Vec<_> = causes
        .iter()
        .map(|(cause, count)| format!("{count} × {cause}"))
        .collect();
    let percent = kept * 100 / calls.total;
    what += &format!("; {percent} % cannot be: {}", causes.join("; "));
    let mend = (calls.told_by == "daemon").then(|| "relay-user list".to_owned());
    CALLS.warning(id, what, mend)
}

/// Why a call is kept, without the names that make each case its own: what stands in brackets after a
/// leg, and which leg.
pub(in crate::doctor) fn cause(why: &str) -> String {
    let mut cause = why.to_owned();
    for leg in ["leg A (", "leg B ("] {
        while let Some(start) = cause.find(leg) {
            let names = &cause[start + leg.len()..];
            let Some(end) = names.find(')') else { break };
            let end = start + leg.len() + end + 1;
            cause.replace_range(start..end, "a leg");
        }
    }
    cause
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{
        super::{
            asterisk::tests::only,
            tests::{found, judged},
        },
        *,
    };
    use crate::doctor::Level;

    fn told(calls: CallFacts) -> Vec<Finding> {
        findings(&Facts {
            calls: Some(calls),
            ..only(None)
        })
    }

    #[test]
    fn the_fraction_that_is_kept_is_told_with_its_causes() {
        let findings = told(CallFacts {
            told_by: "daemon".to_owned(),
            total: 8,
            relayed: 4,
            waiting: 1,
            kept: BTreeMap::from([
                ("a leg is on hold".to_owned(), 1),
                ("transcoding ulaw→alaw".to_owned(), 2),
            ]),
        });
        let mend = Some("relay-user list");
        assert_eq!(judged(&findings, "offloadable"), (Level::Warning, mend));
        assert_eq!(
            found(&findings, "offloadable").what,
            "4 of 8 calls are relayed, 1 wait; 37 % cannot be: 2 × transcoding ulaw→alaw; 1 × a leg is on hold"
        );
    }

    #[test]
    fn calls_that_can_all_be_relayed_are_no_trouble() {
        let none = told(CallFacts::default());
        assert_eq!(judged(&none, "offloadable"), (Level::Ok, None));
        let all = told(CallFacts {
            told_by: "ami".to_owned(),
            total: 2,
            relayed: 2,
            ..CallFacts::default()
        });
        assert_eq!(judged(&all, "offloadable"), (Level::Ok, None));
        assert!(findings(&only(None)).is_empty());
    }

    #[test]
    fn the_same_cause_is_the_same_whoever_it_is_about() {
        for (why, expected) in [
            (
                "leg A (PJSIP/alice-00000001) is on hold",
                "a leg is on hold",
            ),
            (
                "leg B (PJSIP/bob-2) has encrypted media (SRTP)",
                "a leg has encrypted media (SRTP)",
            ),
            (
                "transcoding ulaw→alaw at leg B (PJSIP/bob-2)",
                "transcoding ulaw→alaw at a leg",
            ),
            ("leg A (unfinished", "leg A (unfinished"),
            ("bridge technology softmix", "bridge technology softmix"),
        ] {
            assert_eq!(cause(why), expected);
        }
    }
}
