//! Who is on the phone: as many legs as are asked for, each of a phone with an address of its own.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use anyhow::Result;
use relay_tests::topology::Direct;
use relay_user::pair::{Leg, Pair, PayloadTypes, Proof};

/// Legs of one address of the PBX. RTP has the even ports.
const LEGS: u32 = 30_000;
/// The lowest of them.
const FIRST_PORT: u32 = 2_000;
/// The PBX's first address.
const PBX: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// Where the phones are.
const PHONES: Ipv4Addr = Ipv4Addr::new(10, 64, 0, 0);

/// Where the PBX receives a leg.
pub(crate) fn local(leg: u32) -> SocketAddrV4 {
    let address = Ipv4Addr::from_bits(PBX.to_bits() + leg / LEGS);
    SocketAddrV4::new(address, (FIRST_PORT + 2 * (leg % LEGS)) as u16)
}

/// The phone of a leg.
pub(crate) fn remote(leg: u32) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::from_bits(PHONES.to_bits() + leg), 4_000)
}

/// Two legs that follow on each other.
pub(crate) fn pair(number: u32, proof: Proof) -> Result<Pair> {
    let leg = |leg| Leg::new(SocketAddr::V4(local(leg)), SocketAddr::V4(remote(leg)));
    let legs = [leg(2 * number), leg(2 * number + 1)];
    Ok(Pair::new(legs, vec![PayloadTypes::same(0)], proof)?)
}

/// The PBX with the addresses of so many legs, and a way to all phones.
pub(crate) fn network(legs: u32) -> Result<Direct> {
    let net = Direct::new(1)?;
    let mut lines = format!(
        "route add {PHONES}/10 via {} dev eth0\n",
        Direct::phone_v4(0)
    );
    for number in 0..=legs / LEGS {
        let address = Ipv4Addr::from_bits(PBX.to_bits() + number);
        lines += &format!("address add {address}/32 dev eth0\n");
    }
    net.pbx.ip(&lines)?;
    Ok(net)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// As many legs as phones' addresses fit behind the route to them.
    const MOST: u32 = 1 << 22;

    #[test]
    fn no_two_legs_share_an_address() {
        let legs = [0, 1, LEGS - 1, LEGS, MOST - 1];
        let locals: HashSet<_> = legs.map(local).into();
        let remotes: HashSet<_> = legs.map(remote).into();
        assert_eq!((locals.len(), remotes.len()), (legs.len(), legs.len()));
        let last = Ipv4Addr::from_bits(remote(MOST - 1).ip().to_bits() & 0xffc0_0000);
        assert_eq!(last, PHONES);
    }
}
