//! Forwarding by the kernel with the addresses changed by netfilter: DNAT as a packet comes in, SNAT as it leaves, and
//! connection tracking for the way back.

use std::{
    fmt::Write as _,
    io::Write as _,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use relay_tests::namespace::Host;

use crate::wire::call::Call;

/// How long the rules may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a connection is known without packets, seconds.
const FOREVER: &str = "86400";

/// Has the machine forward the calls, until it is gone.
///
/// # Errors
/// nft(8) is missing, or the kernel has no NAT.
pub(crate) fn forward(host: &Host, calls: &[Call]) -> Result<()> {
    host.sysctl("net/ipv4/ip_forward", "1")?;
    // The way out is the way in.
    host.sysctl("net/ipv4/conf/all/send_redirects", "0")?;
    host.sysctl("net/ipv4/conf/default/send_redirects", "0")?;
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped());
    let mut nft = host.spawn(command)?;
    let mut input = nft.child_mut().stdin.take().context("no standard input")?;
    input.write_all(rules(calls)?.as_bytes())?;
    drop(input);
    let status = nft.wait(PATIENCE)?;
    ensure!(status.success(), "nft refuses the rules: {status}");
    // Nobody talks while others are measured.
    host.sysctl("net/netfilter/nf_conntrack_udp_timeout", FOREVER)?;
    host.sysctl("net/netfilter/nf_conntrack_udp_timeout_stream", FOREVER)
}

/// The rules. A call's two streams are the two directions of one connection.
fn rules(calls: &[Call]) -> Result<String> {
    let (mut to, mut by) = (String::new(), String::new());
    for [first, second] in calls {
        let (from, to_ip, to_port) = (first.local.port(), second.remote.ip(), second.remote.port());
        write!(to, "{from} : {to_ip} . {to_port}, ")?;
        let (by_ip, by_port) = (second.local.ip(), second.local.port());
        write!(by, "{to_port} : {by_ip} . {by_port}, ")?;
    }
    Ok(format!(
        "table ip relay {{\n\
           chain in {{\n\
             type nat hook prerouting priority dstnat\n\
             dnat to udp dport map {{ {to} }}\n\
           }}\n\
           chain out {{\n\
             type nat hook postrouting priority srcnat\n\
             snat to udp dport map {{ {by} }}\n\
           }}\n\
         }}\n"
    ))
}
