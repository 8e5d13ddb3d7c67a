//! Next hops against the real kernel: each test has a host and a gateway in network namespaces of
//! its own, and changes them with `ip` as an administrator would. Needs root.

use std::{
    fs::File,
    io::Write as _,
    net::{IpAddr, Ipv4Addr},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    unistd::gettid,
};
use relay_user::next_hop::{
    Changes, Interface, InterfaceError, Interfaces, Macs, NextHop, NextHopError, NextHops, Notice,
    Path, Resolution, open,
};
use tokio::sync::oneshot;

/// Long enough for any neighbour discovery: what is awaited for longer never comes.
const PATIENCE: Duration = Duration::from_secs(30);

const HOST: &str = "02:00:00:00:00:01";
const GATEWAY: &str = "02:00:00:00:00:fe";

/// What the issue allows from a change in the kernel's tables to the controller.
const ALLOWED: Duration = Duration::from_millis(100);

/// A network namespace without a name: it is gone when its thread and its sockets are.
struct Namespace {
    handle: String,
    jobs: mpsc::Sender<(String, oneshot::Sender<()>)>,
}

impl Namespace {
    fn new() -> Self {
        let (jobs, queue) = mpsc::channel::<(String, oneshot::Sender<()>)>();
        let (ready, handle) = mpsc::channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare: these tests need root");
            let task = format!("/proc/{}/task/{}/ns/net", std::process::id(), gettid());
            ready.send(task).expect("the creator waits");
            for (batch, done) in queue {
                ip(&batch);
                // Nobody waits any more when the test has failed.
                let _ = done.send(());
            }
        });
        let handle = handle.recv().expect("a namespace, which needs root");
        Self { handle, jobs }
    }

    /// Runs `ip` commands, one on each line, without holding up the caller's runtime.
    async fn ip(&self, batch: &str) {
        let (done, wait) = oneshot::channel();
        self.jobs
            .send((batch.to_owned(), done))
            .expect("the namespace lives");
        wait.await
            .unwrap_or_else(|_| panic!("`ip` failed at: {batch}"));
    }
}

/// Runs `ip` commands in the namespace of this thread; as `ip -6` when they start with `-6`.
fn ip(batch: &str) {
    let (family, batch) = match batch.strip_prefix("-6 ") {
        Some(batch) => (Some("-6"), batch),
        None => (None, batch),
    };
    let mut child = Command::new("ip")
        .args(family)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("iproute2 is installed");
    let mut commands = child.stdin.take().expect("piped");
    commands.write_all(batch.as_bytes()).expect("ip reads");
    drop(commands);
    let status = child.wait().expect("ip ran");
    assert!(status.success(), "`ip` failed at: {batch}");
}

/// A host with one link to a gateway.
struct World {
    host: Namespace,
    gateway: Namespace,
}

impl World {
    /// Builds it and runs the test on a thread inside the host.
    fn run(test: impl AsyncFnOnce(Self) + Send + 'static) {
        let run = move || {
            let world = Self {
                host: Namespace::new(),
                gateway: Namespace::new(),
            };
            let host = File::open(&world.host.handle).expect("the namespace lives");
            setns(host, CloneFlags::CLONE_NEWNET).expect("setns");
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime")
                .block_on(async {
                    world.build().await;
                    test(world).await;
                });
        };
        thread::spawn(run)
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }

    async fn build(&self) {
        let Self { host, gateway } = self;
        host.ip(&format!(
            "link set lo up
             link add eth0 address {HOST} type veth peer name eth0 address {GATEWAY} netns {}
             link set eth0 addrgenmode none",
            gateway.handle
        ))
        .await;
        // Link-local addresses by hand, for neighbour discovery needs one: if the kernel's own came
        // up a second later, all would be looked up then, and a change that was missed be hidden.
        gateway
            .ip("link set eth0 addrgenmode none
                 address add 192.0.2.254/24 dev eth0
                 address add 2001:db8::fe/64 dev eth0 nodad
                 address add fe80::fe/64 dev eth0 nodad
                 link set eth0 up")
            .await;
        host.ip("address add 192.0.2.1/24 dev eth0
                 address add 2001:db8::1/64 dev eth0 nodad
                 address add fe80::1/64 dev eth0 nodad
                 link set eth0 up
                 route add default via 192.0.2.254
                 route add 2001:db8:1::/48 via 2001:db8::fe")
            .await;
    }
}

fn interface(name: &str) -> Result<Interface, InterfaceError> {
    let interfaces = Interfaces::read().expect("netlink");
    interfaces.named(name).cloned()
}

/// A resolver at work, as the daemon would have it.
struct Watcher {
    next_hops: NextHops,
    changes: Changes,
}

impl Watcher {
    fn new() -> Self {
        let attached = interface("eth0").expect("eth0 exists").index;
        let (next_hops, resolver, changes) = open(attached).expect("netlink sockets");
        tokio::spawn(resolver.run());
        Self { next_hops, changes }
    }

    async fn watch(&self, path: Path) -> Resolution {
        let notice = self.next_hops.watch(path).await.expect("the resolver runs");
        notice.resolution
    }

    /// Waits for a change of this path that satisfies, and skips others.
    async fn until(&mut self, path: Path, accept: impl Fn(&Resolution) -> bool) -> Resolution {
        let mut last = None;
        let wait = async {
            loop {
                let Notice {
                    path: changed,
                    resolution,
                    ..
                } = self.changes.recv().await.expect("the resolver runs");
                if changed == path {
                    if accept(&resolution) {
                        return resolution;
                    }
                    last = Some(resolution);
                }
            }
        };
        let done = tokio::time::timeout(PATIENCE, wait).await;
        done.unwrap_or_else(|_| panic!("no such change of {path}; the last was {last:?}"))
    }

    /// Watches a path until its next hop is known.
    async fn known(&mut self, path: Path) -> NextHop {
        let mut resolution = self.watch(path).await;
        loop {
            match resolution {
                Resolution::Known(next_hop) => return next_hop,
                _ => resolution = self.until(path, |_| true).await,
            }
        }
    }

    async fn until_mac(&mut self, path: Path, mac: &str) {
        let mac = bytes(mac);
        self.until(
            path,
            |now| matches!(now, Resolution::Known(next_hop) if next_hop.macs.is_some_and(|macs| macs.destination == mac)),
        )
        .await;
    }

    /// Watches a path that cannot be resolved.
    async fn error(&self, path: Path) -> NextHopError {
        match self.watch(path).await {
            Resolution::Unreachable(error) => error,
            other => panic!("{path} should be unreachable, but is {other:?}"),
        }
    }
}

fn path(remote: &str) -> Path {
    let remote: IpAddr = remote.parse().expect(remote);
    let local = if remote.is_ipv4() {
        "192.0.2.1"
    } else {
        "2001:db8::1"
    };
    Path {
        local: local.parse().expect(local),
        remote,
    }
}

fn bytes(mac: &str) -> [u8; 6] {
    let bytes: Vec<_> = mac
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).expect("two hexadecimal digits"))
        .collect();
    bytes.try_into().expect("six bytes")
}

fn to_gateway() -> NextHop {
    NextHop {
        macs: Some(Macs {
            source: bytes(HOST),
            destination: bytes(GATEWAY),
        }),
        vlan: vec![],
        mtu: 1500,
    }
}

#[test]
fn a_gateway_never_heard_of_is_resolved() {
    World::run(async |_world| {
        let mut watcher = Watcher::new();
        assert_eq!(watcher.known(path("203.0.113.9")).await, to_gateway());
        assert_eq!(watcher.known(path("2001:db8:1::9")).await, to_gateway());
    });
}

#[test]
fn a_remote_on_the_link_is_its_own_neighbour() {
    World::run(async |_world| {
        let mut watcher = Watcher::new();
        assert_eq!(watcher.known(path("192.0.2.254")).await, to_gateway());
        assert_eq!(watcher.known(path("2001:db8::fe")).await, to_gateway());
    });
}

#[test]
fn a_changed_gateway_mac_arrives_in_time() {
    World::run(async |world| {
        let mut watcher = Watcher::new();
        for (remote, gateway) in [
            ("203.0.113.9", "192.0.2.254"),
            ("2001:db8:1::9", "2001:db8::fe"),
        ] {
            let path = path(remote);
            watcher.known(path).await;
            let mut times = Vec::new();
            for round in 0..50 {
                let mac = format!("02:00:00:00:01:{round:02x}");
                let change = format!("neighbour replace {gateway} lladdr {mac} dev eth0");
                let before = Instant::now();
                tokio::join!(world.host.ip(&change), watcher.until_mac(path, &mac));
                times.push(before.elapsed());
            }
            report("gateway MAC, with the run of `ip`", &mut times);
        }
    });
}

#[test]
fn a_gateway_that_announces_its_new_mac_is_followed() {
    World::run(async |world| {
        let mut watcher = Watcher::new();
        let path = path("203.0.113.9");
        watcher.known(path).await;
        world
            .gateway
            .ip("link set eth0 address 02:00:00:00:00:99")
            .await;
        // The ARP request for the host carries the new address.
        world
            .gateway
            .ip("neighbour flush dev eth0
                 neighbour add 192.0.2.1 dev eth0 use nud none")
            .await;
        watcher.until_mac(path, "02:00:00:00:00:99").await;
    });
}

#[test]
fn a_silent_neighbour_is_asked_until_it_answers() {
    World::run(async |world| {
        let mut watcher = Watcher::new();
        for (remote, command) in [
            ("192.0.2.50", "address add 192.0.2.50/24 dev eth0"),
            ("2001:db8::50", "address add 2001:db8::50/64 dev eth0 nodad"),
        ] {
            // Until IPv6 is up on the link.
            watcher.known(path("2001:db8::fe")).await;
            let path = path(remote);
            let waiting = Resolution::Waiting {
                neighbour: path.remote,
                interface: "eth0".to_owned(),
            };
            assert_eq!(watcher.watch(path).await, waiting);
            world.gateway.ip(command).await;
            let known = watcher.until(path, |now| *now != waiting).await;
            assert_eq!(known, Resolution::Known(to_gateway()));
        }
    });
}

#[test]
fn a_neighbour_lost_is_waited_for_and_asked_again() {
    World::run(async |world| {
        let mut watcher = Watcher::new();
        let path = path("203.0.113.9");
        watcher.known(path).await;
        world
            .gateway
            .ip("address del 192.0.2.254/24 dev eth0")
            .await;
        world.host.ip("neighbour del 192.0.2.254 dev eth0").await;
        watcher
            .until(path, |now| matches!(now, Resolution::Waiting { .. }))
            .await;
        world
            .gateway
            .ip("address add 192.0.2.254/24 dev eth0")
            .await;
        watcher.until_mac(path, GATEWAY).await;
    });
}

#[test]
fn a_route_through_another_gateway_is_followed() {
    World::run(async |world| {
        world
            .host
            .ip(
                "neighbour add 192.0.2.253 lladdr 02:00:00:00:00:fd dev eth0 nud permanent
                 neighbour add 2001:db8::fd lladdr 02:00:00:00:00:fd dev eth0 nud permanent",
            )
            .await;
        let mut watcher = Watcher::new();
        for (remote, prefix, old, new) in [
            ("203.0.113.9", "default", "192.0.2.254", "192.0.2.253"),
            (
                "2001:db8:1::9",
                "2001:db8:1::/48",
                "2001:db8::fe",
                "2001:db8::fd",
            ),
        ] {
            let path = path(remote);
            watcher.known(path).await;
            let mut times = Vec::new();
            for round in 0..50 {
                let (gateway, mac) = match round % 2 {
                    0 => (new, "02:00:00:00:00:fd"),
                    _ => (old, GATEWAY),
                };
                let change = format!("route replace {prefix} via {gateway}");
                let before = Instant::now();
                tokio::join!(world.host.ip(&change), watcher.until_mac(path, mac));
                times.push(before.elapsed());
            }
            report("route, with the run of `ip`", &mut times);
        }
        // A more specific route that comes and goes.
        let path = path("203.0.113.9");
        world
            .host
            .ip("route add 203.0.113.0/24 via 192.0.2.253")
            .await;
        watcher.until_mac(path, "02:00:00:00:00:fd").await;
        world.host.ip("route del 203.0.113.0/24").await;
        watcher.until_mac(path, GATEWAY).await;
    });
}

#[test]
fn policy_rules_and_next_hop_objects_count() {
    World::run(async |world| {
        world
            .host
            .ip(
                "neighbour add 192.0.2.253 lladdr 02:00:00:00:00:fd dev eth0 nud permanent
                 route add default via 192.0.2.253 table 7",
            )
            .await;
        let mut watcher = Watcher::new();
        let path = path("203.0.113.9");
        watcher.known(path).await;
        world
            .host
            .ip("rule add from 192.0.2.1 ipproto 17 table 7")
            .await;
        watcher.until_mac(path, "02:00:00:00:00:fd").await;
        world
            .host
            .ip("rule del from 192.0.2.1 ipproto 17 table 7")
            .await;
        watcher.until_mac(path, GATEWAY).await;
        let path6 = self::path("2001:db8:1::9");
        watcher.known(path6).await;
        world
            .host
            .ip("-6 rule add from 2001:db8::1 ipproto 17 prohibit")
            .await;
        watcher
            .until(path6, |now| {
                *now == Resolution::Unreachable(NextHopError::Prohibited(path6))
            })
            .await;
        world
            .host
            .ip("nexthop add id 5 via 192.0.2.254 dev eth0
                 route add 203.0.113.0/24 nhid 5
                 nexthop replace id 5 via 192.0.2.253 dev eth0")
            .await;
        watcher.until_mac(path, "02:00:00:00:00:fd").await;
    });
}

#[test]
fn an_ipv4_route_through_an_ipv6_gateway_is_followed() {
    World::run(async |world| {
        world
            .host
            .ip("route add 203.0.113.0/24 via inet6 2001:db8::fe dev eth0 mtu 1400")
            .await;
        let mut watcher = Watcher::new();
        let next_hop = watcher.known(path("203.0.113.9")).await;
        assert_eq!(
            next_hop,
            NextHop {
                mtu: 1400,
                ..to_gateway()
            }
        );
    });
}

#[test]
fn of_a_multipath_route_the_chosen_way_is_taken() {
    World::run(async |world| {
        world
            .host
            .ip(
                "neighbour add 192.0.2.253 lladdr 02:00:00:00:00:fd dev eth0 nud permanent
                 route add 203.0.113.0/24 nexthop via 192.0.2.254 nexthop via 192.0.2.253",
            )
            .await;
        let mut watcher = Watcher::new();
        let mut seen = Vec::new();
        for remote in 1..=64 {
            let next_hop = watcher.known(path(&format!("203.0.113.{remote}"))).await;
            seen.extend(next_hop.macs.map(|macs| macs.destination));
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [bytes("02:00:00:00:00:fd"), bytes(GATEWAY)]);
    });
}

#[test]
fn a_link_that_goes_down_is_reported_once_for_each_path() {
    World::run(async |world| {
        let mut watcher = Watcher::new();
        let paths = [
            path("203.0.113.9"),
            path("203.0.113.10"),
            path("2001:db8:1::9"),
        ];
        for path in paths {
            watcher.known(path).await;
        }
        let down = Resolution::Unreachable(NextHopError::LinkDown("eth0".to_owned()));
        world.host.ip("link set eth0 down").await;
        let mut told = Vec::new();
        for _ in paths {
            let Notice {
                path, resolution, ..
            } = watcher.changes.recv().await.expect("the resolver runs");
            assert_eq!(resolution, down);
            told.push(path);
        }
        assert!(paths.iter().all(|path| told.contains(path)), "{told:?}");
        world
            .host
            .ip("link set eth0 up
                 route add default via 192.0.2.254")
            .await;
        // The next that is told is about the way back up: nothing is told twice.
        let Notice { resolution, .. } = watcher.changes.recv().await.expect("the resolver runs");
        assert_ne!(resolution, down);
        watcher.known(paths[0]).await;
        // No carrier.
        world.gateway.ip("link set eth0 down").await;
        watcher.until(paths[0], |now| *now == down).await;
        world.gateway.ip("link set eth0 up").await;
        watcher.until_mac(paths[0], GATEWAY).await;
    });
}

#[test]
fn the_end_of_the_interface_is_the_end_of_the_resolver() {
    World::run(async |world| {
        let attached = interface("eth0").expect("eth0 exists").index;
        let (next_hops, resolver, _changes) = open(attached).expect("netlink sockets");
        let resolver = tokio::spawn(resolver.run());
        let path = path("203.0.113.9");
        next_hops.watch(path).await.expect("the resolver runs");
        world.host.ip("link del eth0").await;
        let error = resolver.await.expect("no panic").expect_err("it is gone");
        assert!(error.to_string().contains("eth0 is gone"), "{error}");
        next_hops.watch(path).await.expect_err("nobody answers");
    });
}

#[test]
fn a_changed_mtu_or_own_mac_arrives() {
    World::run(async |world| {
        let mut watcher = Watcher::new();
        let path = path("203.0.113.9");
        watcher.known(path).await;
        world.host.ip("link set eth0 mtu 1400").await;
        let next_hop = NextHop {
            mtu: 1400,
            ..to_gateway()
        };
        watcher
            .until(path, |now| *now == Resolution::Known(next_hop.clone()))
            .await;
        world
            .host
            .ip("link set eth0 address 02:00:00:00:00:02")
            .await;
        let source = bytes("02:00:00:00:00:02");
        watcher
            .until(
                path,
                |now| matches!(now, Resolution::Known(next_hop) if next_hop.macs.is_some_and(|macs| macs.source == source)),
            )
            .await;
    });
}

#[test]
fn what_cannot_be_reached_says_why() {
    World::run(async |world| {
        world
            .host
            .ip("route add blackhole 198.51.100.1
                 route add unreachable 198.51.100.2
                 route add prohibit 198.51.100.3
                 route add blackhole 2001:db8:2::1
                 route add unreachable 2001:db8:2::2
                 route add prohibit 2001:db8:2::3
                 route add 198.51.100.4 encap ip id 5 dst 192.0.2.9 via 192.0.2.254
                 link add eth1 type veth peer name eth2
                 link set eth1 up
                 link set eth2 up
                 route add 198.51.100.5 dev eth1
                 address add 192.0.2.99/32 dev lo")
            .await;
        let mut watcher = Watcher::new();
        // Until IPv6 is up on the link.
        watcher.known(path("2001:db8::fe")).await;
        let other = |remote: &str| NextHopError::OtherInterface {
            remote: remote.parse().expect(remote),
            interface: "eth1".to_owned(),
            attached: "eth0".to_owned(),
        };
        let not_unicast = |remote: &str, kind| NextHopError::NotUnicast {
            remote: remote.parse().expect(remote),
            kind,
        };
        for (remote, error) in [
            (
                "198.51.100.1",
                NextHopError::Blackhole(path("198.51.100.1")),
            ),
            (
                "198.51.100.2",
                NextHopError::RouteUnreachable(path("198.51.100.2")),
            ),
            (
                "198.51.100.3",
                NextHopError::Prohibited(path("198.51.100.3")),
            ),
            (
                "2001:db8:2::1",
                NextHopError::Blackhole(path("2001:db8:2::1")),
            ),
            (
                "2001:db8:2::2",
                NextHopError::RouteUnreachable(path("2001:db8:2::2")),
            ),
            (
                "2001:db8:2::3",
                NextHopError::Prohibited(path("2001:db8:2::3")),
            ),
            (
                "2001:db8:3::1",
                NextHopError::NoRoute(path("2001:db8:3::1")),
            ),
            (
                "198.51.100.4",
                NextHopError::Encapsulated(path("198.51.100.4").remote),
            ),
            ("198.51.100.5", other("198.51.100.5")),
            (
                "192.0.2.99",
                NextHopError::RemoteIsLocal(path("192.0.2.99").remote),
            ),
            ("192.0.2.255", not_unicast("192.0.2.255", "broadcast")),
            ("224.0.0.5", not_unicast("224.0.0.5", "multicast")),
            ("ff02::1", not_unicast("ff02::1", "multicast")),
        ] {
            assert_eq!(watcher.error(path(remote)).await, error);
        }
        let right = path("203.0.113.9");
        let swapped = Path {
            local: right.remote,
            remote: right.local,
        };
        let error = watcher.error(swapped).await;
        assert!(
            error.to_string().contains("did you swap LOCAL=REMOTE?"),
            "{error}"
        );
    });
}

#[test]
fn an_error_ends_when_its_cause_does() {
    World::run(async |world| {
        let mut watcher = Watcher::new();
        let not_ours = Path {
            local: IpAddr::from([198, 51, 100, 7]),
            ..path("203.0.113.9")
        };
        let no_route = path("2001:db8:3::1");
        watcher.error(not_ours).await;
        watcher.error(no_route).await;
        // AnyIP counts as an address of the host.
        world
            .host
            .ip("route add local 198.51.100.0/24 dev lo")
            .await;
        watcher.until_mac(not_ours, GATEWAY).await;
        world
            .host
            .ip("route add 2001:db8:3::/48 via 2001:db8::fe")
            .await;
        watcher.until_mac(no_route, GATEWAY).await;
        world
            .host
            .ip("route del local 198.51.100.0/24 dev lo")
            .await;
        watcher
            .until(not_ours, |now| matches!(now, Resolution::Unreachable(_)))
            .await;
    });
}

#[test]
fn each_watch_needs_its_unwatch() {
    World::run(async |world| {
        let mut watcher = Watcher::new();
        let [twice, once] = [path("203.0.113.9"), path("203.0.113.10")];
        for path in [twice, twice, once] {
            watcher.known(path).await;
        }
        for path in [twice, once] {
            watcher
                .next_hops
                .unwatch(path)
                .await
                .expect("the resolver runs");
        }
        // An unwatch has no answer. That to a later question comes behind it, and this one's never changes.
        watcher.error(path("224.0.0.5")).await;
        world.host.ip("link set eth0 mtu 1400").await;
        let Notice { path, .. } = watcher.changes.recv().await.expect("the resolver runs");
        assert_eq!(path, twice);
        let Watcher {
            next_hops,
            mut changes,
        } = watcher;
        drop(next_hops);
        // The resolver ends, and has told nothing more.
        assert_eq!(changes.recv().await, None);
    });
}

#[test]
fn lost_notifications_are_made_up_for() {
    World::run(async |world| {
        world
            .host
            .ip("neighbour add 192.0.2.253 lladdr 02:00:00:00:00:fd dev eth0 nud permanent")
            .await;
        let mut watcher = Watcher::new();
        let path = path("203.0.113.9");
        watcher.known(path).await;
        // Far more than the socket holds, while nothing reads: here `ip` holds up the runtime.
        let mut batch = flood(30_000);
        batch.push_str("route replace default via 192.0.2.253\n");
        ip(&batch);
        watcher.until_mac(path, "02:00:00:00:00:fd").await;
    });
}

#[test]
fn a_storm_of_routes_does_not_delay_a_gateway() {
    World::run(async |world| {
        let mut watcher = Watcher::new();
        let path = path("203.0.113.9");
        watcher.known(path).await;
        let storm = flood(10_000);
        let mut times = Vec::new();
        let changes = async {
            for round in 0..20 {
                let mac = format!("02:00:00:00:01:{round:02x}");
                let before = Instant::now();
                ip(&format!(
                    "neighbour replace 192.0.2.254 lladdr {mac} dev eth0"
                ));
                watcher.until_mac(path, &mac).await;
                times.push(before.elapsed());
            }
        };
        tokio::join!(world.host.ip(&storm), changes);
        report("gateway MAC in a storm of routes", &mut times);
    });
}

#[test]
fn a_hundred_thousand_paths_follow_their_gateway() {
    const PATHS: u32 = 100_000;
    World::run(async |world| {
        world
            .host
            .ip("neighbour add 192.0.2.253 lladdr 02:00:00:00:00:fd dev eth0 nud permanent")
            .await;
        let mut watcher = Watcher::new();
        watcher.known(path("203.0.113.9")).await;
        let before = Instant::now();
        for number in 0..PATHS {
            let remote = Ipv4Addr::from_bits(0x0a00_0000 + number).into();
            let path = Path {
                remote,
                ..path("203.0.113.9")
            };
            assert_eq!(watcher.watch(path).await, Resolution::Known(to_gateway()));
        }
        println!("{PATHS} paths watched in {:?}", before.elapsed());
        for (what, change, mac) in [
            (
                "gateway MAC",
                "neighbour replace 192.0.2.254 lladdr 02:00:00:00:00:99 dev eth0",
                "02:00:00:00:00:99",
            ),
            (
                "default route",
                "route replace default via 192.0.2.253",
                "02:00:00:00:00:fd",
            ),
        ] {
            let before = Instant::now();
            let told = async {
                let mut first = None;
                for _ in 0..=PATHS {
                    let Notice { resolution, .. } =
                        watcher.changes.recv().await.expect("the resolver runs");
                    first.get_or_insert_with(|| before.elapsed());
                    let Resolution::Known(next_hop) = resolution else {
                        panic!("{resolution:?}")
                    };
                    let destination = next_hop.macs.map(|macs| macs.destination);
                    assert_eq!(destination, Some(bytes(mac)));
                }
                first
            };
            let ((), first) = tokio::join!(world.host.ip(change), told);
            let all = before.elapsed();
            println!("{what}: first path after {first:?}, all after {all:?}");
        }
    });
}

#[test]
fn interfaces_are_described_and_an_unknown_one_is_named() {
    World::run(async |world| {
        world
            .host
            .ip("link add eth1 type veth peer name eth2")
            .await;
        let eth0 = interface("eth0").expect("eth0 exists");
        assert_eq!(
            (
                eth0.mac,
                eth0.mtu,
                eth0.kind.as_deref(),
                eth0.up,
                eth0.carrier
            ),
            (Some(bytes(HOST)), 1500, Some("veth"), true, true)
        );
        assert_eq!((eth0.vlan, eth0.xdp), (None, vec![]));
        let all = Interfaces::read().expect("netlink");
        let eth1 = all.named("eth1").expect("eth1 exists");
        assert_eq!((eth1.up, eth1.carrier), (false, false));
        assert_eq!(all.named("lo").expect("lo exists").mac, None);
        assert_eq!(all.vlans_on(eth0.index).count(), 0);
        let error = interface("eth7").expect_err("there is none").to_string();
        let known = error
            .strip_prefix("no interface `eth7`: this host has ")
            .expect(&error);
        let mut known: Vec<_> = known.split(", ").collect();
        known.sort_unstable();
        assert_eq!(known, ["eth0", "eth1", "eth2", "lo"]);
    });
}

/// Commands for so many routes to places where no path leads.
fn flood(count: u32) -> String {
    (0..count)
        .map(|number| {
            let prefix = Ipv4Addr::from_bits(0x6440_0000 + (number << 4));
            format!("route add {prefix}/28 via 192.0.2.254\n")
        })
        .collect()
}

/// Prints the times and holds the median to what is allowed: the others are at the mercy of the
/// tests that run beside this one.
fn report(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let (p50, max) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{what}: p50 {p50:?}, max {max:?} of {}", times.len());
    assert!(p50 < ALLOWED, "{what}: {times:?}");
}
