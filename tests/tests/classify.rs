//! Marks and classes of what leaves: the decision in the kernel against the same on the host, and real packets through
//! interfaces. Needs root.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use relay_tests::{
    capture::{Capture, Direction, Frame},
    namespace::Host,
    topology::{Direct, PBX_V4, Routed},
};
use relay_user::qos::{
    classifier::{Classifier, Counted},
    policy::Policy,
};

const PATIENCE: Duration = Duration::from_secs(30);
const EF: u8 = 46;

fn counted(host: &Host, interface: &str) -> Counted {
    let counted = host.run(|| Classifier::read(interface)).expect("counters");
    counted.expect("a classifier")
}

/// Packets by rule and by class, those of none left out.
fn packets(counted: &Counted) -> BTreeMap<String, u64> {
    counted
        .rules
        .iter()
        .chain(&counted.classes)
        .filter(|one| one.packets != 0)
        .map(|one| (one.name.clone(), one.packets))
        .collect()
}

#[test]
fn what_leaves_is_marked_until_the_classifier_is_detached() {
    let net = Direct::new(1).expect("network");
    let interface = &net.pbx_interface;
    let attach = |policy: &Policy| {
        net.pbx
            .run(|| Classifier::attach("eth0", interface.index, policy))
            .expect("attached");
    };
    attach(&Policy::built_in());
    let capture = Capture::start(&net.phones_interface).expect("capture");
    let socket = net
        .pbx
        .run(|| UdpSocket::bind((PBX_V4, 10_000)))
        .expect("socket");
    let to = SocketAddr::new(Direct::phone_v4(0), 30_000);
    let mut rtp = [0_u8; 172];
    rtp[0] = 0x80;
    for _ in 0..3 {
        socket.send_to(&rtp, to).expect("sent");
    }
    let counts = counted(&net.pbx, "eth0");
    assert_eq!((counts.voice.packets, counts.voice.bytes), (3, 3 * 214));
    // Another policy in its place.
    let other = "default = \"all\"\n[[class]]\nname = \"all\"\nrate = \"1/1\"\nceiling = \"1/1\"\nprio = 0\n\
                 [[rule]]\nname = \"cs1\"\nrtp = \"any\"\nset-dscp = \"cs1\"\n";
    attach(&Policy::parse(Path::new("test"), other).expect("policy"));
    socket.send_to(&rtp, to).expect("sent");
    let detached = net.pbx.run(|| Classifier::detach("eth0"));
    assert!(detached.expect("detached"));
    assert!(!net.pbx.run(|| Classifier::detach("eth0")).expect("nothing"));
    assert_eq!(
        net.pbx.run(|| Classifier::read("eth0")).expect("nothing"),
        None
    );
    assert!(!net.pbx.run(|| Path::new("/sys/fs/bpf/relay-qos").exists()));
    socket.send_to(&rtp, to).expect("sent");
    let count = |frames: &[Frame]| {
        frames
            .iter()
            .filter(|frame| frame.datagram().is_some())
            .count()
    };
    capture
        .wait(PATIENCE, |frames| count(frames) == 5)
        .expect("packets");
    let seen = capture.stop().expect("capture");
    let marks: Vec<u8> = seen
        .datagrams()
        .map(|(_, datagram)| datagram.dscp)
        .collect();
    assert_eq!(marks, [EF, EF, EF, 8, 0]);
}
