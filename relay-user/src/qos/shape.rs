//! What an interface is shaped to: rates and a policy made into a tree.

use super::{
    htb,
    leaf::Leaf,
    object::{Attribute, Object, ROOT, TCA_RATE},
    policy::{Policy, PolicyError},
    rate::Rate,
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

/// A shaped line.
pub(super) struct Shape<'a> {
    pub(super) rate: Rate,
    pub(super) policy: &'a Policy,
    /// Of the interface, in bytes.
    pub(super) mtu: u32,
}

impl Shape<'_> {
    /// The tree with these queueing disciplines in its classes.
    ///
    /// # Errors
    /// The policy does not fit into the rate.
    pub(super) fn tree(&self, leaf: Leaf) -> Result<Tree, PolicyError> {
        let shaped = self.rate.shaped();
        let frame = self.mtu.saturating_add(LINK_HEADER);
        let rates = self.policy.rates(shaped)?;
        let class = |id, parent, class: htb::Class| {
            let mut object = Object::new(id, parent, htb::KIND, class.encode());
            object.attributes.push(Attribute::new(TCA_RATE, ESTIMATOR));
            object
        };
        let default = Policy::class_id(self.policy.default) as u16;
        let whole = htb::Class::new(shaped, shaped, 0, frame);
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
        for (index, (rates, of)) in rates.iter().zip(&self.policy.classes).enumerate() {
            let id = Policy::class_id(index);
            let htb = htb::Class::new(rates.rate, rates.ceiling, of.prio, frame);
            tree.classes.push(class(id, WHOLE, htb));
            // The leaf of 1:10 is 10:.
            let options = leaf.options(rates.ceiling, frame);
            tree.qdiscs
                .push(Object::new(id << 16, id, leaf.kind(), options));
        }
        Ok(tree)
    }
}
