//! What `cargo xtask screenshots` runs: takes the pictures of the documentation, all of one scene.

mod page;
mod top;

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Parser;
use relay_tests::scene::Scene;

/// A subject of pictures: returns the names of their files, and their content.
type Subject = fn(&mut Scene) -> Result<Vec<(&'static str, Vec<u8>)>>;

/// All subjects, in the order in which they are taken.
const SUBJECTS: [Subject; 2] = [page::pictures, top::pictures];

#[derive(Parser)]
struct Options {
    /// Folder that the pictures go to
    folder: PathBuf,
}

fn run(options: &Options) -> Result<()> {
    let folder = &options.folder;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    println!("placing calls");
    let mut scene = Scene::open()?;
    for subject in SUBJECTS {
        for (name, picture) in subject(&mut scene)? {
            let path = folder.join(name);
            fs::write(&path, &picture)
                .with_context(|| format!("cannot write {}", path.display()))?;
            println!("{} ({} KiB)", path.display(), picture.len() / 1024);
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
