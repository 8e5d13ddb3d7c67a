//! The page of live calls, in a real browser.

use relay_tests::{
    browser::{Browser, Screen},
    scene::{HELD, Scene, TRANSCODED, WEAK},
};
use serde_json::Value;

/// The texts of all elements that a selector finds.
fn texts(selector: &str) -> String {
    format!("[...document.querySelectorAll('{selector}')].map((element) => element.innerText)")
}

/// The browser has the scene's page open, and shows all its calls.
fn opened(scene: &Scene, screen: Screen) -> Browser {
    let mut browser = Browser::start(scene.host(), screen).expect("browser");
    let address = scene.address("http").expect("address");
    browser.open(&format!("http://{address}/")).expect("page");
    browser
        .until("document.querySelectorAll('tbody.call').length === 6")
        .expect("calls");
    browser
}

fn assert_content(browser: &mut Browser) {
    let complaints = browser.complaints().expect("browser");
    assert!(complaints.is_empty(), "{complaints:#?}");
}

fn strings(value: &Value) -> Vec<&str> {
    let items = value.as_array().into_iter().flatten();
    items.filter_map(Value::as_str).collect()
}

#[test]
fn it_shows_calls_as_they_come_and_go_and_why_one_is_refused() {
    let mut scene = Scene::open().expect("scene");
    let mut browser = opened(&scene, Screen::LAPTOP);
    let parties = browser.evaluate(&texts(".parties")).expect("parties");
    let parties = strings(&parties);
    for name in ["alice", WEAK, HELD, TRANSCODED] {
        let shown = parties.iter().any(|text| text.contains(name));
        assert!(shown, "{name}: {parties:?}");
    }
    // What needs a look first comes first, with the reason.
    browser
        .until(&format!(
            "document.querySelector('.parties').innerText.includes('{HELD}')"
        ))
        .expect("the call on hold");
    browser
        .until("document.querySelector('[data-state=refused] td.why').innerText.includes('is on hold')")
        .expect("the reason");
    browser
        .until("document.querySelector('#refusals').innerText === 'on hold ×1'")
        .expect("the refusal is counted");

    // Figures and sparklines move.
    browser
        .until("Number(document.querySelector('#rate').innerText) > 300")
        .expect("a rate");
    let path = "document.querySelector('[data-state=offloaded] svg path').getAttribute('d')";
    let before = browser.evaluate(path).expect("sparkline");
    browser
        .until(&format!("{path} !== {before}"))
        .expect("the sparkline moves");
    browser
        .until("[...document.querySelectorAll('.value')].some((value) => value.innerText === '50')")
        .expect("packets per second of a stream");
    browser
        .until("[...document.querySelectorAll('[data-name=lost].warn')].length === 1")
        .expect("the loss of the weak line");

    // A call appears, and is told of, without a new load; and goes.
    scene.place(["mallory", "olaf"]).expect("call");
    let called = "[...document.querySelectorAll('.parties')].some((call) => call.innerText.includes('mallory'))";
    browser.until(called).expect("the call appears");
    let number = "[...document.querySelectorAll('tbody.call')].find((call) => call.innerText.includes('mallory')).dataset.pair";
    browser
        .until(&format!(
            "[...document.querySelectorAll('#events li')].some((event) => event.innerText.includes('offloaded') && event.innerText.includes('#' + {number}))"
        ))
        .expect("its event");
    scene.hang_up().expect("hung up");
    browser.until(&format!("!{called}")).expect("the call goes");
    assert_content(&mut browser);
}

#[test]
fn it_filters_sorts_and_opens_by_keyboard() {
    let scene = Scene::open().expect("scene");
    let mut browser = opened(&scene, Screen::LAPTOP);
    browser.type_text("/ALICE").expect("typed");
    browser
        .until("document.querySelectorAll('tbody.call').length === 1")
        .expect("filtered");
    browser
        .until("document.querySelector('#count').innerText === '1 call'")
        .expect("counted");
    browser.type_text("xyz").expect("typed");
    browser
        .until("document.querySelector('#empty').innerText === 'No call matches.'")
        .expect("nothing is left");
    browser.press("Escape").expect("pressed");
    browser
        .until("document.querySelectorAll('tbody.call').length === 6")
        .expect("all again");
    browser
        .evaluate("document.querySelector('[data-state=\"refused\"][aria-pressed]').click()")
        .expect("clicked");
    browser
        .until("document.querySelectorAll('tbody.call').length === 1")
        .expect("refused ones alone");
    browser
        .evaluate("document.querySelector('button[data-state=\"\"]').click()")
        .expect("clicked");
    browser
        .evaluate("(() => { const sort = document.querySelector('#sort'); sort.value = 'id'; sort.dispatchEvent(new Event('change')); })()")
        .expect("sorted");
    let numbers =
        "[...document.querySelectorAll('tbody.call')].map((call) => Number(call.dataset.pair))";
    browser
        .until(&format!("{numbers}.length === 6 && {numbers}.every((id, index, all) => index === 0 || all[index - 1] < id)"))
        .expect("oldest first");

    // Details open with the keyboard, and stay open and in focus while figures change.
    browser
        .evaluate("document.querySelector('tbody.call button').focus()")
        .expect("focused");
    browser.type_text("\r").expect("pressed");
    browser
        .until("document.querySelector('.details dd') && document.querySelector('tbody.call button').ariaExpanded === 'true'")
        .expect("open");
    let rate = "document.querySelector('#rate-line path').getAttribute('d')";
    let before = browser.evaluate(rate).expect("rate");
    browser
        .until(&format!("{rate} !== {before}"))
        .expect("a look later");
    let kept = "document.activeElement === document.querySelector('tbody.call button') && document.querySelector('.details dd') !== null";
    assert_eq!(browser.evaluate(kept).expect("focus"), true);

    // Everything that can be pressed or filled in has a name that a screen reader can say.
    let nameless = "[...document.querySelectorAll('button, input, select')].filter((control) => !(control.ariaLabel || control.innerText || control.labels?.length)).length";
    assert_eq!(browser.evaluate(nameless).expect("names"), 0);
    assert_content(&mut browser);
}

#[test]
fn it_fits_a_phone_in_both_themes() {
    let scene = Scene::open().expect("scene");
    let mut browser = opened(&scene, Screen::PHONE);
    for id in ["details", "plain"] {
        let wide = "document.documentElement.scrollWidth > 360 || [...document.querySelectorAll('main *')].filter((element) => element.getBoundingClientRect().right > 361).map((element) => element.outerHTML.slice(0, 80)).join()";
        assert!(
            matches!(browser.evaluate(wide).expect("width"), Value::Bool(false))
                || browser.evaluate(wide).expect("width") == "",
            "{id}: {:#}",
            browser.evaluate(wide).expect("width")
        );
        browser
            .evaluate("document.querySelector('tbody.call:nth-of-type(2) button').click()")
            .expect("opened or closed");
    }
    let ground = "getComputedStyle(document.body).backgroundColor";
    let dark = browser.evaluate(ground).expect("dark");
    browser
        .show(Screen {
            dark: false,
            ..Screen::PHONE
        })
        .expect("the system prefers light");
    let is_dark = format!("{ground} === {dark}");
    browser.until(&format!("!({is_dark})")).expect("light");
    // The choice made on the page outlasts a new load.
    browser.type_text("t").expect("pressed");
    browser.until(&is_dark).expect("chosen");
    let address = scene.address("http").expect("address");
    browser.open(&format!("http://{address}/")).expect("page");
    assert_eq!(browser.evaluate(ground).expect("kept"), dark);
    assert_content(&mut browser);
}

#[test]
fn names_from_the_network_stay_text() {
    let mut scene = Scene::open().expect("scene");
    let mut browser = opened(&scene, Screen::LAPTOP);
    let name = "<img/src=x/onerror=alert(1)>";
    scene
        .place([name, "\"><script>alert(2)</script>"])
        .expect("call");
    browser
        .until(&format!(
            "[...document.querySelectorAll('.parties')].some((call) => call.innerText.includes('{name}'))"
        ))
        .expect("shown as text");
    let made = "document.querySelectorAll('main img, main script').length";
    assert_eq!(browser.evaluate(made).expect("elements"), 0);
    assert_content(&mut browser);
}

#[test]
fn it_tells_when_the_daemon_is_gone() {
    let scene = Scene::open().expect("scene");
    let mut browser = opened(&scene, Screen::LAPTOP);
    scene.relay.run(["detach", "eth0"]).expect("detached");
    browser
        .until("document.querySelector('#link').innerText === 'not connected' && !document.querySelector('#alert').hidden")
        .expect("told");
    // What was shown is still there, and said to be old.
    let calls = browser.evaluate("document.querySelectorAll('tbody.call').length");
    assert_eq!(calls.expect("calls"), 6);
}
