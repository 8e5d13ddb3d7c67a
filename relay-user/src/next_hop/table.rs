//! Which paths are watched, what they depend on, and what follows from a change. No I/O: the
//! resolver asks what is due, asks the kernel, and brings the answers.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use hashbrown::{HashMap, HashSet};

use super::{
    MAX_VLAN_TAGS, Macs, NextHop, NextHopError, Path, Resolution,
    link::{Interface, LinkLayer, VlanTag},
    neighbour::{Entry, Freshness, Key},
    netlink::Hint,
    route::Route,
};

/// Time between two passes over paths whose route may have changed, at least. A routing daemon
/// that moves a full table sends tens of thousands of messages a second.
const PASS_INTERVAL: Duration = Duration::from_millis(20);

/// Time between two lookups of every path. Some changes of a lookup's result are not notified: a
/// path MTU found and an ICMP redirect (both exceptions of a route), IPv4 routes that go because
/// their interface or preferred source goes (`fib_table_flush`), IPv6 router preference by
/// reachability (RFC 4191).
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// Time until the kernel is asked again after it failed to answer a lookup.
const FAILURE_INTERVAL: Duration = Duration::from_secs(1);

/// Time between two uses of a neighbour in use.
///
/// The stack sees none of the packets that the relay sends. To the kernel the entry looks idle: it
/// turns NUD_STALE 15–45 s after its last confirmation (`neigh_rand_reach_time`), is never verified
/// again since only sending does that (`__neigh_event_send`), and is the first to go when the table
/// fills (`neigh_forced_gc`). A phone or gateway that changed its address without a word would
/// then stay unnoticed for ever.
const REFRESH_INTERVAL: Duration = Duration::from_secs(20);

/// Time between uses of a neighbour that does not answer: doubles from the first to the second.
/// The kernel itself asks three times, one second apart, before it gives up (`NUD_FAILED`).
const RETRY_INTERVAL: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(8));

/// At most this many uses, each of which may send a frame,
const USES: usize = 32;

/// in this time.
const USES_INTERVAL: Duration = Duration::from_millis(10);

/// Deeper stacks of devices than the kernel builds (`MAX_NEST_DEV`) are read from changing tables.
const MAX_NESTING: usize = 8;

#[derive(Debug)]
struct Watched {
    /// Told apart from an earlier watch of the same path, whose changes may still be on their way.
    serial: u64,
    watchers: usize,
    /// In `fresh`, `stale` or `pass`.
    queued: bool,
    /// The kernel's last answer; `None` before the first.
    route: Option<Result<Route, NextHopError>>,
    /// Set as long as the path depends on a neighbour of ours.
    neighbour: Option<Key>,
    resolution: Option<Resolution>,
    /// Whether the first watch has been answered: what comes before is no change to anyone.
    answered: bool,
    /// In `changed`.
    changed: bool,
}

#[derive(Debug)]
struct Neighbour {
    /// `None` before it was read first.
    entry: Option<Entry>,
    users: HashSet<Path>,
    used: Option<Instant>,
    retry: Duration,
    /// Its place in `uses`.
    due: Option<Instant>,
}

/// How a packet leaves, its neighbour apart.
struct Egress {
    /// None on a link without Ethernet headers, where nobody is asked for an address.
    mac: Option<[u8; 6]>,
    vlan: Vec<VlanTag>,
    mtu: u16,
}

/// The state of everything watched.
#[derive(Debug)]
pub(super) struct Table {
    began: Instant,
    attached: u32,
    /// Survives the interface, for the texts.
    attached_name: String,
    links: HashMap<u32, Interface>,
    paths: HashMap<Path, Watched>,
    next_serial: u64,
    /// (remote, local) of every path, in order, to find those that a prefix covers.
    remotes: BTreeSet<(IpAddr, IpAddr)>,
    /// Number of paths of each local address.
    locals: BTreeMap<IpAddr, usize>,
    neighbours: HashMap<Key, Neighbour>,
    /// Never looked up.
    fresh: VecDeque<Path>,
    /// To be looked up again in the next pass.
    stale: VecDeque<Path>,
    /// To be looked up again in this pass.
    pass: VecDeque<Path>,
    /// When the pass that is under way began.
    pass_began: Option<Instant>,
    pass_at: Instant,
    sweep_at: Instant,
    links_due: BTreeSet<u32>,
    reads_due: BTreeSet<Key>,
    /// Read before; again after notifications were lost.
    rereads: VecDeque<Key>,
    uses: BTreeSet<(Instant, Key)>,
    uses_at: Instant,
    changed: VecDeque<Path>,
}

impl Table {
    /// For streams that leave through the interface of this index.
    pub(super) fn new(attached: u32, now: Instant) -> Self {
        Self {
            began: now,
            attached,
            attached_name: format!("#{attached}"),
            links: HashMap::new(),
            paths: HashMap::new(),
            next_serial: 1,
            remotes: BTreeSet::new(),
            locals: BTreeMap::new(),
            neighbours: HashMap::new(),
            fresh: VecDeque::new(),
            stale: VecDeque::new(),
            pass: VecDeque::new(),
            pass_began: None,
            pass_at: now,
            sweep_at: now + SWEEP_INTERVAL,
            links_due: BTreeSet::new(),
            reads_due: BTreeSet::new(),
            rereads: VecDeque::new(),
            uses: BTreeSet::new(),
            uses_at: now,
            changed: VecDeque::new(),
        }
    }

    /// Adds a watcher. A new path is due for lookup before all others.
    pub(super) fn watch(&mut self, path: Path) {
        if let Some(watched) = self.paths.get_mut(&path) {
            watched.watchers += 1;
            return;
        }
        self.paths.insert(
            path,
            Watched {
                serial: self.next_serial,
                watchers: 1,
                queued: true,
                route: None,
                neighbour: None,
                resolution: None,
                answered: false,
                changed: false,
            },
        );
        self.next_serial += 1;
        self.remotes.insert((path.remote, path.local));
        *self.locals.entry(path.local).or_default() += 1;
        self.fresh.push_back(path);
    }

    /// Which watch of a path this is; 0 when nobody watches it.
    pub(super) fn serial(&self, path: Path) -> u64 {
        self.paths.get(&path).map_or(0, |watched| watched.serial)
    }

    /// The name that the attached interface had, once it exists no more.
    pub(super) fn attached_gone(&self) -> Option<&str> {
        (!self.links.contains_key(&self.attached)).then_some(&self.attached_name)
    }

    /// Removes a watcher, and the path with its last.
    pub(super) fn unwatch(&mut self, path: Path) {
        let Some(watched) = self.paths.get_mut(&path) else {
            return;
        };
        watched.watchers -= 1;
        if watched.watchers > 0 {
            return;
        }
        let neighbour = watched.neighbour;
        self.paths.remove(&path);
        self.remotes.remove(&(path.remote, path.local));
        if let Some(count) = self.locals.get_mut(&path.local) {
            *count -= 1;
            if *count == 0 {
                self.locals.remove(&path.local);
            }
        }
        if let Some(key) = neighbour {
            self.leave_neighbour(path, key);
        }
    }

    /// The answer to a watch; from now on changes are told. `None` when nobody watches the path.
    pub(super) fn answer(&mut self, path: Path) -> Option<Resolution> {
        let watched = self.paths.get_mut(&path)?;
        watched.answered = true;
        watched.resolution.clone()
    }

    /// Notes that something changed.
    pub(super) fn hint(&mut self, hint: Hint) {
        match hint {
            Hint::Link(index) => {
                self.links_due.insert(index);
                return;
            }
            Hint::Neighbour(key) => {
                if !self.neighbours.contains_key(&key) {
                    return;
                }
                self.reads_due.insert(key);
            }
            Hint::Route { prefix, local } => {
                let range = prefix.range();
                if local && self.locals.range(range.clone()).next().is_some() {
                    self.all_stale();
                } else {
                    let lowest = (*range.start(), Ipv4Addr::UNSPECIFIED.into());
                    let highest = (*range.end(), Ipv6Addr::from_bits(u128::MAX).into());
                    let covered = self.remotes.range(lowest..=highest);
                    let mut any = false;
                    for (remote, local) in covered {
                        any = true;
                        let path = Path {
                            local: *local,
                            remote: *remote,
                        };
                        queue(&mut self.paths, &mut self.stale, path);
                    }
                    if !any {
                        return;
                    }
                }
            }
            Hint::Routing => self.all_stale(),
            Hint::Lost => {
                self.all_stale();
                self.rereads = self.neighbours.keys().copied().collect();
            }
        }
        // An interface that goes down takes its neighbours and routes along first. Only by its own
        // state is that told from a neighbour that fell silent.
        self.links_due.insert(self.attached);
    }

    fn all_stale(&mut self) {
        for (path, watched) in &mut self.paths {
            if !mem::replace(&mut watched.queued, true) {
                self.stale.push_back(*path);
            }
        }
    }

    /// Takes the interfaces to be read again.
    pub(super) fn links_due(&mut self) -> BTreeSet<u32> {
        mem::take(&mut self.links_due)
    }

    /// Takes note of all interfaces that there are.
    pub(super) fn interfaces(&mut self, interfaces: Vec<Interface>) {
        let was_usable = self.attached_usable();
        self.links = interfaces
            .into_iter()
            .map(|link| (link.index, link))
            .collect();
        self.note_name();
        self.links_changed(was_usable);
    }

    /// Takes note of one interface, or that it is gone.
    pub(super) fn link_answer(&mut self, index: u32, interface: Option<Interface>) {
        let was_usable = self.attached_usable();
        let facts = |link: &Interface| (link.mac, link.mtu, link.usable(), link.vlan);
        let new = interface.as_ref().map(facts);
        let old = match interface {
            Some(link) => self.links.insert(index, link),
            None => self.links.remove(&index),
        };
        self.note_name();
        if old.as_ref().map(facts) != new {
            self.links_changed(was_usable);
        }
    }

    fn note_name(&mut self) {
        if let Some(link) = self.links.get(&self.attached) {
            self.attached_name.clone_from(&link.name);
        }
    }

    fn links_changed(&mut self, was_usable: bool) {
        self.all_stale();
        // What was looked up while the interface was down says nothing about it being up.
        if was_usable || !self.attached_usable() {
            let paths: Vec<_> = self.paths.keys().copied().collect();
            for path in paths {
                self.judge(path);
            }
        }
    }

    fn attached_usable(&self) -> bool {
        self.links
            .get(&self.attached)
            .is_some_and(Interface::usable)
    }

    /// Takes paths to look up, new ones first, at most `limit`.
    pub(super) fn lookups_due(&mut self, now: Instant, limit: usize) -> Vec<Path> {
        if now >= self.sweep_at {
            self.sweep_at = now + SWEEP_INTERVAL;
            self.all_stale();
        }
        if self.pass_began.is_none() && !self.stale.is_empty() && now >= self.pass_at {
            self.pass_began = Some(now);
            mem::swap(&mut self.pass, &mut self.stale);
        }
        let mut due = Vec::new();
        while due.len() < limit {
            let Some(path) = self.fresh.pop_front().or_else(|| self.pass.pop_front()) else {
                break;
            };
            if let Some(watched) = self.paths.get_mut(&path)
                && mem::replace(&mut watched.queued, false)
            {
                due.push(path);
            }
        }
        due
    }

    /// Takes note of the routes that [`Table::lookups_due`] asked for.
    pub(super) fn route_answers(
        &mut self,
        answers: impl IntoIterator<Item = (Path, Result<Route, NextHopError>)>,
        now: Instant,
    ) {
        for (path, answer) in answers {
            if matches!(answer, Err(NextHopError::Kernel { .. })) {
                self.sweep_at = self.sweep_at.min(now + FAILURE_INTERVAL);
            }
            let key = answer.as_ref().ok().and_then(|route| {
                self.egress(path, route).ok()?.mac.map(|_| Key {
                    interface: route.interface,
                    address: route.neighbour,
                })
            });
            let Some(watched) = self.paths.get_mut(&path) else {
                continue;
            };
            watched.route = Some(answer);
            let before = mem::replace(&mut watched.neighbour, key);
            if before != key {
                if let Some(key) = before {
                    self.leave_neighbour(path, key);
                }
                if let Some(key) = key {
                    self.join_neighbour(path, key, now);
                }
            }
            self.judge(path);
        }
        if self.pass.is_empty()
            && let Some(began) = self.pass_began.take()
        {
            // Half of the time at most goes into passes, however long one takes.
            self.pass_at = now + PASS_INTERVAL.max(now.saturating_duration_since(began));
        }
    }

    fn join_neighbour(&mut self, path: Path, key: Key, now: Instant) {
        let neighbour = self.neighbours.entry(key).or_insert_with(|| {
            self.reads_due.insert(key);
            Neighbour {
                entry: None,
                users: HashSet::new(),
                used: None,
                retry: RETRY_INTERVAL.0,
                due: None,
            }
        });
        neighbour.users.insert(path);
        if neighbour.entry == Some(Entry::Unresolved) {
            // Whoever comes new need not wait out the long intervals of who came before.
            let due = neighbour.retry_from(now);
            neighbour.schedule(Some(due), key, &mut self.uses);
        }
    }

    fn leave_neighbour(&mut self, path: Path, key: Key) {
        let Some(neighbour) = self.neighbours.get_mut(&key) else {
            return;
        };
        neighbour.users.remove(&path);
        if neighbour.users.is_empty() {
            neighbour.schedule(None, key, &mut self.uses);
            self.neighbours.remove(&key);
            self.reads_due.remove(&key);
        }
    }

    /// Takes the neighbours to be read: those that someone waits for or that changed, and of the
    /// others at most `limit`.
    pub(super) fn reads_due(&mut self, limit: usize) -> Vec<Key> {
        let mut due = mem::take(&mut self.reads_due);
        due.extend(self.rereads.drain(..limit.min(self.rereads.len())));
        due.into_iter().collect()
    }

    /// Takes note of what the kernel holds for a neighbour.
    pub(super) fn neighbour_answer(&mut self, key: Key, entry: Entry, now: Instant) {
        let Some(neighbour) = self.neighbours.get_mut(&key) else {
            return;
        };
        let before = neighbour.entry.replace(entry);
        let was_resolved = matches!(before, Some(Entry::Resolved { .. }));
        let due = match entry {
            Entry::Resolved {
                freshness: Freshness::Fixed,
                ..
            } => None,
            Entry::Resolved { .. } => neighbour
                .due
                .filter(|_| was_resolved)
                .or(Some(now + REFRESH_INTERVAL)),
            Entry::Unresolved if before == Some(Entry::Unresolved) => neighbour.due,
            Entry::Unresolved => Some(neighbour.retry_from(now)),
        };
        neighbour.schedule(due, key, &mut self.uses);
        let mac = |entry| match entry {
            Entry::Resolved { mac, .. } => Some(mac),
            Entry::Unresolved => None,
        };
        let changed = before.map(mac) != Some(mac(entry));
        let users: Vec<_> = if changed {
            neighbour.users.iter().copied().collect()
        } else {
            Vec::new()
        };
        for path in users {
            self.judge(path);
        }
    }

    /// Takes the neighbours that are to be used now.
    pub(super) fn uses_due(&mut self, now: Instant) -> Vec<Key> {
        let mut due = Vec::new();
        if now < self.uses_at {
            return due;
        }
        while due.len() < USES
            && let Some((at, key)) = self.uses.first().copied()
            && at <= now
        {
            let Some(neighbour) = self.neighbours.get_mut(&key) else {
                self.uses.pop_first();
                continue;
            };
            let next = match neighbour.entry {
                Some(Entry::Resolved {
                    freshness: Freshness::Fixed,
                    ..
                })
                | None => None,
                Some(Entry::Resolved {
                    freshness: Freshness::Verified,
                    ..
                }) => Some(now + REFRESH_INTERVAL),
                Some(Entry::Resolved {
                    freshness: Freshness::Stale,
                    ..
                }) => {
                    due.push(key);
                    neighbour.used = Some(now);
                    Some(now + REFRESH_INTERVAL)
                }
                Some(Entry::Unresolved) => {
                    due.push(key);
                    neighbour.used = Some(now);
                    let wait = neighbour.retry;
                    neighbour.retry = (wait * 2).min(RETRY_INTERVAL.1);
                    Some(now + wait)
                }
            };
            neighbour.schedule(next, key, &mut self.uses);
        }
        if !due.is_empty() {
            self.uses_at = now + USES_INTERVAL;
        }
        due
    }

    /// When there is something to do, if nothing happens before. In the past: at once.
    pub(super) fn deadline(&self) -> Instant {
        if !self.fresh.is_empty()
            || !self.pass.is_empty()
            || !self.rereads.is_empty()
            || !self.links_due.is_empty()
            || !self.reads_due.is_empty()
        {
            return self.began;
        }
        let mut deadline = self.sweep_at;
        if !self.stale.is_empty() {
            deadline = deadline.min(self.pass_at);
        }
        if let Some((at, _)) = self.uses.first() {
            deadline = deadline.min((*at).max(self.uses_at));
        }
        deadline
    }

    /// Whether [`Table::next_notice`] has one.
    pub(super) fn has_notices(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Takes a path that changed, with its state now.
    pub(super) fn next_notice(&mut self) -> Option<(Path, Resolution)> {
        while let Some(path) = self.changed.pop_front() {
            if let Some(watched) = self.paths.get_mut(&path)
                && mem::take(&mut watched.changed)
                && let Some(resolution) = &watched.resolution
            {
                return Some((path, resolution.clone()));
            }
        }
        None
    }

    /// Draws the conclusion for one path from all that is known.
    fn judge(&mut self, path: Path) {
        let Some(resolution) = self.conclusion(path) else {
            return;
        };
        let Some(watched) = self.paths.get_mut(&path) else {
            return;
        };
        if watched.resolution.as_ref() == Some(&resolution) {
            return;
        }
        watched.resolution = Some(resolution);
        if watched.answered && !mem::replace(&mut watched.changed, true) {
            self.changed.push_back(path);
        }
    }

    /// `None` while something is still to be read.
    fn conclusion(&self, path: Path) -> Option<Resolution> {
        let watched = self.paths.get(&path)?;
        let route = watched.route.as_ref()?;
        if !self.attached_usable() {
            let error = NextHopError::LinkDown(self.attached_name.clone());
            return Some(Resolution::Unreachable(error));
        }
        let (route, egress) = match route
            .as_ref()
            .map_err(NextHopError::clone)
            .and_then(|route| {
                let egress = self.egress(path, route)?;
                Ok((route, egress))
            }) {
            Ok(found) => found,
            Err(error) => return Some(Resolution::Unreachable(error)),
        };
        let known = |macs| {
            Resolution::Known(NextHop {
                macs,
                vlan: egress.vlan,
                mtu: egress.mtu,
            })
        };
        let Some(source) = egress.mac else {
            return Some(known(None));
        };
        Some(match self.neighbours.get(&watched.neighbour?)?.entry? {
            Entry::Resolved {
                mac: Some(destination),
                ..
            } => known(Some(Macs {
                source,
                destination,
            })),
            Entry::Resolved { mac: None, .. } => {
                let error = NextHopError::NoLinkLayer(self.interface_name(route.interface));
                Resolution::Unreachable(error)
            }
            Entry::Unresolved => Resolution::Waiting {
                neighbour: route.neighbour,
                interface: self.interface_name(route.interface),
            },
        })
    }

    fn egress(&self, path: Path, route: &Route) -> Result<Egress, NextHopError> {
        let elsewhere = || NextHopError::OtherInterface {
            remote: path.remote,
            interface: self.interface_name(route.interface),
            attached: self.attached_name.clone(),
        };
        let output = self.links.get(&route.interface).ok_or_else(elsewhere)?;
        let mut down = None;
        let mut vlan = Vec::new();
        let mut link = output;
        loop {
            if !link.usable() {
                down = down.or(Some(link));
            }
            if link.index == self.attached {
                break;
            }
            let lower = link
                .vlan
                .filter(|_| vlan.len() < MAX_NESTING)
                .ok_or_else(elsewhere)?;
            vlan.push(lower.tag);
            link = lower
                .lower
                .and_then(|index| self.links.get(&index))
                .ok_or_else(elsewhere)?;
        }
        if let Some(link) = down {
            return Err(NextHopError::LinkDown(link.name.clone()));
        }
        if vlan.len() > MAX_VLAN_TAGS {
            return Err(NextHopError::TooManyVlanTags {
                remote: path.remote,
                interface: output.name.clone(),
            });
        }
        vlan.reverse();
        let mac = match output.layer {
            LinkLayer::Ip => None,
            LinkLayer::Ethernet | LinkLayer::Other => Some(
                output
                    .mac
                    .ok_or_else(|| NextHopError::NoLinkLayer(output.name.clone()))?,
            ),
        };
        let mtu = route.mtu.unwrap_or(output.mtu).min(output.mtu);
        Ok(Egress {
            mac,
            vlan,
            mtu: mtu.try_into().unwrap_or(u16::MAX),
        })
    }

    fn interface_name(&self, index: u32) -> String {
        self.links
            .get(&index)
            .map_or_else(|| format!("#{index}"), |link| link.name.clone())
    }
}

impl Neighbour {
    /// When a neighbour that is not resolved is to be used, with retries at their shortest.
    fn retry_from(&mut self, now: Instant) -> Instant {
        self.retry = RETRY_INTERVAL.0;
        self.used
            .map_or(now, |used| now.max(used + RETRY_INTERVAL.0))
    }

    fn schedule(&mut self, due: Option<Instant>, key: Key, uses: &mut BTreeSet<(Instant, Key)>) {
        if let Some(before) = mem::replace(&mut self.due, due) {
            uses.remove(&(before, key));
        }
        if let Some(due) = due {
            uses.insert((due, key));
        }
    }
}

fn queue(paths: &mut HashMap<Path, Watched>, stale: &mut VecDeque<Path>, path: Path) {
    if let Some(watched) = paths.get_mut(&path)
        && !mem::replace(&mut watched.queued, true)
    {
        stale.push_back(path);
    }
}

#[cfg(test)]
mod tests {
    use std::iter;

    use super::*;
    use crate::next_hop::{
        link::{LinkLayer, VlanLink},
        route::Prefix,
    };

    const ATTACHED: u32 = 2;
    const OTHER: u32 = 3;
    const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 254));
    const KEY: Key = Key {
        interface: ATTACHED,
        address: GATEWAY,
    };
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];

    fn link(index: u32, name: &str) -> Interface {
        Interface {
            index,
            name: name.to_owned(),
            layer: LinkLayer::Ethernet,
            mac: Some([2, 0, 0, 0, 0, index as u8]),
            mtu: 1500,
            kind: None,
            up: true,
            carrier: true,
            vlan: None,
            xdp: vec![],
        }
    }

    fn vlan(index: u32, name: &str, protocol: u16, id: u16, lower: u32) -> Interface {
        let tag = VlanTag { protocol, id };
        let vlan = Some(VlanLink {
            tag,
            lower: Some(lower),
        });
        Interface {
            vlan,
            mtu: 1496,
            ..link(index, name)
        }
    }

    fn path(number: u8) -> Path {
        Path {
            local: Ipv4Addr::new(192, 0, 2, 1).into(),
            remote: Ipv4Addr::new(203, 0, 113, number).into(),
        }
    }

    fn route(interface: u32) -> Route {
        Route {
            interface,
            neighbour: GATEWAY,
            mtu: None,
        }
    }

    fn resolved(mac: [u8; 6], freshness: Freshness) -> Entry {
        Entry::Resolved {
            mac: Some(mac),
            freshness,
        }
    }

    fn down() -> Resolution {
        Resolution::Unreachable(NextHopError::LinkDown("eth0".to_owned()))
    }

    /// A table with its clock.
    struct Bench {
        table: Table,
        now: Instant,
    }

    impl Bench {
        fn new(links: Vec<Interface>) -> Self {
            let now = Instant::now();
            let mut table = Table::new(ATTACHED, now);
            table.interfaces(links);
            Self { table, now }
        }

        fn after(&mut self, time: Duration) {
            self.now += time;
        }

        /// Answers every lookup that is due with this route, and says how many there were.
        fn look_up(&mut self, route: Result<Route, NextHopError>) -> usize {
            let mut count = 0;
            loop {
                let due = self.table.lookups_due(self.now, 256);
                let done = due.is_empty();
                count += due.len();
                let answers = due.into_iter().zip(iter::repeat(route.clone()));
                self.table.route_answers(answers, self.now);
                if done {
                    return count;
                }
            }
        }

        /// Answers every read that is due with this entry, and says how many there were.
        fn read(&mut self, entry: Entry) -> usize {
            let due = self.table.reads_due(256);
            for key in &due {
                self.table.neighbour_answer(*key, entry, self.now);
            }
            due.len()
        }

        fn watch(&mut self, path: Path, out: Route, entry: Entry) -> Resolution {
            self.table.watch(path);
            self.look_up(Ok(out));
            self.read(entry);
            self.table.answer(path).expect("watched and looked up")
        }

        fn told(&mut self) -> Vec<(Path, Resolution)> {
            iter::from_fn(|| self.table.next_notice()).collect()
        }

        fn known(mac: [u8; 6]) -> Resolution {
            Resolution::Known(NextHop {
                macs: Some(Macs {
                    source: [2, 0, 0, 0, 0, ATTACHED as u8],
                    destination: mac,
                }),
                vlan: vec![],
                mtu: 1500,
            })
        }
    }

    #[test]
    fn vlan_devices_on_the_attached_interface_give_tags() {
        let mut bench = Bench::new(vec![
            link(ATTACHED, "eth0"),
            vlan(5, "eth0.100", 0x88a8, 100, ATTACHED),
            vlan(6, "eth0.100.7", 0x8100, 7, 5),
            vlan(7, "eth0.100.7.9", 0x8100, 9, 6),
        ]);
        let tags = |resolution| match resolution {
            Resolution::Known(next_hop) => next_hop,
            other => panic!("{other:?}"),
        };
        let entry = resolved(MAC, Freshness::Verified);
        let outer = VlanTag {
            protocol: 0x88a8,
            id: 100,
        };
        let inner = VlanTag {
            protocol: 0x8100,
            id: 7,
        };
        let single = tags(bench.watch(path(1), route(5), entry));
        assert_eq!((single.vlan, single.mtu), (vec![outer], 1496));
        let source = single.macs.map(|macs| macs.source);
        assert_eq!(source, Some([2, 0, 0, 0, 0, 5]));
        let double = tags(bench.watch(path(2), route(6), entry));
        assert_eq!(double.vlan, [outer, inner]);
        assert_eq!(
            bench.watch(path(3), route(7), entry),
            Resolution::Unreachable(NextHopError::TooManyVlanTags {
                remote: path(3).remote,
                interface: "eth0.100.7.9".to_owned(),
            })
        );
    }

    #[test]
    fn a_vlan_device_elsewhere_is_another_interface() {
        let elsewhere = Interface {
            vlan: Some(VlanLink {
                tag: VlanTag {
                    protocol: 0x8100,
                    id: 5,
                },
                lower: None,
            }),
            ..link(9, "vlan5")
        };
        let mut bench = Bench::new(vec![
            link(ATTACHED, "eth0"),
            link(OTHER, "eth1"),
            vlan(5, "eth1.5", 0x8100, 5, OTHER),
            elsewhere,
        ]);
        for (index, name) in [(OTHER, "eth1"), (5, "eth1.5"), (9, "vlan5"), (77, "#77")] {
            let path = path(index as u8);
            assert_eq!(
                bench.watch(path, route(index), Entry::Unresolved),
                Resolution::Unreachable(NextHopError::OtherInterface {
                    remote: path.remote,
                    interface: name.to_owned(),
                    attached: "eth0".to_owned(),
                })
            );
        }
        // Nobody is asked for on links that no stream uses.
        assert_eq!(bench.table.uses_due(bench.now), []);
    }

    #[test]
    fn a_vlan_device_that_is_down_is_named() {
        let mut device = vlan(5, "eth0.5", 0x8100, 5, ATTACHED);
        device.up = false;
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0"), device]);
        assert_eq!(
            bench.watch(path(1), route(5), Entry::Unresolved),
            Resolution::Unreachable(NextHopError::LinkDown("eth0.5".to_owned()))
        );
    }

    #[test]
    fn a_link_without_ethernet_needs_no_neighbour_and_one_unknown_is_refused() {
        let without_mac = |layer| Interface {
            layer,
            mac: None,
            ..link(ATTACHED, "tun0")
        };
        let mut bench = Bench::new(vec![without_mac(LinkLayer::Ip)]);
        assert_eq!(
            bench.watch(path(1), route(ATTACHED), Entry::Unresolved),
            Resolution::Known(NextHop {
                macs: None,
                vlan: vec![],
                mtu: 1500,
            })
        );
        assert_eq!(bench.table.uses_due(bench.now), [], "nobody is asked");
        let mut bench = Bench::new(vec![without_mac(LinkLayer::Other)]);
        assert_eq!(
            bench.watch(path(1), route(ATTACHED), Entry::Unresolved),
            Resolution::Unreachable(NextHopError::NoLinkLayer("tun0".to_owned()))
        );
    }

    #[test]
    fn the_smaller_mtu_counts_and_the_largest_is_capped() {
        for (link_mtu, route_mtu, mtu) in [
            (1500, None, 1500),
            (1500, Some(1400), 1400),
            (1500, Some(9000), 1500),
            (100_000, None, u16::MAX),
        ] {
            let attached = Interface {
                mtu: link_mtu,
                ..link(ATTACHED, "eth0")
            };
            let mut bench = Bench::new(vec![attached]);
            let route = Route {
                mtu: route_mtu,
                ..route(ATTACHED)
            };
            let Resolution::Known(next_hop) =
                bench.watch(path(1), route, resolved(MAC, Freshness::Fixed))
            else {
                panic!("resolved")
            };
            assert_eq!(next_hop.mtu, mtu);
        }
    }

    #[test]
    fn a_neighbour_is_read_once_for_all_its_paths_and_tells_them_all() {
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        for number in 1..=200 {
            bench.table.watch(path(number));
        }
        assert_eq!(bench.look_up(Ok(route(ATTACHED))), 200);
        assert_eq!(bench.read(resolved(MAC, Freshness::Verified)), 1);
        for number in 1..=200 {
            assert_eq!(bench.table.answer(path(number)), Some(Bench::known(MAC)));
        }
        assert_eq!(bench.told(), []);
        bench.table.hint(Hint::Neighbour(KEY));
        assert_eq!(bench.read(resolved([2; 6], Freshness::Verified)), 1);
        let told = bench.told();
        assert_eq!(told.len(), 200);
        assert!(told.iter().all(|(_, now)| *now == Bench::known([2; 6])));
        // A new state of the same address is no change, and neither is another's neighbour.
        bench.table.hint(Hint::Neighbour(KEY));
        bench.read(resolved([2; 6], Freshness::Stale));
        bench.table.hint(Hint::Neighbour(Key {
            interface: OTHER,
            ..KEY
        }));
        assert_eq!(bench.read(Entry::Unresolved), 0);
        assert_eq!(bench.told(), []);
        assert_eq!(bench.look_up(Ok(route(ATTACHED))), 0);
    }

    #[test]
    fn a_burst_of_route_changes_is_one_pass() {
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        bench.watch(path(1), route(ATTACHED), resolved(MAC, Freshness::Fixed));
        bench.watch(path(2), route(ATTACHED), resolved(MAC, Freshness::Fixed));
        bench.after(PASS_INTERVAL);
        assert_eq!(bench.look_up(Ok(route(ATTACHED))), 0);
        let mut lookups = 0;
        for _ in 0..10_000 {
            bench.table.hint(Hint::Routing);
            lookups += bench.look_up(Ok(route(ATTACHED)));
            bench.after(Duration::from_micros(10));
        }
        // 100 ms: at once, then every 20 ms.
        assert_eq!(lookups, 2 * 5);
        bench.after(PASS_INTERVAL);
        assert_eq!(bench.look_up(Ok(route(ATTACHED))), 2);
        assert_eq!(bench.told(), []);
    }

    #[test]
    fn a_slow_pass_is_followed_by_as_long_a_rest() {
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        bench.watch(path(1), route(ATTACHED), resolved(MAC, Freshness::Fixed));
        bench.table.hint(Hint::Routing);
        let paths = bench.table.lookups_due(bench.now, 256);
        bench.after(Duration::from_millis(300));
        let answers = paths.into_iter().map(|path| (path, Ok(route(ATTACHED))));
        bench.table.route_answers(answers, bench.now);
        bench.table.hint(Hint::Routing);
        bench.after(Duration::from_millis(299));
        assert_eq!(bench.look_up(Ok(route(ATTACHED))), 0);
        bench.after(Duration::from_millis(1));
        assert_eq!(bench.look_up(Ok(route(ATTACHED))), 1);
    }

    #[test]
    fn a_new_path_does_not_wait_for_a_pass() {
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        for number in 1..=100 {
            bench.watch(
                path(number),
                route(ATTACHED),
                resolved(MAC, Freshness::Fixed),
            );
        }
        bench.table.hint(Hint::Routing);
        assert_eq!(bench.table.lookups_due(bench.now, 10).len(), 10);
        bench.table.watch(path(101));
        assert_eq!(bench.table.lookups_due(bench.now, 10)[0], path(101));
    }

    #[test]
    fn a_changed_route_concerns_the_paths_that_it_covers() {
        let prefix = |address: [u8; 4], length| Prefix::new(address.into(), length);
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        for number in [1, 2, 129] {
            bench.watch(
                path(number),
                route(ATTACHED),
                resolved(MAC, Freshness::Fixed),
            );
        }
        for (prefix, local, lookups) in [
            (prefix([198, 51, 100, 0], 24), false, 0),
            (prefix([203, 0, 113, 0], 25), false, 2),
            (prefix([203, 0, 113, 129], 32), false, 1),
            (prefix([0, 0, 0, 0], 0), false, 3),
            (prefix([192, 0, 2, 1], 32), false, 0),
            (prefix([192, 0, 2, 1], 32), true, 3),
        ] {
            bench.after(PASS_INTERVAL);
            bench.table.hint(Hint::Route { prefix, local });
            assert_eq!(bench.look_up(Ok(route(ATTACHED))), lookups, "{prefix:?}");
        }
    }

    #[test]
    fn every_path_is_looked_up_once_a_minute_and_sooner_after_a_failure() {
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        bench.watch(path(1), route(ATTACHED), resolved(MAC, Freshness::Fixed));
        assert_eq!(bench.table.deadline(), bench.now + SWEEP_INTERVAL);
        bench.after(SWEEP_INTERVAL);
        let errno = nix::errno::Errno::ENOBUFS;
        let failure = NextHopError::Kernel {
            path: path(1),
            errno,
        };
        assert_eq!(bench.look_up(Err(failure.clone())), 1);
        assert_eq!(bench.told(), [(path(1), Resolution::Unreachable(failure))]);
        bench.after(FAILURE_INTERVAL);
        assert_eq!(bench.look_up(Ok(route(ATTACHED))), 1);
        bench.read(resolved(MAC, Freshness::Fixed));
        assert_eq!(bench.told(), [(path(1), Bench::known(MAC))]);
    }

    #[test]
    fn a_silent_neighbour_is_used_with_growing_intervals() {
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        let waiting = Resolution::Waiting {
            neighbour: GATEWAY,
            interface: "eth0".to_owned(),
        };
        assert_eq!(
            bench.watch(path(1), route(ATTACHED), Entry::Unresolved),
            waiting
        );
        for wait in [1, 2, 4, 8, 8] {
            assert_eq!(bench.table.uses_due(bench.now), [KEY]);
            bench
                .table
                .neighbour_answer(KEY, Entry::Unresolved, bench.now);
            assert_eq!(
                bench.table.deadline(),
                bench.now + Duration::from_secs(wait)
            );
            bench.after(Duration::from_secs(wait) - PASS_INTERVAL);
            assert_eq!(bench.table.uses_due(bench.now), []);
            bench.after(PASS_INTERVAL);
        }
        // A second path through it starts anew, but does not break the rate.
        bench.table.uses_due(bench.now);
        bench.watch(path(2), route(ATTACHED), Entry::Unresolved);
        assert_eq!(bench.table.uses_due(bench.now), []);
        bench.after(RETRY_INTERVAL.0);
        assert_eq!(bench.table.uses_due(bench.now), [KEY]);
        for path in [path(1), path(2)] {
            bench.table.unwatch(path);
        }
        bench.after(RETRY_INTERVAL.1);
        assert_eq!(bench.table.uses_due(bench.now), []);
    }

    #[test]
    fn a_flapping_neighbour_is_used_once_a_second() {
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        bench.watch(path(1), route(ATTACHED), Entry::Unresolved);
        let mut uses = 0;
        for _ in 0..100 {
            for entry in [resolved(MAC, Freshness::Verified), Entry::Unresolved] {
                bench.table.hint(Hint::Neighbour(KEY));
                bench.read(entry);
            }
            uses += bench.table.uses_due(bench.now).len();
            bench.after(Duration::from_millis(100));
        }
        assert_eq!(uses, 10);
    }

    #[test]
    fn a_stale_neighbour_in_use_is_refreshed_and_others_are_left_alone() {
        for (entry, uses) in [
            (resolved(MAC, Freshness::Stale), vec![KEY]),
            (resolved(MAC, Freshness::Verified), vec![]),
            (resolved(MAC, Freshness::Fixed), vec![]),
        ] {
            let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
            bench.watch(path(1), route(ATTACHED), entry);
            for _ in 0..3 {
                assert_eq!(bench.table.uses_due(bench.now), []);
                bench.after(REFRESH_INTERVAL);
                assert_eq!(bench.table.uses_due(bench.now), uses);
                bench.table.neighbour_answer(KEY, entry, bench.now);
            }
        }
    }

    #[test]
    fn many_neighbours_are_used_at_a_bounded_rate() {
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        for number in 1..=100 {
            let neighbour = path(number).remote;
            let route = Route {
                neighbour,
                ..route(ATTACHED)
            };
            bench.watch(path(number), route, Entry::Unresolved);
        }
        let mut rounds = 0;
        let mut uses = 0;
        while uses < 100 {
            let due = bench.table.uses_due(bench.now).len();
            assert!(due <= USES);
            assert_eq!(bench.table.uses_due(bench.now), []);
            uses += due;
            rounds += 1;
            bench.after(USES_INTERVAL);
        }
        assert_eq!(rounds, 100usize.div_ceil(USES));
    }

    #[test]
    fn an_interface_that_goes_is_told_once_whatever_goes_with_it() {
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        for number in [1, 2] {
            bench.watch(
                path(number),
                route(ATTACHED),
                resolved(MAC, Freshness::Verified),
            );
        }
        // The neighbour goes first, and is the first that is heard of.
        bench.table.hint(Hint::Neighbour(KEY));
        assert_eq!(bench.table.links_due(), [ATTACHED].into());
        let off = Interface {
            up: false,
            ..link(ATTACHED, "eth0")
        };
        bench.table.link_answer(ATTACHED, Some(off));
        bench.read(Entry::Unresolved);
        let mut told = bench.told();
        told.sort_by_key(|(path, _)| path.remote);
        assert_eq!(told, [(path(1), down()), (path(2), down())]);
        bench.look_up(Err(NextHopError::NoRoute(path(1))));
        bench.table.link_answer(ATTACHED, None);
        bench.after(PASS_INTERVAL);
        bench.look_up(Err(NextHopError::NoRoute(path(1))));
        assert_eq!(bench.told(), []);
        // Nobody is asked for on a link that is down.
        assert_eq!(bench.table.uses_due(bench.now), []);
        // On the way up the old lookups are not taken for the new state.
        bench
            .table
            .link_answer(ATTACHED, Some(link(ATTACHED, "eth0")));
        assert_eq!(bench.told(), []);
        bench.after(PASS_INTERVAL);
        bench.look_up(Ok(route(ATTACHED)));
        bench.read(resolved(MAC, Freshness::Verified));
        assert_eq!(bench.told().len(), 2);
    }

    #[test]
    fn a_new_name_is_no_change_and_an_attached_program_neither() {
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        bench.watch(path(1), route(ATTACHED), resolved(MAC, Freshness::Fixed));
        bench
            .table
            .link_answer(ATTACHED, Some(link(ATTACHED, "wan0")));
        bench.after(PASS_INTERVAL);
        assert_eq!(bench.look_up(Ok(route(ATTACHED))), 0);
        bench.table.link_answer(ATTACHED, None);
        let gone = Resolution::Unreachable(NextHopError::LinkDown("wan0".to_owned()));
        assert_eq!(bench.told(), [(path(1), gone)]);
    }

    #[test]
    fn lost_notifications_cause_everything_to_be_read() {
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        for number in 1..=3 {
            let neighbour = path(number).remote;
            let route = Route {
                neighbour,
                ..route(ATTACHED)
            };
            bench.watch(path(number), route, resolved(MAC, Freshness::Verified));
        }
        bench.table.hint(Hint::Lost);
        assert_eq!(bench.table.links_due(), [ATTACHED].into());
        assert_eq!(bench.table.lookups_due(bench.now, 256).len(), 3);
        assert_eq!(bench.table.reads_due(2).len(), 2);
        assert_eq!(bench.table.reads_due(2).len(), 1);
    }

    #[test]
    fn a_slow_receiver_gets_the_latest_state_once() {
        let mut bench = Bench::new(vec![link(ATTACHED, "eth0")]);
        bench.watch(path(1), route(ATTACHED), resolved(MAC, Freshness::Verified));
        for last in 1..=9 {
            bench.table.hint(Hint::Neighbour(KEY));
            bench.read(resolved([2, 0, 0, 0, 1, last], Freshness::Verified));
        }
        assert_eq!(bench.told(), [(path(1), Bench::known([2, 0, 0, 0, 1, 9]))]);
        bench.table.hint(Hint::Neighbour(KEY));
        bench.read(resolved(MAC, Freshness::Verified));
        bench.table.unwatch(path(1));
        assert_eq!(bench.told(), []);
    }
}
