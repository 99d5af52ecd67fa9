// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the user sees of the set-up: one progress bar a step on a terminal, plain lines elsewhere. Steps may run side
//! by side.
//!
//! Everything goes to standard error, so that the output of `boot --run` stays clean.

use std::{
    fs::File,
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    sync::LazyLock,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// The bars of the steps that run.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Prints one line of information, in the same form everywhere.
pub fn info(text: &str) {
    BARS.suspend(|| eprintln!("viridian: {text}"));
}

/// A running step of the set-up, with its log file.
pub struct Step {
    always: bool,
    title: String,
    bar: Option<Bar>,
    log: File,
    log_path: PathBuf,
    tail: Vec<String>,
    started: Instant,
}

/// How many lines of a failed step's log are shown.
const TAIL_LINES: usize = 15;

impl Step {
    /// Starts a step. `expected_lines` is about how much its commands print; it only scales the bar.
    ///
    /// # Errors
    ///
    /// When the log file cannot be created.
    pub fn start(title: &str, log_path: &Path, expected_lines: u64) -> Result<Self> {
        let step = Self::start_quiet(title, log_path, expected_lines)?;
        if step.bar.is_none() {
            info(&format!("{title} ..."));
        }
        Ok(Self {
            always: true,
            ..step
        })
    }

    /// Starts a step that usually has nothing to do: it is only mentioned when it took more than a second.
    ///
    /// # Errors
    ///
    /// When the log file cannot be created.
    pub fn start_quiet(title: &str, log_path: &Path, expected_lines: u64) -> Result<Self> {
        let log = File::create(log_path)
            .with_context(|| format!("cannot create {}", log_path.display()))?;
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = BARS.add(ProgressBar::new(expected_lines.max(1)));
            let style = "viridian: {msg} [{bar:24}] {elapsed} {prefix:.dim}";
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_message(title.to_owned());
            bar.enable_steady_tick(Duration::from_millis(250));
            Bar(bar)
        });
        Ok(Self {
            always: false,
            title: title.to_owned(),
            bar,
            log,
            log_path: log_path.to_owned(),
            tail: Vec::new(),
            started: Instant::now(),
        })
    }

    /// Takes one line that a command of this step printed.
    pub fn line(&mut self, line: &str) {
        // The log is a convenience: a full disk is reported by the step itself.
        let _ = writeln!(self.log, "{line}");
        if self.tail.len() == TAIL_LINES {
            self.tail.remove(0);
        }
        self.tail.push(line.to_owned());
        if let Some(Bar(bar)) = &self.bar {
            let last = bar.length().unwrap_or(1).saturating_sub(1);
            if bar.position() < last {
                bar.inc(1);
            }
            let short: String = line
                .trim()
                .chars()
                .filter(|c| !c.is_control())
                .take(32)
                .collect();
            bar.set_prefix(short);
        }
    }

    /// The last lines printed, indented, with the name of the whole log.
    pub fn failure_text(&self) -> String {
        let mut text = String::new();
        for line in &self.tail {
            text.push_str("\n    ");
            text.push_str(line);
        }
        format!("{text}\n    (whole log: {})", self.log_path.display())
    }

    /// Ends the step well and prints its time.
    pub fn done(self) {
        let seconds = self.started.elapsed().as_secs_f64();
        drop(self.bar);
        if !self.always && seconds < 1.0 {
            return;
        }
        info(&format!("{}: done in {seconds:.1} s", self.title));
    }
}

/// The bar goes away with the step, however that ends.
struct Bar(ProgressBar);

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
        BARS.remove(&self.0);
    }
}
