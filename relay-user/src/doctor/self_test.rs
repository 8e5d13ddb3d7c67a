//! Whether native XDP really forwards here: some drivers take a program and lose what it sends.

use super::facts::{NetworkFacts, SelfTest};
use crate::next_hop::Interface;

pub(super) fn run(_interface: &Interface, _network: &NetworkFacts, _served: bool) -> SelfTest {
    SelfTest::Skipped {
        cause: "nothing".to_owned(),
    }
}
