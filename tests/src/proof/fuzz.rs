//! PBXs that do as they please, and a judge who knows nothing of how the proof works: it keeps every packet, byte for
//! byte.

use std::{collections::BTreeMap, net::SocketAddrV4};

use anyhow::Result;
use relay_common::stream::{PayloadType, State, mode, ticks};

use super::{ADDRESSES, FAR, HEADERS, IN, OUT, PHONE, Programs, SLOTS, frame, streams};
use crate::{fixture::SECOND, generator::Generator};

/// Between two packets of a phone, ns: far from any time that matters to the relay, for in the kernel it is not exact.
const PACKET_TIME: u64 = SECOND / 10;

/// Packets of a phone in one trial.
const PACKETS: u32 = 26;

/// What a trial came to.
#[derive(Debug)]
pub struct Outcome {
    /// The stream was offloaded at some time.
    pub taken_over: bool,
    /// Packets that were relayed.
    pub relayed: u32,
    /// Every takeover, and every relayed packet, that nothing justified; and every take-back that was missed.
    pub wrong: Vec<String>,
    /// A PBX that does nothing but forward, and a phone that only talks, after which the stream was not relayed.
    pub missed: bool,
    /// How the streams fare at the end.
    pub states: [State; 2],
}

/// Declares the liberties once.
macro_rules! liberties {
    ($($liberty:ident)*) => {
        /// A liberty that a PBX takes with a packet.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        enum Liberty {
            $($liberty,)*
        }

        const LIBERTIES: &[Liberty] = &[$(Liberty::$liberty,)*];
    };
}

liberties! {
    Ssrc
    Sequence
    Timestamp
    Payload
    Flags
    PayloadType
    SetMarker
    FlipMarker
    Longer
    Shorter
    Drop
    DropPayloadType
    Delay
    Overtaken
    Twice
    Replace
    OtherPort
    OtherHost
    AlsoOtherHost
    OwnBefore
    OwnAfter
    OldAgain
    Keepalive
}

/// A packet inside the PBX.
struct Inside {
    /// When it leaves: by packet of the phone.
    due: u32,
    /// Whom it goes to.
    to: SocketAddrV4,
    rtp: Vec<u8>,
    /// Number of the passed packet that it is, changed or not.
    from: Option<usize>,
}

/// A PBX.
struct Pbx {
    /// What it does, each with how rare it is: one packet in so many.
    liberties: Vec<(Liberty, usize)>,
    /// The first packet that it takes a liberty with, and the first that it does not.
    during: (u32, u32),
    /// By how much it renumbers dynamic payload types.
    renumbering: u8,
    /// Sets the marker on the first packet that it forwards.
    marks_first: bool,
    /// How long each packet takes at least.
    delay: u32,
    queue: Vec<Inside>,
    forwarded: bool,
    last: Vec<u8>,
    sequence: u16,
}

impl Pbx {
    fn new(random: &mut Generator, plain: bool) -> Self {
        let mut liberties = Vec::new();
        let kinds = if plain { 0 } else { 1 + random.below(2) };
        for _ in 0..kinds {
            let liberty = random.pick(LIBERTIES);
            liberties.push((liberty, random.pick(&[1, 1, 2, 4, 8, 12])));
        }
        let later = random.below(20) as u32;
        let first = random.pick(&[0, 0, later]);
        let sooner = first + random.below(12) as u32;
        let end = random.pick(&[PACKETS, PACKETS, sooner]);
        Self {
            liberties,
            during: (first, end),
            renumbering: random.pick(&[0, 5, 1]),
            marks_first: random.one_in(2),
            delay: random.pick(&[0, 0, 0, 1, 3, 7]),
            queue: Vec::new(),
            forwarded: false,
            last: Vec::new(),
            sequence: random.next() as u16,
        }
    }

    /// The payload type on the other leg.
    const fn renumbered(&self, payload_type: u8) -> u8 {
        if payload_type >= 96 {
            payload_type - self.renumbering
        } else {
            payload_type
        }
    }

    /// RTP of its own.
    fn own(&mut self, random: &mut Generator, like: &[u8]) -> Vec<u8> {
        let mut rtp = like[..like.len().min(32)].to_vec();
        self.sequence = self.sequence.wrapping_add(1);
        rtp[1] = random.pick(&[0, 8, 101]);
        rtp[2..4].copy_from_slice(&self.sequence.to_be_bytes());
        rtp[12..].fill(0xd5);
        rtp
    }

    /// Takes a packet from the phone. Returns nothing: what comes of it is in the queue.
    fn take(&mut self, random: &mut Generator, now: u32, number: usize, rtp: &[u8]) {
        let mut out = rtp.to_vec();
        out[1] = out[1] & 0x80 | self.renumbered(out[1] & 0x7f);
        if self.marks_first && !self.forwarded {
            out[1] |= 0x80;
        }
        self.forwarded = true;
        let mut due = now + self.delay;
        let mut to = FAR;
        let (mut before, mut after) = (Vec::new(), Vec::new());
        let mut from = Some(number);
        let mut dropped = false;
        for (liberty, rarity) in self.liberties.clone() {
            if !(self.during.0..self.during.1).contains(&now) || !random.one_in(rarity) {
                continue;
            }
            let elsewhere = SocketAddrV4::new([192, 0, 2, 99].into(), FAR.port());
            match liberty {
                Liberty::Ssrc => out[8] ^= 0x5a,
                Liberty::Sequence => out[3] = out[3].wrapping_add(3),
                Liberty::Timestamp => out[6] ^= 1,
                Liberty::Payload => {
                    if out.len() > 12 {
                        let at = 12 + random.below(out.len() - 12);
                        out[at] ^= 1 << random.below(8);
                    }
                }
                Liberty::Flags => out[0] ^= random.pick(&[0x20, 0x10, 0x01]),
                Liberty::PayloadType => out[1] = out[1] & 0x80 | random.pick(&[0, 8, 96, 101]),
                Liberty::SetMarker => out[1] |= 0x80,
                Liberty::FlipMarker => out[1] ^= 0x80,
                Liberty::Longer => out.push(0),
                Liberty::Shorter => out.truncate(out.len() - 1),
                Liberty::Drop => dropped = true,
                Liberty::DropPayloadType => dropped |= rtp[1] & 0x7f == 101,
                Liberty::Delay => due += 1 + random.below(11) as u32,
                Liberty::Overtaken => due += 1,
                Liberty::Twice => after.push((to, out.clone())),
                Liberty::Replace => {
                    out = self.own(random, rtp);
                    from = None;
                }
                Liberty::OtherPort => to.set_port(FAR.port() + 2),
                Liberty::OtherHost => to = elsewhere,
                Liberty::AlsoOtherHost => after.push((elsewhere, out.clone())),
                Liberty::OwnBefore => before.push((to, self.own(random, rtp))),
                Liberty::OwnAfter => after.push((to, self.own(random, rtp))),
                Liberty::OldAgain if !self.last.is_empty() => after.push((to, self.last.clone())),
                Liberty::OldAgain => {}
                Liberty::Keepalive => {
                    let mut noise = self.own(random, rtp);
                    noise.resize(13, 0);
                    noise[0] = 0x80;
                    noise[1] = 13;
                    after.push((to, noise));
                }
            }
        }
        let own = |(to, rtp)| Inside {
            due,
            to,
            rtp,
            from: None,
        };
        self.queue.extend(before.into_iter().map(own));
        if !dropped {
            self.last.clone_from(&out);
            self.queue.push(Inside {
                due,
                to,
                rtp: out,
                from,
            });
        }
        self.queue.extend(after.into_iter().map(own));
    }

    /// The next packet that is due, in the order in which they came in unless one took longer.
    fn next_due(&mut self, now: u32) -> Option<Inside> {
        let due = |inside: &Inside| inside.due <= now;
        let at = (0..self.queue.len())
            .filter(|&at| due(&self.queue[at]))
            .min_by_key(|&at| (self.queue[at].due, at))?;
        Some(self.queue.remove(at))
    }

    /// Whether it never lets a packet overtake another.
    fn keeps_order(&self) -> bool {
        let disorder = |liberty| matches!(liberty, Liberty::Delay | Liberty::Overtaken);
        !self.liberties.iter().any(|&(liberty, _)| disorder(liberty))
    }
}

/// A packet that the relay left to the PBX.
struct Passed {
    rtp: Vec<u8>,
    /// The round of proof that it belongs to: what went in before it is no evidence.
    round: u32,
    came_out: bool,
}

/// A packet of the PBX's that is one that went in, but for its payload type and perhaps for a marker that it gained.
#[derive(Clone, Copy)]
struct Equal {
    number: usize,
    payload_type: PayloadType,
    marked: bool,
}

/// The judge.
struct Judge {
    proof: usize,
    round: u32,
    passed: Vec<Passed>,
    /// What the PBX sent in this round of proof, in order; none for what equals no packet that went in.
    sent: Vec<Option<Equal>>,
    /// Payload types whose proof it has seen.
    proven: BTreeMap<u8, u8>,
    /// The PBX has done something else while it was trusted.
    distrusted: bool,
    wrong: Vec<String>,
}

impl Judge {
    /// The packet that the PBX sends.
    fn equal(&self, to: SocketAddrV4, rtp: &[u8]) -> Option<Equal> {
        if to != FAR {
            return None;
        }
        let number = self.passed.iter().position(|passed| {
            let it = &passed.rtp;
            let open = passed.round == self.round && !passed.came_out;
            open && it.len() == rtp.len() && it[0] == rtp[0] && it[2..] == rtp[2..]
        })?;
        let (from, to) = (self.passed[number].rtp[1], rtp[1]);
        (from & !to & 0x80 == 0).then_some(Equal {
            number,
            payload_type: PayloadType {
                from: from & 0x7f,
                to: to & 0x7f,
            },
            marked: from & 0x80 != to & 0x80,
        })
    }

    /// Whether the last packets that the PBX sent prove that it forwards this payload type as that one: so many of
    /// them, each equal, none missing, none in between that the phone had not sent.
    fn is_proven(&self, payload_type: PayloadType) -> bool {
        let mut found = 0;
        let mut next: Option<usize> = None;
        for sent in self.sent.iter().rev() {
            let Some(equal) = sent else {
                return false;
            };
            if next.is_some_and(|next| next != equal.number + 1) {
                return false;
            }
            next = Some(equal.number);
            if equal.payload_type.from == payload_type.from {
                if equal.marked || equal.payload_type.to != payload_type.to {
                    return false;
                }
                found += 1;
                if found == self.proof {
                    return true;
                }
            }
        }
        false
    }

    fn complain(&mut self, of: impl Into<String>) {
        self.wrong.push(of.into());
    }
}

/// A phone.
struct Phone {
    ssrc: u32,
    sequence: u16,
    timestamp: u32,
    payload_type: u8,
}

impl Phone {
    fn next(&mut self, random: &mut Generator, lively: bool) -> Vec<u8> {
        let mut flags = 0x80;
        let mut marker = 0;
        let mut length = 20;
        if lively {
            if random.one_in(6) {
                self.payload_type = random.pick(&[0, 0, 101, 101, 8, 102]);
            }
            match random.below(60) {
                0 | 1 => self.ssrc = random.next() as u32,
                2 => self.timestamp = random.next() as u32,
                3 => self.sequence = random.next() as u16,
                4 => flags |= 0x20,
                5 => length = 1600,
                6 => length = 2100,
                7 => length = 0,
                8..12 => marker = 0x80,
                _ => {}
            }
        }
        self.sequence = self.sequence.wrapping_add(1);
        self.timestamp = self.timestamp.wrapping_add(160);
        let mut rtp = vec![flags, marker | self.payload_type];
        rtp.extend(self.sequence.to_be_bytes());
        rtp.extend(self.timestamp.to_be_bytes());
        rtp.extend(self.ssrc.to_be_bytes());
        rtp.resize(12 + length, 0);
        for chunk in rtp[12..].chunks_mut(8).take(3) {
            chunk.copy_from_slice(&random.next().to_ne_bytes()[..chunk.len()]);
        }
        rtp
    }
}

/// One trial: a fresh stream, a phone and a PBX. The same seed gives the same again.
///
/// # Errors
/// The programs do not run.
pub fn trial(seed: u64, programs: &mut impl Programs) -> Result<Outcome> {
    let mut random = Generator::new(seed);
    let proof = 1 + random.below(12);
    let plain = random.one_in(4);
    let lively = !plain && random.one_in(2);
    let mut entries = streams(proof as u8);
    if !plain && random.one_in(2) {
        entries[0].stream.keepalive = ticks(4 * PACKET_TIME + PACKET_TIME / 2) as u16;
    }
    programs.begin(&entries)?;
    let mut pbx = Pbx::new(&mut random, plain);
    let mut phone = Phone {
        ssrc: random.next() as u32,
        sequence: random.next() as u16,
        timestamp: random.next() as u32,
        payload_type: random.pick(&[0, 0, 8, 101]),
    };
    let mut judge = Judge {
        proof,
        round: 1,
        passed: Vec::new(),
        sent: Vec::new(),
        proven: BTreeMap::new(),
        distrusted: false,
        wrong: Vec::new(),
    };
    let (mut relayed, mut taken_over) = (0, false);
    let mut last_relayed = false;
    for now in 0..PACKETS {
        let pause = lively && random.one_in(30);
        programs.wait(if pause { SECOND } else { PACKET_TIME });
        if !plain && random.one_in(80) {
            judge.round += 1;
            for slot in SLOTS {
                programs.set_epoch(slot, judge.round)?;
            }
            judge.sent.clear();
            judge.proven.clear();
            judge.distrusted = false;
        }
        // The packets before, as far as they are due by now.
        if let Some(before) = now.checked_sub(1) {
            let_out(&mut pbx, before, programs, &mut judge)?;
        }
        let rtp = phone.next(&mut random, lively);
        let mode = programs.state(SLOTS[0])?.mode();
        taken_over |= mode == mode::OFFLOADED;
        let after = programs.receive(&frame(PHONE, IN, &rtp))?;
        last_relayed = after.is_some();
        if let Some(after) = after {
            relayed += 1;
            judge_relayed(&mut judge, &pbx, &rtp, &after);
        } else {
            if mode != mode::SUSPENDED {
                judge.passed.push(Passed {
                    rtp: rtp.clone(),
                    round: judge.round,
                    came_out: false,
                });
            }
            let number = judge.passed.len().wrapping_sub(1);
            pbx.take(&mut random, now, number, &rtp);
        }
        let_out(&mut pbx, now, programs, &mut judge)?;
    }
    let needed = proof as u32 + u32::from(pbx.marks_first);
    let expected = (pbx.delay == 0).then(|| PACKETS - needed);
    let_out(&mut pbx, u32::MAX, programs, &mut judge)?;
    let states = [programs.state(SLOTS[0])?, programs.state(SLOTS[1])?];
    taken_over |= states[0].mode() == mode::OFFLOADED;
    let all = expected.is_none_or(|expected| relayed == expected && last_relayed);
    Ok(Outcome {
        taken_over,
        relayed,
        wrong: judge.wrong,
        missed: plain && !(all && states[0].mode() == mode::OFFLOADED),
        states,
    })
}

/// A packet that was relayed: it must be what the PBX was proven to make of it.
fn judge_relayed(judge: &mut Judge, pbx: &Pbx, rtp: &[u8], after: &[u8]) {
    let mut expected = rtp.to_vec();
    match judge.proven.get(&(rtp[1] & 0x7f)) {
        Some(to) => expected[1] = rtp[1] & 0x80 | to,
        None => judge.complain(format!("payload type {} unproven, relayed", rtp[1])),
    }
    if judge.distrusted {
        judge.complain("relayed after the PBX has spoken");
    }
    if after[HEADERS..] != expected || after[ADDRESSES..] != frame(OUT, FAR, &expected)[ADDRESSES..]
    {
        judge.complain("relayed as something else");
    }
    let inside = |inside: &Inside| {
        let passed = inside.from.map(|number| &judge.passed[number]);
        passed.is_some_and(|passed| !passed.came_out)
    };
    if pbx.keeps_order() && pbx.queue.iter().any(inside) {
        judge.complain("overtakes a packet that is still inside the PBX");
    }
}

/// What is due leaves the PBX.
fn let_out(pbx: &mut Pbx, now: u32, programs: &mut impl Programs, judge: &mut Judge) -> Result<()> {
    while let Some(Inside { to, rtp, .. }) = pbx.next_due(now) {
        let before = programs.state(SLOTS[0])?;
        let is_let_out = programs.leave(&frame(OUT, to, &rtp))?;
        let after = programs.state(SLOTS[0])?;
        let equal = judge.equal(to, &rtp);
        if let Some(Equal { number, .. }) = equal {
            judge.passed[number].came_out = true;
        }
        // Less than a header is no RTP: nothing that a phone would play.
        let is_rtp = rtp.len() >= 12;
        if is_rtp {
            judge.sent.push(equal);
        }
        let is_noise = rtp.len() == 13 && rtp[1] & 0x7f == 13;
        if !is_let_out && (before.mode() != mode::OFFLOADED || !is_noise) {
            judge.complain("swallows a packet of the PBX's");
        }
        if before.mode() == mode::OFFLOADED {
            let as_before = equal.is_some_and(|equal| {
                let known = judge.proven.get(&equal.payload_type.from);
                known.is_none_or(|known| *known == equal.payload_type.to)
            });
            judge.distrusted |= is_rtp && !as_before && !is_noise;
        }
        if after.mode() != mode::OFFLOADED {
            continue;
        }
        if judge.distrusted {
            judge.complain("still offloaded after the PBX has spoken");
        }
        for payload_type in after.payload_types {
            let PayloadType { from, to } = payload_type;
            if payload_type == PayloadType::UNUSED || judge.proven.contains_key(&from) {
                continue;
            }
            if !judge.is_proven(payload_type) {
                judge.complain(format!("{payload_type:?} taken over unproven"));
            }
            judge.proven.insert(from, to);
        }
    }
    Ok(())
}
