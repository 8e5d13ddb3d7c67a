//! Pictures of `relay-user top`: its table, and the page of a stream.

use std::time::Duration;

use anyhow::Result;
use relay_tests::{picture, scene::Scene, terminal::Terminal};

/// So long it runs before its picture is taken: its courses are full then.
const EXPOSURE: Duration = Duration::from_secs(62);

/// In this time a page is drawn whole.
const DRAWN: Duration = Duration::from_millis(500);

/// Takes both.
pub(crate) fn pictures(scene: &mut Scene) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let command = scene.relay.command(["top", "--sort", "-loss"]);
    let mut top = Terminal::open(scene.host(), command, 24, 110)?;
    top.wait_for("offloaded")?;
    let table = top.watch(EXPOSURE)?;
    top.press("\r")?;
    top.wait_for("highest of")?;
    let stream = top.watch(DRAWN)?;
    top.press("q")?;
    top.end()?;
    Ok(vec![
        ("top.svg", picture::svg(&table).into_bytes()),
        ("top-stream.svg", picture::svg(&stream).into_bytes()),
    ])
}
