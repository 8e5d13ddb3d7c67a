//! The two networks that most tests use. Every interface towards the phones' side of the PBX is called `eth0`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::{
    link::{End, Interface, connect},
    namespace::Host,
};

/// MAC address of the PBX.
pub const PBX_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
/// MAC address of the phones' machine.
pub const PHONES_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x11];
/// MAC address of the router towards the PBX.
pub const ROUTER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0xfe];
/// MAC address of the router towards the phones.
pub const ROUTER_PHONES_MAC: [u8; 6] = [0x02, 0, 0, 0, 1, 0xfe];

/// The PBX's IPv4 address, /24.
pub const PBX_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
/// The PBX's IPv6 address, /64.
pub const PBX_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

/// `phones` and `pbx` on one cable. Clones are the same.
#[derive(Clone, Debug)]
pub struct Direct {
    /// The machine with the PBX and the relay: 192.0.2.1/24 and 2001:db8::1/64.
    pub pbx: Host,
    /// The machine with all phones: [`Direct::phone_v4`], [`Direct::phone_v6`].
    pub phones: Host,
    /// `eth0` of `pbx`.
    pub pbx_interface: Interface,
    /// `eth0` of `phones`.
    pub phones_interface: Interface,
}

impl Direct {
    /// Builds the network with `phones` addresses of each family in the phones' machine.
    ///
    /// # Errors
    /// See [`Host::new`] and [`connect`].
    ///
    /// # Panics
    /// More than 240 addresses do not fit in the /24.
    pub fn new(phones: u8) -> Result<Self> {
        Self::named(phones, ["eth0", "eth0"])
    }

    /// The same with names for the interfaces of the PBX and of the phones. The kernel's threads bear them, which belong
    /// to no namespace.
    ///
    /// # Errors
    /// As [`Direct::new`].
    ///
    /// # Panics
    /// As [`Direct::new`].
    pub fn named(phones: u8, names: [&str; 2]) -> Result<Self> {
        let (pbx, phones_host) = (Host::new("pbx")?, Host::new("phones")?);
        let [pbx_interface, phones_interface] = connect(
            End {
                host: &pbx,
                name: names[0],
                mac: PBX_MAC,
                addresses: &pbx_addresses(),
            },
            End {
                host: &phones_host,
                name: names[1],
                mac: PHONES_MAC,
                addresses: &phone_addresses(phones, Self::phone_v4, Self::phone_v6),
            },
        )?;
        Ok(Self {
            pbx,
            phones: phones_host,
            pbx_interface,
            phones_interface,
        })
    }

    /// The IPv4 address of a phone: 192.0.2.11 for phone 0, and so on.
    pub fn phone_v4(phone: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, last_byte(phone)).into()
    }

    /// The IPv6 address of a phone: 2001:db8::11 for phone 0, ::12 for phone 1 … (decimal digits, as for IPv4).
    pub fn phone_v6(phone: u8) -> IpAddr {
        Ipv6Addr::new(
            0x2001,
            0xdb8,
            0,
            0,
            0,
            0,
            0,
            decimal_digits(last_byte(phone)),
        )
        .into()
    }
}

/// `phones` behind `router`, so that the PBX reaches all of them through one next hop.
#[derive(Debug)]
pub struct Routed {
    /// The machine with the PBX and the relay: 192.0.2.1/24 and 2001:db8::1/64, default routes to the router.
    pub pbx: Host,
    /// Forwards: 192.0.2.254 and 2001:db8::254 towards the PBX (`eth0`), .254 and ::254 of the phones' networks
    /// towards the phones (`eth1`).
    pub router: Host,
    /// The machine with all phones: [`Routed::phone_v4`], [`Routed::phone_v6`].
    pub phones: Host,
    /// `eth0` of `pbx`.
    pub pbx_interface: Interface,
    /// `eth0` of `router`: the gateway of the PBX.
    pub gateway_interface: Interface,
    /// `eth0` of `phones`.
    pub phones_interface: Interface,
}

impl Routed {
    /// Builds the network with `phones` addresses of each family in the phones' machine.
    ///
    /// # Errors
    /// See [`Host::new`] and [`connect`].
    ///
    /// # Panics
    /// More than 240 addresses do not fit in the /24.
    pub fn new(phones: u8) -> Result<Self> {
        let (pbx, router, phones_host) = (
            Host::new("pbx")?,
            Host::new("router")?,
            Host::new("phones")?,
        );
        let [pbx_interface, gateway_interface] = connect(
            End {
                host: &pbx,
                name: "eth0",
                mac: PBX_MAC,
                addresses: &pbx_addresses(),
            },
            End {
                host: &router,
                name: "eth0",
                mac: ROUTER_MAC,
                addresses: &["192.0.2.254/24".to_owned(), "2001:db8::254/64".to_owned()],
            },
        )?;
        let [_, phones_interface] = connect(
            End {
                host: &router,
                name: "eth1",
                mac: ROUTER_PHONES_MAC,
                addresses: &[
                    "198.51.100.254/24".to_owned(),
                    "2001:db8:1::254/64".to_owned(),
                ],
            },
            End {
                host: &phones_host,
                name: "eth0",
                mac: PHONES_MAC,
                addresses: &phone_addresses(phones, Self::phone_v4, Self::phone_v6),
            },
        )?;
        router.sysctl("net/ipv4/ip_forward", "1")?;
        router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        pbx.ip("route add default via 192.0.2.254\nroute add default via 2001:db8::254")?;
        phones_host
            .ip("route add default via 198.51.100.254\nroute add default via 2001:db8:1::254")?;
        Ok(Self {
            pbx,
            router,
            phones: phones_host,
            pbx_interface,
            gateway_interface,
            phones_interface,
        })
    }

    /// The IPv4 address of a phone: 198.51.100.11 for phone 0, and so on.
    pub fn phone_v4(phone: u8) -> IpAddr {
        Ipv4Addr::new(198, 51, 100, last_byte(phone)).into()
    }

    /// The IPv6 address of a phone: 2001:db8:1::11 for phone 0, and so on (decimal digits, as for IPv4).
    pub fn phone_v6(phone: u8) -> IpAddr {
        Ipv6Addr::new(
            0x2001,
            0xdb8,
            1,
            0,
            0,
            0,
            0,
            decimal_digits(last_byte(phone)),
        )
        .into()
    }
}

fn pbx_addresses() -> [String; 2] {
    [format!("{PBX_V4}/24"), format!("{PBX_V6}/64")]
}

fn phone_addresses(count: u8, v4: fn(u8) -> IpAddr, v6: fn(u8) -> IpAddr) -> Vec<String> {
    (0..count)
        .flat_map(|phone| [format!("{}/24", v4(phone)), format!("{}/64", v6(phone))])
        .collect()
}

/// .11 onwards; .254 is the router.
fn last_byte(phone: u8) -> u8 {
    assert!(
        phone < 240,
        "phone {phone} has no address in a /24 that begins at .11"
    );
    phone + 11
}

/// The number that reads in hexadecimal as `value` does in decimal.
fn decimal_digits(value: u8) -> u16 {
    let value = u16::from(value);
    value / 100 * 0x100 + value / 10 % 10 * 0x10 + value % 10
}
