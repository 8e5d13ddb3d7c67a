//! A call and bulk data that share a slow uplink: the PBX and its caller in the office, the other party and a greedy
//! receiver behind an access line.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::Command,
    slice, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use relay_user::qos::report::{LineReport, QosReport};

use crate::{
    bulk::Bulk,
    line::{Access, DOWNLINK_QUEUE, Line},
    link::{End, connect},
    namespace::Host,
    phone::{Bank, PACKET_TIME, Phone, Talk},
    relay::{Relay, binary},
    topology::{PBX_V4, Routed},
    transit::Transit,
};

/// What lies between the router and the far machine.
pub const ACCESS: Access = Access::DSL;
/// Where the router is, towards the far machine.
const ROUTER: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 254));
/// Where the machine behind the line is.
const FAR: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 11));
/// Where its bulk data goes, the port of discard (RFC 863).
const SINK: SocketAddr = SocketAddr::new(FAR, 9);
/// Ports of the PBX, of the office's leg and of the other.
const PORTS: [u16; 2] = [10_000, 10_002];
/// Longer than any queue here.
const PATIENCE: Duration = Duration::from_secs(20);

/// What keeps the way to the far machine to the rates of [`ACCESS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bottleneck {
    /// HTB with a plain queue, at the router and at the far machine. What its burst lets pass early, a line would still
    /// be busy with; and it takes no time on the way.
    Htb,
    /// A line that sends one packet after the other.
    Line,
}

/// The site. The PBX has one interface, `eth0`, for both legs of the call and for the bulk data; behind it a router
/// leads to the office's phones and, through the bottleneck, to the far machine.
#[derive(Debug)]
pub struct Uplink {
    /// The PBX, the router and the office.
    pub office: Routed,
    /// Receives the bulk data, and has the other phone.
    pub far: Host,
    /// The caller in the office, and who is behind the line.
    pub phones: [Phone; 2],
    _banks: [Bank; 2],
    _line: Option<Line>,
}

/// What came of a measurement.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// The voice up the line, towards the far phone.
    pub voice: Transit,
    /// The voice down the line, towards the office.
    pub down: Transit,
    /// Payload of the bulk data, bit/s.
    pub bulk: f64,
}

impl Uplink {
    /// Builds it.
    ///
    /// # Errors
    /// See [`Routed::new`], [`connect`] and [`Line::connect`].
    pub fn new(bottleneck: Bottleneck) -> Result<Self> {
        let office = Routed::new(1)?;
        let far = Host::new("far")?;
        let [router_address, far_address] = [ROUTER, FAR].map(|address| format!("{address}/24"));
        let line = match bottleneck {
            Bottleneck::Htb => {
                let end = |host, last, address| End {
                    host,
                    name: "dsl0",
                    mac: [0x02, 0, 0, 0, 2, last],
                    addresses: slice::from_ref(address),
                };
                connect(
                    end(&office.router, 0xfe, &router_address),
                    end(&far, 0x11, &far_address),
                )?;
                narrow(&office.router, ACCESS.uplink, ACCESS.queue)?;
                narrow(&far, ACCESS.downlink, DOWNLINK_QUEUE)?;
                None
            }
            Bottleneck::Line => Some(Line::connect(
                ACCESS,
                (&office.router, &router_address),
                (&far, &far_address),
            )?),
        };
        far.ip(&format!("route add default via {ROUTER}"))?;
        let banks = [Bank::new(&office.phones)?, Bank::new(&far)?];
        let phones = [
            banks[0].phone(SocketAddr::new(Routed::phone_v4(0), 30_000))?,
            banks[1].phone(SocketAddr::new(FAR, 30_002))?,
        ];
        Ok(Self {
            office,
            far,
            phones,
            _banks: banks,
            _line: line,
        })
    }

    /// Has the PBX send IPv4 packets of so many bytes at most. An interface would lose its IPv6 addresses by an MTU
    /// below 1280 (`addrconf_notify()` in net/ipv6/addrconf.c), a route does not.
    ///
    /// # Errors
    /// The kernel refuses the MTU.
    pub fn limit_packets(&self, mtu: u16) -> Result<()> {
        let change = format!("route change default via 192.0.2.254 mtu {mtu}");
        self.office.pbx.ip(&change)
    }

    /// Shapes the PBX's interface for the uplink with `relay-user qos apply`.
    ///
    /// # Errors
    /// It fails.
    pub fn shape(&self) -> Result<()> {
        let uplink = format!("{}bit", ACCESS.uplink);
        self.qos(&["apply", "eth0", "--uplink", &uplink]).map(drop)
    }

    /// What the classes of [`Uplink::shape`] have sent until now.
    ///
    /// # Errors
    /// The interface is not shaped.
    pub fn shaped(&self) -> Result<LineReport> {
        let report: QosReport = serde_json::from_str(&self.qos(&["show", "eth0", "--json"])?)?;
        let uplink = report.interfaces.into_iter().find_map(|it| it.uplink);
        uplink.context("eth0 is not shaped")
    }

    /// Runs `relay-user qos` on the PBX; what it prints.
    fn qos(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new(binary("relay-user", "RELAY_USER_BIN")?);
        command.arg("qos").args(words);
        let output = self.office.pbx.output(command)?;
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Has the call relayed, and both phones talk.
    ///
    /// # Errors
    /// See [`Relay::offload`].
    pub fn call(&self, relay: &Relay) -> Result<()> {
        let legs = self.legs().map(|(local, phone)| format!("{local}={phone}"));
        let [office, far] = legs;
        let payload_type = ["--payload-type", "0"].map(str::to_owned);
        relay.offload([office, far].into_iter().chain(payload_type))?;
        for (phone, ((local, _), ssrc)) in
            self.phones.iter().zip(self.legs().into_iter().zip([1, 2]))
        {
            phone.talk(Talk::to(local, ssrc));
        }
        Ok(())
    }

    /// Where the PBX receives, and where the phone does.
    fn legs(&self) -> [(SocketAddr, SocketAddr); 2] {
        [0, 1].map(|leg| {
            let local = SocketAddr::new(PBX_V4, PORTS[leg]);
            (local, self.phones[leg].local())
        })
    }

    /// Sends bulk data beside the call and judges `packets` of it, after `settling` more of them, in which the flows find
    /// their rate; 20 ms each. The call ends with it.
    ///
    /// # Errors
    /// The flows cannot be set up, or the kernel did not relay every packet of the call.
    pub fn measure(
        &self,
        relay: &Relay,
        flows: usize,
        settling: u64,
        packets: u64,
    ) -> Result<Outcome> {
        let [near, far] = &self.phones;
        let bulk = Bulk::start(flows, &self.office.pbx, &self.far, SINK)?;
        let first = self.phones.each_ref().map(|phone| phone.sent() + settling);
        let time = PACKET_TIME * u32::try_from(settling + packets)? + PATIENCE;
        near.wait_sent(first[0], time)?;
        let (started, before) = (Instant::now(), bulk.received());
        near.wait_sent(first[0] + packets, time)?;
        let (lasted, received) = (started.elapsed(), bulk.received() - before);
        let outcome = Outcome {
            voice: transit([near, far], first[0], packets)?,
            down: transit([far, near], first[1], packets)?,
            bulk: received as f64 * 8.0 / lasted.as_secs_f64(),
        };
        drop(bulk);
        self.phones.iter().for_each(Phone::hush);
        self.await_relayed(relay)?;
        Ok(outcome)
    }

    /// Waits until the kernel has relayed all that both phones have sent.
    fn await_relayed(&self, relay: &Relay) -> Result<()> {
        let sent: u64 = self.phones.iter().map(Phone::sent).sum();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let reasons = relay.reasons()?;
            if reasons["relayed"] == sent {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the phones sent {sent} packets, of which became: {reasons:?}");
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Judges so many packets from one phone to the other, from that of this number on.
fn transit([from, to]: [&Phone; 2], first: u64, packets: u64) -> Result<Transit> {
    // They stay in order: when a later one has come, none of these is still on its way.
    to.wait(PATIENCE, |arrivals| {
        let stamp = arrivals.last().and_then(|arrival| arrival.stamp);
        stamp.is_some_and(|stamp| stamp.number >= first + packets)
    })
    .context("the voice does not come through")?;
    let first = usize::try_from(first)?;
    let sendings = from.sendings();
    let arrivals = to.received_from(from).into_iter();
    let arrivals = arrivals.filter_map(|(number, arrival)| {
        let index = usize::try_from(number).ok()?.checked_sub(first)?;
        Some((index, arrival.at))
    });
    let sent = &sendings[first..first + usize::try_from(packets)?];
    Ok(Transit::of(sent, arrivals))
}

/// Keeps what leaves a machine at `dsl0` to a rate in bit/s, behind a queue of so many packets.
fn narrow(host: &Host, rate: u64, queue: usize) -> Result<()> {
    for line in [
        "qdisc add dev dsl0 root handle 1: htb default 1".to_owned(),
        format!("class add dev dsl0 parent 1: classid 1:1 htb rate {rate}bit"),
        format!("qdisc add dev dsl0 parent 1:1 pfifo limit {queue}"),
    ] {
        let mut command = Command::new("tc");
        command.args(line.split_whitespace());
        host.output(command)?;
    }
    Ok(())
}
