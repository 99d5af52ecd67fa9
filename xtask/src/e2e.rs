// SPDX-License-Identifier: MIT OR Apache-2.0

//! Runs the tests that boot guests: a few batches side by side, each in an L1 VM of its own where one is needed.
//!
//! A batch is a run of the test program with some names. A VM that dies takes one test with it: the batch's
//! others go back to the queue. What a test prints is shown only when it fails.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::Stdio,
    sync::{Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{cmd, ui};

/// Tests in a batch: enough that the start of a VM does not count, few enough that all workers end together.
const BATCH: usize = 4;

/// No batch takes longer. Tests have limits of their own: this is for a VM that stands still.
pub const BATCH_LIMIT: Duration = Duration::from_secs(40 * 60);

/// A test program, and how it is run.
pub struct Program {
    /// The program.
    pub path: PathBuf,
    /// What comes before it in a command: the runner, if one is needed.
    pub runner: Vec<String>,
    /// Its environment beyond ours.
    pub environment: Vec<(String, String)>,
    /// Batches that run at once.
    pub workers: usize,
    /// The longest time of a batch.
    pub limit: Duration,
}

/// What was found out so far.
#[derive(Default)]
struct Progress {
    queue: VecDeque<String>,
    total: usize,
    ended: usize,
    failed: Vec<String>,
}

/// A line `test NAME ... RESULT` of the test program: the name, and whether the test passed.
fn parse_result(line: &str) -> Option<(&str, bool)> {
    let (name, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
    match result.trim_end() {
        "ok" => Some((name, true)),
        "FAILED" => Some((name, false)),
        // The program died in the test.
        _ => None,
    }
}

/// The names in what the test program prints for `--list --format terse`, that contain one of the filters.
fn parse_list(text: &str, filters: &[String]) -> VecDeque<String> {
    text.lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .filter(|name| filters.is_empty() || filters.iter().any(|part| name.contains(part)))
        .map(str::to_owned)
        .collect()
}

impl Program {
    /// Runs those of its tests whose names contain one of `filters`, or all. Says how many there are.
    ///
    /// # Errors
    ///
    /// Names the tests that failed.
    pub fn run(&self, filters: &[String]) -> Result<usize> {
        let list = cmd::output(
            std::process::Command::new(&self.path).args(["--list", "--format", "terse"]),
        )?;
        let queue = parse_list(&list, filters);
        if queue.is_empty() {
            ui::info("no test that boots a guest has such a name");
            return Ok(0);
        }
        let started = Instant::now();
        let total = queue.len();
        ui::info(&format!(
            "{total} tests that boot guests, {} at a time",
            self.workers.min(total)
        ));
        let progress = Mutex::new(Progress {
            queue,
            total,
            ..Progress::default()
        });
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.workers)
                .map(|_| scope.spawn(|| self.work(&progress)))
                .collect();
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().unwrap_or_else(|_| bail!("a worker panicked")))
        })?;
        let progress = progress
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let seconds = started.elapsed().as_secs();
        if !progress.failed.is_empty() {
            bail!(
                "{} of {total} tests that boot guests failed:\n    {}",
                progress.failed.len(),
                progress.failed.join("\n    ")
            );
        }
        ui::info(&format!(
            "all {total} tests that boot guests passed in {seconds} s"
        ));
        Ok(total)
    }

    /// Runs batches until the queue is empty.
    fn work(&self, progress: &Mutex<Progress>) -> Result<()> {
        let lock = || progress.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let batch: Vec<String> = {
                let queue = &mut lock().queue;
                // The last ones are shared out.
                let size = BATCH.min(queue.len().div_ceil(self.workers));
                queue.drain(..size).collect()
            };
            if batch.is_empty() {
                return Ok(());
            }
            for name in self.run_batch(&batch, progress)?.into_iter().rev() {
                lock().queue.push_front(name);
            }
        }
    }

    /// Runs one batch and gives the tests that it did not come to.
    fn run_batch(&self, batch: &[String], progress: &Mutex<Progress>) -> Result<Vec<String>> {
        let mut words = self.runner.clone();
        words.push(self.path.to_string_lossy().into_owned());
        let (program, arguments) = words.split_first().context("nothing to run")?;
        let mut command = cmd::tied(program);
        command
            .args(arguments)
            .args(["--exact", "--test-threads=1"])
            .args(batch)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A second signal ends the runner before it has tidied up: a terminal's go to us alone.
            .process_group(0);
        let mut child = command.spawn().context("cannot start the tests")?;
        // What is said on standard error can come amid a line with a result.
        let (sender, lines) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            cmd::read_lines(stdout, sender.clone(), |line| (true, line));
        }
        if let Some(stderr) = child.stderr.take() {
            cmd::read_lines(stderr, sender.clone(), |line| (false, line));
        }
        drop(sender);

        let mut waiting: VecDeque<&String> = batch.iter().collect();
        let mut begun = Instant::now();
        let mut output = String::new();
        let mut failures = Vec::new();
        let take = |(is_stdout, line): (bool, String)| {
            let result = parse_result(&line)
                .filter(|(name, _)| is_stdout && waiting.iter().any(|waiting| *waiting == name));
            let Some((name, passed)) = result else {
                // Writing to a string cannot fail.
                let _ = writeln!(output, "{line}");
                return;
            };
            waiting.retain(|waiting| *waiting != name);
            if passed {
                report(progress, name, true, begun.elapsed());
            } else {
                // What it printed comes at the end of the batch.
                failures.push((name.to_owned(), begun.elapsed()));
            }
            begun = Instant::now();
        };
        let end = match cmd::follow(&mut child, &lines, cmd::GRACE, Some(self.limit), take) {
            Ok(status) => cmd::describe(status),
            Err(error) if error.is::<cmd::TooLong>() => error.to_string(),
            Err(error) => return Err(error),
        };
        // The test that was running when the batch died is the one that failed.
        if let Some(name) = waiting.pop_front() {
            failures.push((name.clone(), begun.elapsed()));
            let _ = writeln!(output, "the tests ended without a result for {name}: {end}");
        }
        let rest: Vec<String> = waiting.into_iter().cloned().collect();
        let mut shown = false;
        for (name, time) in failures {
            report(progress, &name, false, time);
            shown = true;
        }
        if shown {
            eprint!("{output}");
        }
        Ok(rest)
    }
}

/// Counts a test's end and tells the user.
fn report(progress: &Mutex<Progress>, name: &str, passed: bool, time: Duration) {
    let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
    progress.ended += 1;
    if !passed {
        progress.failed.push(name.to_owned());
    }
    println!(
        "[{:3}/{}] {} {name} ({:.1} s)",
        progress.ended,
        progress.total,
        if passed { "ok    " } else { "FAILED" },
        time.as_secs_f64()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines() {
        assert_eq!(
            parse_result("test bus::c::a ... ok"),
            Some(("bus::c::a", true))
        );
        assert_eq!(parse_result("test a ... FAILED"), Some(("a", false)));
        assert_eq!(parse_result("test a ... "), None);
        assert_eq!(parse_result("test result: ok. 1 passed"), None);
    }

    #[test]
    fn lists_are_filtered() {
        let list = "a::c::x: test\na::rust::x: test\nb: benchmark\n";
        assert_eq!(parse_list(list, &[]).len(), 2);
        assert_eq!(
            parse_list(list, &["rust".into(), "none".into()]),
            ["a::rust::x"]
        );
    }

    /// A program that behaves as a test program does, by a shell script.
    fn program(directory: &std::path::Path, script: &str) -> Program {
        let path = directory.join("program");
        let list =
            "if [ \"$1\" = --list ]; then echo 'a: test'; echo 'b: test'; echo 'c: test'; exit; fi";
        std::fs::write(&path, format!("{list}\n{script}\n")).unwrap();
        // A shell reads it: a program that was just written may be busy.
        Program {
            path,
            runner: vec!["sh".into()],
            environment: Vec::new(),
            workers: 1,
            limit: Duration::from_secs(60),
        }
    }

    fn run(name: &str, script: &str) -> (Progress, Result<Vec<String>>) {
        run_for(Duration::from_secs(60), name, script)
    }

    fn run_for(limit: Duration, name: &str, script: &str) -> (Progress, Result<Vec<String>>) {
        let scratch = crate::cache::Scratch::create(name).unwrap();
        let progress = Mutex::default();
        let batch = ["a", "b", "c"].map(String::from);
        let program = Program {
            limit,
            ..program(scratch.path(), script)
        };
        let rest = program.run_batch(&batch, &progress);
        (progress.into_inner().unwrap(), rest)
    }

    #[test]
    fn results_are_counted() {
        let (progress, rest) = run(
            "counted",
            "for n in a b c; do echo \"test $n ... ok\"; done; echo 'test result: ok'",
        );
        assert_eq!((progress.ended, progress.failed.len()), (3, 0));
        assert!(rest.unwrap().is_empty());
    }

    #[test]
    fn failures_are_named() {
        let (progress, _) = run(
            "named",
            "echo 'test a ... ok'; echo 'test b ... FAILED'; echo 'test c ... ok'; exit 101",
        );
        assert_eq!((progress.ended, progress.failed), (3, vec!["b".to_owned()]));
    }

    #[test]
    fn a_dead_vm_takes_one_test_with_it() {
        let (progress, rest) = run(
            "dead",
            "echo 'test a ... ok'; printf 'test b ... '; kill -9 $$",
        );
        assert_eq!((progress.ended, progress.failed), (2, vec!["b".to_owned()]));
        assert_eq!(rest.unwrap(), ["c"]);
    }

    #[test]
    fn a_batch_that_stands_still_is_ended() {
        let (progress, rest) = run_for(
            Duration::from_secs(2),
            "still",
            "echo 'test a ... ok'; sleep 300 & wait",
        );
        assert_eq!((progress.ended, progress.failed), (2, vec!["b".to_owned()]));
        assert_eq!(rest.unwrap(), ["c"]);
    }

    #[test]
    fn what_is_said_amid_a_result_does_not_hide_it() {
        let (progress, rest) = run(
            "amid",
            "for n in a b c; do printf \"test $n ... \"; echo noise >&2; sleep 0.1; echo ok; done; \
             echo 'test a ... FAILED' >&2",
        );
        assert_eq!((progress.ended, progress.failed.len()), (3, 0));
        assert!(rest.unwrap().is_empty());
    }

    #[test]
    fn a_program_that_does_nothing_fails() {
        let (progress, rest) = run("idle", "exit 0");
        assert_eq!((progress.ended, progress.failed), (1, vec!["a".to_owned()]));
        assert_eq!(rest.unwrap(), ["b", "c"]);
    }
}
