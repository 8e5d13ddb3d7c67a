//! A call and bulk data that share a slow uplink: the PBX and its caller in the office, the other party and a greedy
//! receiver behind an access line.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    bulk::Bulk,
    line::{Access, Line},
    namespace::Host,
    phone::{Bank, PACKET_TIME, Phone, Talk},
    relay::Relay,
    topology::{PBX_V4, Routed},
    transit::Transit,
};

/// Where the machine behind the line is.
const FAR: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 11));
/// Where its bulk data goes, the port of discard (RFC 863).
const SINK: SocketAddr = SocketAddr::new(FAR, 9);
/// Ports of the PBX, of the office's leg and of the other.
const PORTS: [u16; 2] = [10_000, 10_002];
/// Longer than any queue here.
const PATIENCE: Duration = Duration::from_secs(20);

/// The site. The PBX has one interface, `eth0`, for both legs of the call and for the bulk data; behind it a router
/// leads to the office's phones and, over the line, to the far machine.
#[derive(Debug)]
pub struct Uplink {
    /// The PBX, the router and the office.
    pub office: Routed,
    /// Receives the bulk data, and has the other phone.
    pub far: Host,
    /// The caller in the office, and who is behind the line.
    pub phones: [Phone; 2],
    _banks: [Bank; 2],
    _line: Line,
}

/// What came of a measurement.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// The voice over the line, towards the far phone.
    pub voice: Transit,
    /// Payload of the bulk data, bit/s.
    pub bulk: f64,
}

impl Uplink {
    /// Builds it.
    ///
    /// # Errors
    /// See [`Routed::new`] and [`Line::connect`].
    pub fn new(access: Access) -> Result<Self> {
        let office = Routed::new(1)?;
        let far = Host::new("far")?;
        let line = Line::connect(
            access,
            (&office.router, "203.0.113.254/24"),
            (&far, &format!("{FAR}/24")),
        )?;
        far.ip("route add default via 203.0.113.254")?;
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
        let first = near.sent() + settling;
        let sent = |count| {
            let time = PACKET_TIME * u32::try_from(settling + packets)?;
            near.wait_sent(count, time + PATIENCE)
        };
        sent(first)?;
        let (started, before) = (Instant::now(), bulk.received());
        sent(first + packets)?;
        let (lasted, received) = (started.elapsed(), bulk.received() - before);
        // The call's packets stay in order: when a later one has come, none of these is still on its way.
        far.wait(PATIENCE, |arrivals| {
            let stamp = arrivals.last().and_then(|arrival| arrival.stamp);
            stamp.is_some_and(|stamp| stamp.number >= first + packets)
        })
        .context("the voice does not come through")?;
        drop(bulk);
        self.phones.iter().for_each(Phone::hush);
        self.await_relayed(relay)?;
        let first = usize::try_from(first)?;
        let sendings = near.sendings();
        let sendings = &sendings[first..first + usize::try_from(packets)?];
        let arrivals = far.received_from(near).into_iter();
        let arrivals = arrivals.filter_map(|(number, arrival)| {
            let index = usize::try_from(number).ok()?.checked_sub(first)?;
            Some((index, arrival.at))
        });
        Ok(Outcome {
            voice: Transit::of(sendings, arrivals),
            bulk: received as f64 * 8.0 / lasted.as_secs_f64(),
        })
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
