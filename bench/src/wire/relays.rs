//! The ways to relay that are measured, each at work on a cable of its own.

use std::{
    os::fd::OwnedFd,
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result};
use relay_tests::{
    link::Interface,
    program::{self, Kind},
    topology::Direct,
};

use super::{
    RELAY_CPU,
    call::{self, Call},
    own::Own,
    subject::{Class, Subject, Work},
};
use crate::peer::{
    asterisk, batched::Batched, nftables, per_call::PerCall, rtpengine::Rtpengine, swap::swap_macs,
};

/// Has a network relay the calls: the calls as they come in, and what does the work.
type Begin<'a> = &'a dyn Fn(&Direct) -> Result<(Vec<Call>, Work)>;

/// Starts all of them.
///
/// # Errors
/// One does not relay.
pub(super) fn all(calls: u16) -> Result<Vec<Subject>> {
    let calls = call::between_phones(calls);
    let calls = &calls[..];
    let mut subjects = Vec::new();
    let mut start = |name: &'static str, class, begin: Begin<'_>| {
        let net = network()?;
        eprintln!("starting: {name}");
        let begun = begin(&net).with_context(|| name)?;
        subjects.push(Subject::ready(name, class, &net, begun).with_context(|| name)?);
        Ok::<_, anyhow::Error>(())
    };
    start("MAC swap (floor)", Class::Floor, &|net| {
        let link = swap(&net.pbx_interface)?;
        Ok((calls.to_vec(), Work::of_threads(&[], link)))
    })?;
    for (name, mode) in [
        (OURS, "native"),
        ("relay-user, generic XDP", "generic"),
        ("relay-user, TC", "tc"),
    ] {
        start(name, Class::Ours, &|net| {
            Ok((calls.to_vec(), ours(net, calls, mode)?))
        })?;
    }
    start("nftables NAT", Class::Kernel, &|net| {
        nftables::forward(&net.pbx, calls)?;
        Ok((calls.to_vec(), Work::default()))
    })?;
    start("userspace, one thread, batches", Class::Userspace, &|net| {
        let relay = Batched::start(&net.pbx, calls, RELAY_CPU)?;
        Ok((calls.to_vec(), Work::of_threads(&[relay.thread()], relay)))
    })?;
    start("userspace, a thread per call", Class::Userspace, &|net| {
        let relay = PerCall::start(&net.pbx, calls, RELAY_CPU)?;
        let threads = relay.threads().to_vec();
        Ok((calls.to_vec(), Work::of_threads(&threads, relay)))
    })?;
    start("rtpengine, userspace", Class::Userspace, &|net| {
        let mut rtpengine = Rtpengine::start(&net.pbx)?;
        let calls = calls.iter().enumerate();
        let calls = calls.map(|(number, call)| rtpengine.call(number, call.map(|leg| leg.remote)));
        let calls = calls.collect::<Result<_>>()?;
        Ok((calls, Work::of_process(rtpengine.id(), rtpengine)))
    })?;
    start("Asterisk", Class::Userspace, &|net| {
        let (lab, calls) = asterisk::bridge(net.clone(), calls.len())?;
        Ok((calls, Work::of_process(lab.id(), lab)))
    })?;
    Ok(subjects)
}

/// The one that the others are compared with.
pub(super) const OURS: &str = "relay-user, native XDP";

/// Our relay and the PBX behind it.
fn ours(net: &Direct, calls: &[Call], mode: &str) -> Result<Work> {
    let pbx = PerCall::start(&net.pbx, calls, RELAY_CPU)?;
    let own = Own::attach(net, calls, mode)?;
    Ok(Work {
        threads: pbx.threads().to_vec(),
        processes: vec![own.id()],
        own: Some(own),
        _guard: Box::new(pbx),
    })
}

/// Two machines on a cable whose ends have names that no other interface has.
fn network() -> Result<Direct> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let names = ["r", "p"].map(|end| format!("{end}{}x{number}", process::id()));
    Direct::named(2, names.each_ref().map(String::as_str))
}

/// Attaches the floor.
fn swap(interface: &Interface) -> Result<OwnedFd> {
    let program = program::load(Kind::Xdp, &swap_macs())?;
    interface.attach_xdp(&program)
}
