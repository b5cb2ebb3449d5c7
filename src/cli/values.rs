//! Values of options that are neither sizes nor keys of disks.
//!
//! Owns how they are parsed, and the message for a wrong one. A path in them may contain any bytes.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use clap::builder::{OsStringValueParser, PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Arg, Command};

use crate::disk_options::{self, DiskOptions};
use crate::hosts::HostChoice;
use crate::sandbox;
use crate::virtio::TransportChoice;
use crate::vmm::ConsoleTarget;

/// Parses a number of guest CPUs.
pub fn cpus(text: &str) -> Result<u8, String> {
    let wrong = || "expected a number from 1 to 254".to_string();
    text.parse().ok().filter(|count| (1..=254).contains(count)).ok_or_else(wrong)
}

// Lists of words, so that shells complete them and an error suggests the nearest one.
pub(super) fn transport() -> impl TypedValueParser<Value = TransportChoice> {
    let unknown = || "expected pci or mmio".to_owned();
    PossibleValuesParser::new(["pci", "mmio"])
        .try_map(move |name| TransportChoice::by_name(&name).ok_or_else(unknown))
}

/// Returns the parser of `--sandbox`.
pub fn sandbox_mode() -> impl TypedValueParser<Value = sandbox::Mode> {
    let unknown = || "expected on, log or off".to_owned();
    PossibleValuesParser::new(sandbox::Mode::ALL.map(|(name, _)| name))
        .try_map(move |name| sandbox::Mode::by_name(&name).ok_or_else(unknown))
}

/// Returns the parser of `--disk`.
pub fn disk() -> impl TypedValueParser<Value = DiskOptions> {
    OsStringValueParser::new().try_map(disk_options::parse)
}

/// An option's values of which shells can complete some, while others are not in any list.
#[derive(Debug, Clone)]
pub struct Suggested<T: 'static> {
    /// What shells complete.
    pub words: &'static [&'static str],
    /// Parses any value. The error says what a value is.
    pub parse: fn(&OsStr) -> Result<T, String>,
}

impl<T: Clone + Send + Sync + 'static> TypedValueParser for Suggested<T> {
    type Value = T;

    fn parse_ref(&self, command: &Command, option: Option<&Arg>, value: &OsStr) -> Result<T, clap::Error> {
        let parse = self.parse;
        OsStringValueParser::new().try_map(move |text| parse(&text)).parse_ref(command, option, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.words.iter().map(|word| PossibleValue::new(*word))))
    }
}

pub(super) fn console() -> Suggested<ConsoleTarget> {
    Suggested { words: &["stdio", "stderr", "off", "file="], parse: console_target }
}

/// Returns the parser of `--host`.
pub fn host() -> Suggested<HostChoice> {
    Suggested {
        words: &["auto", "direct", "emulated"],
        parse: |text| HostChoice::by_name(&text.to_string_lossy()),
    }
}

fn console_target(text: &OsStr) -> Result<ConsoleTarget, String> {
    match text.as_bytes() {
        b"stdio" => Ok(ConsoleTarget::Stdio),
        b"stderr" => Ok(ConsoleTarget::Stderr),
        b"off" => Ok(ConsoleTarget::Off),
        [b'f', b'i', b'l', b'e', b'=', path @ ..] if !path.is_empty() => {
            Ok(ConsoleTarget::File(OsStr::from_bytes(path).into()))
        }
        _ => Err("expected stdio, stderr, off, or file=PATH".into()),
    }
}

/// Parses a number of seconds above 0.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = || "expected a number of seconds above 0, such as 60 or 0.5".to_string();
    let seconds: f64 = text.parse().map_err(|_| wrong())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles_and_seconds_are_what_they_say() {
        let console = |text: &str| console_target(text.as_ref());
        assert_eq!(console("stdio"), Ok(ConsoleTarget::Stdio));
        assert_eq!(console("off"), Ok(ConsoleTarget::Off));
        assert_eq!(console("file=a=b"), Ok(ConsoleTarget::File("a=b".into())));
        for wrong in ["", "file", "file=", "pty", "stdio=x"] {
            assert!(console(wrong).is_err(), "{wrong}");
        }
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0", "-1", "NaN", "inf", "", "1s", "1e400"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
