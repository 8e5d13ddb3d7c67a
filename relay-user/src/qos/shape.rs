//! What an interface is shaped to: rates and a policy made into a tree.

use std::time::Duration;

use super::{
    htb,
    leaf::Leaves,
    object::{Attribute, Object, ROOT, TCA_RATE},
    policy::{ClassRate, Policy, PolicyError},
    rate::Rate,
    tbf::{self, Splitter},
    tree::Tree,
};

/// The root, `1:`.
pub(super) const HANDLE: u32 = 1 << 16;
/// The class that all others borrow from, `1:1`.
const WHOLE: u32 = HANDLE | 1;

/// `struct tc_estimator`: the kernel tells a class's rate over the last second (est_timer() in
/// net/core/gen_estimator.c), two thirds of it from the last four.
const ESTIMATOR: [u8; 2] = [0, 2];

/// An Ethernet header with a VLAN tag.
const LINK_HEADER: u32 = 18;

/// The longest packet that TCP hands over as one.
pub(super) const LONGEST: u32 = 64 * 1024;
/// A line that it is on for longer has it cut: a quarter of the time from one packet of a call to its
/// next, at some 100 Mbit/s. A faster line is spared the work.
const LONG: Duration = Duration::from_millis(5);

/// A shaped line.
#[derive(Debug)]
pub(super) struct Shape<'a> {
    pub(super) rate: Rate,
    policy: &'a Policy,
    /// Of the classes, in their order.
    rates: Vec<ClassRate>,
    /// The longest on the line, in bytes.
    frame: u32,
}

impl<'a> Shape<'a> {
    /// A line of this rate for an interface with this MTU in bytes.
    ///
    /// # Errors
    /// The policy does not fit into the rate.
    pub(super) fn new(rate: Rate, policy: &'a Policy, mtu: u32) -> Result<Self, PolicyError> {
        Ok(Self {
            rate,
            policy,
            rates: policy.rates(rate.shaped())?,
            frame: mtu.saturating_add(LINK_HEADER),
        })
    }

    /// Whether packets that are sent as one are too long for it.
    pub(super) fn is_slow(&self) -> bool {
        self.time(LONGEST) > LONG
    }

    /// How long so many bytes are on the line.
    pub(super) fn time(&self, bytes: u32) -> Duration {
        Duration::from_micros(u64::from(bytes) * 8_000_000 / self.rate.bits_per_second())
    }

    /// The tree with these queueing disciplines in its classes.
    pub(super) fn tree(&self, leaves: Leaves) -> Tree {
        let shaped = self.rate.shaped();
        let class = |id, parent, class: htb::Class| {
            let mut object = Object::new(id, parent, htb::KIND, class.encode());
            object.attributes.push(Attribute::new(TCA_RATE, ESTIMATOR));
            object
        };
        let default = Policy::class_id(self.policy.default) as u16;
        let whole = htb::Class::whole(shaped, self.frame);
        let mut tree = Tree {
            qdiscs: vec![Object::new(
                HANDLE,
                ROOT,
                htb::KIND,
                htb::encode_root(default),
            )],
            classes: vec![class(WHOLE, ROOT, whole)],
            filters: Vec::new(),
        };
        for (index, (rates, of)) in self.rates.iter().zip(&self.policy.classes).enumerate() {
            let id = Policy::class_id(index);
            let htb = htb::Class::new(rates.rate, rates.ceiling, of.prio, self.frame);
            tree.classes.push(class(id, WHOLE, htb));
            // The leaf of 1:10 is 10:, and what is inside of that, 11:.
            let (mut handle, mut parent) = (id << 16, id);
            if leaves.split && self.is_slow() {
                let options = Splitter::new(self.frame).encode();
                tree.qdiscs
                    .push(Object::new(handle, parent, tbf::KIND, options));
                // Its only class (tbf_dump_class() in net/sched/sch_tbf.c).
                parent = handle | 1;
                handle += 1 << 16;
            }
            let options = leaves.fair.options(rates.ceiling, self.frame);
            tree.qdiscs
                .push(Object::new(handle, parent, leaves.fair.kind(), options));
        }
        tree
    }
}
