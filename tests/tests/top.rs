//! `list`, `show`, `stats` and `top` as users see them: on a terminal and in a pipe, with a daemon and after it.

use std::{
    io::{BufRead as _, BufReader},
    process::{Output, Stdio},
    time::Duration,
};

use nix::sys::signal::Signal;
use relay_tests::{
    pair::{Legs, Sockets},
    phone::Bank,
    relay::Relay,
    terminal::Terminal,
    topology::Direct,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);

/// A call over IPv4 and one over IPv6, both relayed.
struct Site {
    relay: Relay,
    calls: Vec<Sockets>,
    _banks: [Bank; 2],
    net: Direct,
}

impl Site {
    fn new() -> Self {
        let net = Direct::new(2).expect("network");
        let banks = [&net.phones, &net.pbx].map(|host| Bank::new(host).expect("sockets"));
        let args = ["--mode", "generic"];
        let relay = Relay::attach(&net.pbx, "eth0", args).expect("relay");
        let calls: Vec<_> = Legs::direct()
            .into_iter()
            .map(|legs| Sockets::open(legs, &banks[0], &banks[1]).expect("sockets"))
            .collect();
        for call in &calls {
            call.offload(&relay).expect("offloaded");
        }
        Self {
            relay,
            calls,
            _banks: banks,
            net,
        }
    }

    fn talk(&self) {
        for call in &self.calls {
            call.talk(0, 0, None);
            call.talk(1, 0, None);
        }
    }

    fn hush(&self) {
        for call in &self.calls {
            call.phones.iter().for_each(|phone| phone.hush());
        }
    }

    fn terminal(&self, args: &[&str], rows: u16, columns: u16) -> Terminal {
        let mut command = self.relay.command(args);
        command.env_remove("NO_COLOR");
        Terminal::open(&self.net.pbx, command, rows, columns).expect("terminal")
    }

    fn top(&self) -> Terminal {
        self.terminal(&["top", "--every", "0.2"], 24, 80)
    }

    /// Ends the daemon as a crash does.
    fn kill(&mut self) {
        self.relay.signal(Signal::SIGKILL);
        self.relay.wait(PATIENCE).expect("killed");
    }
}

/// The lines of the table that are a stream's.
fn streams(lines: &[String]) -> Vec<Vec<String>> {
    let words = |line: &String| line.split_whitespace().map(str::to_owned).collect();
    lines
        .iter()
        .filter(|line| {
            let id = line.split_whitespace().next().unwrap_or_default();
            id.split_once('/').is_some_and(|(pair, leg)| {
                pair.parse::<u64>().is_ok() && leg.parse::<u64>().is_ok()
            })
        })
        .map(words)
        .collect()
}

/// Packets a second of a row of 80 columns.
fn rate(row: &[String]) -> f64 {
    row[3].parse().expect("a rate")
}

fn ids(lines: &[String]) -> Vec<String> {
    streams(lines).iter().map(|row| row[0].clone()).collect()
}

#[test]
fn figures_move_and_keys_sort_filter_and_open_pages() {
    let site = Site::new();
    let mut top = site.top();
    top.wait("showing four silent streams", |lines| ids(lines).len() == 4)
        .expect("streams");
    site.talk();
    let moving = |lines: &[String]| {
        let rows = streams(lines);
        rows.len() == 4 && rows.iter().all(|row| row[3] != "-" && rate(row) > 50.0)
    };
    let lines = top.wait("moving", moving).expect("rates");
    assert!(
        lines.iter().all(|line| line.chars().count() <= 80),
        "{lines:#?}"
    );
    let rows = streams(&lines);
    assert_eq!(ids(&lines), ["1/1", "1/2", "2/1", "2/2"]);
    assert_eq!(rows[0][1], "offloaded");
    assert_eq!(rows[0][2], "192.0.2.11:30000");
    let course = |lines: &[String]| lines.iter().any(|line| line.contains("▆▆"));
    top.wait("drawing the course", course).expect("course");
    // Their colour: green, of a state that is well.
    let coloured = |cell: &vt100::Cell| cell.fgcolor() == vt100::Color::Idx(2);
    let green = |top: &Terminal| {
        let screen = top.screen();
        (0..24).any(|row| screen.cell(row, 10).is_some_and(coloured))
    };
    assert!(green(&top), "{:?}", top.lines());

    top.press("r").expect("key");
    top.wait("reversed", |lines| {
        ids(lines) == ["2/1", "2/2", "1/1", "1/2"]
    })
    .expect("order");
    top.press("rss").expect("keys");
    top.wait_for("FROM▲").expect("sorted by phone");
    top.press("r").expect("key");
    top.wait("sorted by phone", |lines| {
        ids(lines) == ["2/2", "2/1", "1/2", "1/1"]
    })
    .expect("order");

    top.press("/2001:db8::11").expect("keys");
    top.wait_for("filter: 2001:db8::11").expect("typed");
    top.press("\r").expect("key");
    top.wait("filtered", |lines| ids(lines) == ["2/2", "2/1"])
        .expect("filter");
    top.press("/ losd>1\r").expect("keys");
    top.wait_for("there is no `losd` to filter by")
        .expect("error");
    top.press("\x1b").expect("key");
    top.wait("as before", |lines| {
        lines.last().is_some_and(|last| last.contains("quit"))
    })
    .expect("cancelled");
    top.press("\x1b").expect("key");
    top.wait("unfiltered", |lines| ids(lines).len() == 4)
        .expect("all");

    top.press("g\r").expect("keys");
    let lines = top.wait_for("highest of").expect("the page of a stream");
    assert!(
        lines
            .iter()
            .any(|line| line.contains("from the second leg")),
        "{lines:#?}"
    );
    assert!(lines.iter().any(|line| line.contains("SSRC")), "{lines:#?}");
    top.press("\t").expect("key");
    top.wait_for("from the first leg")
        .expect("the opposite direction");
    top.press("w").expect("key");
    let lines = top.wait_for("VERDICT").expect("reasons");
    assert!(
        lines.iter().any(|line| line.starts_with("relayed  all")),
        "{lines:#?}"
    );
    top.press("?").expect("key");
    top.wait_for("all about the chosen stream").expect("help");
    top.press("x\x1b").expect("keys");
    top.wait_for("PKT/S").expect("back");

    site.hush();
    let still = |lines: &[String]| streams(lines).iter().all(|row| row[3] == "0");
    top.wait("still", still).expect("silence shows");
    top.press("q").expect("key");
    assert!(top.end().expect("ends").success());
    assert!(top.is_restored().expect("settings"), "{:?}", top.lines());
}

#[test]
fn every_size_is_drawn_and_every_way_out_restores_the_terminal() {
    let site = Site::new();
    site.talk();
    let mut top = site.top();
    top.wait_for("1/1").expect("streams");
    top.resize(40, 200).expect("wide");
    top.wait_for("CHANNEL").expect("more columns");
    for (rows, columns) in [(5, 20), (1, 1), (2, 3), (24, 7), (3, 200)] {
        top.resize(rows, columns).expect("small");
        // All pages and the help, in whatever order; they are drawn before the next size is set.
        top.press("?").expect("key");
        top.press("x\rw\x1b/x\x1b").expect("keys");
    }
    top.resize(24, 80).expect("as before");
    top.press("\x1b\x1b").expect("keys");
    top.wait_for("? help").expect("goes on");
    top.press("\x03").expect("Ctrl-C");
    assert!(top.end().expect("ends").success());
    assert!(top.is_restored().expect("settings"));

    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut top = site.top();
        top.wait_for("1/1").expect("streams");
        assert!(
            !top.is_restored().expect("settings"),
            "it does use the terminal"
        );
        top.signal(signal);
        assert!(top.end().expect("ends").success(), "{signal}");
        assert!(top.is_restored().expect("settings"), "{signal}");
    }
}

#[test]
fn without_colour_nothing_is_coloured() {
    let site = Site::new();
    let mut command = site.relay.command(["top"]);
    command.env("NO_COLOR", "1");
    let mut top = Terminal::open(&site.net.pbx, command, 24, 80).expect("terminal");
    top.wait_for("offloaded").expect("streams");
    let screen = top.screen();
    for row in 0..24 {
        for column in 0..80 {
            let cell = screen.cell(row, column).expect("cell");
            assert_eq!(cell.fgcolor(), vt100::Color::Default, "{row}, {column}");
            assert_eq!(cell.bgcolor(), vt100::Color::Default, "{row}, {column}");
        }
    }
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("text")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("text")
}

#[test]
fn what_a_dead_daemon_has_left_is_read_until_it_is_gone() {
    let mut site = Site::new();
    site.talk();
    let before = site.relay.json(["list"]).expect("list");
    let mut top = site.top();
    top.wait("moving", |lines| {
        let rows = streams(lines);
        rows.len() == 4 && rows.iter().all(|row| row[3] != "-" && rate(row) > 50.0)
    })
    .expect("rates");
    site.kill();
    top.wait_for("no daemon").expect("told");
    let relayed = |lines: &[String]| streams(lines).iter().any(|row| rate(row) > 50.0);
    top.wait("going on", relayed).expect("the kernel relays on");
    top.wait_for("lease over").expect("told");
    // The PBX's packets are counted too.
    top.wait("suspended and counted", |lines| {
        let rows = streams(lines);
        rows.len() == 4
            && rows
                .iter()
                .all(|row| row[1] == "suspended" && rate(row) > 50.0)
    })
    .expect("goes on");

    let list = site.relay.run(["list", "--json"]).expect("list");
    assert!(
        stderr(&list).contains("read from the maps in /sys/fs/bpf/relay/"),
        "{list:?}"
    );
    let after: Value = serde_json::from_str(&stdout(&list)).expect("JSON");
    for (before, after) in [0, 1].map(|pair| (&before["pairs"][pair], &after["pairs"][pair])) {
        for field in ["id", "feed", "legs", "proof", "payload_types"] {
            assert_eq!(before[field], after[field], "{field}");
        }
        assert_eq!(after["state"], "waiting");
        assert!(
            after["why"]
                .as_str()
                .is_some_and(|why| why.contains("lease")),
            "{after}"
        );
        for stream in [0, 1] {
            let packets = |pair: &Value| pair["streams"][stream]["reception"]["packets"].as_u64();
            assert!(packets(after) > packets(before), "{before} {after}");
            assert_eq!(
                before["streams"][stream]["next_hop"],
                after["streams"][stream]["next_hop"]
            );
        }
    }
    let show = site.relay.run(["show", "2"]).expect("show");
    assert!(stdout(&show).contains("packets received"), "{show:?}");
    assert!(stderr(&show).contains("read from"), "{show:?}");
    let unknown = site.relay.run(["show", "99"]).expect("show");
    assert_eq!(unknown.status.code(), Some(1));
    assert!(
        stderr(&unknown).contains("there is no pair 99"),
        "{unknown:?}"
    );
    let stats = site.relay.run(["stats"]).expect("stats");
    let table = stdout(&stats);
    assert!(
        table.contains("lease_over") && stderr(&stats).contains("read from"),
        "{stats:?}"
    );

    // Nobody holds a lock: the next daemon takes over, and the screen with it.
    let again = Relay::attach(&site.net.pbx, "eth0", ["--mode", "generic"]).expect("relay");
    top.wait("relayed again", |lines| {
        let rows = streams(lines);
        rows.len() == 4 && rows.iter().all(|row| row[1] == "offloaded")
    })
    .expect("adopted");
    again.stop().expect("stopped");
    top.wait_for("no maps of this version").expect("told");
    top.press("q").expect("key");
    assert!(top.end().expect("ends").success());
    assert!(top.is_restored().expect("settings"));
    let nothing = site.relay.run(["list"]).expect("list");
    assert_eq!(nothing.status.code(), Some(1), "{nothing:?}");
}

#[test]
fn a_list_is_sorted_and_filtered_and_goes_on() {
    let site = Site::new();
    site.talk();
    for call in &site.calls {
        call.relayed(0, 100).expect("relayed");
    }
    let ids = |args: &[&str]| -> Vec<u64> {
        let list = site.relay.json(["list"].iter().chain(args)).expect("list");
        let pairs = list["pairs"].as_array().expect("pairs");
        pairs
            .iter()
            .filter_map(|pair| pair["id"].as_u64())
            .collect()
    };
    assert_eq!(ids(&["--sort", "-id"]), [2, 1]);
    assert_eq!(ids(&["--sort", "from", "--reverse"]), [2, 1]);
    assert_eq!(
        ids(&["--filter", "192.0.2.11 state=offloaded received>50"]),
        [1]
    );
    assert_eq!(ids(&["--filter", "loss>50"]), [0_u64; 0]);
    let refused = site
        .relay
        .run(["list", "--filter", "losd>1"])
        .expect("list");
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        stderr(&refused).contains("loss, jitter, mos"),
        "{refused:?}"
    );
    let refused = site.relay.run(["list", "--sort", "losd"]).expect("list");
    assert_eq!(refused.status.code(), Some(2));

    // A pipe gets one document on each line, until nobody reads.
    for verb in ["list", "stats"] {
        let mut command = site.relay.command([verb, "--watch", "0.1", "--json"]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = site.net.pbx.spawn(command).expect("started");
        let mut lines = BufReader::new(process.child_mut().stdout.take().expect("pipe")).lines();
        for _ in 0..3 {
            let line = lines.next().expect("a line").expect("text");
            let _: Value = serde_json::from_str(&line).expect("a whole document");
        }
        drop(lines);
        assert!(process.wait(PATIENCE).expect("ends").success(), "{verb}");
    }
    // A terminal is drawn upon in place.
    let mut list = site.terminal(&["list", "--watch", "0.1"], 24, 80);
    let lines = list.wait("showing both calls", |lines| {
        lines
            .iter()
            .filter(|line| line.contains("offloaded"))
            .count()
            == 4
    });
    let lines = lines.expect("list");
    assert!(lines[0].trim_start().starts_with("ID"), "{lines:#?}");
    // None while the line is being drawn.
    let packets = |lines: &[String]| -> Option<u64> {
        let words: Vec<_> = lines[1].split_whitespace().collect();
        words.get(4)?.parse().ok()
    };
    let first = packets(&lines);
    list.wait("counting", |lines| packets(lines) > first)
        .expect("goes on");
    let mut stats = site.terminal(&["stats", "--watch", "0.2"], 24, 80);
    stats.wait_for("PACKETS/S").expect("rates");
    for watched in [&mut list, &mut stats] {
        watched.press("\x03").expect("Ctrl-C");
        assert!(watched.end().expect("ends").success());
        assert!(watched.is_restored().expect("settings"));
        assert_eq!(
            watched
                .lines()
                .iter()
                .filter(|line| line.contains("PACKETS"))
                .count(),
            1
        );
    }
    let refused = site.relay.run(["top"]).expect("top");
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains("relay-user list --watch"),
        "{refused:?}"
    );
}

#[test]
fn nobody_writes_to_what_is_only_read() {
    let site = Site::new();
    let state = || {
        site.net.pbx.run(|| {
            let maps = relay_user::datapath::PinnedMaps::open("eth0").expect("maps");
            let snapshot = relay_user::snapshot::Snapshot::take(&maps).expect("snapshot");
            let mut slots: Vec<_> = snapshot
                .streams
                .iter()
                .map(|sample| sample.spec.slot)
                .collect();
            slots.sort_unstable();
            (maps.max_streams(), maps.is_current(), slots)
        })
    };
    assert_eq!(state(), (65_536, true, vec![0, 1, 2, 3]));
    // The daemon's lock is untouched: another daemon is refused as ever.
    let second = Relay::attach(&site.net.pbx, "eth0", ["--mode", "generic"]);
    assert!(second.is_err());
    let foreign = site.net.pbx.run(|| {
        let path = std::path::Path::new("/sys/fs/bpf/relay");
        let version = std::fs::read_dir(path)
            .expect("pins")
            .next()
            .expect("version")
            .expect("entry");
        let pin = version.path().join("eth0/COUNTERS");
        std::fs::remove_file(&pin).expect("pin");
        relay_user::datapath::PinnedMaps::open("eth0")
            .err()
            .map(|error| error.to_string())
    });
    assert!(foreign.expect("an error").contains("COUNTERS"));
}
