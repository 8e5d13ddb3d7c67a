//! The feed itself: session and tracker together, and a new session whenever one is lost.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc::{Receiver, Sender},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

pub use super::{
    conditions::Proving,
    tracker::{CallId, FeedCommand, FeedEvent},
};
use super::{
    session::{AmiError, Incoming, Session, connect},
    tracker::{Output, Query, Tracker},
};
use crate::config::AmiSettings;

/// The first wait after a lost connection; doubled for each one that follows, up to [`MAX_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The longest wait between two attempts to connect: so long at most do calls go without the relay
/// after AMI is back. A PBX does not feel a connection every few seconds.
pub const MAX_WAIT: Duration = Duration::from_secs(10);

/// Everything the feed needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeedSettings {
    /// How to reach Asterisk.
    pub ami: AmiSettings,
    /// Set where a proof on the wire follows each offer.
    pub proving: Option<Proving>,
    /// Bridges tracked at a time.
    pub max_bridges: usize,
}

/// Why serving a session ended.
enum End {
    /// Shut down, or nobody listens any more.
    Over,
    Lost(AmiError),
}

/// The feed's ends of its channels.
struct Ends {
    events: Sender<FeedEvent>,
    commands: Receiver<FeedCommand>,
    shutdown: CancellationToken,
}

/// Runs the feed until `shutdown`, or until nobody receives its events: reports what may be
/// relayed, and connects again whenever the connection is lost. `events` may be of any capacity;
/// while it is full the feed reads nothing, neither of Asterisk's, which queues, nor of `commands`.
/// So who receives the events must not wait for room in `commands`. What is asked while the
/// connection is lost waits for the next one, and may find there that it is being asked anyway.
pub async fn run(
    session: Session,
    settings: FeedSettings,
    events: Sender<FeedEvent>,
    commands: Receiver<FeedCommand>,
    shutdown: CancellationToken,
) {
    let FeedSettings {
        ami,
        proving,
        max_bridges,
    } = settings;
    let ends = Ends {
        events,
        commands,
        shutdown,
    };
    let tracker = Tracker::new(max_bridges, proving);
    drive(session, tracker, || connect(&ami), ends).await;
}

/// [`run`] over any byte stream and any way to open it anew.
async fn drive<S, C, F>(
    mut session: Session<S>,
    mut tracker: Tracker,
    mut connect: C,
    mut ends: Ends,
) where
    S: AsyncRead + AsyncWrite,
    C: FnMut() -> F,
    F: Future<Output = Result<Session<S>, AmiError>>,
{
    let mut wait = FIRST_WAIT;
    loop {
        let since = Instant::now();
        let lost = match serve(&mut session, &mut tracker, &mut ends).await {
            End::Over => return,
            End::Lost(error) => error,
        };
        if !ends.tell_lost(&lost).await {
            return;
        }
        // At once after a session that outlasted the wait before it, and from the shortest wait on:
        // that trouble was over, and a PBX that restarts now is not to be waited for as long. One
        // that is closed right after each login must not be opened over and over.
        let mut next = since + jittered(wait);
        wait = if since.elapsed() >= wait {
            FIRST_WAIT
        } else {
            (wait * 2).min(MAX_WAIT)
        };
        session = loop {
            tokio::select! {
                () = sleep_until(next) => {}
                () = ends.shutdown.cancelled() => return,
            }
            let attempt = tokio::select! {
                attempt = connect() => attempt,
                () = ends.shutdown.cancelled() => return,
            };
            match attempt {
                Ok(session) => break session,
                Err(error) => {
                    if !ends.tell_lost(&error).await {
                        return;
                    }
                }
            }
            next = Instant::now() + jittered(wait);
            wait = (wait * 2).min(MAX_WAIT);
        };
    }
}

/// Serves one session to its end. Every event is handed on before the next one is read, so a
/// take-back never waits for a timer or for an answer.
async fn serve<S: AsyncRead + AsyncWrite>(
    session: &mut Session<S>,
    tracker: &mut Tracker,
    ends: &mut Ends,
) -> End {
    let asterisk = session.banner().to_owned();
    if !ends.tell(FeedEvent::Up { asterisk }).await {
        return End::Over;
    }
    tracker.up(now());
    // The tracker bounds how many questions are open.
    let (mut unasked, mut unbegun) = (VecDeque::new(), VecDeque::new());
    let mut asked: HashMap<u64, Query> = HashMap::new();
    loop {
        for output in tracker.take_outputs() {
            match output {
                Output::Tell(event) => {
                    if !ends.tell(event).await {
                        return End::Over;
                    }
                }
                Output::Ask(query) if query.begins() => unbegun.push_back(query),
                Output::Ask(query) => unasked.push_back(query),
            }
        }
        while session.is_ready()
            && let Some(query) = unasked.pop_front().or_else(|| unbegun.pop_front())
        {
            match query.action() {
                Ok(action) => {
                    asked.insert(session.submit(&action), query);
                }
                Err(error) => {
                    tracing::warn!(%error, "a question that AMI cannot carry");
                    tracker.answer(&query, None, now());
                }
            }
        }
        let deadline = tracker.deadline();
        tokio::select! {
            () = ends.shutdown.cancelled() => return End::Over,
            Some(command) = ends.commands.recv() => tracker.command(&command, now()),
            incoming = session.next() => match incoming {
                Ok(Incoming::Event(event)) => tracker.event(&event, now()),
                Ok(Incoming::Answer(id, answer)) => {
                    if let Some(query) = asked.remove(&id) {
                        tracker.answer(&query, Some(answer), now());
                    }
                }
                Err(error) => return End::Lost(error),
            },
            () = async { sleep_until(deadline.map_or_else(Instant::now, Instant::from_std)).await },
                if deadline.is_some() => tracker.tick(now()),
        }
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

impl Ends {
    /// Hands an event on. `false`: shut down, or nobody listens.
    async fn tell(&self, event: FeedEvent) -> bool {
        tokio::select! {
            sent = self.events.send(event) => sent.is_ok(),
            () = self.shutdown.cancelled() => false,
        }
    }

    async fn tell_lost(&self, error: &AmiError) -> bool {
        let cause = error.to_string();
        self.tell(FeedEvent::Down { cause }).await
    }
}

/// Half to all of a wait: many relays that lost the same PBX do not all come back at once.
fn jittered(wait: Duration) -> Duration {
    let random = RandomState::new().hash_one(());
    wait.mul_f64(0.5 + 0.5 * (random as f64 / u64::MAX as f64))
}

#[cfg(test)]
mod tests {
    use tokio::{io::DuplexStream, sync::mpsc::channel, task::JoinHandle};

    use super::*;
    use crate::ami::{
        server::{Server, config, logged_in, pipe},
        session::TIMEOUT,
        simulation::{Pbx, in_short},
        tracker::DEBOUNCE,
    };

    /// A feed whose every connection ends at a server of the test's.
    struct Feed {
        events: Receiver<FeedEvent>,
        commands: Sender<FeedCommand>,
        servers: Receiver<Server>,
        shutdown: CancellationToken,
        task: JoinHandle<()>,
    }

    async fn feed(capacity: usize) -> (Feed, Server) {
        let (session, server) = logged_in().await;
        let (sender, events) = channel(capacity);
        let (commands, commands_out) = channel(capacity);
        let (offer_server, servers) = channel(1);
        let shutdown = CancellationToken::new();
        let connect = move || {
            let offer_server = offer_server.clone();
            async move {
                let (stream, server): (DuplexStream, Server) = pipe();
                offer_server
                    .send(server)
                    .await
                    .expect("the test takes every server");
                Session::login(stream, &config()).await
            }
        };
        let ends = Ends {
            events: sender,
            commands: commands_out,
            shutdown: shutdown.clone(),
        };
        let task = tokio::spawn(drive(session, Tracker::new(1000, None), connect, ends));
        (
            Feed {
                events,
                commands,
                servers,
                shutdown,
                task,
            },
            server,
        )
    }

    impl Feed {
        async fn next(&mut self) -> String {
            loop {
                match self.events.recv().await.expect("a running feed") {
                    FeedEvent::Synced => {}
                    event => return in_short(&event),
                }
            }
        }
    }

    fn one_call() -> Pbx {
        let mut pbx = Pbx::default();
        pbx.bridge("one", "native_rtp", &["PJSIP/a-1", "PJSIP/b-2"]);
        pbx
    }

    #[tokio::test(start_paused = true)]
    async fn a_standing_call_is_offered_and_taken_back_without_a_wait() {
        let (mut feed, mut server) = feed(16).await;
        let pbx = one_call();
        assert_eq!(feed.next().await, "up Asterisk Call Manager/11.0.0");
        let offer = tokio::select! {
            offer = feed.next() => offer,
            () = server.serve(&pbx) => unreachable!("the feed goes on"),
        };
        assert!(offer.starts_with("offer "), "{offer}");
        let start = Instant::now();
        server
            .send("Event: Hold\r\nPrivilege: call,all\r\nChannel: PJSIP/a-1\r\n\r\n")
            .await;
        assert_eq!(feed.next().await, "back Hold (PJSIP/a-1)");
        assert_eq!(start.elapsed(), Duration::ZERO);
        let refused = tokio::select! {
            refused = feed.next() => refused,
            () = server.serve(&pbx) => unreachable!("the feed goes on"),
        };
        assert_eq!(
            (refused.as_str(), start.elapsed()),
            ("refused leg A (PJSIP/a-1) is on hold", DEBOUNCE)
        );
        feed.shutdown.cancel();
        feed.task.await.expect("a clean end");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_connection_takes_everything_back_and_the_next_one_resyncs() {
        let (mut feed, mut server) = feed(16).await;
        let pbx = one_call();
        feed.next().await;
        tokio::select! {
            offer = feed.next() => assert!(offer.starts_with("offer "), "{offer}"),
            () = server.serve(&pbx) => unreachable!("the feed goes on"),
        }
        // Longer than the first wait: a session that held.
        tokio::select! {
            () = tokio::time::sleep(2 * FIRST_WAIT) => {}
            () = server.serve(&pbx) => unreachable!("the feed goes on"),
        }
        drop(server);
        assert!(
            feed.next()
                .await
                .starts_with("down AMI at pbx.example:5038 closed the connection")
        );

        // After a session that held the first attempt comes at once; each that fails tells its cause
        // and makes the next one wait longer.
        let mut waits = Vec::new();
        for attempt in 0..10 {
            let start = Instant::now();
            let mut server = feed.servers.recv().await.expect("another attempt");
            waits.push(start.elapsed());
            server.send(&format!("attempt {attempt}\r\n")).await;
            drop(server);
            let down = feed.next().await;
            assert!(
                down.starts_with("down ") && down.contains(&format!("attempt {attempt}")),
                "{down}"
            );
        }
        assert_eq!(waits[0], Duration::ZERO);
        assert!(
            waits[1] <= FIRST_WAIT && waits[9] >= MAX_WAIT / 2,
            "{waits:?}"
        );
        assert!(waits.iter().all(|wait| *wait <= MAX_WAIT), "{waits:?}");

        let mut server = feed.servers.recv().await.expect("another attempt");
        server.accept().await;
        assert!(feed.next().await.starts_with("up "));
        tokio::select! {
            offer = feed.next() => assert!(offer.starts_with("offer "), "{offer}"),
            () = server.serve(&pbx) => unreachable!("the feed goes on"),
        }
        feed.shutdown.cancel();
        feed.task.await.expect("a clean end");
    }

    #[tokio::test(start_paused = true)]
    async fn every_way_to_lose_the_connection_is_down() {
        for breakage in [
            "Event: X\r\nValue: ".to_owned() + &"y".repeat(70_000),
            "a: b\r\n".repeat(50_000),
            String::new(),
        ] {
            let (mut feed, mut server) = feed(16).await;
            feed.next().await;
            let start = Instant::now();
            // The last one is silence: the resync is left without an answer.
            tokio::select! {
                down = feed.next() => assert!(down.starts_with("down "), "{down}"),
                () = async { server.send(&breakage).await; std::future::pending().await } => {}
            }
            assert!(start.elapsed() <= TIMEOUT);
            feed.shutdown.cancel();
            feed.task.await.expect("a clean end");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_events_neither_grows_nor_hides_a_take_back() {
        let (mut feed, mut server) = feed(1).await;
        let pbx = one_call();
        feed.next().await;
        tokio::select! {
            offer = feed.next() => assert!(offer.starts_with("offer "), "{offer}"),
            () = server.serve(&pbx) => unreachable!("the feed goes on"),
        }
        let flood =
            "Event: VarSet\r\nChannel: PJSIP/other-9\r\nVariable: BRIDGEPEER\r\nValue: z\r\n\r\n"
                .repeat(100);
        for _ in 0..1000 {
            server.send(&flood).await;
        }
        server
            .send("Event: HangupRequest\r\nChannel: PJSIP/b-2\r\n\r\n")
            .await;
        assert_eq!(feed.next().await, "back HangupRequest (PJSIP/b-2)");
        feed.shutdown.cancel();
        feed.task.await.expect("a clean end");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_closes_each_session_at_once_is_not_logged_in_to_over_and_over() {
        let (mut feed, server) = feed(16).await;
        drop(server);
        let start = Instant::now();
        for _ in 0..20 {
            let mut server = feed.servers.recv().await.expect("another attempt");
            server.accept().await;
            drop(server);
            while !feed.next().await.starts_with("down ") {}
        }
        assert!(start.elapsed() >= 5 * MAX_WAIT, "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_session_that_held_an_earlier_trouble_delays_nothing() {
        let (mut feed, mut server) = feed(16).await;
        let pbx = one_call();
        // The wait has grown to 8 s by then.
        for _ in 0..4 {
            drop(server);
            server = feed.servers.recv().await.expect("another attempt");
            server.accept().await;
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(9)) => {}
            () = server.serve(&pbx) => unreachable!("the feed goes on"),
            () = async { loop { feed.next().await; } } => unreachable!("the feed goes on"),
        }
        drop(server);
        let start = Instant::now();
        while !feed.next().await.starts_with("down ") {}
        for _ in 0..3 {
            drop(feed.servers.recv().await.expect("another attempt"));
            while !feed.next().await.starts_with("down ") {}
        }
        assert!(start.elapsed() <= 3 * FIRST_WAIT, "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_or_silent_server_is_down_within_the_timeout() {
        for slow in [false, true] {
            let (mut feed, mut server) = feed(16).await;
            feed.next().await;
            let start = Instant::now();
            let drip = async {
                for byte in "Response: Success\r\nActionID: relay-4\r\n".chars().cycle() {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    if slow {
                        server.send(&byte.to_string()).await;
                    }
                }
            };
            tokio::select! {
                down = feed.next() => assert!(down.contains("left BridgeList without an answer for 5 s"), "{down}"),
                () = drip => unreachable!("never ends"),
            }
            assert_eq!(start.elapsed(), TIMEOUT);
            // So is one that accepts and then says nothing.
            let mut silent = feed.servers.recv().await.expect("another attempt");
            if slow {
                silent.send("Asterisk").await;
            }
            let start = Instant::now();
            let down = feed.next().await;
            assert!(down.contains("sends no AMI banner within 5 s"), "{down}");
            assert_eq!(start.elapsed(), TIMEOUT);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_controller_asks_is_answered_and_while_down_it_need_not_wait() {
        let (mut feed, mut server) = feed(16).await;
        let pbx = one_call();
        let ask = || FeedCommand::Ask {
            call: CallId::new("one").expect("a bridge id"),
        };
        feed.next().await;
        let offer = tokio::select! {
            offer = feed.next() => offer,
            () = server.serve(&pbx) => unreachable!("the feed goes on"),
        };
        let start = Instant::now();
        feed.commands.try_send(ask()).expect("room");
        let again = tokio::select! {
            again = feed.next() => again,
            () = server.serve(&pbx) => unreachable!("the feed goes on"),
        };
        assert_eq!((again, start.elapsed()), (offer.clone(), Duration::ZERO));

        drop(server);
        assert!(feed.next().await.starts_with("down "));
        for _ in 0..16 {
            feed.commands.try_send(ask()).expect("room");
        }
        let mut server = feed.servers.recv().await.expect("another attempt");
        server.accept().await;
        assert!(feed.next().await.starts_with("up "));
        let told = tokio::select! {
            told = feed.next() => told,
            () = server.serve(&pbx) => unreachable!("the feed goes on"),
        };
        assert_eq!(told, offer);

        // The controller may also stop asking.
        drop(std::mem::replace(&mut feed.commands, channel(1).0));
        server
            .send("Event: Hold\r\nChannel: PJSIP/a-1\r\n\r\n")
            .await;
        assert_eq!(feed.next().await, "back Hold (PJSIP/a-1)");
    }

    /// 10,000 events a second that concern no call, for 20 seconds.
    #[tokio::test(start_paused = true)]
    async fn a_flood_of_events_delays_no_answer() {
        const RATE: usize = 10_000;
        let (mut feed, mut server) = feed(4).await;
        let mut pbx = one_call();
        feed.next().await;
        let burst = "Event: Newexten\r\nPrivilege: dialplan,all\r\nChannel: PJSIP/other-9\r\n\
                     Extension: s\r\nPriority: 1\r\nApplication: Set\r\nAppData: x=y\r\n\r\n"
            .repeat(RATE / 100);
        let serve = async {
            let start = Instant::now();
            for burst_number in 1..=20 * 100 {
                server.send(&burst).await;
                if burst_number == 1000 {
                    pbx.bridge("two", "native_rtp", &["PJSIP/c-3", "PJSIP/d-4"]);
                    for (count, channel) in [(1, "PJSIP/c-3"), (2, "PJSIP/d-4")] {
                        server
                            .send(&format!(
                                "Event: BridgeEnter\r\nBridgeUniqueid: two\r\n\
                                 BridgeNumChannels: {count}\r\nChannel: {channel}\r\n\r\n\
                                 Event: VarSet\r\nChannel: {channel}\r\n\
                                 Variable: BRIDGEPEER\r\nValue: x\r\n\r\n"
                            ))
                            .await;
                    }
                }
                let next = start + Duration::from_millis(10) * burst_number;
                while Instant::now() < next {
                    tokio::select! {
                        action = server.action() => {
                            server.answer(&action.expect("the feed goes on"), &pbx).await;
                        }
                        () = sleep_until(next) => {}
                    }
                }
            }
        };
        let start = Instant::now();
        let mut told = Vec::new();
        let listen = async {
            loop {
                told.push((feed.next().await, start.elapsed().as_secs()));
            }
        };
        tokio::select! {
            () = listen => unreachable!("never ends"),
            () = serve => {}
        }
        let offers: Vec<_> = told
            .iter()
            .map(|(told, second)| (told.split(' ').next().unwrap_or_default(), *second))
            .collect();
        assert_eq!(offers, [("offer", 0), ("offer", 10)], "{told:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_calls_that_stand_are_all_offered() {
        let mut pbx = Pbx::default();
        for call in 0..1000 {
            pbx.bridge(
                &format!("b{call}"),
                "native_rtp",
                &[&format!("PJSIP/a-{call}"), &format!("PJSIP/b-{call}")],
            );
        }
        let (mut feed, mut server) = feed(4).await;
        feed.next().await;
        let offers = async {
            let mut offers = 0;
            while offers < 1000 {
                let told = feed.next().await;
                assert!(told.starts_with("offer "), "{told}");
                offers += 1;
            }
        };
        tokio::select! {
            () = offers => {}
            () = server.serve(&pbx) => unreachable!("the feed goes on"),
        }
    }

    /// What the first call has to be asked comes before the last call's turn.
    #[tokio::test(start_paused = true)]
    async fn the_first_of_many_calls_need_not_wait_for_the_last() {
        let mut pbx = Pbx::default();
        for call in 0..1000 {
            let names = ["a", "b"].map(|name| format!("PJSIP/{name}-{call}"));
            pbx.bridge(&format!("b{call}"), "native_rtp", &[&names[0], &names[1]]);
        }
        let (mut feed, mut server) = feed(4).await;
        feed.next().await;
        let mut begun = 0;
        let serve = async {
            while let Some(action) = server.action().await {
                begun += usize::from(action["Action"] == "BridgeInfo");
                server.answer(&action, &pbx).await;
            }
        };
        tokio::select! {
            told = feed.next() => assert!(told.starts_with("offer "), "{told}"),
            () = serve => unreachable!("the feed goes on"),
        }
        assert!(begun < 200, "{begun}");
    }

    #[tokio::test(start_paused = true)]
    async fn it_ends_when_it_is_shut_down_or_nobody_listens() {
        let (feed_, _server) = feed(1).await;
        feed_.shutdown.cancel();
        feed_.task.await.expect("a clean end");
        let (feed_, _server) = feed(1).await;
        drop(feed_.events);
        feed_.task.await.expect("a clean end");
    }

    /// The daemon spawns the feed.
    #[test]
    fn the_feed_can_be_spawned() {
        fn sendable<F: Future + Send>(
            _: impl Fn(
                Session,
                FeedSettings,
                Sender<FeedEvent>,
                Receiver<FeedCommand>,
                CancellationToken,
            ) -> F,
        ) {
        }
        sendable(run);
    }
}
