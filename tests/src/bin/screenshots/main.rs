//! What `cargo xtask screenshots` runs: takes the pictures of the documentation, all of one scene.

mod page;

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Parser;
use relay_tests::scene::Scene;

/// A subject of pictures: returns their names, without `.png`, and their content.
type Subject = fn(&mut Scene) -> Result<Vec<(&'static str, Vec<u8>)>>;

/// All subjects, in the order in which they are taken.
const SUBJECTS: [Subject; 1] = [page::pictures];

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
            let path = folder.join(name).with_extension("png");
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
