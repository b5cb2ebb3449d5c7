//! Prints what a campaign has found, as text or JSON.
//!
//! Owns the wording of points and lost entries, and the command line that tries a state again.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::check::CheckedState;
use super::legal::{Pending, StateName};
use super::log::WriteLog;
use super::plan::Task;
use minivmm::text::shell_word;

/// Number of failures whose images are kept. The first that are found are kept.
pub const KEPT_MAX: usize = 16;

/// Most failures that the text shows.
const SHOWN_MAX: usize = 10;
/// Lines of output that the text shows for each failure, from its beginning.
const OUTPUT_LINES: usize = 6;
/// Default time limit of a check.
pub const CHECK_TIMEOUT: Duration = Duration::from_secs(60);

/// What was tried, and what was bad.
#[derive(Debug, Serialize)]
pub struct CrashReport {
    /// The write log.
    #[serde(serialize_with = "minivmm::text::path_as_text")]
    pub log: PathBuf,
    /// The disk as it was when the log began.
    #[serde(serialize_with = "minivmm::text::path_as_text")]
    pub base: PathBuf,
    /// Number of entries in the log.
    pub entries: usize,
    /// The command of the check.
    pub check: String,
    /// Number of points at which the power failed.
    pub points: usize,
    /// Number of different disks that were checked.
    pub states: u64,
    /// The disks that the check did not find good.
    pub failures: Vec<Failure>,
    /// True if the campaign was interrupted before everything was tried.
    pub interrupted: bool,
    /// Duration of the campaign.
    pub seconds: f64,
    /// Directory in which the images were made.
    #[serde(serialize_with = "minivmm::text::path_as_text")]
    pub scratch: PathBuf,
    /// Number of checks that ran at once.
    pub jobs: usize,
}

/// A state that is not good.
#[derive(Debug, Serialize)]
pub struct Failure {
    /// Number of entries that had completed.
    pub entry: usize,
    /// Name of the state.
    #[serde(serialize_with = "as_text")]
    pub state: StateName,
    /// The entries that the state lacks at least in part.
    pub lost: Vec<usize>,
    /// How the check ended.
    pub why: String,
    /// The end of its output.
    pub output: String,
    /// The image as it was before the check; `None` if it was not kept.
    #[serde(serialize_with = "optional_path")]
    pub image: Option<PathBuf>,
    /// The command line that tries the state again.
    pub repeat: String,
}

#[allow(clippy::ref_option, reason = "serde asks so")]
fn optional_path<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_ref().map(|path| path.display().to_string()).serialize(serializer)
}

fn as_text<S: Serializer>(name: &StateName, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(name)
}

impl CrashReport {
    /// Returns the report as JSON.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// Returns the report as text.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for failure in self.failures.iter().take(SHOWN_MAX) {
            // Writing to a String cannot fail.
            let _ = write!(text, "FAILED  entry {}, state {}: {}", failure.entry, failure.state, failure.why);
            let _ = writeln!(text, "; lost: {}", listed(&failure.lost));
            let lines = failure.output.lines().filter(|line| !line.trim().is_empty());
            for line in lines.take(OUTPUT_LINES) {
                let _ = writeln!(text, "    | {line}");
            }
            if let Some(image) = &failure.image {
                let _ = writeln!(text, "    image:  {}", image.display());
            }
            let _ = writeln!(text, "    repeat: {}", failure.repeat);
        }
        if self.failures.len() > SHOWN_MAX {
            let _ = writeln!(
                text,
                "and {} more (--json has all of them; images of the first {KEPT_MAX} found are kept)",
                self.failures.len() - SHOWN_MAX
            );
        }
        let _ = write!(
            text,
            "{} states at {} points of {} entries in {:.1} s, {} at a time: {}",
            self.states,
            self.points,
            self.entries,
            self.seconds,
            self.jobs,
            match self.failures.len() {
                0 => "all good".to_owned(),
                count => format!("{count} failed"),
            }
        );
        if self.interrupted {
            text.push_str(" (interrupted: more was to be tried)");
        }
        text
    }
}

fn listed(entries: &[usize]) -> String {
    const MOST: usize = 12;
    if entries.is_empty() {
        return "nothing".to_owned();
    }
    let words: Vec<String> = entries.iter().take(MOST).map(usize::to_string).collect();
    let more =
        if entries.len() > MOST { format!(" and {} more", entries.len() - MOST) } else { String::new() };
    format!("{}{more}", words.join(" "))
}

/// Describes a point of the log.
pub(super) fn describe_point(log: &WriteLog, point: usize) -> String {
    match log.entries.get(point) {
        Some(entry) => format!("before entry {point} ({}) had ended", entry.kind()),
        None => "at the end of the log".to_owned(),
    }
}

/// Returns what the environment of a check says about the state.
pub(super) fn checked_state(log: &WriteLog, task: &Task) -> CheckedState {
    let before = log.entries.get(..task.point).unwrap_or(&log.entries);
    let mark = before.iter().rev().find_map(|entry| entry.mark.clone());
    CheckedState { entry: task.point, state: task.name.to_string(), mark }
}

/// Returns the entries that the state of a task lacks at least in part.
pub(super) fn lost_entries(log: &WriteLog, task: &Task) -> Vec<usize> {
    Pending::at(log, task.point, task.name.is_torn()).lost(task.name)
}

/// Returns the command line that tries the state of a task again.
pub(super) fn repeat_command(
    log: &Path,
    base: &Path,
    check: Option<&str>,
    limit: Duration,
    task: &Task,
) -> String {
    let path = |path: &Path| shell_word(path);
    let mut line = format!("minivmm crash {} --base {}", path(log), path(base));
    if let Some(check) = check {
        let _ = write!(line, " --check {}", shell_word(check));
    }
    if limit != CHECK_TIMEOUT {
        let _ = write!(line, " --check-timeout {}", limit.as_secs_f64());
    }
    let _ = write!(line, " --repeat {}:{}", task.point, task.name);
    line
}
