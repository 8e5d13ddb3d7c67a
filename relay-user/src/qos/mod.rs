//! Quality of service on what leaves an interface: the policy, and the program that marks and
//! classifies by it.

pub mod classifier;
pub mod policy;
pub mod rate;
pub mod table;
