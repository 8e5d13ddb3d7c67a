//! The fake PBX as a process: see `relay_tests::pbx`.

use clap::Parser as _;
use relay_tests::pbx::{Options, run};

fn main() -> anyhow::Result<()> {
    run(&Options::parse())
}
