//! Asterisk: whether AMI can be used, and what its endpoints are set to.

use super::{About, Finding, Group, some, word};
use crate::{
    ami::PRIVILEGES,
    control::model::{AmiReport, AmiState},
    doctor::facts::{AsteriskFacts, Endpoint, Facts, Stage, Trouble},
};

const ASTERISK: About = About(Group::Asterisk);

/// The steps of a session: the name of the finding, and what it says where the step was taken.
const STEPS: [(Stage, &str, &str); 4] = [
    (Stage::Reach, "ami_reachable", "answers"),
    (
        Stage::Login,
        "ami_login",
        "the user and the secret are right",
    ),
    (Stage::Ask, "ami_write", "the user may ask about calls"),
    (Stage::Hear, "ami_read", "the user hears of changes"),
];

/// Shows whether the manager interface is on, and where it listens.
const MANAGER: &str = "asterisk -rx 'manager show settings'";

/// A timeout of Asterisk's so short that a third of it is too little for a keepalive to come in time.
const SHORT_TIMEOUT: u32 = 5;

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let feed = facts.daemon.as_ref().and_then(|daemon| daemon.ami.as_ref());
    if let Some(ami) = feed {
        findings.push(feed_state(ami));
    }
    match &facts.asterisk {
        Some(asterisk) => findings.extend(session(asterisk)),
        None if feed.is_some() => {}
        None => findings.push(ASTERISK.warning(
            "ami_settings",
            "no AMI was named: the relay then takes pairs from `relay-user add` alone",
            format!(
                "relay-user doctor {}--ami 127.0.0.1:5038 --ami-user relay --ami-secret-file /etc/relay-user/ami.secret",
                facts.interface.as_ref().map_or_else(String::new, |interface| word(&interface.name) + " ")
            ),
        )),
    }
    findings
}

fn feed_state(ami: &AmiReport) -> Finding {
    let id = "ami_feed";
    match (ami.state, &ami.cause) {
        (AmiState::Up, _) => ASTERISK.ok(
            id,
            format!("the daemon is logged in to {} as {}", ami.address, ami.user),
        ),
        (AmiState::Down, cause) => ASTERISK.problem(
            id,
            format!(
                "the daemon has no AMI: {}",
                cause.as_deref().unwrap_or("it tells no cause")
            ),
            MANAGER.to_owned(),
        ),
    }
}

fn session(asterisk: &AsteriskFacts) -> Vec<Finding> {
    if let Some(Trouble {
        stage: Stage::Settings,
        cause,
    }) = &asterisk.trouble
    {
        return vec![ASTERISK.problem("ami_settings", cause, None)];
    }
    let mut findings = Vec::new();
    for (stage, id, what) in STEPS {
        match &asterisk.trouble {
            Some(trouble) if trouble.stage == stage => {
                let mend = remedy(asterisk, stage);
                findings.push(ASTERISK.problem(id, &trouble.cause, mend));
                return findings;
            }
            _ if stage == Stage::Reach => findings.push(ASTERISK.ok(
                id,
                format!(
                    "{} {what}{}",
                    asterisk.address,
                    asterisk.asterisk.as_ref().map(|name| format!(": {name}")).unwrap_or_default()
                ),
            )),
            _ => findings.push(ASTERISK.ok(id, what)),
        }
    }
    findings.extend([
        excess(asterisk),
        direct_media(asterisk),
        rtp_timeout(asterisk),
    ]);
    findings
}

/// What to do about a session that did not come about.
fn remedy(asterisk: &AsteriskFacts, stage: Stage) -> String {
    match stage {
        Stage::Settings | Stage::Reach => MANAGER.to_owned(),
        Stage::Login => format!(
            "asterisk -rx 'manager show user {}'",
            asterisk.user.replace('\'', r"'\''")
        ),
        Stage::Ask | Stage::Hear => in_manager_conf(asterisk, PRIVILEGES),
    }
}

fn in_manager_conf(asterisk: &AsteriskFacts, what: &str) -> String {
    format!(
        "under [{}] of manager.conf: {what}; then asterisk -rx 'manager reload'",
        asterisk.user
    )
}

fn excess(asterisk: &AsteriskFacts) -> Finding {
    let id = "ami_excess";
    if asterisk.excess.is_empty() {
        return ASTERISK.ok(id, "the user may do nothing that gives the host away");
    }
    let actions: Vec<_> = asterisk.excess.iter().map(String::as_str).collect();
    ASTERISK.warning(
        id,
        format!(
            "the user may run {}, which the relay never does",
            some(&actions, 6)
        ),
        in_manager_conf(asterisk, PRIVILEGES),
    )
}

fn endpoints(asterisk: &AsteriskFacts, wanted: impl Fn(&Endpoint) -> bool) -> Vec<&str> {
    let named = asterisk
        .endpoints
        .iter()
        .filter(|endpoint| wanted(endpoint));
    named.map(|endpoint| endpoint.name.as_str()).collect()
}

/// How many endpoints there were to look at, or why none.
fn looked_at(asterisk: &AsteriskFacts) -> String {
    match (asterisk.endpoints.len(), asterisk.endpoints_from.as_deref()) {
        (0, _) => "Asterisk names no endpoint to this user".to_owned(),
        (count, Some("channels")) => format!("of the {count} endpoints that have a call"),
        (count, _) => format!("of {count} endpoints"),
    }
}

fn direct_media(asterisk: &AsteriskFacts) -> Finding {
    let id = "direct_media";
    let direct = endpoints(asterisk, |endpoint| endpoint.direct_media == Some(true));
    if direct.is_empty() {
        let looked_at = looked_at(asterisk);
        return ASTERISK.ok(id, format!("on for none; {looked_at}"));
    }
    ASTERISK.warning(
        id,
        format!(
            "on for {} ({}): phones may send to each other, and then there is nothing to relay",
            some(&direct, 6),
            looked_at(asterisk)
        ),
        "in pjsip.conf, where media is to pass the PBX: direct_media=no; then asterisk -rx 'pjsip reload'"
            .to_owned(),
    )
}

fn rtp_timeout(asterisk: &AsteriskFacts) -> Finding {
    let id = "rtp_timeout";
    let short = endpoints(asterisk, |endpoint| {
        endpoint
            .rtp_timeout
            .is_some_and(|seconds| (1..SHORT_TIMEOUT).contains(&seconds))
    });
    let set = endpoints(asterisk, |endpoint| {
        endpoint.rtp_timeout.is_some_and(|seconds| seconds > 0)
    });
    if short.is_empty() {
        let looked_at = looked_at(asterisk);
        return ASTERISK.ok(
            id,
            match set.len() {
                0 => format!("set for none; {looked_at}"),
                _ => format!(
                    "set for {}; {looked_at}: the relay passes packets up within a third of it",
                    some(&set, 6)
                ),
            },
        );
    }
    ASTERISK.warning(
        id,
        format!(
            "less than {SHORT_TIMEOUT} s for {}: Asterisk may hang up a phone that sends no RTCP while it is relayed",
            some(&short, 6)
        ),
        "in pjsip.conf: rtp_timeout=30; then asterisk -rx 'pjsip reload'".to_owned(),
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::{
        super::{
            interface::tests::daemon,
            tests::{found, judged},
        },
        *,
    };
    use crate::{
        datapath::AttachMode,
        doctor::{Level, facts::HostFacts},
    };

    /// Nothing but what is given here.
    pub(in super::super) fn only(asterisk: Option<AsteriskFacts>) -> Facts {
        Facts {
            host: HostFacts::default(),
            interface: None,
            network: None,
            daemon: None,
            asterisk,
            calls: None,
        }
    }

    fn sound() -> AsteriskFacts {
        AsteriskFacts {
            address: "127.0.0.1:5038".to_owned(),
            user: "relay".to_owned(),
            asterisk: Some("Asterisk Call Manager/11.0.0".to_owned()),
            endpoints: vec![endpoint("alice", false, 0), endpoint("bob", false, 30)],
            endpoints_from: Some("endpoints".to_owned()),
            ..AsteriskFacts::default()
        }
    }

    fn endpoint(name: &str, direct_media: bool, rtp_timeout: u32) -> Endpoint {
        Endpoint {
            name: name.to_owned(),
            direct_media: Some(direct_media),
            rtp_timeout: Some(rtp_timeout),
        }
    }

    #[test]
    fn a_sound_asterisk_has_no_trouble() {
        for finding in findings(&only(Some(sound()))) {
            assert_eq!(
                (finding.level, &finding.mend),
                (Level::Ok, &None),
                "{finding:?}"
            );
        }
    }

    #[test]
    fn a_session_ends_where_its_trouble_is() {
        for (stage, id, count, mend) in [
            (Stage::Settings, "ami_settings", 1, None),
            (
                Stage::Reach,
                "ami_reachable",
                1,
                Some("manager show settings"),
            ),
            (
                Stage::Login,
                "ami_login",
                2,
                Some("manager show user relay"),
            ),
            (Stage::Ask, "ami_write", 3, Some("write=call")),
            (Stage::Hear, "ami_read", 4, Some("read=call,dialplan")),
        ] {
            let facts = only(Some(AsteriskFacts {
                trouble: Some(Trouble {
                    stage,
                    cause: "so".to_owned(),
                }),
                ..sound()
            }));
            let findings = findings(&facts);
            assert_eq!(findings.len(), count, "{findings:#?}");
            let (level, command) = judged(&findings, id);
            assert_eq!(level, Level::Problem);
            assert_eq!(command.is_some(), mend.is_some());
            assert!(
                command
                    .unwrap_or_default()
                    .contains(mend.unwrap_or_default()),
                "{command:?}"
            );
        }
    }

    #[test]
    fn without_settings_or_daemon_the_command_is_told_that_has_some() {
        let findings = findings(&only(None));
        let (level, mend) = judged(&findings, "ami_settings");
        assert_eq!(level, Level::Warning);
        assert!(mend.is_some_and(|mend| mend.starts_with("relay-user doctor --ami ")));
    }

    #[test]
    fn a_daemon_without_ami_tells_why() {
        let mut facts = only(None);
        let mut daemon = daemon(AttachMode::Native);
        let ami = daemon.ami.as_mut().expect("a feed");
        ami.state = AmiState::Down;
        ami.cause = Some("refused".to_owned());
        facts.daemon = Some(daemon);
        let findings = findings(&facts);
        assert_eq!(findings.len(), 1);
        assert_eq!(
            found(&findings, "ami_feed").what,
            "the daemon has no AMI: refused"
        );
        assert_eq!(
            judged(&findings, "ami_feed"),
            (Level::Problem, Some(MANAGER))
        );
    }

    #[test]
    fn settings_that_keep_calls_from_the_relay_are_warnings() {
        let mut asterisk = sound();
        asterisk.endpoints.push(endpoint("carol", true, 3));
        asterisk.excess.push("Command".to_owned());
        let findings = findings(&only(Some(asterisk)));
        for (id, mend) in [
            ("direct_media", "direct_media=no"),
            ("rtp_timeout", "rtp_timeout=30"),
            ("ami_excess", "under [relay] of manager.conf"),
        ] {
            let (level, command) = judged(&findings, id);
            assert_eq!(level, Level::Warning);
            assert!(
                command.is_some_and(|command| command.contains(mend)),
                "{command:?}"
            );
        }
        assert!(found(&findings, "direct_media").what.contains("carol"));
        assert!(!found(&findings, "direct_media").what.contains("alice"));
    }
}
