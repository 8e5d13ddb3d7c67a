//! Pictures of the page in a browser: dark, light, and on a phone.

use std::{thread, time::Duration};

use anyhow::Result;
use relay_tests::{
    browser::{Browser, Screen},
    scene::Scene,
};

/// So long the page looks on before its picture is taken: its sparklines are full then.
const EXPOSURE: Duration = Duration::from_secs(62);

/// Takes all of them.
pub(crate) fn pictures(scene: &mut Scene) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let url = format!("http://{}/", scene.address("http")?);
    let dark = Screen {
        dark: true,
        ..Screen::LAPTOP
    };
    let mut browser = Browser::start(scene.host(), dark)?;
    browser.open(&url)?;
    thread::sleep(EXPOSURE);
    let mut pictures = Vec::new();
    for (name, screen) in [
        ("page-dark.png", dark),
        ("page-light.png", Screen::LAPTOP),
        ("page-phone.png", Screen::PHONE),
    ] {
        browser.show(screen)?;
        // Drawn anew with the next figures.
        browser.evaluate("new Promise((resolve) => requestAnimationFrame(resolve))")?;
        pictures.push((name, browser.picture()?));
    }
    Ok(pictures)
}
