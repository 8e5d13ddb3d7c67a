// The page of live calls. It only reads: /v1/status, /v1/pairs and /v1/events, see docs/api.md.
//
// Names of channels and causes come from the network: every text goes in as a text node, and nothing is
// ever parsed as HTML.
"use strict";

const PERIOD = 1000; // ms between two looks
const PATIENCE = 5000; // ms for an answer
const SAMPLES = 60; // looks that a sparkline shows
const FORGOTTEN = 60000; // ms after which the samples of a stream that is not shown are dropped
const EVENTS = 200; // events kept on the page
const PAGE = 50; // calls shown at first, and more at each press of "Show more"
const KINDS = {
  watching: "", proven: "good", offloaded: "good", suspended: "bad", taken_back: "warn", expired: "warn",
  refused: "bad", silent: "warn", unexpected_source: "warn", resumed: "", adopted: "good", ami_up: "good",
  ami_down: "bad", lease_lost: "bad", lagged: "warn",
};
const STATES = { offloaded: "good", waiting: "warn", watching: "warn", suspended: "bad", refused: "bad" };

const $ = (id) => document.getElementById(id);

/** What a table's parts are, said aloud: on a phone they are laid out as cards, and browsers then forget. */
const ROLES = { tbody: "rowgroup", tr: "row", th: "rowheader", td: "cell" };

/** An element with a class, a text and children. */
function make(name, className, text, ...children) {
  const element = document.createElement(name);
  if (ROLES[name]) element.setAttribute("role", ROLES[name]);
  if (className) element.className = className;
  if (text !== undefined && text !== null) element.textContent = text;
  element.append(...children);
  return element;
}

/** Sets a text where it is another one, so that nothing is drawn, or read out, again for nothing. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function grade(element, className, base) {
  const wanted = [base, className].filter(Boolean).join(" ");
  if (element.getAttribute("class") !== wanted) element.setAttribute("class", wanted);
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { maximumFractionDigits: 1, notation: "compact" });
const fixed = (number, digits) => number.toFixed(digits);
const words = (name) => name.replaceAll("_", " ");

/* ---- Sparklines ------------------------------------------------------------------------------- */

const SVG = "http://www.w3.org/2000/svg";

/** Draws samples, the latest at the right edge. `least` is the least top of the scale. */
function draw(svg, samples, least, area) {
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  const top = Math.max(least, ...samples.filter((sample) => sample !== null));
  let line = "";
  let pen = "M";
  let first = null;
  let last = null;
  samples.forEach((sample, index) => {
    if (sample === null) {
      pen = "M";
      return;
    }
    const x = width - ((samples.length - 1 - index) * width) / (SAMPLES - 1);
    const y = height - 1.5 - (sample / top) * (height - 3);
    line += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
    first ??= x;
    last = x;
  });
  const shapes = area && first !== null ? [["area", `${line}L${last.toFixed(1)} ${height}L${first.toFixed(1)} ${height}Z`]] : [];
  shapes.push(["", line]);
  while (svg.childElementCount < shapes.length) svg.append(document.createElementNS(SVG, "path"));
  shapes.forEach(([className, d], index) => {
    const path = svg.children[index];
    if (className) path.setAttribute("class", className);
    path.setAttribute("d", d);
  });
}

function sparkline() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 68 18");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  return svg;
}

function push(samples, sample) {
  samples.push(sample);
  if (samples.length > SAMPLES) samples.shift();
}

/* ---- What the daemon said before -------------------------------------------------------------- */

const histories = new Map();

/** The samples of a stream, with this look's added. */
function sampled(key, stream, time) {
  let history = histories.get(key);
  const { packets, lost, jitter_ms: jitter } = stream.reception;
  if (!history) {
    history = { time, packets, lost, rates: [], losses: [], jitters: [] };
    histories.set(key, history);
  }
  const seconds = (time - history.time) / 1000;
  if (seconds > 0) {
    const came = packets - history.packets;
    const missing = Math.max(0, lost - history.lost);
    // Counters begin anew with each round of a stream.
    push(history.rates, came < 0 ? null : came / seconds);
    push(history.losses, came < 0 || came + missing === 0 ? null : (100 * missing) / (came + missing));
    push(history.jitters, jitter);
    Object.assign(history, { time, packets, lost });
  }
  return history;
}

function forgetOld(time) {
  for (const [key, history] of histories) {
    if (time - history.time > FORGOTTEN) histories.delete(key);
  }
}

/* ---- Summary ---------------------------------------------------------------------------------- */

let before = null;
const totals = [];

function showStatus(status) {
  document.title = `${status.offloaded}/${status.pairs} offloaded · ${status.interface} · relay-user`;
  say($("interface"), status.interface);
  $("mode").hidden = false;
  say($("mode"), status.mode === "tc" ? "TC" : `${status.mode} XDP`);
  $("mode").title = status.mode_reason;
  $("ami").hidden = false;
  const ami = status.ami;
  say($("ami"), ami ? (ami.state === "up" ? "AMI up" : "AMI down") : "no AMI");
  $("ami").title = ami ? (ami.cause ?? ami.asterisk ?? ami.address) : "pairs come from `relay-user add` alone";
  grade($("ami"), ami ? (ami.state === "up" ? "good" : "bad") : "", "chip");

  const time = Date.parse(status.time);
  const relayed = status.reasons.filter((row) => row.verdict === "relayed");
  const now = {
    time,
    packets: relayed.reduce((sum, row) => sum + row.packets, 0),
    bytes: relayed.reduce((sum, row) => sum + row.bytes, 0),
    reasons: new Map(status.reasons.map((row) => [row.reason, row.packets])),
  };
  const seconds = before ? (time - before.time) / 1000 : 0;
  if (seconds > 0) {
    const rate = Math.max(0, now.packets - before.packets) / seconds;
    push(totals, rate);
    say($("rate"), whole.format(rate));
    const bits = (8 * Math.max(0, now.bytes - before.bytes)) / seconds;
    say($("bandwidth"), `${fixed(bits / 1e6, 2)} Mbit/s`);
    draw($("rate-line"), totals, 1, true);
  }
  say($("offloaded"), whole.format(status.offloaded));
  say($("of-pairs"), `of ${whole.format(status.pairs)}`);
  say($("states"), `${whole.format(status.waiting)} waiting${status.unproven ? `, ${whole.format(status.unproven)} without proof` : ""}`);
  say($("streams"), whole.format(status.streams));
  say($("max-streams"), `of ${whole.format(status.max_streams)}`);
  const states = status.stream_states;
  say($("stream-states"), ["offloaded", "watching", "suspended", "waiting"]
    .filter((state) => states[state]).map((state) => `${whole.format(states[state])} ${state}`).join(", ") || "none");
  say($("refused"), whole.format(status.refused));
  const refusals = [...status.refusals].sort((a, b) => b.count - a.count).slice(0, 3);
  say($("refusals"), refusals.map((row) => `${words(row.cause)} ×${whole.format(row.count)}`).join(", ") || "nothing was refused");
  say($("about"), `relay-user ${status.version}, ABI ${status.abi}, process ${status.pid}, lease ${fixed(status.lease_ms / 1000, 1)} s`);
  showReasons(status.reasons, now, seconds);
  if (seconds > 0 || !before) before = now;
}

function showReasons(reasons, now, seconds) {
  const body = $("reasons").tBodies[0];
  const seen = reasons.filter((row) => row.packets > 0).sort((a, b) => b.packets - a.packets);
  while (body.rows.length > seen.length) body.deleteRow(-1);
  seen.forEach((row, index) => {
    const line = body.rows[index] ?? body.insertRow();
    if (!line.cells.length) {
      line.append(make("td", "", null, make("span", "name")), make("td", "number"), make("td", "number"));
    }
    const rate = seconds > 0 ? Math.max(0, row.packets - (before.reasons.get(row.reason) ?? 0)) / seconds : null;
    const name = line.cells[0].firstChild;
    say(name, row.reason);
    name.title = row.verdict;
    if (rate !== null) say(line.cells[1], rate === 0 ? "–" : rate < 10 ? fixed(rate, 1) : whole.format(rate));
    say(line.cells[2], short.format(row.packets));
  });
}

/* ---- Calls ------------------------------------------------------------------------------------ */

const shown = new Map(); // number of a pair → the parts of its rows
const open = new Set(); // numbers whose details are shown
const asked = { state: "", filter: "", sort: "worst", limit: PAGE };

function party(pair, leg) {
  return pair.legs[leg]?.channel ?? pair.channels[leg] ?? pair.legs[leg]?.remote ?? "?";
}

/** `PJSIP/alice-00000001` is alice to people. */
const plain = (channel) => channel.replace(/^[^/]+\//, "").replace(/-[0-9a-f]{8}$/, "");

function streamRow() {
  const measure = (name) => {
    const value = make("span", "value");
    value.dataset.name = name;
    const svg = sparkline();
    return { value, svg, cell: make("td", "number", null, make("span", "measure", null, value, svg)) };
  };
  const row = {
    from: make("td", "from"), name: make("b"), address: make("span"), state: make("td", "state"), chip: make("span", "chip"), why: make("div", "why"),
    rate: measure("packets/s"), loss: measure("lost"), jitter: measure("jitter"), mos: make("td", "number mos"),
  };
  row.from.append(row.name, row.address);
  row.state.append(row.chip);
  row.line = make("tr", "stream", null, row.from, row.state, row.rate.cell, row.loss.cell, row.jitter.cell, row.mos);
  return row;
}

function callBody(pair) {
  const call = { body: make("tbody", "call"), rows: [], details: null };
  call.head = make("th");
  call.head.scope = "rowgroup";
  call.toggle = make("button", "", `#${pair.id}`);
  call.toggle.type = "button";
  call.toggle.addEventListener("click", () => {
    if (!open.delete(pair.id)) open.add(pair.id);
    showDetails(call, call.pair);
  });
  call.chip = make("span", "chip");
  call.parties = make("div", "parties");
  call.why = make("div", "why");
  call.head.append(make("div", "title", null, call.toggle, call.chip), call.parties, call.why);
  return call;
}

function showCall(call, pair, time) {
  call.pair = pair;
  call.body.dataset.state = pair.state;
  call.body.dataset.pair = pair.id;
  say(call.chip, pair.state);
  grade(call.chip, STATES[pair.state], "chip");
  say(call.parties, [0, 1].map((leg) => plain(party(pair, leg))).join(" ⇄ "));
  call.parties.title = pair.channels.join(" ⇄ ");
  call.toggle.setAttribute("aria-label", `Details of call ${pair.id}`);
  // Of a call without streams it stands in their place.
  call.why.hidden = !pair.why || pair.streams.length === 0;
  say(call.why, call.why.hidden ? "" : pair.why);

  const wanted = Math.max(1, pair.streams.length);
  if (call.rows.length !== wanted || call.empty !== (pair.streams.length === 0)) {
    call.rows = pair.streams.map(streamRow);
    call.empty = pair.streams.length === 0;
    const lines = call.rows.map((row) => row.line);
    if (call.empty) {
      call.alone = make("td", "why");
      call.alone.colSpan = 6;
      lines.push(make("tr", "stream", null, call.alone));
      call.rows = [null];
    }
    call.head.rowSpan = lines.length;
    lines[0].prepend(call.head);
    call.body.replaceChildren(...lines);
    call.details = null;
  }
  if (call.empty) say(call.alone, pair.why ?? "");
  pair.streams.forEach((stream, index) => showStream(call.rows[index], pair, stream, time));
  showDetails(call, pair);
}

function showStream(row, pair, stream, time) {
  const history = sampled(`${pair.id}:${stream.leg}`, stream, time);
  const heard = stream.reception;
  say(row.name, plain(party(pair, stream.leg)));
  say(row.address, stream.from);
  say(row.chip, stream.state);
  grade(row.chip, STATES[stream.state], "chip");
  row.chip.title = stream.why ?? "";
  if (stream.why && stream.why !== pair.why) {
    say(row.why, stream.why);
    row.state.append(row.why);
  } else {
    row.why.remove();
  }

  const rate = history.rates.at(-1) ?? null;
  say(row.rate.value, rate === null ? "–" : fixed(rate, rate < 9.95 ? 1 : 0));
  grade(row.rate.svg, STATES[stream.state], "");
  draw(row.rate.svg, history.rates, 1);

  const loss = heard.lost_percent;
  const lossGrade = loss < 1 ? "" : loss < 5 ? "warn" : "bad";
  say(row.loss.value, heard.packets === 0 ? "–" : `${fixed(loss, loss < 9.95 ? 1 : 0)} %`);
  grade(row.loss.value, lossGrade, "value");
  grade(row.loss.svg, lossGrade, "");
  draw(row.loss.svg, history.losses, 1);

  const jitter = heard.jitter_ms;
  const jitterGrade = jitter === null || jitter < 20 ? "" : jitter < 50 ? "warn" : "bad";
  say(row.jitter.value, jitter === null ? "–" : `${fixed(jitter, 1)} ms`);
  grade(row.jitter.value, jitterGrade, "value");
  grade(row.jitter.svg, jitterGrade, "");
  draw(row.jitter.svg, history.jitters, 5);

  say(row.mos, heard.mos === null ? "–" : fixed(heard.mos, 1));
}

/** All that the API says of a stream, in words. */
function facts(pair, stream) {
  const leg = pair.legs[stream.leg];
  const hop = stream.next_hop;
  const heard = stream.reception;
  const rows = [
    ["channel", leg?.channel],
    ["goes to", stream.to],
    ["PBX receives at", leg?.local],
    ["PBX sends from", pair.legs[1 - stream.leg]?.sends_from],
    ["relayed", `${whole.format(stream.packets)} packets, ${short.format(stream.bytes)}B`],
    ["proof", stream.proof && `${stream.proof.equal} of ${stream.proof.of} equal, ${stream.proof.unequal} unequal`],
    ["last packet", stream.silent_ms === null ? "none yet" : `${whole.format(stream.silent_ms)} ms ago`],
    ["came with DSCP", stream.marks.map((mark) => `${mark.dscp ?? "other"} ×${whole.format(mark.packets)}`).join(", ")],
    ["next hop", hop && [hop.destination_mac ?? "no MAC", ...hop.vlan.map((id) => `VLAN ${id}`), `MTU ${hop.mtu}`].join(", ")],
    ["received", `${whole.format(heard.packets)} packets, ${whole.format(heard.lost)} lost, ${whole.format(heard.reordered)} reordered, ${whole.format(heard.duplicates)} duplicates`],
    ["codec", [heard.codec, heard.payload_types.length ? `payload types ${heard.payload_types.join(", ")}` : null].filter(Boolean).join(", ")],
    ["SSRC", heard.ssrc && `${heard.ssrc}, ${whole.format(heard.ssrc_changes)} changes`],
    ["jitter", heard.jitter_mean_ms !== null && `${fixed(heard.jitter_mean_ms, 1)} ms mean, ${fixed(heard.jitter_max_ms, 1)} ms at most`],
    ["largest gap", heard.packets > 1 && `${fixed(heard.largest_gap_ms, 0)} ms`],
  ];
  return rows.filter(([, value]) => value);
}

function showDetails(call, pair) {
  const isOpen = open.has(pair.id);
  call.toggle.setAttribute("aria-expanded", String(isOpen));
  if (!isOpen) {
    call.details?.line.remove();
    call.details = null;
    return;
  }
  if (!call.details) {
    const cell = make("td");
    cell.colSpan = 7;
    call.details = { cell, line: make("tr", "details", null, cell) };
    call.body.append(call.details.line);
  }
  const lists = pair.streams.map((stream) => {
    const list = make("dl");
    for (const [name, value] of facts(pair, stream)) {
      list.append(make("div", "", null, make("dt", "", name), make("dd", "", value)));
    }
    return list;
  });
  if (!lists.length) {
    const list = make("dl");
    for (const [name, value] of [["call", pair.call], ["channels", pair.channels.join(", ")], ["feed", pair.feed]]) {
      if (value) list.append(make("div", "", null, make("dt", "", name), make("dd", "", value)));
    }
    lists.push(list);
  }
  call.details.cell.replaceChildren(...lists);
}

function showCalls(list) {
  const time = Date.parse(list.time);
  const table = $("calls").querySelector("table");
  const numbers = new Set(list.pairs.map((pair) => pair.id));
  for (const [id, call] of shown) {
    if (!numbers.has(id)) {
      call.body.remove();
      shown.delete(id);
    }
  }
  let place = table.tHead;
  for (const pair of list.pairs) {
    let call = shown.get(pair.id);
    if (!call) {
      call = callBody(pair);
      shown.set(pair.id, call);
    }
    showCall(call, pair, time);
    // Moved only where the order changed: moving an element takes the focus from it.
    if (place.nextElementSibling !== call.body) place.after(call.body);
    place = call.body;
  }
  const all = list.matching;
  const few = list.pairs.length;
  say($("count"), all === 0 ? "" : few < all ? `${whole.format(few)} of ${whole.format(all)} calls` : `${whole.format(all)} ${all === 1 ? "call" : "calls"}`);
  $("empty").hidden = all !== 0;
  say($("empty"), asked.filter || asked.state ? "No call matches." : "No calls yet. They appear here as soon as the relay hears of one.");
  $("more").hidden = few >= all || few < asked.limit;
  forgetOld(time);
}

/* ---- Asking ----------------------------------------------------------------------------------- */

async function read(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(PATIENCE) });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error?.message ?? `HTTP ${answer.status}`);
  return body;
}

function query() {
  const parts = new URLSearchParams({ limit: asked.limit, sort: asked.sort });
  if (asked.state) parts.set("state", asked.state);
  if (asked.filter) parts.set("filter", asked.filter);
  return parts;
}

let timer = null;
let looks = 0;

/** Looks now, and again in a while; the look before, if it is under way, no longer counts. */
async function look() {
  clearTimeout(timer);
  const turn = ++looks;
  let failed = null;
  try {
    const [status, list] = await Promise.all([read("/v1/status"), read(`/v1/pairs?${query()}`)]);
    if (turn !== looks) return;
    showStatus(status);
    showCalls(list);
  } catch (error) {
    if (turn !== looks) return;
    failed = error;
  }
  say($("link"), failed ? "not connected" : "live");
  grade($("link"), failed ? "bad" : "good", "chip");
  $("alert").hidden = !failed;
  if (failed) say($("alert"), `The daemon does not answer (${failed.message}). What stands below is how it was; trying again.`);
  if (!document.hidden) timer = setTimeout(look, PERIOD);
}

/* ---- Events ----------------------------------------------------------------------------------- */

let source = null;
let retry = null;
let latest = 0;

function showEvent(event) {
  const list = $("events");
  const item = make("li", "new");
  const kind = make("span", `kind ${KINDS[event.kind] ?? ""}`, words(event.kind));
  const head = make("div", "head", null);
  if (event.time) {
    const time = make("time", "", new Date(event.time).toLocaleTimeString("en-GB"));
    time.dateTime = event.time;
    head.append(time);
  }
  head.append(kind);
  const whom = [event.pair === null || event.pair === undefined ? "" : `#${event.pair}`, event.stream === null || event.stream === undefined ? "" : ["A→B", "B→A"][event.stream]].filter(Boolean).join(" ");
  if (whom) head.append(make("span", "whom", whom));
  item.append(head, make("div", "cause", event.kind === "lagged" ? `${event.missed} events are missing here` : event.cause));
  list.prepend(item);
  while (list.childElementCount > EVENTS) list.lastElementChild.remove();
}

function follow() {
  clearTimeout(retry);
  if (source) return;
  source = new EventSource(`/v1/events?since=${latest}`);
  const told = (message) => {
    const event = JSON.parse(message.data);
    // After a new start of the daemon, numbers begin anew.
    latest = event.serial ?? latest;
    showEvent(event);
  };
  for (const kind of Object.keys(KINDS)) source.addEventListener(kind, told);
  source.onopen = () => say($("events-state"), "");
  source.onerror = () => {
    say($("events-state"), "not connected");
    // The browser tries again by itself, unless the answer was no stream of events.
    if (source?.readyState === EventSource.CLOSED) {
      unfollow();
      retry = setTimeout(follow, 10 * PERIOD);
    }
  };
}

function unfollow() {
  clearTimeout(retry);
  source?.close();
  source = null;
}

/* ---- Controls --------------------------------------------------------------------------------- */

const THEMES = { "": "auto", dark: "dark", light: "light" };

function stored() {
  try {
    return localStorage.getItem("theme") ?? "";
  } catch {
    return ""; // The browser keeps nothing for this page.
  }
}

function showTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  say($("theme"), `Theme: ${THEMES[theme] ?? "auto"}`);
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // As above.
  }
}

function nextTheme() {
  const names = Object.keys(THEMES);
  showTheme(names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length]);
}

function choose(change) {
  Object.assign(asked, { limit: PAGE }, change);
  look();
}

let typed = null;
$("filter").addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(() => choose({ filter: $("filter").value.trim() }), 150);
});
$("sort").addEventListener("change", () => choose({ sort: $("sort").value }));
$("more").addEventListener("click", () => choose({ limit: asked.limit + PAGE }));
$("theme").addEventListener("click", nextTheme);
for (const button of document.querySelectorAll(".states button")) {
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll(".states button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    choose({ state: button.dataset.state });
  });
}
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && event.target === $("filter")) {
    $("filter").value = "";
    choose({ filter: "" });
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    $("filter").focus();
  } else if (event.key === "t" && !typing) {
    nextTheme();
  }
});
// What nobody looks at costs the daemon nothing, and leaves its place among the followers of events.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    clearTimeout(timer);
    unfollow();
  } else {
    look();
    follow();
  }
});

showTheme(stored());
look();
follow();
