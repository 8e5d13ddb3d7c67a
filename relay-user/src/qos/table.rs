//! A policy as the classifier wants it: bit vectors of the rules that each value satisfies.

use std::ops::RangeInclusive;

use relay_common::classify::{Action, CLASSES, NAME, NONE, Names, RuleTable};
use zerocopy::FromZeros as _;

use super::policy::{Policy, Rtp, Rule};

/// Payload types of audio or video: 128 of each in [`RuleTable::rtp`].
const PAYLOAD_TYPES: usize = 128;

/// Compiles a policy.
///
/// # Panics
/// Without a megabyte and a half of memory.
#[must_use]
pub fn compile(policy: &Policy) -> Box<RuleTable> {
    let mut table = RuleTable::new_box_zeroed().expect("memory for a table");
    table.class_count = policy.classes.len() as u32;
    table.default_class = policy.default as u32;
    table.actions.fill(Action::NONE);
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
    let is_rtp = asked.rtp.is_some() || !asked.payload_types.is_empty();
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
    if !is_rtp {
        table.no_rtp |= bit;
    }
    let lists = [&asked.ports, &asked.source_ports, &asked.destination_ports];
    if lists.iter().all(|ports| ports.is_empty()) {
        table.no_ports |= bit;
    }
    let has = |ports: &[RangeInclusive<u16>], port: &u16| {
        ports.is_empty() || ports.iter().any(|range| range.contains(port))
    };
    for (port, rules) in (0..=u16::MAX).zip(&mut table.ports) {
        for (list, vector) in
            lists
                .into_iter()
                .zip([&mut rules.either, &mut rules.source, &mut rules.destination])
        {
            if has(list, &port) {
                *vector |= bit;
            }
        }
    }
}

/// Sets a rule's bit for each value that it fits.
fn set(table: &mut [u64], bit: u64, fits: impl Fn(usize) -> bool) {
    for (value, vector) in table.iter_mut().enumerate() {
        if fits(value) {
            *vector |= bit;
        }
    }
}
