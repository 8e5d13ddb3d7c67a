//! The datapath loaded into the kernel but attached to nothing: packets are shown to it by `BPF_PROG_TEST_RUN`.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, PerCpuArray, PerCpuValues, RingBuf},
    programs::{Program, ProgramInfo, SchedClassifier, TcAttachType, Xdp, XdpMode, tc},
    util::nr_cpus,
};
use nix::time::{ClockId, clock_gettime};
use relay_common::{
    capture::{Capture, Captured},
    reason::{Reason, Verdict},
    stream::{Control, Counter, Event, State, Stream, StreamKey, ticks},
};
use relay_user::{
    datapath::{self, AttachMode, names},
    next_hop::LinkLayer,
};
use zerocopy::FromBytes as _;

use crate::{
    fixture::Hook,
    program::{self, Run},
    tables::{Entry, NOW, TRANSLATED, later},
};

/// `XDP_PASS` and `XDP_TX` (`enum xdp_action`), `TC_ACT_UNSPEC`, `TC_ACT_SHOT` and `TC_ACT_REDIRECT`
/// (linux/pkt_cls.h).
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
const TC_ACT_UNSPEC: u32 = u32::MAX;
const TC_ACT_SHOT: u32 = 2;
const TC_ACT_REDIRECT: u32 = 7;

const KEY: usize = size_of::<StreamKey>();
const VALUE: usize = size_of::<Stream>();
const STATE: usize = size_of::<State>();
const COUNTER: usize = size_of::<Counter>();
const CONTROL: usize = size_of::<Control>();

/// The programs of the object, and its maps.
pub struct Kernel {
    ebpf: Ebpf,
    slots: u32,
}

impl Kernel {
    /// Loads the object for a hook, with room for `slots` streams.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn load(hook: Hook, slots: u32) -> Result<Self> {
        let mode = match hook {
            Hook::NativeXdp => AttachMode::Native,
            Hook::GenericXdp => AttachMode::Generic,
            Hook::Tc => AttachMode::Tc,
        };
        let mut ebpf = datapath::load(mode, LinkLayer::Ethernet, slots)?;
        datapath::load_xdp(&mut ebpf)?;
        datapath::load_tc(&mut ebpf)?;
        datapath::load_observer(&mut ebpf)?;
        Ok(Self { ebpf, slots })
    }

    /// `STREAMS`.
    ///
    /// # Errors
    /// The object has none.
    pub fn streams(&self) -> Result<BorrowedFd<'_>> {
        match self.map(names::STREAMS)? {
            Map::HashMap(map) => Ok(map.fd().as_fd()),
            _ => bail!("no hash map {}", names::STREAMS),
        }
    }

    /// Replaces all streams and states, whose times are put on this machine's clock, sets the counters to zero and the end of the lease to never, and forgets all
    /// events.
    ///
    /// # Errors
    /// There are more than fit.
    pub fn set(&mut self, entries: &[Entry]) -> Result<()> {
        let mut streams: HashMap<_, [u8; KEY], [u8; VALUE]> =
            HashMap::try_from(self.map_mut(names::STREAMS)?)?;
        let old: Vec<_> = streams.keys().collect::<Result<_, _>>()?;
        for key in old {
            streams.remove(&key)?;
        }
        for entry in entries {
            for (key, value) in entry.stream.entries() {
                let (key, value): ([u8; KEY], [u8; VALUE]) =
                    (zerocopy::transmute!(key), zerocopy::transmute!(value));
                streams.insert(key, value, 0)?;
            }
        }
        let mut counters: PerCpuArray<_, [u8; COUNTER]> =
            PerCpuArray::try_from(self.map_mut(names::COUNTERS)?)?;
        let cpus = nr_cpus().map_err(|(path, error)| anyhow::anyhow!("{path}: {error}"))?;
        for &reason in Reason::ALL {
            let zero = PerCpuValues::try_from(vec![[0; COUNTER]; cpus])?;
            counters.set(reason as u32, zero, 0)?;
        }
        let mut dscp_map: Array<_, [u8; 64]> = Array::try_from(self.map_mut(names::DSCP_MAP)?)?;
        dscp_map.set(0, TRANSLATED, 0)?;
        self.set_lease(u64::MAX)?;
        self.take_events()?;
        self.set_capture(Capture::default())?;
        self.take_captured()?;
        // Last, for their times grow old.
        let slots = self.slots;
        let passed = ticks(now()?).wrapping_sub(ticks(NOW));
        let mut states: Array<_, [u8; STATE]> = Array::try_from(self.map_mut(names::STATE)?)?;
        for slot in 0..slots {
            let entry = entries.iter().find(|entry| entry.stream.slot == slot);
            let state = entry.map_or_else(State::default, |entry| later(entry.state, passed));
            let state: [u8; STATE] = zerocopy::transmute!(state);
            states.set(slot, state, 0)?;
        }
        Ok(())
    }

    /// Sets the end of the lease, ns.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn set_lease(&mut self, deadline: u64) -> Result<()> {
        self.set_control(|control| control.lease = deadline)
    }

    /// Sets what is captured.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn set_capture(&mut self, capture: Capture) -> Result<()> {
        self.set_control(|control| control.capture = capture)
    }

    fn set_control(&mut self, change: impl FnOnce(&mut Control)) -> Result<()> {
        let mut map: Array<_, [u8; CONTROL]> = Array::try_from(self.map_mut(names::CONTROL)?)?;
        let mut control: Control = zerocopy::transmute!(map.get(&0, 0)?);
        change(&mut control);
        let control: [u8; CONTROL] = zerocopy::transmute!(control);
        map.set(0, control, 0)?;
        Ok(())
    }

    /// What was captured since the last call: each header, and the bytes behind it.
    ///
    /// # Errors
    /// The ring buffer cannot be read, or does not hold captured packets.
    pub fn take_captured(&mut self) -> Result<Vec<(Captured, Vec<u8>)>> {
        let mut ring = RingBuf::try_from(self.map_mut(names::CAPTURED)?)?;
        let mut captured = Vec::new();
        while let Some(item) = ring.next() {
            let parts = Captured::read_from_prefix(&item).ok();
            let (header, bytes) = parts.context("a captured packet without a header")?;
            captured.push((header, bytes.to_vec()));
        }
        Ok(captured)
    }

    /// What was reported since the last call.
    ///
    /// # Errors
    /// The ring buffer cannot be read, or does not hold events.
    pub fn take_events(&mut self) -> Result<Vec<Event>> {
        let mut ring = RingBuf::try_from(self.map_mut(names::EVENTS)?)?;
        let mut events = Vec::new();
        while let Some(item) = ring.next() {
            let event = Event::read_from_bytes(&item).ok();
            events.push(event.context("an event of another size")?);
        }
        Ok(events)
    }

    /// Sets what happened to the stream of a slot.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn set_state(&mut self, slot: u32, state: State) -> Result<()> {
        let mut states: Array<_, [u8; STATE]> = Array::try_from(self.map_mut(names::STATE)?)?;
        let state: [u8; STATE] = zerocopy::transmute!(state);
        states.set(slot, state, 0)?;
        Ok(())
    }

    /// What happened to the stream of a slot; none where there is no such slot.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn state(&self, slot: u32) -> Result<Option<State>> {
        if slot >= self.slots {
            return Ok(None);
        }
        let states: Array<_, [u8; STATE]> = Array::try_from(self.map(names::STATE)?)?;
        Ok(Some(zerocopy::transmute!(states.get(&slot, 0)?)))
    }

    /// What was counted, all CPUs together, by number of the reason.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn counters(&self) -> Result<[Counter; Reason::COUNT]> {
        let counters: PerCpuArray<_, [u8; COUNTER]> =
            PerCpuArray::try_from(self.map(names::COUNTERS)?)?;
        let mut totals = [Counter::default(); Reason::COUNT];
        for (number, total) in totals.iter_mut().enumerate() {
            for value in counters.get(&(number as u32), 0)?.iter() {
                let Counter { packets, bytes } = zerocopy::transmute!(*value);
                total.packets += packets;
                total.bytes += bytes;
            }
        }
        Ok(totals)
    }

    /// Pins the maps by their names.
    ///
    /// # Errors
    /// `directory` is not in a bpffs.
    pub fn pin(&self, directory: &Path) -> Result<()> {
        for name in [names::STREAMS, names::STATE, names::COUNTERS] {
            let (Map::HashMap(map) | Map::Array(map) | Map::PerCpuArray(map)) = self.map(name)?
            else {
                bail!("map {name} is of another type");
            };
            map.pin(directory.join(name))?;
        }
        Ok(())
    }

    /// Attaches the program of TC to the ingress of an interface, for as long as this lives. Runs inside the machine.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn attach_tc(&mut self, interface: &str) -> Result<()> {
        // For kernels without TCX; it may be there.
        let _ = tc::qdisc_add_clsact(interface);
        let program: &mut SchedClassifier = self
            .ebpf
            .program_mut(names::TC)
            .with_context(|| format!("no program {}", names::TC))?
            .try_into()?;
        program.attach(interface, TcAttachType::Ingress)?;
        Ok(())
    }

    /// Attaches the program of XDP to an interface in generic mode, for as long as this lives. Runs inside the machine.
    ///
    /// With each call, `BPF_PROG_TEST_RUN` makes a program known to all processors that they do not know from an
    /// interface, and waits until they do: more than 10 ms (`bpf_dispatcher_change_prog` in kernel/bpf/dispatcher.c).
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn attach_xdp(&mut self, interface: &str) -> Result<()> {
        let program: &mut Xdp = self
            .ebpf
            .program_mut(names::XDP)
            .with_context(|| format!("no program {}", names::XDP))?
            .try_into()?;
        program.attach(interface, XdpMode::Skb)?;
        Ok(())
    }

    /// What the kernel tells of a hook's program.
    ///
    /// # Errors
    /// It tells nothing.
    pub fn info(&self, hook: Hook) -> Result<ProgramInfo> {
        info_of(self.program(program_name(hook))?)
    }

    /// What the kernel tells of the observer.
    ///
    /// # Errors
    /// It tells nothing.
    pub fn observer_info(&self) -> Result<ProgramInfo> {
        info_of(self.program(names::OBSERVE)?)
    }

    /// The descriptor of a hook's program.
    ///
    /// # Errors
    /// The object has no such program.
    pub fn descriptor(&self, hook: Hook) -> Result<BorrowedFd<'_>> {
        descriptor_of(self.program(program_name(hook))?)
    }

    /// The descriptor of the observer.
    ///
    /// # Errors
    /// The object has no such program.
    pub fn observer(&self) -> Result<BorrowedFd<'_>> {
        descriptor_of(self.program(names::OBSERVE)?)
    }

    fn program(&self, name: &str) -> Result<&Program> {
        self.ebpf
            .program(name)
            .with_context(|| format!("no program {name}"))
    }

    pub(crate) fn map(&self, name: &str) -> Result<&Map> {
        self.ebpf
            .map(name)
            .with_context(|| format!("no map {name}"))
    }

    fn map_mut(&mut self, name: &str) -> Result<&mut Map> {
        self.ebpf
            .map_mut(name)
            .with_context(|| format!("no map {name}"))
    }
}

const fn program_name(hook: Hook) -> &'static str {
    match hook {
        Hook::NativeXdp | Hook::GenericXdp => names::XDP,
        Hook::Tc => names::TC,
    }
}

fn info_of(program: &Program) -> Result<ProgramInfo> {
    Ok(match program {
        Program::Xdp(program) => program.info()?,
        Program::SchedClassifier(program) => program.info()?,
        _ => bail!("neither XDP nor TC"),
    })
}

fn descriptor_of(program: &Program) -> Result<BorrowedFd<'_>> {
    Ok(match program {
        Program::Xdp(program) => program.fd()?.as_fd(),
        Program::SchedClassifier(program) => program.fd()?.as_fd(),
        _ => bail!("neither XDP nor TC"),
    })
}

/// The time by the clock that the datapath reads, ns.
///
/// # Errors
/// None, on Linux.
pub fn now() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)?;
    Ok(Duration::from(now).as_nanos() as u64)
}

/// Shows a frame that leaves to the observer, once. None as for [`show`].
///
/// # Errors
/// The kernel does not run it, or it returns what it never should.
pub fn show_observer(program: BorrowedFd<'_>, frame: &[u8]) -> Result<Option<Verdict>> {
    let Some((verdict, after)) = run_once(program, frame, 0)? else {
        return Ok(None);
    };
    ensure!(after == *frame, "the observer changes a packet");
    match verdict {
        TC_ACT_UNSPEC => Ok(Some(Verdict::Pass)),
        TC_ACT_SHOT => Ok(Some(Verdict::Drop)),
        other => bail!("the observer returned {other}"),
    }
}

/// What a program returns, and the frame afterwards.
fn run_once(program: BorrowedFd<'_>, frame: &[u8], flags: u32) -> Result<Option<(u32, Vec<u8>)>> {
    let mut after = vec![0; frame.len() + 64];
    let Run {
        verdict, length, ..
    } = match program::test_run(program, frame, &mut after, 1, flags) {
        Ok(run) => run,
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(None),
        Err(error) => return Err(error).context("BPF_PROG_TEST_RUN"),
    };
    after.truncate(length);
    Ok(Some((verdict, after)))
}

/// Shows a frame to a program, once. None where the kernel takes the frame for none and does not run the program.
///
/// # Errors
/// The kernel does not run it for another reason, or the program returns what it never should.
pub fn show(
    program: BorrowedFd<'_>,
    hook: Hook,
    frame: &[u8],
    flags: u32,
) -> Result<Option<(Verdict, Vec<u8>)>> {
    let Some((verdict, after)) = run_once(program, frame, flags)? else {
        return Ok(None);
    };
    let verdict = match (hook, verdict) {
        (Hook::NativeXdp | Hook::GenericXdp, XDP_TX) | (Hook::Tc, TC_ACT_REDIRECT) => Verdict::Send,
        (Hook::NativeXdp | Hook::GenericXdp, XDP_PASS) | (Hook::Tc, TC_ACT_UNSPEC) => Verdict::Pass,
        (_, other) => bail!("{hook:?} returned {other}"),
    };
    Ok(Some((verdict, after)))
}
