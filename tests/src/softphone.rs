//! SIP phones of the harness's own, whose media is a [`Phone`]: they do what a test wants at the moment it wants, and
//! every packet that they hear is known.

use std::{
    collections::{BTreeMap, HashMap},
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    process,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{setsockopt, sockopt};

use crate::{
    namespace::Host,
    phone::{Bank, PACKET_TIME, Phone, Talk},
    sip::{Codec, Message, Remote, Session, ULAW, Way, parameter, uri},
};

/// How long the PBX may take for a final answer, or a call to come.
const PATIENCE: Duration = Duration::from_secs(20);
/// T1 of RFC 3261: before a request is sent again.
const AGAIN: Duration = Duration::from_millis(500);
/// How often the thread looks whether it shall end.
const TURN: Duration = Duration::from_millis(50);

/// What a softphone can do.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// Its one codec.
    pub codec: Codec,
    /// Payload type with which it offers telephone events.
    pub events: u8,
    /// It has a camera, and sends no picture.
    pub video: bool,
    /// It sends RTCP.
    pub rtcp: bool,
    /// Time between two packets.
    pub interval: Duration,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            codec: ULAW,
            events: 101,
            video: false,
            rtcp: true,
            interval: PACKET_TIME,
        }
    }
}

/// All softphones behind one SIP address.
#[derive(Debug)]
pub struct Desk {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    bank: Arc<Bank>,
    socket: UdpSocket,
    local: SocketAddr,
    pbx: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
    closing: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    lines: BTreeMap<u32, Line>,
    /// Transactions of ours that wait, by their branch, with their final answer.
    pending: HashMap<String, Option<Message>>,
    /// Answers to requests, by branch and method, in case a request comes again.
    answered: HashMap<(String, String), Vec<u8>>,
    /// ACKs by Call-ID and CSeq, in case an answer comes again.
    acknowledged: HashMap<(String, String), Vec<u8>>,
    fault: Option<String>,
}

#[derive(Debug)]
struct Line {
    /// The number that it answers, until it has.
    number: Option<String>,
    phone: Arc<Phone>,
    features: Features,
    session: Session,
    remote: Option<Remote>,
    dialog: Option<Dialog>,
    /// A transfer that it asked for has succeeded.
    transferred: bool,
    over: bool,
}

#[derive(Clone, Debug)]
struct Dialog {
    call_id: String,
    /// `From` of our requests.
    local: String,
    /// `To` of our requests.
    remote: String,
    /// Where our requests go.
    target: String,
    sequence: u32,
}

/// One phone, in one call. Dropping it hangs up, and waits for nothing.
#[derive(Debug)]
pub struct Softphone {
    shared: Arc<Shared>,
    id: u32,
    phone: Arc<Phone>,
}

impl Drop for Softphone {
    fn drop(&mut self) {
        let in_call = self.leave();
        if in_call {
            // Who does not hear of it is gone himself.
            let _ = self.shared.send(&self.request("BYE").write());
        }
        self.shared.state().lines.remove(&self.id);
    }
}

/// A number that no other call, tag or branch of this process has.
fn fresh() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Desk {
    /// Begins to serve SIP at `local`, an address of the machine; phones have their media at the same address.
    ///
    /// # Errors
    /// The address is not the machine's, or taken.
    pub fn open(host: &Host, bank: &Arc<Bank>, local: SocketAddr, pbx: SocketAddr) -> Result<Self> {
        let socket = host
            .run(|| UdpSocket::bind(local))
            .with_context(|| format!("cannot bind SIP to {local}"))?;
        socket.set_read_timeout(Some(TURN))?;
        // Hundreds of calls begin at once.
        setsockopt(&socket, sockopt::RcvBuf, &(4 << 20))?;
        let shared = Arc::new(Shared {
            bank: Arc::clone(bank),
            socket,
            local,
            pbx,
            state: Mutex::default(),
            changed: Condvar::new(),
            closing: AtomicBool::new(false),
        });
        let thread = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("sip".to_owned())
                .spawn(move || shared.serve())?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// A phone that answers the next call to `number`, at once.
    ///
    /// # Errors
    /// No port is left.
    pub fn answer(&self, number: &str, features: Features) -> Result<Softphone> {
        self.shared.line(Some(number.to_owned()), features)
    }

    /// A phone that calls `number` as `user`, and is in the call when this returns.
    ///
    /// # Errors
    /// The PBX refuses the call, or does not answer.
    pub fn call(&self, user: &str, number: &str, features: Features) -> Result<Softphone> {
        let softphone = self.shared.line(None, features)?;
        softphone.dial_out(user, number)?;
        Ok(softphone)
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// An even port, so that RTCP has the odd one above it, and none that the kernel gives to other sockets.
    fn media_address(&self) -> SocketAddr {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let port = 20_000 + NEXT.fetch_add(1, Ordering::Relaxed) % 5_000 * 2;
        SocketAddr::new(self.local.ip(), port)
    }

    fn line(self: &Arc<Self>, number: Option<String>, features: Features) -> Result<Softphone> {
        let phone = Arc::new(self.bank.phone(self.media_address())?);
        let id = fresh();
        let session = Session {
            audio: phone.local(),
            codec: features.codec,
            events: features.events,
            way: Way::Both,
            video: features.video.then(|| self.media_address().port()),
            version: 1,
        };
        let line = Line {
            number,
            phone: Arc::clone(&phone),
            features,
            session,
            remote: None,
            dialog: None,
            transferred: false,
            over: false,
        };
        self.state().lines.insert(id, line);
        Ok(Softphone {
            shared: Arc::clone(self),
            id,
            phone,
        })
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        self.socket
            .send_to(bytes, self.pbx)
            .context("send SIP")
            .map(drop)
    }

    fn serve(&self) {
        let mut buffer = vec![0; 65_536];
        while !self.closing.load(Ordering::Relaxed) {
            let len = match self.socket.recv(&mut buffer) {
                Ok(len) => len,
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    continue;
                }
                Err(error) => return self.fail(&error.into()),
            };
            let handled = Message::parse(&buffer[..len]).and_then(|message| {
                if message.status().is_some() {
                    self.take_answer(message)
                } else {
                    self.take_request(&message)
                }
            });
            if let Err(error) = handled {
                self.fail(&error);
            }
        }
    }

    fn fail(&self, error: &anyhow::Error) {
        self.state().fault.get_or_insert(format!("{error:#}"));
        self.changed.notify_all();
    }

    fn take_answer(&self, answer: Message) -> Result<()> {
        let mut state = self.state();
        let key = (
            answer.need("Call-ID")?.to_owned(),
            answer.need("CSeq")?.to_owned(),
        );
        if let Some(acknowledgement) = state.acknowledged.get(&key) {
            return self.send(acknowledgement);
        }
        let branch = answer.branch().context("an answer without branch")?;
        if answer.status() >= Some(200)
            && let Some(place) = state.pending.get_mut(branch)
        {
            *place = Some(answer);
            self.changed.notify_all();
        }
        Ok(())
    }

    fn take_request(&self, request: &Message) -> Result<()> {
        let method = request.method();
        if method == "ACK" {
            return Ok(());
        }
        let mut state = self.state();
        let branch = request.branch().context("a request without branch")?;
        let key = (branch.to_owned(), method.to_owned());
        if let Some(answer) = state.answered.get(&key) {
            return self.send(answer);
        }
        let bytes = self.answer(&mut state, request)?.write();
        state.answered.insert(key, bytes.clone());
        self.changed.notify_all();
        self.send(&bytes)
    }

    fn answer(&self, state: &mut State, request: &Message) -> Result<Message> {
        let call_id = request.need("Call-ID")?;
        let of_dialog = |line: &Line| {
            let dialog = line.dialog.as_ref();
            dialog.is_some_and(|dialog| dialog.call_id == call_id)
        };
        let of_number = |line: &Line| {
            let number = line.number.as_deref();
            request.method() == "INVITE" && number.is_some() && number == request.user()
        };
        let lines = &mut state.lines;
        let known = lines.iter().find(|(_, line)| of_dialog(line));
        let found = known.or_else(|| lines.iter().find(|(_, line)| of_number(line)));
        let Some((id, line)) = found
            .map(|(id, _)| *id)
            .and_then(|id| Some((id, lines.get_mut(&id)?)))
        else {
            let code = match request.method() {
                "INVITE" => "404 Not Found",
                "OPTIONS" => "200 OK",
                _ => "481 Call/Transaction Does Not Exist",
            };
            return response(request, code, None);
        };
        if line.number.take().is_some() {
            line.dialog = Some(Dialog {
                call_id: call_id.to_owned(),
                local: format!("{};tag={}", request.need("To")?, fresh()),
                remote: request.need("From")?.to_owned(),
                target: uri(request.need("Contact")?).to_owned(),
                sequence: 0,
            });
        }
        let local = line.dialog.as_ref().map(|dialog| dialog.local.as_str());
        let mut answer = response(request, "200 OK", local)?;
        match request.method() {
            "INVITE" | "UPDATE" => {
                answer = answer.with("Contact", contact(id, self.local));
                if !request.body.is_empty() {
                    let offer = Remote::parse(&request.body, line.session.codec.name)?;
                    let way = match line.session.way {
                        Way::Both => offer.way.answer(),
                        own => own,
                    };
                    let session = Session {
                        way,
                        ..line.session.clone()
                    };
                    answer = answer.with_session(session.answer(&offer)?);
                    line.hear_of(offer)?;
                }
            }
            // The final answer that the other side got (RFC 3515, section 2.4.5).
            "NOTIFY" => line.transferred |= request.body.starts_with("SIP/2.0 2"),
            "BYE" | "CANCEL" => line.end(),
            _ => {}
        }
        Ok(answer)
    }

    /// Sends a request until its final answer comes.
    fn transact(&self, request: &Message) -> Result<Message> {
        let branch = request.branch().context("a request without branch")?;
        let bytes = request.write();
        self.state().pending.insert(branch.to_owned(), None);
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.send(&bytes)?;
            let again = Instant::now() + AGAIN;
            let mut state = self.state();
            loop {
                if let Some(fault) = &state.fault {
                    bail!("the softphones have failed: {fault}");
                }
                if let Some(answer) = state.pending.get_mut(branch).and_then(Option::take) {
                    state.pending.remove(branch);
                    return Ok(answer);
                }
                let left = again.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                let waited = self.changed.wait_timeout(state, left);
                state = waited.expect("no holder of this lock panics").0;
            }
            if Instant::now() > deadline {
                bail!("no answer to {} after {PATIENCE:?}", request.start);
            }
        }
    }
}

/// The address at which a phone wants requests.
fn contact(id: u32, local: SocketAddr) -> String {
    format!("<sip:phone{id}@{local}>")
}

/// An answer to a request; `local` is its `To` with our tag.
fn response(request: &Message, code: &str, local: Option<&str>) -> Result<Message> {
    let mut response = Message::new(format!("SIP/2.0 {code}"));
    for via in request.all("Via") {
        response = response.with("Via", via);
    }
    let to = request.need("To")?;
    // A request inside a dialog has our tag already.
    let to = local
        .filter(|_| parameter(to, "tag").is_none())
        .unwrap_or(to);
    Ok(response
        .with("From", request.need("From")?)
        .with("To", to)
        .with("Call-ID", request.need("Call-ID")?)
        .with("CSeq", request.need("CSeq")?)
        .with("Allow", "INVITE, ACK, BYE, CANCEL, UPDATE, NOTIFY"))
}

impl Line {
    /// Talks to where the other side wants it.
    fn hear_of(&mut self, remote: Remote) -> Result<()> {
        let first = self.remote.replace(remote).is_none();
        if remote.audio.ip().is_unspecified() {
            return Ok(());
        }
        if !first {
            self.phone.aim(remote.audio);
            return Ok(());
        }
        let payload_type = remote.payload_type;
        self.phone.talk(Talk {
            payload_type: payload_type.with_context(|| format!("no common codec: {remote:?}"))?,
            interval: self.features.interval,
            ..Talk::to(remote.audio, ssrc())
        });
        if self.features.rtcp {
            self.phone.report(remote.audio)?;
        }
        Ok(())
    }

    fn end(&mut self) {
        self.over = true;
        self.phone.hush();
    }
}

/// A source that no other phone has.
fn ssrc() -> u32 {
    process::id() << 20 | fresh() & 0xf_ffff
}

impl Softphone {
    /// Its media.
    pub fn phone(&self) -> &Phone {
        &self.phone
    }

    /// Payload type with which the PBX wants telephone events.
    ///
    /// # Panics
    /// It is in no call, or the PBX wants none.
    pub fn events(&self) -> u8 {
        let remote = self.with(|line| line.remote);
        remote
            .and_then(|remote| remote.events)
            .expect("a call that takes telephone events")
    }

    /// Whether its call has ended.
    pub fn is_over(&self) -> bool {
        self.with(|line| line.over)
    }

    /// Waits until it is in a call.
    ///
    /// # Errors
    /// It is not in time.
    pub fn wait_up(&self) -> Result<()> {
        self.wait("in a call", |line| line.remote.is_some())
    }

    /// Waits until its call has ended.
    ///
    /// # Errors
    /// It has not in time.
    pub fn wait_over(&self) -> Result<()> {
        self.wait("out of its call", |line| line.over)
    }

    fn wait(&self, wanted: &str, is_so: impl Fn(&Line) -> bool) -> Result<()> {
        let state = self.shared.state();
        let id = self.id;
        let waiting = |state: &mut State| {
            state.fault.is_none() && state.lines.get(&id).is_some_and(|line| !is_so(line))
        };
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, PATIENCE, waiting);
        let (state, timeout) = waited.expect("no holder of this lock panics");
        if let Some(fault) = &state.fault {
            bail!("the softphones have failed: {fault}");
        }
        if timeout.timed_out() {
            bail!("phone {id} is not {wanted} after {PATIENCE:?}");
        }
        Ok(())
    }

    fn with<T>(&self, act: impl FnOnce(&mut Line) -> T) -> T {
        let mut state = self.shared.state();
        let line = state.lines.get_mut(&self.id);
        act(line.expect("a line lives as long as its desk"))
    }

    fn dial_out(&self, user: &str, number: &str) -> Result<()> {
        let Shared { local, pbx, .. } = &*self.shared;
        let target = format!("sip:{number}@{pbx}");
        let dialog = Dialog {
            call_id: format!("{}-{}@{}", fresh(), process::id(), local.ip()),
            // The name shows in AMI which call a channel belongs to.
            local: format!("\"{number}\" <sip:{user}@{}>;tag={}", local.ip(), fresh()),
            remote: format!("<{target}>"),
            target,
            sequence: 0,
        };
        self.with(|line| line.dialog = Some(dialog));
        self.offer()
    }

    /// The next request of its dialog.
    fn request(&self, method: &str) -> Message {
        let (id, local) = (self.id, self.shared.local);
        self.with(|line| {
            let dialog = line.dialog.as_mut().expect("a phone in a call");
            dialog.sequence += 1;
            build(dialog, method, dialog.sequence, fresh(), local)
        })
        .with("Contact", contact(id, local))
    }

    /// Invites with the session as it is, and takes the answer.
    fn offer(&self) -> Result<()> {
        let local = self.shared.local;
        let session = self.with(|line| line.session.offer());
        let request = self.request("INVITE").with_session(session);
        let answer = self.shared.transact(&request)?;
        let status = answer.status();
        let success = status < Some(300);
        let mut state = self.shared.state();
        let line = state.lines.get_mut(&self.id);
        let line = line.expect("a line lives as long as its desk");
        let dialog = line.dialog.as_mut().expect("a phone in a call");
        if success {
            answer.need("To")?.clone_into(&mut dialog.remote);
            uri(answer.need("Contact")?).clone_into(&mut dialog.target);
        }
        // That of a refusal belongs to the same transaction.
        let mut acknowledgement = build(dialog, "ACK", dialog.sequence, fresh(), local);
        if !success {
            acknowledgement.headers[0].1 = request.need("Via")?.to_owned();
        }
        let bytes = acknowledgement.write();
        self.shared.send(&bytes)?;
        if !success {
            bail!("{}: {}", request.start, answer.start);
        }
        let remote = Remote::parse(&answer.body, line.session.codec.name)?;
        line.hear_of(remote)?;
        let key = (
            answer.need("Call-ID")?.to_owned(),
            answer.need("CSeq")?.to_owned(),
        );
        state.acknowledged.insert(key, bytes);
        self.shared.changed.notify_all();
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut Session)) -> Result<()> {
        self.with(|line| {
            line.session.version += 1;
            change(&mut line.session);
        });
        self.offer()
    }

    /// Puts the other side on hold: [`Way::SendOnly`] goes on talking, [`Way::Inactive`] falls silent first.
    ///
    /// # Errors
    /// The PBX refuses.
    pub fn hold(&self, way: Way) -> Result<()> {
        if way == Way::Inactive {
            self.phone.hush();
        }
        self.change(|session| session.way = way)
    }

    /// Puts the other side on hold as in RFC 2543, by an address of zeros, and falls silent first.
    ///
    /// # Errors
    /// The PBX refuses.
    pub fn hold_by_zeros(&self) -> Result<()> {
        self.phone.hush();
        let zeros = IpAddr::from([0; 4]);
        self.change(|session| session.audio.set_ip(zeros))
    }

    /// Ends the hold, and talks on.
    ///
    /// # Errors
    /// The PBX refuses.
    pub fn resume(&self) -> Result<()> {
        let address = self.shared.local.ip();
        self.change(|session| {
            session.way = Way::Both;
            session.audio.set_ip(address);
        })?;
        self.phone.resume();
        Ok(())
    }

    /// Moves its media to another port, and says so first.
    ///
    /// # Errors
    /// The PBX refuses.
    pub fn move_media(&self) -> Result<()> {
        let local = self.shared.media_address();
        self.phone.listen(local)?;
        self.change(|session| session.audio = local)?;
        self.phone.switch();
        Ok(())
    }

    /// Sends from another port from now on, and receives there too, without a word.
    ///
    /// # Errors
    /// No port is left.
    pub fn move_silently(&self) -> Result<()> {
        self.phone.listen(self.shared.media_address())?;
        self.phone.switch();
        Ok(())
    }

    /// Sends with another SSRC and new sequence numbers from now on.
    pub fn change_source(&self) {
        self.phone.change_ssrc(ssrc());
    }

    /// Transfers the other side to a number, blindly, and hangs up.
    ///
    /// # Errors
    /// The PBX refuses.
    pub fn transfer(&self, number: &str) -> Result<()> {
        self.refer(&format!("<sip:{number}@{}>", self.shared.pbx))
    }

    /// Transfers the other side to whom this phone's owner talks with on `consultation`, and hangs up.
    ///
    /// # Errors
    /// The PBX refuses.
    pub fn transfer_to(&self, consultation: &Self, number: &str) -> Result<()> {
        let dialog = consultation.with(|line| line.dialog.clone());
        let dialog = dialog.context("the consultation is no call")?;
        let tag = |value| parameter(value, "tag").context("a dialog without tags");
        let (to, from) = (tag(&dialog.remote)?, tag(&dialog.local)?);
        let call_id = dialog.call_id.replace('@', "%40");
        let replaces = format!("{call_id}%3Bto-tag%3D{to}%3Bfrom-tag%3D{from}");
        self.refer(&format!(
            "<sip:{number}@{}?Replaces={replaces}>",
            self.shared.pbx
        ))
    }

    fn refer(&self, target: &str) -> Result<()> {
        let request = self.request("REFER").with("Refer-To", target);
        let answer = self.shared.transact(&request)?;
        if answer.status() >= Some(300) {
            bail!("{}: {}", request.start, answer.start);
        }
        self.wait("rid of the other side", |line| {
            line.transferred || line.over
        })?;
        self.hang_up()
    }

    /// Hangs up, if the call has not ended by itself.
    ///
    /// # Errors
    /// The PBX does not answer.
    pub fn hang_up(&self) -> Result<()> {
        if self.leave() {
            // It may end by itself at the same moment: any answer will do.
            self.shared.transact(&self.request("BYE"))?;
        }
        Ok(())
    }

    /// Falls silent, and tells whether it was in a call.
    fn leave(&self) -> bool {
        self.with(|line| {
            let in_call = line.dialog.is_some() && !line.over;
            line.end();
            in_call
        })
    }
}

/// A request inside a dialog.
fn build(dialog: &Dialog, method: &str, sequence: u32, branch: u32, local: SocketAddr) -> Message {
    let via = format!("SIP/2.0/UDP {local};rport;branch=z9hG4bK{branch}");
    Message::new(format!("{method} {} SIP/2.0", dialog.target))
        .with("Via", via)
        .with("Max-Forwards", "70")
        .with("From", &dialog.local)
        .with("To", &dialog.remote)
        .with("Call-ID", &dialog.call_id)
        .with("CSeq", format!("{sequence} {method}"))
}
