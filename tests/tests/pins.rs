//! What a daemon leaves pinned and attached: the next one carries it on, replaces it, or removes it, and calls go on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, mem,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    maps::{HashMap, Map, MapData, MapInfo},
    programs::{SchedClassifier, TcAttachType, links::FdLink, links::PinnedLink, tc},
};
use relay_common::{
    stream::{
        Endpoint, Event, NextHop, PAYLOAD_TYPES, PayloadType, Stream, StreamSpec, VlanTag, event,
    },
    wire::Mac,
};
use relay_tests::{
    namespace::Host,
    phone::{Bank, Phone, Talk},
    topology::{Direct, PBX_MAC, PBX_V4, PHONES_MAC},
};
use relay_user::{
    clock::monotonic_now,
    datapath::{self, Adopted, AttachMode, Datapath, DatapathError, Events, names},
    next_hop::{Interface, Interfaces, LinkLayer},
    privileges,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
const DIRECTORY: &str = "/sys/fs/bpf/relay/v6/eth0";
const MAX_STREAMS: u32 = 16;
const GENERIC: AttachMode = AttachMode::Generic;
/// Between two packets.
const FAST: Duration = Duration::from_millis(1);
/// A lease that outlasts any test, ns.
const LONG: u64 = 3_600_000_000_000;

fn endpoint((address, port): (IpAddr, u16)) -> Endpoint {
    Endpoint {
        address: address.into(),
        port,
    }
}

/// Where the PBX receives and a phone is, by leg.
const LOCAL_PORTS: [u16; 2] = [10_000, 10_002];
const REMOTE_PORTS: [u16; 2] = [30_000, 30_002];

fn spec(leg: u8) -> StreamSpec {
    let local = |leg: u8| endpoint((PBX_V4, LOCAL_PORTS[usize::from(leg)]));
    let remote = |leg: u8| endpoint((Direct::phone_v4(leg), REMOTE_PORTS[usize::from(leg)]));
    let other = 1 - leg;
    StreamSpec {
        source: remote(leg),
        local: local(leg),
        sends_from: local(leg),
        new_source: local(other),
        new_destination: remote(other),
        next_hop: NextHop {
            destination_mac: Mac { bytes: PHONES_MAC },
            source_mac: Mac { bytes: PBX_MAC },
            vlans: [VlanTag::default(); 2],
            mtu: 1500,
        },
        dscp: 46,
        slot: leg.into(),
        keepalive: 0,
        pair: 7,
        is_ami: false,
        proof: 0,
        priority: 0,
        own_priority: false,
    }
}

/// The interface of the machine that this runs in.
fn eth0() -> Interface {
    let interfaces = Interfaces::read().expect("interfaces");
    interfaces.named("eth0").expect("eth0").clone()
}

/// Two phones and the PBX between them, whose datapath the test holds.
struct Site {
    net: Direct,
    phones: [Phone; 2],
    pbx: [Phone; 2],
    _banks: [Bank; 2],
}

impl Site {
    fn new() -> Self {
        let net = Direct::new(2).expect("network");
        let banks = [&net.phones, &net.pbx].map(|host| Bank::new(host).expect("sockets"));
        let phones = [0, 1].map(|leg: u8| {
            let port = REMOTE_PORTS[usize::from(leg)];
            let address = SocketAddr::new(Direct::phone_v4(leg), port);
            banks[0].phone(address).expect("phone")
        });
        let pbx = LOCAL_PORTS
            .map(|port| SocketAddr::new(PBX_V4, port))
            .map(|address| banks[1].phone(address).expect("socket"));
        Self {
            net,
            phones,
            pbx,
            _banks: banks,
        }
    }

    fn host(&self) -> &Host {
        &self.net.pbx
    }

    fn index(&self) -> u32 {
        self.host()
            .run(|| nix::net::if_::if_nametoindex("eth0").expect("interface"))
    }

    fn attach(
        &self,
        mode: AttachMode,
        max_streams: u32,
    ) -> Result<(Datapath, Option<Adopted>), DatapathError> {
        self.host().run(|| {
            datapath::ensure_bpffs()?;
            Datapath::attach(&eth0(), mode, max_streams)
        })
    }

    fn fresh(&self, mode: AttachMode, max_streams: u32) -> Datapath {
        let (datapath, adopted) = self.attach(mode, max_streams).expect("attached");
        assert_eq!(adopted, None);
        assert_eq!(datapath.lease(), 0, "nothing is relayed yet");
        datapath
    }

    fn adopt(&self, mode: AttachMode) -> (Datapath, Adopted) {
        let (datapath, adopted) = self.attach(mode, MAX_STREAMS).expect("attached");
        (datapath, adopted.expect("adopted"))
    }

    /// Has both streams relayed.
    fn offload(&self, datapath: &mut Datapath) {
        let mut payload_types = [PayloadType::UNUSED; PAYLOAD_TYPES];
        payload_types[0] = PayloadType { from: 0, to: 0 };
        for leg in [0, 1] {
            let spec = spec(leg);
            datapath.reset(spec.slot);
            datapath.install(&spec).expect("installed");
            datapath.offload(spec.slot, 1, payload_types);
        }
        datapath.renew_lease(monotonic_now() + LONG);
    }

    fn leave(&self, datapath: Datapath) {
        self.host().run(|| datapath.leave());
    }

    fn drop(&self, datapath: Datapath) {
        self.host().run(|| drop(datapath));
    }

    fn talk(&self) {
        for (leg, phone) in self.phones.iter().enumerate() {
            phone.talk(Talk {
                interval: FAST,
                ..Talk::to(SocketAddr::new(PBX_V4, LOCAL_PORTS[leg]), 100 + leg as u32)
            });
        }
    }

    /// Waits until this many more packets of each phone have come to an end.
    fn goes_on(&self, packets: usize) {
        for leg in [0, 1] {
            let arrived = || self.phones[1 - leg].arrivals().len() + self.pbx[leg].arrivals().len();
            let target = arrived() + packets;
            let deadline = Instant::now() + PATIENCE;
            while arrived() < target {
                assert!(Instant::now() < deadline, "packets stopped");
                let there = self.phones[leg].sent();
                self.phones[leg]
                    .wait_sent(there + 1, PATIENCE)
                    .expect("talking");
            }
        }
    }

    /// Silences both phones, and asserts that each of their packets came once, in order, to the other phone or to the
    /// PBX; returns how many came to the PBX.
    fn passed(&self) -> u64 {
        let mut passed = 0;
        for leg in [0, 1] {
            let phone = &self.phones[leg];
            phone.hush();
            let sent = phone.sent();
            let ends = [&self.phones[1 - leg], &self.pbx[leg]];
            let arrived = || ends.map(|end| end.heard(phone).received);
            let deadline = Instant::now() + Duration::from_secs(5);
            while arrived().iter().sum::<u64>() < sent && Instant::now() < deadline {
                thread::yield_now();
            }
            assert_eq!(
                arrived().iter().sum::<u64>(),
                sent,
                "leg {leg}: {:?}",
                arrived()
            );
            for end in ends {
                let heard = end.heard(phone);
                assert_eq!((heard.duplicates, heard.reordered), (0, 0), "leg {leg}");
            }
            passed += arrived()[1];
        }
        passed
    }

    fn exists(&self, path: impl AsRef<Path> + Send) -> bool {
        self.host().run(|| fs::symlink_metadata(path).is_ok())
    }

    /// Asserts that nothing is attached and nothing pinned, without waiting.
    fn nothing_left(&self) {
        assert!(!self.exists("/sys/fs/bpf/relay"), "pins");
        assert_eq!(self.relays(), [] as [u32; 0], "relay");
        assert_eq!(self.observers(), [] as [u32; 0], "observer");
    }

    /// The XDP program that runs.
    fn xdp(&self) -> Option<u32> {
        self.host()
            .run(|| eth0().xdp.first().map(|program| program.id))
    }

    /// The programs that see what comes in: of XDP, then of traffic control.
    fn relays(&self) -> Vec<u32> {
        let tc = self.traffic_control(TcAttachType::Ingress, "ingress");
        self.xdp().into_iter().chain(tc).collect()
    }

    /// The programs at the egress, in their order.
    fn observers(&self) -> Vec<u32> {
        self.traffic_control(TcAttachType::Egress, "egress")
    }

    /// The programs on one side of traffic control, in their order: of TCX or, before Linux 6.6, of clsact.
    fn traffic_control(&self, side: TcAttachType, name: &str) -> Vec<u32> {
        let tcx = self.host().run(|| SchedClassifier::query_tcx("eth0", side));
        if let Ok((_, programs)) = tcx {
            return programs.iter().map(|program| program.id()).collect();
        }
        let mut command = Command::new("tc");
        command.args(["-json", "filter", "show", "dev", "eth0", name]);
        let output = self.host().run_to_end(command).expect("tc");
        // Without clsact it says nothing at all.
        let filters: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let filters = filters.as_array().into_iter().flatten();
        let ids = filters.filter_map(|filter| filter["options"]["prog"]["id"].as_u64());
        ids.map(|id| id.try_into().expect("32 bits")).collect()
    }

    /// Asserts that what is pinned is what is attached, and that one observer is.
    fn whole(&self, pinned: &Pinned, what: &str) {
        let maps: BTreeSet<_> = pinned.maps.keys().map(String::as_str).collect();
        assert_eq!(maps, names::MAPS.into(), "{what}");
        for (attached, links) in [
            (self.relays(), &[names::XDP_LINK, names::TC_LINK][..]),
            (self.observers(), &[names::OBSERVER_LINK]),
        ] {
            let mut pinned = links.iter().filter_map(|link| pinned.programs.get(*link));
            let link = pinned.next();
            assert_eq!((attached.len(), pinned.next()), (1, None), "{what}");
            // A filter of clsact has no link.
            assert!(link.is_none_or(|link| attached == [*link]), "{what}");
        }
    }

    /// Ids of the links and of the maps by the names of their pins.
    fn pinned(&self) -> Pinned {
        self.host().run(|| {
            let mut pinned = Pinned::default();
            for entry in fs::read_dir(DIRECTORY).expect("pins") {
                let path = entry.expect("pin").path();
                let name = path
                    .file_name()
                    .expect("name")
                    .to_str()
                    .expect("text")
                    .to_owned();
                if name.ends_with("_link") {
                    let link: FdLink = PinnedLink::from_pin(&path).expect("link").into();
                    let info = link.info().expect("link");
                    pinned.links.insert(name.clone(), info.id());
                    pinned.programs.insert(name, info.program_id());
                } else {
                    pinned
                        .maps
                        .insert(name, MapInfo::from_pin(&path).expect("map").id());
                }
            }
            pinned
        })
    }

    fn rename(&self, from: &str, to: &str) {
        self.host().run(|| {
            fs::create_dir_all(Path::new(to).parent().expect("folder")).expect("folder");
            fs::rename(from, to).expect("renamed");
        });
    }

    fn remove(&self, path: &str) {
        self.host().run(|| fs::remove_file(path).expect("removed"));
    }

    fn remove_leftovers(&self) -> Result<Vec<String>, DatapathError> {
        self.host().run(|| datapath::remove_leftovers("eth0"))
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Pinned {
    links: BTreeMap<String, u32>,
    maps: BTreeMap<String, u32>,
    programs: BTreeMap<String, u32>,
}

impl Pinned {
    /// The relay's link.
    fn relay(&self) -> Option<u32> {
        let names = [names::XDP_LINK, names::TC_LINK];
        names.iter().find_map(|name| self.links.get(*name)).copied()
    }
}

/// The next daemons carry calls on without losing or passing a packet.
fn carries_calls_on(mode: AttachMode) {
    let site = Site::new();
    let mut datapath = site.fresh(mode, MAX_STREAMS);
    let first = site.pinned();
    site.whole(&first, "fresh");
    site.offload(&mut datapath);
    let lease = datapath.lease();
    site.talk();
    site.goes_on(20);
    site.leave(datapath);
    let mut programs = BTreeSet::from_iter(site.relays());
    for _ in 0..20 {
        site.goes_on(20);
        let (datapath, adopted) = site.adopt(mode);
        let mut expected = [0, 1].map(|leg| (spec(leg).key(), spec(leg).compile()));
        expected.sort_by_key(|(key, _)| key.local_port);
        let mut streams = adopted.streams;
        streams.sort_by_key(|(key, _)| key.local_port);
        assert_eq!(streams, expected);
        assert_eq!((adopted.lease, datapath.lease()), (lease, lease));
        let now = site.pinned();
        assert_eq!((&now.links, &now.maps), (&first.links, &first.maps));
        site.whole(&now, "adopted");
        assert!(programs.insert(site.relays()[0]), "the same program");
        assert!(datapath.state(0).packets > 0 && datapath.state(1).packets > 0);
        site.leave(datapath);
    }
    site.goes_on(20);
    assert_eq!(site.passed(), 0, "packets through the slow path");
    let (datapath, _) = site.adopt(mode);
    // Taken back by its end: no entry of this daemon is without a daemon.
    site.drop(datapath);
    site.nothing_left();
}

#[test]
fn the_next_daemon_carries_calls_on_without_losing_or_passing_a_packet() {
    carries_calls_on(GENERIC);
}

#[test]
fn the_next_daemon_carries_calls_on_in_traffic_control() {
    carries_calls_on(AttachMode::Tc);
}

#[test]
fn another_size_or_mode_replaces_what_was_there_and_loses_nothing() {
    let site = Site::new();
    // Native XDP on veth counts what the peer receives only when that has a program too.
    let _peer = site.net.phones_interface.pass_program().expect("program");
    let mut datapath = site.fresh(GENERIC, MAX_STREAMS);
    site.offload(&mut datapath);
    site.talk();
    let mut before = site.pinned();
    let cases = [
        (GENERIC, MAX_STREAMS * 2),
        (GENERIC, MAX_STREAMS),
        (AttachMode::Native, MAX_STREAMS),
        (AttachMode::Native, 4),
        (AttachMode::Tc, 4),
        (AttachMode::Tc, MAX_STREAMS),
        (GENERIC, MAX_STREAMS),
        (AttachMode::Tc, MAX_STREAMS),
        (AttachMode::Native, MAX_STREAMS),
        (GENERIC, 4),
    ];
    let mut mode = GENERIC;
    for (next, max_streams) in cases {
        site.goes_on(20);
        site.leave(datapath);
        datapath = site.fresh(next, max_streams);
        let now = site.pinned();
        let maps = |pinned: &Pinned| pinned.maps.values().copied().collect::<BTreeSet<_>>();
        assert!(maps(&now).is_disjoint(&maps(&before)), "maps of its own");
        // A filter of clsact has none.
        if let [Some(before), Some(now)] = [&before, &now].map(Pinned::relay) {
            assert_eq!(before == now, next == mode, "the link stays where it can");
        }
        site.whole(&now, "replaced");
        site.goes_on(20);
        site.offload(&mut datapath);
        (before, mode) = (now, next);
    }
    site.goes_on(20);
    assert!(site.passed() > 0, "some before the lease was renewed");
    site.drop(datapath);
    site.nothing_left();
}

/// Whatever a killed daemon left half done, the next one stands whole.
fn stands_whole(mode: AttachMode) {
    let site = Site::new();
    let datapath = site.fresh(mode, MAX_STREAMS);
    let pinned = site.pinned();
    site.drop(datapath);
    let pins: Vec<_> = pinned.maps.keys().chain(pinned.links.keys()).collect();
    // Which pins are gone, and which are still in the folder of what is being prepared.
    let mut damages: Vec<(&[&String], &[&String])> = Vec::new();
    // The last map, and the links.
    for pin in pins[5..].chunks(1) {
        damages.extend([(pin, &[][..]), (&[], pin)]);
    }
    damages.extend((0..pins.len()).map(|moved| (&[][..], &pins[moved..])));
    for (gone, staged) in damages {
        let what = format!("{gone:?} gone, {staged:?} not moved up");
        for detach in [false, true] {
            let datapath = site.fresh(mode, MAX_STREAMS);
            site.leave(datapath);
            for pin in gone {
                site.remove(&format!("{DIRECTORY}/{pin}"));
                // The kernel detaches a link without a pin a moment later.
                let deadline = Instant::now() + PATIENCE;
                while match pin.as_str() {
                    names::XDP_LINK | names::TC_LINK => !site.relays().is_empty(),
                    names::OBSERVER_LINK => !site.observers().is_empty(),
                    _ => false,
                } {
                    assert!(Instant::now() < deadline, "still attached");
                    thread::yield_now();
                }
            }
            for pin in staged {
                site.rename(
                    &format!("{DIRECTORY}/{pin}"),
                    &format!("{DIRECTORY}/next/{pin}"),
                );
            }
            if detach {
                let removed = site.remove_leftovers().expect(&what);
                assert!(removed[0].starts_with(DIRECTORY), "{removed:?}");
            } else {
                let datapath = site.fresh(mode, MAX_STREAMS);
                let pinned = site.pinned();
                site.whole(&pinned, &what);
                site.drop(datapath);
            }
            site.nothing_left();
        }
    }
}

#[test]
fn whatever_a_killed_daemon_left_half_done_the_next_one_stands_whole() {
    stands_whole(GENERIC);
}

#[test]
fn whatever_a_killed_daemon_left_half_done_in_traffic_control_the_next_one_stands_whole() {
    stands_whole(AttachMode::Tc);
}

/// What a killed daemon had begun to replace is carried on.
fn carries_on_what_was_being_replaced(mode: AttachMode) {
    let site = Site::new();
    let mut datapath = site.fresh(mode, MAX_STREAMS);
    site.offload(&mut datapath);
    site.talk();
    site.leave(datapath);
    let before = site.pinned();
    let next = format!("{DIRECTORY}/next");
    site.host().run(|| {
        fs::create_dir(&next).expect("folder");
        let map = MapData::from_pin(format!("{DIRECTORY}/CONTROL")).expect("map");
        map.pin(format!("{next}/CONTROL")).expect("pinned");
        // The last step before the earlier instance is touched.
        for name in [names::XDP_LINK, names::TC_LINK] {
            let link = before.links.get(name);
            let link = link.map(|_| PinnedLink::from_pin(format!("{DIRECTORY}/{name}")));
            if let Some(link) = link {
                let link = FdLink::from(link.expect("link"));
                link.pin(format!("{next}/{name}")).expect("pinned");
            }
        }
    });
    // One that cannot begin touches nothing.
    let alien = format!("{DIRECTORY}/alien");
    site.host().run(|| {
        let map = MapData::from_pin(format!("{DIRECTORY}/STATE")).expect("map");
        map.pin(&alien).expect("pinned");
    });
    let refused = site.attach(mode, MAX_STREAMS).map(drop);
    assert!(
        matches!(refused, Err(DatapathError::ForeignPin { .. })),
        "{refused:?}"
    );
    site.goes_on(20);
    site.remove(&alien);
    let (datapath, _) = site.adopt(mode);
    assert!(!site.exists(&next));
    let now = site.pinned();
    assert_eq!((&now.links, &now.maps), (&before.links, &before.maps));
    site.whole(&now, "adopted");
    site.goes_on(20);
    assert_eq!(site.passed(), 0, "packets through the slow path");
    site.drop(datapath);
    site.nothing_left();
}

#[test]
fn what_a_killed_daemon_had_begun_to_replace_is_carried_on() {
    carries_on_what_was_being_replaced(GENERIC);
}

#[test]
fn what_a_killed_daemon_had_begun_to_replace_in_traffic_control_is_carried_on() {
    carries_on_what_was_being_replaced(AttachMode::Tc);
}

#[test]
fn other_versions_give_way_to_this_one_and_detach_removes_them_all() {
    let site = Site::new();
    for attaches in [true, false] {
        // A version 1, which had maps only, and a version to come, which is attached.
        let datapath = site.fresh(GENERIC, MAX_STREAMS);
        site.leave(datapath);
        let link = site.pinned().links[names::XDP_LINK];
        site.rename("/sys/fs/bpf/relay/v6", "/sys/fs/bpf/relay/v7");
        for name in [names::STREAMS, names::STATE, names::COUNTERS] {
            site.host().run(|| {
                let map = MapData::from_pin(format!("/sys/fs/bpf/relay/v7/eth0/{name}"));
                fs::create_dir_all("/sys/fs/bpf/relay/v1/eth0").expect("folder");
                let map = map.expect("map");
                map.pin(format!("/sys/fs/bpf/relay/v1/eth0/{name}"))
                    .expect("pinned");
            });
        }
        if attaches {
            site.talk();
            site.goes_on(20);
            let datapath = site.fresh(GENERIC, MAX_STREAMS);
            assert_eq!(site.pinned().links[names::XDP_LINK], link, "taken over");
            for other in ["v1", "v7"] {
                assert!(
                    !site.exists(format!("/sys/fs/bpf/relay/{other}")),
                    "{other}"
                );
            }
            assert_eq!(site.observers().len(), 1);
            site.drop(datapath);
            assert!(site.passed() > 0, "there are no streams");
        } else {
            let removed = site.remove_leftovers().expect("removed");
            let has = |words: &str| removed.iter().any(|line| line.contains(words));
            assert!(has("v1/eth0 (3 maps)"), "{removed:?}");
            assert!(has("v7/eth0 (XDP program, "), "{removed:?}");
            assert!(has(names::OBSERVE) || has("observer"), "{removed:?}");
        }
        site.nothing_left();
    }
}

#[test]
fn what_is_not_the_relays_is_neither_detached_nor_removed() {
    let site = Site::new();
    let refused = || match site.attach(GENERIC, MAX_STREAMS) {
        Ok(_) => panic!("attached"),
        Err(error) => error,
    };
    let other = site.net.pbx_interface.pass_program().expect("program");
    let id = site.xdp().expect("attached");
    assert!(matches!(refused(), DatapathError::OtherProgram { .. }));
    assert_eq!(site.remove_leftovers().expect("nothing"), [] as [String; 0]);
    assert_eq!(site.xdp(), Some(id));
    let index = site.index();
    let owns = || {
        site.host()
            .run(|| datapath::owns("eth0", index, site.xdp()?).ok())
    };
    assert_eq!(owns(), Some(false));
    drop(other);
    site.nothing_left();

    // A map of another program, in a place of ours.
    let datapath = site.fresh(GENERIC, MAX_STREAMS);
    site.leave(datapath);
    assert_eq!(owns(), Some(true));
    let alien = format!("{DIRECTORY}/alien");
    site.host().run(|| {
        let map = MapData::from_pin(format!("{DIRECTORY}/CONTROL")).expect("map");
        map.pin(&alien).expect("pinned");
    });
    let before = (site.xdp(), site.observers());
    let error = refused().to_string();
    assert!(error.contains(&alien) && error.contains("rm "), "{error}");
    assert_eq!((site.xdp(), site.observers()), before, "left as it was");
    let error = site.remove_leftovers().expect_err("refused").to_string();
    assert!(error.contains(&alien), "{error}");
    assert!(site.exists(&alien));
    assert_eq!(
        (site.xdp(), site.observers()),
        (None, vec![]),
        "ours is gone"
    );
    site.remove(&alien);
    site.remove_leftovers().expect("removed");
    site.nothing_left();
}

#[test]
fn a_running_daemon_keeps_its_interface_and_a_lost_interface_is_no_obstacle() {
    let site = Site::new();
    let datapath = site.fresh(GENERIC, MAX_STREAMS);
    let running = |outcome: Result<(), DatapathError>| {
        assert!(
            matches!(outcome, Err(DatapathError::Running { .. })),
            "{outcome:?}"
        );
    };
    running(site.attach(GENERIC, MAX_STREAMS).map(drop));
    running(site.remove_leftovers().map(drop));
    running(site.host().run(|| datapath::check_unserved("eth0")));
    site.leave(datapath);
    site.host()
        .run(|| datapath::check_unserved("eth0"))
        .expect("unserved");
    site.host().ip("link delete eth0").expect("deleted");
    let removed = site.remove_leftovers().expect("removed");
    assert_eq!(removed.len(), 1, "{removed:?}");
    assert!(!site.exists("/sys/fs/bpf/relay"));
}

#[test]
fn an_interface_that_goes_before_the_datapath_is_attached_is_told_to_be_gone() {
    let site = Site::new();
    site.host().run(|| {
        datapath::ensure_bpffs().expect("bpffs");
        let gone = eth0();
        site.host().ip("link delete eth0").expect("deleted");
        for mode in [GENERIC, AttachMode::Tc] {
            let outcome = Datapath::attach(&gone, mode, MAX_STREAMS);
            let error = outcome.err().expect("nothing to attach to");
            assert!(
                matches!(error, DatapathError::InterfaceGone(_)),
                "{mode:?}: {error}"
            );
        }
    });
    assert!(!site.exists("/sys/fs/bpf/relay"));
}

#[test]
fn an_interface_that_is_another_by_now_gets_a_new_instance() {
    let site = Site::new();
    let datapath = site.fresh(GENERIC, MAX_STREAMS);
    site.leave(datapath);
    let index = site.index();
    site.host()
        .ip("link delete eth0\nlink add eth0 type veth peer name eth1\nlink set eth0 up")
        .expect("another");
    assert_ne!(site.index(), index);
    let datapath = site.fresh(GENERIC, MAX_STREAMS);
    assert_eq!(site.xdp(), Some(site.pinned().programs[names::XDP_LINK]));
    site.drop(datapath);
    site.nothing_left();
}

#[test]
fn relay_and_observer_come_before_other_programs_of_traffic_control() {
    type Load = fn(&mut Ebpf) -> Result<&mut SchedClassifier, DatapathError>;
    let site = Site::new();
    let index = site.index();
    let xdp = site.net.pbx_interface.pass_program().expect("program");
    site.host().run(|| {
        let mut ebpf = datapath::load(GENERIC, LinkLayer::Ethernet, 2).expect("loaded");
        // For kernels without TCX.
        tc::qdisc_add_clsact("eth0").expect("clsact");
        // Each where the relay has none of this name.
        for (side, load) in [
            (TcAttachType::Ingress, datapath::load_observer as Load),
            (TcAttachType::Egress, datapath::load_tc),
        ] {
            let program = load(&mut ebpf).expect("loaded");
            let link = program.attach("eth0", side).expect("attached");
            // It stays as long as the machine does.
            mem::forget(program.take_link(link).expect("link"));
        }
    });
    let sides = || {
        let ingress = site.traffic_control(TcAttachType::Ingress, "ingress");
        [ingress, site.observers()]
    };
    let theirs = sides();
    let datapath = site.fresh(AttachMode::Tc, MAX_STREAMS);
    for (attached, theirs) in sides().iter().zip(&theirs) {
        let [ours, rest @ ..] = &attached[..] else {
            panic!("nothing attached");
        };
        assert!(rest == theirs && !theirs.contains(ours), "{ours} {rest:?}");
    }
    assert_eq!(
        site.host()
            .run(|| datapath::attached_mode("eth0", index))
            .expect("mode"),
        Some(AttachMode::Tc)
    );
    site.drop(datapath);
    assert_eq!(sides(), theirs, "only ours goes");
    assert!(site.xdp().is_some(), "another XDP program is no obstacle");
    drop(xdp);
}

#[test]
fn the_capabilities_kept_suffice_to_carry_on_and_to_end() {
    let site = Site::new();
    site.host().run(|| {
        // Of this thread only.
        privileges::keep_for_attaching().expect("kept");
        let attach = || Datapath::attach(&eth0(), GENERIC, MAX_STREAMS).expect("attached");
        attach().0.leave();
        let (datapath, adopted) = attach();
        assert!(adopted.is_some());
        privileges::keep_for_serving().expect("kept");
        drop(datapath);
    });
    site.nothing_left();
    let datapath = site.fresh(GENERIC, MAX_STREAMS);
    site.leave(datapath);
    site.host().run(|| {
        privileges::keep_for_attaching().expect("kept");
        privileges::keep_for_serving().expect("kept");
        datapath::remove_leftovers("eth0").expect("removed");
    });
    site.nothing_left();
}

/// Reads events as the daemon does.
fn with_events<T>(datapath: &mut Datapath, work: impl AsyncFnOnce(&mut Events) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("event loop").block_on(async {
        let mut events = datapath.events().expect("events");
        work(&mut events).await
    })
}

#[test]
fn events_wait_for_the_next_daemon() {
    let site = Site::new();
    let mut datapath = site.fresh(GENERIC, MAX_STREAMS);
    site.offload(&mut datapath);
    let stranger = |port: u16, expected: usize| {
        let bank = Bank::new(&site.net.phones).expect("sockets");
        let phone = bank
            .phone(SocketAddr::new(Direct::phone_v4(0), port))
            .expect("phone");
        phone.talk(Talk {
            count: Some(1),
            ..Talk::to(SocketAddr::new(PBX_V4, LOCAL_PORTS[0]), 9)
        });
        site.pbx[0]
            .wait_received(expected, PATIENCE)
            .expect("passed");
    };
    let is = |event: Event, port: u16| {
        assert_eq!((event.kind, event.slot), (event::UNEXPECTED_SOURCE, 0));
        assert_eq!(
            (event.address, event.port),
            (Direct::phone_v4(0).into(), port)
        );
    };
    stranger(40_000, 1);
    site.leave(datapath);
    let (mut datapath, _) = site.adopt(GENERIC);
    with_events(&mut datapath, async |events| {
        is(events.next().await, 40_000);
        // One that comes while the reader sleeps.
        let timeout = tokio::time::timeout(Duration::from_millis(150), events.next());
        timeout.await.expect_err("no other event");
        let next = events.next();
        let (event, ()) = tokio::join!(next, async { stranger(40_002, 2) });
        is(event, 40_002);
    });
    site.leave(datapath);
    let (mut datapath, _) = site.adopt(GENERIC);
    with_events(&mut datapath, async |events| {
        let timeout = tokio::time::timeout(Duration::from_millis(1), events.next());
        timeout.await.expect_err("each is read once");
    });
    site.drop(datapath);
}

/// `STREAMS` of the kernel.
type StreamMap = HashMap<MapData, [u8; 20], [u8; size_of::<Stream>()]>;

#[test]
fn half_of_a_stream_does_not_outlive_its_daemon() {
    let site = Site::new();
    let mut datapath = site.fresh(GENERIC, MAX_STREAMS);
    // The PBX sends from another address than it receives at.
    let elsewhere = |leg: u8| endpoint((PBX_V4, LOCAL_PORTS[usize::from(leg)] + 100));
    let stream = |leg: u8| StreamSpec {
        sends_from: elsewhere(leg),
        new_source: elsewhere(1 - leg),
        ..spec(leg)
    };
    for leg in 0..2 {
        datapath.install(&stream(leg)).expect("installed");
    }
    let with = |change: fn(&mut StreamMap)| {
        site.host().run(|| {
            let pin = PathBuf::from(DIRECTORY).join(names::STREAMS);
            let map = MapData::from_pin(pin).expect("map");
            let mut map = Map::HashMap(map).try_into().expect("map");
            change(&mut map);
            map.keys().count()
        })
    };
    let entries = || with(|_| {});
    assert_eq!(entries(), 4);
    // As a daemon that was killed between the two entries leaves it.
    with(|map| {
        let key = zerocopy::transmute!(spec(1).key());
        map.remove(&key).expect("removed");
    });
    assert_eq!(entries(), 3);
    site.leave(datapath);
    let (datapath, adopted) = site.adopt(GENERIC);
    assert_eq!((adopted.streams.len(), entries()), (1, 1));
    site.drop(datapath);
}
