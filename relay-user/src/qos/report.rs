//! How shaped interfaces fare: read from the kernel, with what the state adds.
//!
//! This is the JSON of `relay-user qos show --json`. Its shape is stable: fields are added, never
//! renamed or removed. A field that does not apply is `null`, never absent.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{
    auto::{self, AutoReport},
    classifier::Classifier,
    htb,
    kernel::{self, Kernel, question},
    leaf::Leaf,
    object::{Attribute, Object, handle},
    policy::Policy,
    rate::Rate,
    shaper::{self, QosError},
    state::{Line, State, Store},
    tree::Tree,
};
use crate::next_hop::Interfaces;

/// `TCA_STATS2` of include/uapi/linux/rtnetlink.h.
const TCA_STATS2: u16 = 7;

/// All interfaces that were asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QosReport {
    /// One each.
    pub interfaces: Vec<InterfaceReport>,
}

/// One interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InterfaceReport {
    /// Its name.
    pub interface: String,
    /// Its index when it was shaped, or now if it is not; `null` where there is none of that name.
    pub ifindex: Option<u32>,
    /// What it is.
    pub state: ShapingState,
    /// What was changed by hand since, a phrase each.
    pub drift: Vec<String>,
    /// What is there if it is not shaped, and what was there before and `clear` puts back if it is.
    pub before: String,
    /// Where the policy was read; `null` for the built-in one.
    pub policy: Option<PathBuf>,
    /// What `qos auto` does or did there; `null` where it never ran since the last boot or `qos clear`.
    pub auto: Option<AutoReport>,
    /// The rules, in order, of an interface that is only marked; those of a shaped one are with its
    /// lines.
    pub rules: Option<Vec<RuleReport>>,
    /// What leaves.
    pub uplink: Option<LineReport>,
    /// What comes in, where that is shaped too.
    pub downlink: Option<LineReport>,
}

/// What became of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShapingState {
    /// As it was made.
    Shaped,
    /// Changed by hand since.
    Drifted,
    /// Packets are classified and marked, but not shaped: by `qos mark`, or by `qos auto` without a call.
    Marked,
    /// Something else is there, or nothing.
    Unshaped,
    /// The interface that was shaped is gone; `clear` removes what is left.
    Gone,
}

/// A device with its classes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineReport {
    /// The interface, or the IFB device of what comes in.
    pub device: String,
    /// What the line carries, as it was told, in bit/s.
    pub rate: u64,
    /// What it is shaped to, in bit/s.
    pub shaped: u64,
    /// The queueing discipline in each class.
    pub leaf: Leaf,
    /// Whether packets that TCP hands over as one (GSO) are cut there.
    pub splits: bool,
    /// Those that are there.
    pub classes: Vec<ClassReport>,
    /// The rules of the policy, in order; `null` where packets are not classified.
    pub rules: Option<Vec<RuleReport>>,
}

/// A class, as the kernel tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassReport {
    /// As tc(8) writes it, such as `1:10`.
    pub id: String,
    /// From the policy; `null` for a class that is not of it.
    pub name: Option<String>,
    /// Guaranteed, in bit/s.
    pub rate: u64,
    /// With what others leave, in bit/s.
    pub ceiling: u64,
    /// Who is asked first: 0 before all others.
    pub prio: u32,
    /// Packets sent.
    pub packets: u64,
    /// Bytes sent, from the Ethernet header on.
    pub bytes: u64,
    /// The rate of the last seconds, in bit/s; `null` where the kernel does not measure it.
    pub bits_per_second: Option<u64>,
    /// Packets dropped because the queue was full.
    pub drops: u64,
    /// How often the class had to wait.
    pub overlimits: u64,
    /// Packets waiting.
    pub backlog_packets: u64,
    /// Bytes waiting.
    pub backlog_bytes: u64,
}

/// A rule of the policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleReport {
    /// What it is called.
    pub name: String,
    /// Packets that it matched.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl QosReport {
    /// Takes the rates from what was sent since an earlier report, so many seconds ago.
    pub fn measure(&mut self, earlier: &Self, seconds: f64) {
        let earlier: Vec<_> = earlier.classes().collect();
        let lines = self.interfaces.iter_mut();
        let lines = lines.flat_map(|it| it.uplink.iter_mut().chain(&mut it.downlink));
        for line in lines {
            for class in &mut line.classes {
                let mut earlier = earlier.iter();
                let found =
                    earlier.find(|(device, it)| *device == line.device && it.id == class.id);
                class.bits_per_second = found.map(|(_, found)| {
                    let bytes = class.bytes.saturating_sub(found.bytes);
                    (bytes as f64 * 8.0 / seconds) as u64
                });
            }
        }
    }

    fn classes(&self) -> impl Iterator<Item = (&str, &ClassReport)> {
        let lines = self.interfaces.iter();
        let lines = lines.flat_map(|it| it.uplink.iter().chain(&it.downlink));
        lines.flat_map(|line| {
            line.classes
                .iter()
                .map(|class| (line.device.as_str(), class))
        })
    }
}

/// Reads one interface, or all that were shaped.
///
/// # Errors
/// [`QosError`]; an interface of that name is neither there nor was shaped.
pub fn show(kernel: &mut dyn Kernel, interface: Option<&str>) -> Result<QosReport, QosError> {
    let names = match interface {
        Some(name) => vec![name.to_owned()],
        None => Store::interfaces(),
    };
    let interfaces = Interfaces::read()?;
    let reports = names.iter().map(|name| one(kernel, &interfaces, name));
    Ok(QosReport {
        interfaces: reports.collect::<Result<_, _>>()?,
    })
}

fn one(
    kernel: &mut dyn Kernel,
    interfaces: &Interfaces,
    name: &str,
) -> Result<InterfaceReport, QosError> {
    let mut report = InterfaceReport {
        interface: name.to_owned(),
        ifindex: None,
        state: ShapingState::Unshaped,
        drift: Vec::new(),
        before: String::new(),
        policy: None,
        auto: auto::read(name),
        rules: None,
        uplink: None,
        downlink: None,
    };
    let Some(state) = shaper::store_of(kernel, interfaces, name)?.read()? else {
        let found = interfaces.named(name)?;
        report.ifindex = Some(found.index);
        report.before = tree(kernel, name, found.index)?.describe();
        return Ok(report);
    };
    let line = &state.uplink;
    let renamed = shaper::renamed(kernel, interfaces, &state)?;
    let found = interfaces
        .indexed(line.index)
        .filter(|found| found.name == line.device && state.is_current())
        .or(renamed);
    report.policy = state.policy.as_ref().map(|policy| policy.path.clone());
    report.before = line.before.describe();
    let Some(found) = found else {
        report.ifindex = interfaces.named(name).ok().map(|found| found.index);
        report.state = ShapingState::Gone;
        return Ok(report);
    };
    if renamed.is_some() {
        report.interface.clone_from(&found.name);
        report.drift.push(format!(
            "it was {} when it was shaped: `relay-user qos clear {}`, then shape it again",
            line.device, found.name
        ));
    }
    let is_unclassified = |line: &Line| -> Result<Option<String>, QosError> {
        let is_missing = state.classified && !Classifier::is_attached(&line.device, line.index)?;
        Ok(is_missing.then(|| "the classifier is missing".to_owned()))
    };
    report.drift.extend(is_unclassified(line)?);
    report.ifindex = Some(line.index);
    let present = tree(kernel, name, line.index)?;
    if !state.shaped || !state.is_at(&present) {
        report.before = present.describe();
        if state.shaped {
            report.drift.push(match present.root() {
                None => "our queueing discipline was removed".to_owned(),
                Some(_) => "our queueing discipline was replaced".to_owned(),
            });
        } else if state.classified {
            report.state = ShapingState::Marked;
            report.rules = rules(name)?;
        }
    } else {
        report.drift.extend(line.tree.drift(&present));
        let mtu = found.mtu;
        if mtu > state.mtu {
            report.drift.push(format!(
                "the MTU is {mtu} and was {}: what is longer may be lost until it is shaped again",
                state.mtu
            ));
        }
        report.uplink = Some(line_report(kernel, &state, line)?);
        if let Some(line) = &state.downlink {
            match interfaces.indexed(line.index) {
                Some(ifb) => {
                    if !ifb.up {
                        report
                            .drift
                            .push(format!("{} is down: what comes in is lost", line.device));
                    }
                    if state.classified
                        && !Classifier::is_redirected(&state.uplink.device, state.uplink.index)?
                    {
                        let what = format!("what comes in is not sent to {}", line.device);
                        report.drift.push(what);
                    }
                    let present = tree(kernel, &line.device, line.index)?;
                    let mut drift = line.tree.drift(&present);
                    drift.extend(is_unclassified(line)?);
                    let on = |what| format!("{what} on {}", line.device);
                    report.drift.extend(drift.into_iter().map(on));
                    report.downlink = Some(line_report(kernel, &state, line)?);
                }
                None => report.drift.push(format!("{} is gone", line.device)),
            }
        }
        report.state = match report.drift[..] {
            [] => ShapingState::Shaped,
            _ => ShapingState::Drifted,
        };
    }
    Ok(report)
}

fn tree(kernel: &mut dyn Kernel, device: &str, index: u32) -> Result<Tree, QosError> {
    Tree::read(kernel, index).map_err(|refusal| QosError::Read {
        device: device.to_owned(),
        refusal,
    })
}

fn line_report(
    kernel: &mut dyn Kernel,
    state: &State,
    line: &Line,
) -> Result<LineReport, QosError> {
    let mut dump = |kind| {
        let objects = kernel.dump(question(kind, line.index, 0));
        objects.map_err(|refusal| QosError::Read {
            device: line.device.clone(),
            refusal,
        })
    };
    let classes = dump(kernel::GET_CLASS)?;
    let qdiscs = dump(kernel::GET_QDISC)?;
    let mut classes: Vec<_> = classes
        .iter()
        .filter_map(|class| class_report(class, &qdiscs, &state.classes))
        .collect();
    classes.sort_by_key(|(handle, _)| *handle);
    Ok(LineReport {
        device: line.device.clone(),
        rate: line.rate.map_or(0, Rate::bits_per_second),
        shaped: line.rate.map_or(0, Rate::shaped),
        leaf: state.leaves.fair,
        splits: line.tree.splits(),
        classes: classes.into_iter().map(|(_, report)| report).collect(),
        rules: rules(&line.device)?,
    })
}

/// What the classifier of a device has counted.
fn rules(device: &str) -> Result<Option<Vec<RuleReport>>, QosError> {
    let counted = Classifier::read(device)?;
    Ok(counted.map(|counted| {
        let rules = counted.rules.into_iter();
        let rules = rules.map(|rule| RuleReport {
            name: rule.name,
            packets: rule.packets,
            bytes: rule.bytes,
        });
        rules.collect()
    }))
}

fn class_report(
    object: &Object,
    qdiscs: &[Object],
    names: &[String],
) -> Option<(u32, ClassReport)> {
    let class = htb::Class::decode(object.options())?;
    let statistics = Statistics::of(object);
    let inside = |parent| qdiscs.iter().find(|it| it.parent == parent);
    // The class itself only counts packets that its leaf did not take, and not those that it took and
    // then gave up.
    let leaf = inside(object.handle);
    let drops = leaf.map_or(statistics.drops, |leaf| Statistics::of(leaf).drops);
    // Some kernels count wrongly what waits in the outer one (Linux before 6.13, sch_tbf.c).
    let queue = leaf.map(|leaf| inside(leaf.handle | 1).unwrap_or(leaf));
    let queue = Statistics::of(queue.unwrap_or(object));
    let mut names = names.iter().enumerate();
    let name = names.find(|(index, _)| Policy::class_id(*index) == object.handle);
    let report = ClassReport {
        id: handle(object.handle),
        name: name.map(|(_, name)| name.clone()),
        rate: class.rate * 8,
        ceiling: class.ceil * 8,
        prio: class.prio,
        packets: statistics.packets,
        bytes: statistics.bytes,
        bits_per_second: statistics.bytes_per_second.map(|bytes| bytes * 8),
        drops: drops.into(),
        overlimits: statistics.overlimits.into(),
        backlog_packets: queue.backlog_packets.into(),
        backlog_bytes: queue.backlog_bytes.into(),
    };
    Some((object.handle, report))
}

/// What the kernel counts of a class (include/uapi/linux/gen_stats.h).
#[derive(Default)]
struct Statistics {
    bytes: u64,
    packets: u64,
    bytes_per_second: Option<u64>,
    backlog_packets: u32,
    backlog_bytes: u32,
    drops: u32,
    overlimits: u32,
}

impl Statistics {
    /// Reads those of a class or a queueing discipline.
    fn of(object: &Object) -> Self {
        const BASIC: u16 = 1;
        const RATE_EST: u16 = 2;
        const QUEUE: u16 = 3;
        const RATE_EST64: u16 = 5;
        const PKT64: u16 = 8;
        let all = Attribute::all(object.attribute(TCA_STATS2));
        let number = |kind, at: usize| {
            let found = all.iter().find(|attribute| attribute.kind() == kind)?;
            let bytes = found.value().get(at..at + 4)?;
            Some(u32::from_ne_bytes(bytes.try_into().ok()?))
        };
        let wide = |kind, at: usize| {
            let found = all.iter().find(|attribute| attribute.kind() == kind)?;
            let bytes = found.value().get(at..at + 8)?;
            Some(u64::from_ne_bytes(bytes.try_into().ok()?))
        };
        let queue = |at| number(QUEUE, at).unwrap_or_default();
        Self {
            // struct gnet_stats_basic; the number of packets has 64 bits in an attribute of its own.
            bytes: wide(BASIC, 0).unwrap_or_default(),
            packets: wide(PKT64, 0)
                .or(number(BASIC, 8).map(u64::from))
                .unwrap_or_default(),
            // struct gnet_stats_rate_est and, beyond 32 bits, its wide one.
            bytes_per_second: wide(RATE_EST64, 0).or(number(RATE_EST, 0).map(u64::from)),
            // struct gnet_stats_queue.
            backlog_packets: queue(0),
            backlog_bytes: queue(4),
            drops: queue(8),
            overlimits: queue(16),
        }
    }
}
