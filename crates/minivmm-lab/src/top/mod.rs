//! `minivmm top FILE`: shows an observation while it grows, on a terminal or as lines.
//!
//! Owns the choice between the two, and the loop. [`minivmm::observe::follow`] reads the file, [`view`] draws a
//! sample and `columns` chooses the figures that fit. It only reads the file and does not contact the minivmm
//! that writes it, so whoever may read the file may use this.

mod columns;
mod figures;
pub mod history;
pub mod view;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use history::History;
use minivmm::observe::follow::{Follower, NotAnObservation};
use minivmm::terminal;
use view::Screen;

/// How often the file is checked for new rows.
const CHECK_EVERY: Duration = Duration::from_millis(100);

/// Why an observation cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// The file cannot be read.
    #[error("cannot read the observation {path}")]
    Read {
        /// The file.
        path: String,
        /// The error that the host reported.
        source: io::Error,
    },
    /// The file is not an observation.
    #[error("{path} is not an observation")]
    Other {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: NotAnObservation,
    },
    /// The terminal or the output cannot be used.
    #[error("cannot use the terminal")]
    Terminal(#[source] io::Error),
}

/// Shows `path`: on a terminal until the user quits, elsewhere as lines until the observation ends; in both
/// cases also until `stop` is set.
pub fn run(path: &Path, stop: &AtomicBool) -> Result<(), TopError> {
    let name = path.display().to_string();
    let file = File::open(path).map_err(|source| TopError::Read { path: name.clone(), source })?;
    let mut follower = Follower::new(file);
    // Read before the screen is taken over, so that an error stays visible.
    let mut history = History::default();
    read_rows(&mut follower, &mut history, &name)?;
    if !io::stdout().is_terminal() {
        return print(follower, history, &name, stop);
    }
    terminal::defer_stops();
    let mut screen = ratatui::try_init().map_err(TopError::Terminal)?;
    let shown = show(&mut screen, follower, history, &name, stop);
    ratatui::restore();
    shown
}

/// Reads the new rows. Returns `true` if more may come.
fn read_rows(follower: &mut Follower, history: &mut History, name: &str) -> Result<bool, TopError> {
    // Asked before reading, so that what the writer wrote last is read too.
    let goes_on = follower.is_written();
    let rows = follower.read().map_err(|source| TopError::Read { path: name.to_owned(), source })?;
    let rows = rows.map_err(|source| TopError::Other { path: name.to_owned(), source })?;
    rows.into_iter().for_each(|row| history.take(row));
    Ok(goes_on)
}

fn print(
    mut follower: Follower,
    mut history: History,
    name: &str,
    stop: &AtomicBool,
) -> Result<(), TopError> {
    let mut out = io::stdout().lock();
    loop {
        let goes_on = read_rows(&mut follower, &mut history, name)?;
        for line in history.take_lines() {
            match writeln!(out, "{line}") {
                // A reader that has closed the pipe, as `head` does, wants no more.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                written => written.map_err(TopError::Terminal)?,
            }
        }
        if !goes_on || stop.load(Ordering::SeqCst) {
            return Ok(());
        }
        std::thread::sleep(CHECK_EVERY);
    }
}

/// Returns `true` if this kind of terminal has colours and the user wants them. A NO_COLOR that is not empty
/// refuses them (no-color.org).
fn has_colours(no_color: Option<&OsStr>, term: Option<&OsStr>) -> bool {
    let unwanted = no_color.is_some_and(|value| !value.is_empty());
    let term = term.map(OsStr::to_string_lossy).unwrap_or_default();
    let without =
        ["", "dumb", "unknown"].contains(&&*term) || term.starts_with("vt1") || term.ends_with("-m");
    !unwanted && !without
}

fn show(
    screen: &mut ratatui::DefaultTerminal,
    mut follower: Follower,
    mut history: History,
    name: &str,
    stop: &AtomicBool,
) -> Result<(), TopError> {
    let colours = has_colours(std::env::var_os("NO_COLOR").as_deref(), std::env::var_os("TERM").as_deref());
    while !stop.load(Ordering::SeqCst) {
        let goes_on = read_rows(&mut follower, &mut history, name)?;
        history.take_lines();
        let content = Screen { name, goes_on, colours };
        screen.draw(|frame| view::draw(frame, &history, &content)).map_err(TopError::Terminal)?;
        let mut stops = terminal::take_stop();
        if event::poll(CHECK_EVERY).map_err(TopError::Terminal)?
            && let Event::Key(key) = event::read().map_err(TopError::Terminal)?
            && key.kind == KeyEventKind::Press
        {
            let control = key.modifiers.contains(KeyModifiers::CONTROL);
            match key.code {
                KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                KeyCode::Char('c') if control => return Ok(()),
                KeyCode::Char('z') if control => stops = true,
                _ => {}
            }
        }
        if stops {
            ratatui::restore();
            terminal::stop();
            *screen = ratatui::try_init().map_err(TopError::Terminal)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_that_have_them_and_users_who_want_them() {
        for (no_color, term, expected) in [
            (None, Some("xterm-256color"), true),
            (Some(""), Some("screen"), true),
            (Some("1"), Some("xterm-256color"), false),
            (None, Some("dumb"), false),
            (None, Some("vt100"), false),
            (None, None, false),
        ] {
            let found = has_colours(no_color.map(OsStr::new), term.map(OsStr::new));
            assert_eq!(found, expected, "{no_color:?} {term:?}");
        }
    }
}
