//! The queueing disciplines of an interface as one tree: how it is read, and the steps from one tree
//! to another.

use std::collections::VecDeque;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::{
    htb,
    kernel::{self, Kernel, question},
    leaf::Leaves,
    object::{Attribute, Message, Object, ROOT, handle},
    tbf::{self, Splitter},
};
use crate::netlink::Refusal;

/// What leaves an interface passes this. Empty where the kernel's default is there, which nobody
/// needs to put back: it comes when everything else is deleted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tree {
    /// Queueing disciplines, the root first.
    pub qdiscs: Vec<Object>,
    /// Classes.
    pub classes: Vec<Object>,
    /// Filters of the queueing disciplines and classes.
    pub filters: Vec<Object>,
}

/// `TC_H_MAJ_MASK` of include/uapi/linux/pkt_sched.h: the queueing discipline of a handle.
const MAJOR: u32 = 0xffff_0000;

/// One request.
#[derive(Clone, Debug)]
pub(super) struct Step {
    message: Message,
    flags: u16,
}

/// How to get from one tree to another.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Creates and changes.
    pub(super) first: Vec<Step>,
    /// Deletes what no packet is sent to any longer.
    pub(super) last: Vec<Step>,
}

/// How a tree makes way for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Both are ours: what they have in common stays, with what waits in it.
    InPlace,
    /// One is somebody else's, of which nothing may be mixed with ours.
    Whole,
}

/// The kernel refused a step.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {refusal}")]
pub struct StepError {
    /// What was to be done.
    pub what: String,
    /// Which kind of queueing discipline it is about.
    pub kind: String,
    /// The kernel's answer.
    #[source]
    pub refusal: Refusal,
}

impl Step {
    pub(super) fn run(&self, kernel: &mut dyn Kernel) -> Result<(), StepError> {
        let outcome = kernel.change(&self.message, self.flags);
        outcome.map_err(|refusal| StepError {
            what: self.what(),
            kind: self.message.object.kind().to_owned(),
            refusal,
        })
    }

    fn what(&self) -> String {
        let object = &self.message.object;
        let at = handle(object.handle);
        let kind = object.kind();
        match self.message.kind {
            kernel::DELETE_QDISC => format!("deleting the queueing discipline {kind} {at}"),
            kernel::NEW_CLASS => format!("the class {at}"),
            kernel::DELETE_CLASS => format!("deleting the class {at}"),
            kernel::NEW_FILTER => format!("a filter of {}", handle(object.parent)),
            kernel::DELETE_FILTER => format!("deleting a filter of {}", handle(object.parent)),
            _ => format!("the queueing discipline {kind} {at}"),
        }
    }
}

impl StepError {
    /// The leaves without the kind that the kernel does not have (qdisc_create() in
    /// net/sched/sch_api.c).
    ///
    /// # Errors
    /// The error itself, if it is another one or the kind is none of theirs.
    pub(super) fn lesser(self, leaves: Leaves) -> Result<Leaves, Self> {
        let lacks = self.refusal.errno == Errno::ENOENT;
        let lesser = lacks.then(|| leaves.without(&self.kind)).flatten();
        lesser.ok_or(self)
    }
}

pub(super) fn run(kernel: &mut dyn Kernel, steps: &[Step]) -> Result<(), StepError> {
    steps.iter().try_for_each(|step| step.run(kernel))
}

impl Tree {
    /// Reads it, without what only counts.
    pub(super) fn read(kernel: &mut dyn Kernel, index: u32) -> Result<Self, Refusal> {
        let mut ask = |kind, parent| -> Result<Vec<Object>, Refusal> {
            let objects = kernel.dump(question(kind, index, parent))?;
            Ok(objects.into_iter().map(lasting).collect())
        };
        let mut qdiscs = ask(kernel::GET_QDISC, 0)?;
        for qdisc in &mut qdiscs {
            // How often it is referred to.
            qdisc.info = 0;
        }
        // Nobody but the kernel attaches one that has no handle.
        qdiscs.retain(|qdisc| qdisc.handle != 0);
        qdiscs.sort_by_key(|qdisc| (qdisc.parent != ROOT, qdisc.handle));
        if qdiscs.first().is_none_or(|root| root.parent != ROOT) {
            return Ok(Self::default());
        }
        let mut classes = ask(kernel::GET_CLASS, 0)?;
        classes.retain(|class| {
            let mut owners = qdiscs.iter();
            owners.any(|it| it.handle >> 16 == class.handle >> 16 && takes_classes(it))
        });
        // They come in the order of a hash table.
        classes.sort_by_key(|class| class.handle);
        let mut filters = Vec::new();
        for owner in qdiscs.iter().chain(&classes) {
            // One that has no filters answers that it has none, or that it cannot have any.
            filters.extend(ask(kernel::GET_FILTER, owner.handle).unwrap_or_default());
        }
        // A classifier as a whole, and the hash table that u32 makes of itself, come with the first
        // filter.
        filters.retain(|filter| {
            filter.handle != 0 && (filter.kind() != "u32" || filter.handle & 0xf_ffff != 0)
        });
        // HTB shows the filters of the root at every class that has none of its own.
        let mut known: Vec<Object> = Vec::new();
        for filter in filters {
            if !known.contains(&filter) {
                known.push(filter);
            }
        }
        Ok(Self {
            qdiscs,
            classes,
            filters: known,
        })
    }

    /// The queueing discipline at the interface itself, unless that is the kernel's default.
    pub(super) fn root(&self) -> Option<&Object> {
        self.qdiscs.first()
    }

    /// Whether packets that are sent as one are cut in it, as we do it.
    pub(super) fn splits(&self) -> bool {
        let mut options = self.qdiscs.iter().map(Object::options);
        options.any(|options| Splitter::decode(options).is_some())
    }

    /// In a few words, such as `tbf 8001:`.
    #[must_use]
    pub fn describe(&self) -> String {
        match self.root() {
            None => "the kernel's default".to_owned(),
            Some(root) => {
                let mut words = format!("{} {}", root.kind(), handle(root.handle));
                for (count, one, more) in [
                    (self.classes.len(), "class", "classes"),
                    (self.filters.len(), "filter", "filters"),
                ] {
                    if count > 0 {
                        words += &format!(", {count} {}", if count == 1 { one } else { more });
                    }
                }
                words
            }
        }
    }

    /// Everything in the order in which it can be created: what holds before what is held.
    fn in_order(&self) -> Vec<(u16, &Object)> {
        let mut ordered = Vec::new();
        let mut majors: VecDeque<u32> = VecDeque::new();
        if let Some(root) = self.root() {
            ordered.push((kernel::NEW_QDISC, root));
            majors.push_back(root.handle >> 16);
        }
        while let Some(major) = majors.pop_front() {
            let classes = self.classes.iter();
            let own = classes.filter(|class| class.handle >> 16 == major);
            ordered.extend(
                parents_first(own)
                    .into_iter()
                    .map(|it| (kernel::NEW_CLASS, it)),
            );
            for qdisc in &self.qdiscs {
                if qdisc.parent >> 16 == major && qdisc.parent != ROOT {
                    ordered.push((kernel::NEW_QDISC, qdisc));
                    majors.push_back(qdisc.handle >> 16);
                }
            }
        }
        ordered.extend(self.filters.iter().map(|it| (kernel::NEW_FILTER, it)));
        ordered
    }

    /// The steps from this tree, which an interface has, to another.
    pub(super) fn plan(&self, index: u32, wanted: &Self, change: Change) -> Plan {
        let step = |kind, object: &Object, flags| Step {
            message: Message {
                kind,
                index,
                object: object.clone(),
            },
            flags,
        };
        let remove = |kind, object: &Object| step(kind, &object.clone().named(), 0);
        let mut plan = Plan::default();
        if self == wanted {
            return plan;
        }
        if change == Change::Whole || !self.leads_to(wanted) {
            // Under the handle of the present one, the kernel would change and not replace it.
            let replaces = |present: &Object| {
                let root = wanted.root();
                root.is_some_and(|root| root.handle != present.handle)
            };
            let present = self.root().filter(|present| !replaces(present));
            let delete = present.map(|present| remove(kernel::DELETE_QDISC, present));
            plan.first.extend(delete);
            plan.first.extend(wanted.creation(index));
            return plan;
        }
        let mut changed = Vec::new();
        for (kind, object) in wanted.in_order() {
            match kind {
                kernel::NEW_CLASS => {
                    let found = self.classes.iter().find(|it| it.handle == object.handle);
                    if found.is_none_or(|found| !same(found, object)) {
                        plan.first.push(step(kind, object, NLM_F_CREATE));
                    }
                }
                kernel::NEW_QDISC => {
                    let found = self.qdiscs.iter().find(|it| it.parent == object.parent);
                    let named = found.filter(|found| found.handle == object.handle);
                    if let Some(other) = named.filter(|named| named.kind() != object.kind()) {
                        // The kernel would change it, and not replace it by one of another kind.
                        plan.first.push(remove(kernel::DELETE_QDISC, other));
                    }
                    // What is inside one goes with it, or is changed with it (fifo_set_limit() in
                    // net/sched/sch_fifo.c, for sch_tbf).
                    let inside = changed.contains(&(object.parent & MAJOR));
                    if inside || named.is_none_or(|named| !same(named, object)) {
                        let flags = NLM_F_CREATE | NLM_F_REPLACE;
                        plan.first.push(step(kind, object, flags));
                        changed.push(object.handle);
                    }
                }
                _ => {
                    if !self.filters.contains(object) {
                        plan.first
                            .push(step(kind, object, NLM_F_CREATE | NLM_F_EXCL));
                    }
                }
            }
        }
        for filter in &self.filters {
            if !wanted.filters.contains(filter) {
                plan.last.push(remove(kernel::DELETE_FILTER, filter));
            }
        }
        let remains = |parent| wanted.classes.iter().any(|it| it.handle == parent);
        for qdisc in self.qdiscs.iter().filter(|it| remains(it.parent)) {
            if !wanted.qdiscs.iter().any(|it| it.parent == qdisc.parent) {
                plan.last.push(remove(kernel::DELETE_QDISC, qdisc));
            }
        }
        for class in parents_first(self.classes.iter()).into_iter().rev() {
            if !wanted.classes.iter().any(|it| it.handle == class.handle) {
                plan.last.push(remove(kernel::DELETE_CLASS, class));
            }
        }
        plan
    }

    /// Creates all of it, in the place of whatever is there under another handle.
    fn creation(&self, index: u32) -> impl Iterator<Item = Step> {
        self.in_order().into_iter().map(move |(kind, object)| Step {
            message: Message {
                kind,
                index,
                object: object.clone(),
            },
            flags: match kind {
                kernel::NEW_QDISC => NLM_F_CREATE | NLM_F_REPLACE,
                _ => NLM_F_CREATE | NLM_F_EXCL,
            },
        })
    }

    /// Whether another tree can be had by changing this one in its place.
    fn leads_to(&self, wanted: &Self) -> bool {
        let root = |tree: &Self| tree.root().cloned();
        let (Some(present), Some(root)) = (root(self), root(wanted)) else {
            return false;
        };
        let moved = |class: &Object| {
            let found = wanted.classes.iter().find(|it| it.handle == class.handle);
            found.is_some_and(|found| found.parent != class.parent)
        };
        // What is inside another goes with it, and would be missed by steps that are taken one by one.
        let flat = |tree: &Self| {
            let mut classes = tree.classes.iter();
            classes.all(|class| class.handle >> 16 == root.handle >> 16)
        };
        present.handle == root.handle
            && same(&present, &root)
            && flat(self)
            && flat(wanted)
            && !self.classes.iter().any(moved)
    }

    /// Whether an interface's tree is this one, changed by hand maybe, and not another that happens to
    /// have its handles: some class is just as we made it, or there is none yet.
    pub(super) fn is_at(&self, found: &Self) -> bool {
        let roots = self.root().zip(found.root());
        roots.is_some_and(|(own, found)| own.handle == found.handle && same(found, own))
            && (found.classes.is_empty()
                || self.classes.iter().any(|own| {
                    let mut classes = found.classes.iter();
                    classes.any(|it| it.handle == own.handle && same(it, own))
                }))
    }

    /// In what an interface's tree differs from this one, in words.
    pub(super) fn drift(&self, found: &Self) -> Vec<String> {
        let mut drift = Vec::new();
        for wanted in &self.classes {
            let at = handle(wanted.handle);
            match found.classes.iter().find(|it| it.handle == wanted.handle) {
                None => drift.push(format!("class {at} is gone")),
                Some(found) if !same(found, wanted) || found.parent != wanted.parent => {
                    drift.push(format!("class {at} was changed"));
                }
                Some(_) => {}
            }
        }
        for class in &found.classes {
            if !self.classes.iter().any(|it| it.handle == class.handle) {
                drift.push(format!("class {} was added", handle(class.handle)));
            }
        }
        for wanted in &self.qdiscs {
            let (at, kind) = (handle(wanted.parent), wanted.kind());
            match found.qdiscs.iter().find(|it| it.parent == wanted.parent) {
                None => drift.push(format!("{kind} of {at} is gone")),
                Some(found) if found.kind() != kind || found.handle != wanted.handle => {
                    drift.push(format!("{kind} of {at} was replaced by {}", found.kind()));
                }
                // The other kinds tell more than they were told, and rounded.
                Some(found)
                    if matches!(kind, htb::KIND | tbf::KIND | "pfifo") && !same(found, wanted) =>
                {
                    drift.push(format!("{kind} of {at} was changed"));
                }
                Some(_) => {}
            }
        }
        if !found.filters.is_empty() {
            drift.push(format!("filters were added: {}", found.filters.len()));
        }
        drift
    }
}

/// Whether classes can be created in it; in others they are by themselves.
fn takes_classes(qdisc: &Object) -> bool {
    matches!(qdisc.kind(), htb::KIND | "hfsc" | "drr" | "qfq")
}

/// Whether two objects are made of the same.
fn same(a: &Object, b: &Object) -> bool {
    if a.kind() != b.kind() {
        return false;
    }
    if a.options() == b.options() {
        return true;
    }
    let classes = htb::Class::decode(a.options()).zip(htb::Class::decode(b.options()));
    let defaults = htb::decode_root(a.options()).zip(htb::decode_root(b.options()));
    a.kind() == htb::KIND
        && (classes.is_some_and(|(one, other)| one.agrees(&other))
            || defaults.is_some_and(|(one, other)| one == other))
}

/// What of an object can be put back.
fn lasting(object: Object) -> Object {
    let object = object.lasting();
    let options = match object.kind() {
        htb::KIND => htb::as_created(object.options()),
        tbf::KIND => match Splitter::decode(object.options()) {
            Some(splitter) => splitter.encode(),
            None => return object,
        },
        kind => match offload_flags(kind) {
            Some(flags) => as_created(object.options(), flags),
            None => return object,
        },
    };
    object.with_options(options)
}

/// `TCA_U32_FLAGS`.
const TCA_U32_FLAGS: u16 = 11;

/// Number of the attribute of a filter that also tells whether hardware took it
/// (include/uapi/linux/pkt_cls.h).
fn offload_flags(kind: &str) -> Option<u16> {
    const TCA_MATCHALL_FLAGS: u16 = 3;
    const TCA_FLOWER_FLAGS: u16 = 22;
    match kind {
        "matchall" => Some(TCA_MATCHALL_FLAGS),
        "u32" => Some(TCA_U32_FLAGS),
        "flower" => Some(TCA_FLOWER_FLAGS),
        _ => None,
    }
}

/// Options of a filter as it was created: the kernel takes no others of its flags than
/// `TCA_CLS_FLAGS_SKIP_HW` and `TCA_CLS_FLAGS_SKIP_SW`.
fn as_created(options: &[u8], flags: u16) -> Vec<u8> {
    const SKIP: u32 = 3;
    /// How often each part of a u32 filter matched.
    const TCA_U32_PCNT: u16 = 9;
    let kept = Attribute::all(options)
        .into_iter()
        .filter(|attribute| flags != TCA_U32_FLAGS || attribute.kind() != TCA_U32_PCNT);
    Attribute::nest(kept.map(|attribute| {
        let told = <[u8; 4]>::try_from(attribute.value()).map(u32::from_ne_bytes);
        match told {
            Ok(told) if attribute.kind() == flags => {
                Attribute::new(flags, (told & SKIP).to_ne_bytes())
            }
            _ => attribute,
        }
    }))
}

/// Classes of one queueing discipline, each after the class that it is under.
fn parents_first<'a>(classes: impl Iterator<Item = &'a Object>) -> Vec<&'a Object> {
    let mut waiting: Vec<_> = classes.collect();
    let mut ordered: Vec<&Object> = Vec::new();
    while !waiting.is_empty() {
        let (ready, rest): (Vec<_>, Vec<_>) = waiting
            .iter()
            .partition(|class| !waiting.iter().any(|other| other.handle == class.parent));
        if ready.is_empty() {
            // A circle, which the kernel has not made.
            ordered.extend(rest);
            break;
        }
        ordered.extend(ready);
        waiting = rest;
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qos::{leaf::Leaf, shape::HANDLE};

    const INDEX: u32 = 7;

    fn class(handle: u32, parent: u32, rate: u64) -> Object {
        let options = htb::Class::new(rate, rate, 0, 1518).encode();
        Object::new(handle, parent, htb::KIND, options)
    }

    /// An HTB with a class that has two others under it, each with a leaf.
    fn tree(rate: u64) -> Tree {
        let leaf = |major: u32, parent| {
            let options = Leaf::Pfifo.options(rate, 1518);
            Object::new(major << 16, parent, "pfifo", options)
        };
        Tree {
            qdiscs: vec![
                Object::new(HANDLE, ROOT, htb::KIND, htb::encode_root(0x20)),
                leaf(0x10, HANDLE | 0x10),
                leaf(0x20, HANDLE | 0x20),
            ],
            classes: vec![
                class(HANDLE | 0x20, HANDLE | 1, rate / 2),
                class(HANDLE | 0x10, HANDLE | 1, rate / 2),
                class(HANDLE | 1, ROOT, rate),
            ],
            filters: Vec::new(),
        }
    }

    fn tell(steps: &[Step]) -> Vec<String> {
        steps.iter().map(Step::what).collect()
    }

    fn told(present: &Tree, wanted: &Tree) -> [Vec<String>; 2] {
        let plan = present.plan(INDEX, wanted, Change::InPlace);
        [tell(&plan.first), tell(&plan.last)]
    }

    #[test]
    fn what_holds_is_created_before_what_is_held() {
        let [first, last] = told(&Tree::default(), &tree(1_000_000));
        assert_eq!(
            first,
            [
                "the queueing discipline htb 1:",
                "the class 1:1",
                "the class 1:20",
                "the class 1:10",
                "the queueing discipline pfifo 10:",
                "the queueing discipline pfifo 20:",
            ]
        );
        assert_eq!(last, [""; 0]);
    }

    #[test]
    fn nothing_is_done_where_nothing_differs() {
        let same = tree(1_000_000);
        assert_eq!(told(&same, &same), <[Vec<String>; 2]>::default());
        assert_eq!(
            told(&Tree::default(), &Tree::default()),
            <[Vec<String>; 2]>::default()
        );
    }

    #[test]
    fn rates_are_changed_in_their_place() {
        let [first, last] = told(&tree(1_000_000), &tree(1_500_000));
        // The leaves are as short for both.
        let classes = ["the class 1:1", "the class 1:20", "the class 1:10"];
        assert_eq!((first, last), (classes.map(String::from).to_vec(), vec![]));
    }

    #[test]
    fn a_class_is_deleted_last_and_its_leaf_goes_with_it() {
        let mut fewer = tree(1_000_000);
        fewer.classes.remove(1);
        fewer.qdiscs.remove(1);
        let [first, last] = told(&tree(1_000_000), &fewer);
        assert_eq!(first, [""; 0]);
        assert_eq!(last, ["deleting the class 1:10"]);
        let mut bare = tree(1_000_000);
        bare.qdiscs.remove(1);
        let [first, last] = told(&tree(1_000_000), &bare);
        assert_eq!(first, [""; 0]);
        assert_eq!(last, ["deleting the queueing discipline pfifo 10:"]);
    }

    #[test]
    fn another_default_needs_another_tree() {
        let mut other = tree(1_000_000);
        other.qdiscs[0] = Object::new(HANDLE, ROOT, htb::KIND, htb::encode_root(0x10));
        let [first, _] = told(&tree(1_000_000), &other);
        assert_eq!(
            first[..2],
            [
                "deleting the queueing discipline htb 1:",
                "the queueing discipline htb 1:"
            ]
        );
        assert!(!other.is_at(&tree(1_000_000)));
    }

    #[test]
    fn a_tree_of_another_handle_is_replaced_without_a_gap() {
        let present = Tree {
            qdiscs: vec![Object::new(0x8001_0000, ROOT, "pfifo", vec![1, 0, 0, 0])],
            ..Tree::default()
        };
        let [first, _] = told(&present, &tree(1_000_000));
        assert_eq!(first[0], "the queueing discipline htb 1:");
        let [first, last] = told(&tree(1_000_000), &present);
        assert_eq!(first, ["the queueing discipline pfifo 8001:"]);
        assert_eq!(last, [""; 0]);
        let [first, _] = told(&present, &Tree::default());
        assert_eq!(first, ["deleting the queueing discipline pfifo 8001:"]);
    }

    #[test]
    fn nothing_of_anothers_tree_is_mixed_with_ours() {
        let mut other = tree(1_000_000);
        other.classes[0] = class(HANDLE | 0x20, HANDLE | 1, 7_000);
        let steps = |present: &Tree, wanted: &Tree| {
            let plan = present.plan(INDEX, wanted, Change::Whole);
            assert_eq!(tell(&plan.last), [""; 0]);
            tell(&plan.first)
        };
        let first = steps(&tree(1_000_000), &other);
        assert_eq!(first[0], "deleting the queueing discipline htb 1:");
        assert_eq!(first.len(), 1 + other.qdiscs.len() + other.classes.len());
        assert_eq!(steps(&other, &other), [""; 0]);
    }

    #[test]
    fn what_was_changed_by_hand_is_named() {
        let own = tree(1_000_000);
        assert_eq!(own.drift(&own), [""; 0]);
        let mut found = own.clone();
        found.classes[0] = class(HANDLE | 0x20, HANDLE | 1, 7_000);
        found.classes[1].handle = HANDLE | 0x30;
        found.qdiscs.remove(1);
        found
            .filters
            .push(Object::new(1, HANDLE, "u32", Vec::new()));
        assert_eq!(
            own.drift(&found),
            [
                "class 1:20 was changed",
                "class 1:10 is gone",
                "class 1:30 was added",
                "pfifo of 1:10 is gone",
                "filters were added: 1",
            ]
        );
        assert!(own.is_at(&found));
        for class in &mut found.classes {
            *class = self::class(class.handle, class.parent, 9_000);
        }
        assert!(!own.is_at(&found), "another tree with our handles");
    }
}
