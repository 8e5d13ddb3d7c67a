//! A real browser in a simulated machine: headless Chromium, driven over a pipe with the Chrome DevTools Protocol
//! (<https://chromedevtools.github.io/devtools-protocol/>). No port, no driver program whose version must fit.

use std::{
    io::{BufRead as _, BufReader, Cursor, Write as _},
    process::{ChildStdin, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use crate::namespace::{Host, Process};

/// How long an answer, or a change of the page, may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at the page.
const LOOK: Duration = Duration::from_millis(50);
/// The shell that gives Chromium our pipes as the descriptors 3 and 4, where it looks for them.
const PIPES: &str = r#"exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1"#;
const ARGUMENTS: [&str; 13] = [
    "--headless=new",
    "--remote-debugging-pipe",
    // Root cannot have the sandbox; the only page that is opened is the relay's own.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
];

/// What the page is looked at with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Screen {
    /// In CSS pixels.
    pub width: u32,
    /// In CSS pixels.
    pub height: u32,
    /// Device pixels to a CSS pixel.
    pub scale: u32,
    /// Touched with fingers.
    pub phone: bool,
    /// What the system prefers.
    pub dark: bool,
}

impl Screen {
    /// A laptop's, bright.
    pub const LAPTOP: Self = Self {
        width: 1280,
        height: 800,
        scale: 1,
        phone: false,
        dark: false,
    };
    /// The narrowest phone in common use.
    pub const PHONE: Self = Self {
        width: 360,
        height: 780,
        scale: 2,
        phone: true,
        dark: true,
    };
}

/// A browser with one page. Dropping it ends it.
#[derive(Debug)]
pub struct Browser {
    commands: ChildStdin,
    messages: mpsc::Receiver<Value>,
    last: u64,
    session: Option<String>,
    /// Where the page may load from.
    origin: String,
    complaints: Vec<String>,
    _process: Process,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts it in a machine, with an empty page.
    ///
    /// # Errors
    /// Chromium is not installed, or does not answer.
    pub fn start(host: &Host, screen: Screen) -> Result<Self> {
        let profile = tempfile::tempdir().context("temporary directory")?;
        let mut command = Command::new("sh");
        command
            .args(["-c", PIPES, "chromium"])
            .args(ARGUMENTS)
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .env("HOME", profile.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = host.spawn(command)?;
        let child = process.child_mut();
        let commands = child.stdin.take().context("no pipe to Chromium")?;
        let answers = child.stdout.take().context("no pipe from Chromium")?;
        let (told, messages) = mpsc::channel();
        // Ends with the browser, or when nobody listens any longer.
        thread::spawn(move || {
            for message in BufReader::new(answers).split(0).map_while(Result::ok) {
                let Ok(message) = serde_json::from_slice(&message) else {
                    break;
                };
                if told.send(message).is_err() {
                    break;
                }
            }
        });
        let mut browser = Self {
            commands,
            messages,
            last: 0,
            session: None,
            origin: String::new(),
            complaints: Vec::new(),
            _process: process,
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))?;
        let attached = browser.call(
            "Target.attachToTarget",
            json!({ "targetId": target["targetId"], "flatten": true }),
        )?;
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        browser.show(screen)?;
        Ok(browser)
    }

    /// Changes the screen.
    ///
    /// # Errors
    /// Chromium does not.
    pub fn show(&mut self, screen: Screen) -> Result<()> {
        let Screen {
            width,
            height,
            scale,
            phone,
            dark,
        } = screen;
        self.call(
            "Emulation.setDeviceMetricsOverride",
            json!({ "width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone }),
        )?;
        let scheme = if dark { "dark" } else { "light" };
        self.call(
            "Emulation.setEmulatedMedia",
            json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] }),
        )?;
        Ok(())
    }

    /// Opens an address, `http://HOST:PORT/…`; from then on what is loaded from elsewhere is a complaint.
    ///
    /// # Errors
    /// It cannot be loaded.
    pub fn open(&mut self, url: &str) -> Result<()> {
        let parts: Vec<_> = url.splitn(4, '/').collect();
        self.origin = parts[..3.min(parts.len())].join("/") + "/";
        let loaded = self.call("Page.navigate", json!({ "url": url }))?;
        if let Some(error) = loaded["errorText"].as_str() {
            bail!("{url}: {error}");
        }
        self.until("document.readyState === 'complete'")
    }

    /// What an expression is in the page.
    ///
    /// # Errors
    /// It throws.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let mut answer = self.call(
            "Runtime.evaluate",
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true }),
        )?;
        if answer.get("exceptionDetails").is_some() {
            bail!("{expression}: {:#}", answer["exceptionDetails"]);
        }
        Ok(answer["result"]["value"].take())
    }

    /// Waits until an expression is true in the page.
    ///
    /// # Errors
    /// It does not become so: the text holds that of the page.
    pub fn until(&mut self, expression: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        // What it asks for may not be on the page yet.
        let attempt = format!(
            "(() => {{ try {{ return Boolean({expression}); }} catch (fault) {{ return String(fault); }} }})()"
        );
        loop {
            let found = self.evaluate(&attempt)?;
            if found == true {
                return Ok(());
            }
            if Instant::now() > deadline {
                let text = self.evaluate("document.body.innerText")?;
                bail!(
                    "not within {PATIENCE:?}: {expression}: {found}\n{}\n{:?}",
                    text.as_str().unwrap_or_default(),
                    self.complaints
                );
            }
            thread::sleep(LOOK);
        }
    }

    /// Types a text, as the keyboard would, where the focus is.
    ///
    /// # Errors
    /// Chromium does not.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        for key in text.chars() {
            let key = key.to_string();
            self.key("keyDown", json!({ "key": key, "text": key }))?;
            self.key("keyUp", json!({ "key": key }))?;
        }
        Ok(())
    }

    /// Presses a key that writes nothing, such as `Escape`.
    ///
    /// # Errors
    /// Chromium does not.
    pub fn press(&mut self, key: &str) -> Result<()> {
        self.key("keyDown", json!({ "key": key }))?;
        self.key("keyUp", json!({ "key": key }))
    }

    fn key(&mut self, kind: &str, mut event: Value) -> Result<()> {
        event["type"] = kind.into();
        self.call("Input.dispatchKeyEvent", event).map(drop)
    }

    /// A picture of what the screen shows, as PNG.
    ///
    /// # Errors
    /// Chromium does not.
    pub fn picture(&mut self) -> Result<Vec<u8>> {
        let picture = self.call("Page.captureScreenshot", json!({ "format": "png" }))?;
        let data = picture["data"].as_str().context("no picture")?;
        smaller(&STANDARD.decode(data)?)
    }

    /// All that the browser has complained of until now: errors in the console, exceptions, violations of the content
    /// security policy; and requests to another origin.
    ///
    /// # Errors
    /// Chromium has ended.
    pub fn complaints(&mut self) -> Result<&[String]> {
        // What it told before this answer is read by then.
        self.evaluate("0")?;
        Ok(&self.complaints)
    }

    fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.last += 1;
        let mut message = json!({ "id": self.last, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            message["sessionId"] = session.clone().into();
        }
        let mut bytes = serde_json::to_vec(&message)?;
        bytes.push(0);
        self.commands
            .write_all(&bytes)
            .context("Chromium has ended: is the package `chromium` installed?")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut message = self.messages.recv_timeout(left).with_context(|| {
                format!("no answer to {method}: is the package `chromium` installed?")
            })?;
            if message["id"] == self.last {
                if let Some(error) = message.get("error") {
                    bail!("{method}: {error}");
                }
                return Ok(message["result"].take());
            }
            self.note(&message);
        }
    }

    /// Takes in an event.
    fn note(&mut self, message: &Value) {
        let parameters = &message["params"];
        let complaint = match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => Some(parameters["exceptionDetails"].to_string()),
            Some("Runtime.consoleAPICalled")
                if matches!(parameters["type"].as_str(), Some("error" | "warning")) =>
            {
                Some(parameters["args"].to_string())
            }
            // The policy's violations too.
            Some("Log.entryAdded")
                if matches!(
                    parameters["entry"]["level"].as_str(),
                    Some("error" | "warning")
                ) =>
            {
                Some(parameters["entry"].to_string())
            }
            Some("Network.requestWillBeSent") => {
                let url = parameters["request"]["url"].as_str().unwrap_or_default();
                let own = url.starts_with(&self.origin) || url.starts_with("about:");
                (!own).then(|| format!("a request to {url}"))
            }
            _ => None,
        };
        self.complaints.extend(complaint);
    }
}

/// The same picture in fewer bytes: Chromium compresses for speed, and keeps an alpha channel that is opaque.
fn smaller(picture: &[u8]) -> Result<Vec<u8>> {
    let mut decoder = png::Decoder::new(Cursor::new(picture));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info()?;
    let mut pixels = vec![0; reader.output_buffer_size().context("a picture too large")?];
    let frame = reader.next_frame(&mut pixels)?;
    let channels = frame.color_type.samples();
    let opaque: Vec<u8> = pixels
        .chunks_exact(channels)
        .flat_map(|pixel| pixel[..3].to_vec())
        .collect();
    let mut written = Vec::new();
    let mut encoder = png::Encoder::new(&mut written, frame.width, frame.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::High);
    encoder.set_filter(png::Filter::NoFilter);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&opaque)?;
    writer.finish()?;
    Ok(written)
}
