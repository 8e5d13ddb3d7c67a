//! A real Asterisk, whose calls are set up by another one that plays the phones. That one is stopped then, and the
//! generator talks in its place.

use std::{
    net::{SocketAddr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Result, bail};
use relay_tests::{
    asterisk::{self, CALLER, Lab},
    topology::Direct,
};

use crate::wire::call::{Call, Leg};

/// How long all calls may take to be up.
const PATIENCE: Duration = Duration::from_secs(90);
/// After that, each call hangs up by itself, seconds.
const LENGTH: u32 = 3600;
/// The extension that is bridged as it is.
const PLAIN: &str = "2001";

/// Has Asterisk bridge so many calls, and returns them.
///
/// # Errors
/// It cannot be installed, or not all calls come up.
pub(crate) fn bridge(net: Direct, calls: usize) -> Result<(Lab, Vec<Call>)> {
    let lab = Lab::up_in(net)?;
    lab.call(calls as u32, LENGTH, PLAIN, CALLER)?;
    let pairs = lab.wait_calls(calls, PATIENCE)?;
    lab.wait_technology(calls, "native_rtp", PATIENCE)?;
    lab.freeze_phones();
    let calls = pairs
        .iter()
        .map(|[first, second]| Ok([leg(first)?, leg(second)?]));
    Ok((lab, calls.collect::<Result<_>>()?))
}

fn leg(leg: &asterisk::Leg) -> Result<Leg> {
    Ok(Leg {
        local: v4(leg.local)?,
        remote: v4(leg.remote)?,
    })
}

fn v4(address: SocketAddr) -> Result<SocketAddrV4> {
    match address {
        SocketAddr::V4(address) => Ok(address),
        SocketAddr::V6(address) => bail!("{address} is of version 6"),
    }
}
