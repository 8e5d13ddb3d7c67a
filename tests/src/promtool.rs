//! Prometheus' own checks of what is served to it.

use std::{
    env, fs,
    io::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// `cargo xtask setup` puts it into `target/tools`; a test runs from `target/PROFILE/deps`.
fn promtool() -> Result<Command> {
    let own = env::current_exe().context("cannot tell the path of this program")?;
    let folders = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&folders)
        .chain(own.ancestors().take(4).map(|folder| folder.join("tools")));
    let program = folders
        .map(|folder| folder.join("promtool"))
        .find(|program| program.is_file());
    program
        .map(Command::new)
        .context("there is no promtool: `cargo xtask setup` gets it")
}

/// `promtool check metrics`: the format, names, types and help texts.
///
/// # Errors
/// It complains: the text holds of what.
pub fn check_metrics(scraped: &str) -> Result<()> {
    let mut child = promtool()?
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run promtool")?;
    let mut stdin = child.stdin.take().context("promtool reads nothing")?;
    stdin.write_all(scraped.as_bytes())?;
    drop(stdin);
    judged(&child.wait_with_output()?)
}

/// `promtool check rules` of a rule that records an expression: its syntax.
///
/// # Errors
/// It complains: the text holds of what.
pub fn check_expression(expression: &str) -> Result<()> {
    // Grafana puts these in before it asks.
    let expression = expression
        .replace("$__rate_interval", "5m")
        .replace("$instance", ".*");
    let rules = tempfile::NamedTempFile::new()?;
    let expression = serde_json::to_string(&expression)?;
    fs::write(
        rules.path(),
        format!("groups:\n- name: a\n  rules:\n  - record: a:b\n    expr: {expression}\n"),
    )?;
    let mut promtool = promtool()?;
    judged(
        &promtool
            .args(["check", "rules"])
            .arg(rules.path())
            .output()?,
    )
}

fn judged(output: &std::process::Output) -> Result<()> {
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let said = String::from_utf8_lossy(&said);
    // Lint is told, and no failure of its own.
    let lint = !output.stderr.is_empty();
    if !output.status.success() || lint {
        bail!("promtool: {}: {said}", output.status);
    }
    Ok(())
}
