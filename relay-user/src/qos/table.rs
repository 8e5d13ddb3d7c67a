//! A policy as the classifier wants it: bit vectors of the rules that each value satisfies.

use std::ops::RangeInclusive;

use relay_common::classify::{Action, CLASSES, NAME, NONE, Names, PortRules, RuleTable};
use zerocopy::FromZeros as _;

use super::policy::{Conditions, Policy, Rtp, Rule};

/// Payload types of audio or video: 128 of each in [`RuleTable::rtp`].
const PAYLOAD_TYPES: usize = 128;

/// What is done with packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// They are marked, and go to the classes of a policy.
    Classify,
    /// They are only marked: the queues are somebody else's, and so is the choice among them.
    Mark,
}

/// Compiles a policy.
///
/// # Panics
/// Without a megabyte and a half of memory.
#[must_use]
pub fn compile(policy: &Policy, task: Task) -> Box<RuleTable> {
    let mut table = RuleTable::new_box_zeroed().expect("memory for a table");
    table.class_count = match task {
        Task::Classify => policy.classes.len() as u32,
        Task::Mark => 0,
    };
    table.default_class = policy.default as u32;
    table.actions.fill(Action::NONE);
    table.ports.fill(PortRules {
        either: indifferent(policy, |asked| &asked.ports),
        source: indifferent(policy, |asked| &asked.source_ports),
        destination: indifferent(policy, |asked| &asked.destination_ports),
    });
    for (number, rule) in policy.rules.iter().enumerate() {
        table.actions[number] = action(rule);
        add(&mut table, rule, 1 << number);
    }
    table
}

/// What a policy's rules and classes are called.
#[must_use]
pub fn names(policy: &Policy) -> Names {
    let mut names = Names::new_zeroed();
    for (to, rule) in names.rules.iter_mut().zip(&policy.rules) {
        *to = name(&rule.name);
    }
    for (to, class) in names.classes.iter_mut().zip(&policy.classes) {
        *to = name(&class.name);
    }
    names
}

fn name(text: &str) -> [u8; NAME] {
    let mut bytes = [0; NAME];
    for (to, from) in bytes.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    bytes
}

fn action(rule: &Rule) -> Action {
    Action {
        dscp: rule.set_dscp.unwrap_or(NONE),
        overwrite: rule.overwrite.into(),
        class: rule
            .class
            .filter(|class| *class < CLASSES)
            .map_or(NONE, |class| class as u8),
        padding: 0,
    }
}

fn add(table: &mut RuleTable, rule: &Rule, bit: u64) {
    let asked = &rule.conditions;
    if asked.arp {
        table.arp |= bit;
        // It has none, which reads as 0.
        table.dscps[0] |= bit;
        return;
    }
    set(&mut table.protocols, bit, |value| {
        asked.protocols.is_empty() || asked.protocols.contains(&(value as u8))
    });
    set(&mut table.dscps, bit, |value| {
        asked.dscps.is_empty() || asked.dscps.contains(&(value as u8))
    });
    set(&mut table.tcp, bit, |kinds| {
        asked.tcp == 0 || kinds & asked.tcp != 0
    });
    set(&mut table.rtp, bit, |value| {
        let is_video = value >= PAYLOAD_TYPES;
        let is_kind = match asked.rtp {
            Some(Rtp::Audio) => !is_video,
            Some(Rtp::Video) => is_video,
            Some(Rtp::Any) | None => true,
        };
        let number = (value % PAYLOAD_TYPES) as u8;
        is_kind && (asked.payload_types.is_empty() || asked.payload_types.contains(&number))
    });
    if !asked.asks_rtp() {
        table.no_rtp |= bit;
    }
    if !asked.asks_ports() {
        table.no_ports |= bit;
    }
    // Those without a list have their bits in all elements already.
    for range in &asked.ports {
        for rules in ports(table, range) {
            rules.either |= bit;
        }
    }
    for range in &asked.source_ports {
        for rules in ports(table, range) {
            rules.source |= bit;
        }
    }
    for range in &asked.destination_ports {
        for rules in ports(table, range) {
            rules.destination |= bit;
        }
    }
}

fn ports<'a>(table: &'a mut RuleTable, range: &RangeInclusive<u16>) -> &'a mut [PortRules] {
    &mut table.ports[usize::from(*range.start())..=usize::from(*range.end())]
}

/// Bits of the rules that ask something of IP packets, but nothing of this.
fn indifferent(policy: &Policy, list: fn(&Conditions) -> &[RangeInclusive<u16>]) -> u64 {
    let conditions = policy.rules.iter().map(|rule| &rule.conditions);
    conditions
        .enumerate()
        .filter(|(_, asked)| !asked.arp && list(asked).is_empty())
        .fold(0, |bits, (number, _)| bits | 1 << number)
}

/// Sets a rule's bit for each value that it fits.
fn set(table: &mut [u64], bit: u64, fits: impl Fn(usize) -> bool) {
    for (value, vector) in table.iter_mut().enumerate() {
        if fits(value) {
            *vector |= bit;
        }
    }
}
