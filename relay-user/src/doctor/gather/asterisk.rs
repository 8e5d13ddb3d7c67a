//! Asterisk, by one AMI session of the doctor's own.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    ami::{
        self, AmiError, FeedEvent, FeedSettings, Proving, Session,
        conditions::{direct_media_of, endpoint, is_argument, rtp_timeout_of},
        message::Action,
        session::Answer,
    },
    config::{AmiSettings, ConfigError},
    doctor::{
        checks::cause,
        facts::{AsteriskFacts, CallFacts, Endpoint, Stage, Trouble},
    },
};

/// Endpoints that are looked at, at most.
const MOST_ENDPOINTS: usize = 256;
/// How long the feed may take to judge every call.
const JUDGING: Duration = Duration::from_secs(30);
/// How long after that the feed may still be about to tell of a call: one that changes just now is not
/// judged before it rests.
const SETTLING: Duration = Duration::from_secs(1);
/// Events of the feed that wait.
const EVENTS: usize = 1024;

/// Actions with which a user can run programs or change the configuration.
const DANGEROUS: [&str; 7] = [
    "AGI",
    "Command",
    "CreateConfig",
    "DBPut",
    "ModuleLoad",
    "Originate",
    "UpdateConfig",
];

/// What Asterisk tells of itself and, where nobody else tells, of its calls.
pub(super) async fn facts(
    ami: Result<Option<AmiSettings>, ConfigError>,
    own_addresses: Vec<IpAddr>,
    with_calls: bool,
) -> (Option<AsteriskFacts>, Option<CallFacts>) {
    let settings = match ami {
        Ok(None) => return (None, None),
        Ok(Some(settings)) => settings,
        Err(error) => {
            let facts = AsteriskFacts {
                trouble: Some(Trouble {
                    stage: Stage::Settings,
                    cause: error.to_string(),
                }),
                ..AsteriskFacts::default()
            };
            return (Some(facts), None);
        }
    };
    let mut facts = AsteriskFacts {
        address: settings.address.clone(),
        user: settings.user.clone(),
        ..AsteriskFacts::default()
    };
    let session = match ask(&settings, &mut facts).await {
        Ok(session) => session,
        Err(error) => {
            facts.trouble = Some(Trouble {
                stage: stage(&error),
                cause: error.to_string(),
            });
            return (Some(facts), None);
        }
    };
    let calls = if with_calls {
        calls(session, settings, own_addresses).await
    } else {
        None
    };
    (Some(facts), calls)
}

/// How far an attempt went that ended so.
fn stage(error: &AmiError) -> Stage {
    match error {
        AmiError::Resolve { .. }
        | AmiError::Connect { .. }
        | AmiError::ConnectTimeout { .. }
        | AmiError::NoBanner { .. }
        | AmiError::Protocol { .. }
        | AmiError::Unanswered { .. }
        | AmiError::ListTooLong { .. } => Stage::Reach,
        AmiError::Closed { .. } | AmiError::Refused { .. } => Stage::Login,
        AmiError::Privileges { .. } => Stage::Ask,
        AmiError::Blind { .. } => Stage::Hear,
        AmiError::Unusable(_) => Stage::Settings,
    }
}

async fn ask(settings: &AmiSettings, facts: &mut AsteriskFacts) -> Result<Session, AmiError> {
    // It makes sure that the user may ask and hears of changes, as `attach` does.
    let mut session = ami::connect(settings).await?;
    facts.asterisk = Some(session.banner().to_owned());
    let commands = session.request(&Action::new("ListCommands")).await?;
    facts.excess = dangerous(&commands);
    let (names, from) = endpoints(&mut session).await?;
    facts.endpoints_from = Some(from.to_owned());
    for name in names.into_iter().take(MOST_ENDPOINTS) {
        let direct_media = getvar(&mut session, &direct_media_of(&name)).await?;
        let rtp_timeout = getvar(&mut session, &rtp_timeout_of(&name)).await?;
        facts.endpoints.push(Endpoint {
            direct_media: direct_media.as_deref().and_then(truth),
            rtp_timeout: rtp_timeout.and_then(|value| value.parse().ok()),
            name,
        });
    }
    Ok(session)
}

/// Of the answer to `ListCommands`, which names what the user may run.
fn dangerous(commands: &Answer) -> Vec<String> {
    let names: BTreeSet<_> = commands.response.fields().map(|(name, _)| name).collect();
    let known = DANGEROUS.iter().filter(|name| names.contains(*name));
    known.map(|name| (*name).to_owned()).collect()
}

/// Names of endpoints, and how they were found: `PJSIPShowEndpoints` needs `system`, which the relay's
/// user does not have.
async fn endpoints(session: &mut Session) -> Result<(BTreeSet<String>, &'static str), AmiError> {
    let shown = session.request(&Action::new("PJSIPShowEndpoints")).await?;
    let names = named(&shown, "ObjectName", |name| Some(name));
    if !names.is_empty() {
        return Ok((names, "endpoints"));
    }
    let states = session.request(&Action::new("DeviceStateList")).await?;
    let names = named(&states, "Device", |device| device.strip_prefix("PJSIP/"));
    if !names.is_empty() {
        return Ok((names, "device_states"));
    }
    let channels = session.request(&Action::new("Status")).await?;
    Ok((named(&channels, "Channel", endpoint), "channels"))
}

/// What `name` makes of a field of each item.
fn named(answer: &Answer, field: &str, name: impl Fn(&str) -> Option<&str>) -> BTreeSet<String> {
    let values = answer.items.iter().filter_map(|item| item.get(field));
    values
        .filter_map(name)
        .filter(|name| is_argument(name))
        .map(str::to_owned)
        .collect()
}

async fn getvar(session: &mut Session, variable: &str) -> Result<Option<String>, AmiError> {
    // A name that AMI cannot carry is no endpoint that it named.
    let Ok(action) = Action::new("Getvar").with("Variable", variable) else {
        return Ok(None);
    };
    let answer = session.request(&action).await?;
    let value = answer.response.get("Value").filter(|_| answer.is_success());
    Ok(value.map(str::to_owned))
}

fn truth(value: &str) -> Option<bool> {
    match value {
        "true" | "yes" => Some(true),
        "false" | "no" => Some(false),
        _ => None,
    }
}

/// Judges every call that is up as the daemon would, by its own feed.
async fn calls(
    session: Session,
    ami: AmiSettings,
    own_addresses: Vec<IpAddr>,
) -> Option<CallFacts> {
    let (events_in, mut events) = mpsc::channel(EVENTS);
    let (_questions, questions) = mpsc::channel(1);
    let stop = CancellationToken::new();
    let settings = FeedSettings {
        ami,
        proving: Some(Proving { own_addresses }),
        max_bridges: ami::BRIDGES,
    };
    let feed = tokio::spawn(ami::run(
        session,
        settings,
        events_in,
        questions,
        stop.clone(),
    ));
    let mut judged = HashMap::new();
    let judging = async {
        let mut settled = None;
        loop {
            let event = match settled {
                None => events.recv().await,
                Some(settled) => match timeout_at(settled, events.recv()).await {
                    Ok(event) => event,
                    Err(_) => return Some(()),
                },
            };
            match event? {
                FeedEvent::Offer { call, .. } => judged.insert(call, None),
                FeedEvent::Refused { call, cause, .. } | FeedEvent::TakeBack { call, cause } => {
                    judged.insert(call, Some(cause))
                }
                FeedEvent::Gone { call } => judged.remove(&call),
                FeedEvent::Up { .. } => None,
                FeedEvent::Down { .. } => return None,
                FeedEvent::Synced => {
                    settled = Some(Instant::now() + SETTLING);
                    None
                }
            };
        }
    };
    let synced = timeout(JUDGING, judging).await.ok().flatten();
    stop.cancel();
    events.close();
    // It ends with its channels; how it ends changes nothing here.
    let _ = feed.await;
    synced?;
    let mut kept = BTreeMap::new();
    for why in judged.values().flatten() {
        *kept.entry(cause(why)).or_default() += 1;
    }
    Some(CallFacts {
        told_by: "ami".to_owned(),
        total: judged.len() as u64,
        relayed: judged.values().filter(|why| why.is_none()).count() as u64,
        waiting: 0,
        kept,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ami::message::Message;

    #[test]
    fn what_gives_the_host_away_is_picked_out() {
        let answer = Answer {
            response: Message::new(
                b"Response: Success\r\nGetvar: Gets a variable. (Priv: call,reporting,all)\r\n\
                  Command: Execute. (Priv: command,all)\r\nOriginate: Call. (Priv: originate,all)\r\n",
            ),
            items: Vec::new(),
        };
        assert_eq!(dangerous(&answer), ["Command", "Originate"]);
    }

    #[test]
    fn names_that_no_function_takes_are_left_out() {
        let item = |text: &str| Message::new(text.as_bytes());
        let answer = Answer {
            response: item("Response: Success\r\n"),
            items: vec![
                item("Event: DeviceStateChange\r\nDevice: PJSIP/alice\r\n"),
                item("Event: DeviceStateChange\r\nDevice: PJSIP/a,b)\r\n"),
                item("Event: DeviceStateChange\r\nDevice: Local/x@y\r\n"),
                item("Event: DeviceStateListComplete\r\n"),
            ],
        };
        let names = named(&answer, "Device", |device| device.strip_prefix("PJSIP/"));
        assert_eq!(names, BTreeSet::from(["alice".to_owned()]));
    }

    #[test]
    fn only_asterisks_words_for_truth_are_understood() {
        let read = ["true", "yes", "false", "no", ""].map(truth);
        assert_eq!(
            read,
            [Some(true), Some(true), Some(false), Some(false), None]
        );
    }
}
