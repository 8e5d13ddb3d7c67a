//! The feed itself: session and tracker together, and a new session whenever one is lost.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc::Sender,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

pub use super::tracker::{CallId, FeedEvent};
use super::{
    session::{AmiError, Incoming, Secret, Session, connect},
    tracker::{MAX_BRIDGES, Output, Query, Tracker},
};

/// The first wait after a lost connection; doubled for each one that follows, up to [`MAX_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The longest wait between two attempts to connect.
pub const MAX_WAIT: Duration = Duration::from_secs(30);

/// Where AMI is and who we are there.
#[derive(Clone, Debug)]
pub struct AmiConfig {
    /// HOST:PORT.
    pub address: String,
    /// The user, a section of manager.conf.
    pub user: String,
    /// The user's secret.
    pub secret: Secret,
}

/// Why serving a session ended.
enum End {
    /// Shut down, or nobody listens any more.
    Over,
    Lost(AmiError),
}

/// Runs the feed until `shutdown`, or until nobody receives its events: reports what may be
/// relayed, and connects again whenever the connection is lost. `events` may be of any capacity;
/// while it is full the feed reads nothing, and Asterisk queues.
pub async fn run(
    session: Session,
    config: AmiConfig,
    events: Sender<FeedEvent>,
    shutdown: CancellationToken,
) {
    drive(session, || connect(&config), events, shutdown).await;
}

/// [`run`] over any byte stream and any way to open it anew.
async fn drive<S, C, F>(
    mut session: Session<S>,
    mut connect: C,
    events: Sender<FeedEvent>,
    shutdown: CancellationToken,
) where
    S: AsyncRead + AsyncWrite,
    C: FnMut() -> F,
    F: Future<Output = Result<Session<S>, AmiError>>,
{
    let mut tracker = Tracker::new(MAX_BRIDGES);
    let mut wait = FIRST_WAIT;
    loop {
        let since = Instant::now();
        let lost = match serve(&mut session, &mut tracker, &events, &shutdown).await {
            End::Over => return,
            End::Lost(error) => error,
        };
        tracing::warn!(error = %lost, "AMI is lost; every call goes back to the PBX");
        if !tell(
            &events,
            &shutdown,
            FeedEvent::Down {
                cause: lost.to_string(),
            },
        )
        .await
        {
            return;
        }
        // Only a session that held shows that the trouble is over; one that is closed right after
        // each login must not be opened twice a second.
        if since.elapsed() >= MAX_WAIT {
            wait = FIRST_WAIT;
        }
        session = loop {
            tokio::select! {
                () = sleep(jittered(wait)) => {}
                () = shutdown.cancelled() => return,
            }
            wait = (wait * 2).min(MAX_WAIT);
            let attempt = tokio::select! {
                attempt = connect() => attempt,
                () = shutdown.cancelled() => return,
            };
            match attempt {
                Ok(session) => break session,
                Err(error) => tracing::warn!(%error, "AMI is still lost"),
            }
        };
    }
}

/// Serves one session to its end. Every event is handed on before the next one is read, so a
/// take-back never waits for a timer or for an answer.
async fn serve<S: AsyncRead + AsyncWrite>(
    session: &mut Session<S>,
    tracker: &mut Tracker,
    events: &Sender<FeedEvent>,
    shutdown: &CancellationToken,
) -> End {
    if !tell(
        events,
        shutdown,
        FeedEvent::Up {
            asterisk: session.banner().to_owned(),
        },
    )
    .await
    {
        return End::Over;
    }
    tracker.up(now());
    // The tracker bounds how many questions are open.
    let mut unasked = VecDeque::new();
    let mut asked: HashMap<u64, Query> = HashMap::new();
    loop {
        for output in tracker.take_outputs() {
            match output {
                Output::Tell(event) => {
                    if !tell(events, shutdown, event).await {
                        return End::Over;
                    }
                }
                Output::Ask(query) => unasked.push_back(query),
            }
        }
        while session.is_ready()
            && let Some(query) = unasked.pop_front()
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
            () = shutdown.cancelled() => return End::Over,
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

/// Hands an event on. `false`: shut down, or nobody listens.
async fn tell(events: &Sender<FeedEvent>, shutdown: &CancellationToken, event: FeedEvent) -> bool {
    tokio::select! {
        sent = events.send(event) => sent.is_ok(),
        () = shutdown.cancelled() => false,
    }
}

/// Half to all of a wait: many relays that lost the same PBX do not all come back at once.
fn jittered(wait: Duration) -> Duration {
    let random = RandomState::new().hash_one(());
    wait.mul_f64(0.5 + 0.5 * (random as f64 / u64::MAX as f64))
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::DuplexStream,
        sync::mpsc::{Receiver, channel},
        task::JoinHandle,
    };

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
        servers: Receiver<Server>,
        shutdown: CancellationToken,
        task: JoinHandle<()>,
    }

    async fn feed(capacity: usize) -> (Feed, Server) {
        let (session, server) = logged_in().await;
        let (sender, events) = channel(capacity);
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
        let task = tokio::spawn(drive(session, connect, sender, shutdown.clone()));
        (
            Feed {
                events,
                servers,
                shutdown,
                task,
            },
            server,
        )
    }

    impl Feed {
        async fn next(&mut self) -> String {
            in_short(&self.events.recv().await.expect("a running feed"))
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
            ("refused PJSIP/a-1 is on hold", DEBOUNCE)
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
        drop(server);
        assert!(
            feed.next()
                .await
                .starts_with("down AMI at pbx.example:5038 closed the connection")
        );

        // Attempts that fail change nothing but the wait.
        let mut waits = Vec::new();
        for _ in 0..10 {
            let start = Instant::now();
            drop(feed.servers.recv().await.expect("another attempt"));
            waits.push(start.elapsed());
        }
        assert!(
            waits[0] <= FIRST_WAIT && waits[9] >= MAX_WAIT / 2,
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
            _: impl Fn(Session, AmiConfig, Sender<FeedEvent>, CancellationToken) -> F,
        ) {
        }
        sendable(run);
    }
}
