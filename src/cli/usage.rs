//! Wrong arguments, and what the user may have meant; help and version.
//!
//! Owns the answers that end a process before it does anything, and how they are printed. Help goes to
//! standard output; errors go to standard error with minivmm's prefix.

use std::collections::BTreeSet;
use std::io::{self, IsTerminal};
use std::path::Path;

use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::process::{print, report_outcome, say};
use super::{Args, ExitStatus};
use crate::disk_options;
use crate::text;

/// An answer that ends the process before any task: help, the version, or an error in the arguments.
#[derive(Debug)]
pub struct Answer(clap::Error);

impl Answer {
    /// Creates the answer, with what the user may have meant.
    pub fn new(error: clap::Error) -> Self {
        Self(improve(error))
    }

    /// Prints the answer, and returns the exit status.
    pub fn give(&self) -> ExitStatus {
        let text = self.0.render();
        let styled = |is_terminal: bool| match is_terminal && std::env::var_os("NO_COLOR").is_none() {
            true => text.ansi().to_string(),
            false => text.to_string(),
        };
        if self.0.use_stderr() {
            say(format_args!("minivmm: {}", styled(io::stderr().is_terminal()).trim_end()));
            return ExitStatus::Usage;
        }
        report_outcome(print(&styled(io::stdout().is_terminal())).map(|()| ExitStatus::Success))
    }
}

/// Adds what the user may have meant.
fn improve(error: clap::Error) -> clap::Error {
    let words: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned())
        .take_while(|word| word != "--")
        .collect();
    improve_for(error, &words)
}

fn improve_for(mut error: clap::Error, words: &[String]) -> clap::Error {
    // clap would take -hda for -h, a request for help.
    if let Some(advice) = qemu_advice(words) {
        return Args::command().error(ErrorKind::UnknownArgument, advice);
    }
    if error.kind() == ErrorKind::InvalidUtf8 {
        let before = std::env::args_os().take_while(|word| word != "--");
        let wrong = before.filter(|word| word.to_str().is_none());
        let wrong: Vec<_> = wrong.map(|word| format!("'{}'", word.to_string_lossy())).collect();
        let why = format!(
            "{} is not UTF-8: only paths and the words of a COMMAND may be other bytes",
            wrong.join(" or ")
        );
        return Args::command().error(ErrorKind::InvalidUtf8, why);
    }
    let place = match error.kind() {
        ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
        ErrorKind::UnknownArgument => ContextKind::InvalidArg,
        _ => return error,
    };
    let Some(ContextValue::String(word)) = error.get(place) else { return error };
    let before = words.iter().position(|it| it == word).and_then(|at| words.get(at.checked_sub(1)?));
    let own: Vec<String> = Args::command().get_subcommands().map(|it| it.get_name().to_owned()).collect();
    let tip = if let Some(hyphens) = with_hyphens(word) {
        format!("'{word}' begins with a dash, not a hyphen (some programs replace hyphens): type {hyphens}")
    } else if let Some(name) = word.strip_prefix("--") {
        if !disk_options::keys().any(|(key, _)| key == name) {
            return error;
        }
        format!("{name} is a key of --disk: --disk IMAGE,{name}=VALUE")
    } else if word.starts_with('-') {
        return error;
    } else if before.is_some_and(|before| before == "--stats") {
        format!("the file for the statistics follows an '=': use --stats={word}")
    } else if let Some(meant) = text::nearest(word, own.iter().map(String::as_str)) {
        format!(
            "did you mean '{meant}'? (to run a command in the guest, put it after --: minivmm [OPTIONS] -- {word})"
        )
    } else if Path::new(word).exists() {
        format!("to give the guest a disk: --disk {}", text::shell_word(word.replace(',', ",,")))
    } else {
        format!(
            "to run a command in the guest, put it after --: minivmm [OPTIONS] -- {word}; minivmm's own subcommands are {}",
            own.join(", ")
        )
    };
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    error
}

/// Returns the option whose hyphens a text program has turned into a dash: `–memory`, `—memory`, `–-memory`.
fn with_hyphens(word: &str) -> Option<String> {
    let is_dash = |letter: char| ('\u{2010}'..='\u{2015}').contains(&letter) || letter == '\u{2212}';
    let name = word.trim_start_matches(|letter| is_dash(letter) || letter == '-');
    let is_option =
        !name.is_empty() && word.chars().take_while(|letter| !name.starts_with(*letter)).any(is_dash);
    is_option.then(|| if name.chars().count() == 1 { format!("-{name}") } else { format!("--{name}") })
}

/// The options of QEMU, with what does the same in minivmm. `{}` is the value that follows.
const QEMU: [(&str, &str); 17] = [
    ("-m", "--memory {}"),
    ("-smp", "--cpus {}"),
    ("-kernel", "--kernel {}"),
    ("-initrd", "--initrd {}"),
    ("-append", "--append {} (or --cmdline, in place of the default)"),
    ("-drive", "--disk {}"),
    ("-hda", "--disk {}"),
    ("-hdb", "--disk {}, the second one"),
    ("-cdrom", "--disk {},readonly"),
    ("-blockdev", "--disk PATH,cache=MODE"),
    ("-device", "--disk PATH for a disk; there are no other devices to add"),
    ("-serial", "--console stdio|stderr|off|file=PATH"),
    ("-nographic", "nothing: the console is on this terminal, and Ctrl-A x ends the VM"),
    ("-enable-kvm", "nothing: KVM is always used"),
    ("-accel", "nothing: KVM is always used"),
    ("-cpu", "nothing: the guest has the host's CPU"),
    ("-machine", "nothing: there is one machine"),
];

fn qemu_advice(words: &[String]) -> Option<String> {
    let find = |word: &String| QEMU.iter().find(|(name, _)| name == word);
    let (at, (name, ours)) = words.iter().enumerate().find_map(|(at, word)| Some((at, find(word)?)))?;
    let value = words.get(at + 1).map_or("VALUE", String::as_str);
    let first = value.split(',').next().unwrap_or_default();
    let value = match *name {
        // QEMU counts in MiB.
        "-m" if first.bytes().all(|byte| byte.is_ascii_digit()) => format!("{first}M"),
        "-m" => first.trim_start_matches("size=").to_owned(),
        "-smp" => first.trim_start_matches("cpus=").to_owned(),
        "-drive" => drive(value),
        _ => value.to_owned(),
    };
    Some(format!("{name} is an option of QEMU; minivmm's is {}", ours.replace("{}", &value)))
}

/// Converts a -drive into a --disk: its file, and the keys that mean the same here.
fn drive(value: &str) -> String {
    let mut disk = "PATH".to_owned();
    let mut keys: Vec<String> = Vec::new();
    for (key, value) in value.split(',').filter_map(|part| part.split_once('=')) {
        match key {
            "file" => value.clone_into(&mut disk),
            _ => keys.extend(disk_options::from_qemu(key, value)),
        }
    }
    // QEMU has several keys for the cache; the first given here counts.
    let name = |key: &String| key.split('=').next().unwrap_or_default().to_owned();
    let mut given = BTreeSet::new();
    keys.retain(|key| given.insert(name(key)));
    std::iter::once(disk).chain(keys).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_with_another_dash_is_told_with_its_hyphens() {
        for (typed, meant) in [
            ("–memory", Some("--memory")),
            ("—memory", Some("--memory")),
            ("–-disk=a", Some("--disk=a")),
            ("−v", Some("-v")),
            ("--memory", None),
            ("a–b", None),
            ("–", None),
        ] {
            assert_eq!(with_hyphens(typed).as_deref(), meant, "{typed}");
        }
    }

    #[test]
    fn qemus_options_are_answered_in_minivmms_words() {
        for (typed, ours) in [
            ("-m 512", "--memory 512M"),
            ("-m 2G,slots=2", "--memory 2G"),
            ("-smp cpus=4,cores=2", "--cpus 4"),
            ("-drive file=a.img,if=virtio,cache=none,format=raw", "--disk a.img,cache=none"),
            (
                "-drive file=a.img,if=virtio,read-only=on,discard=unmap,aio=native,werror=stop",
                "--disk a.img,readonly,discard=on,engine=io_uring",
            ),
            ("-drive file=a.img,cache=none,cache.direct=on,cache.no-flush=off", "--disk a.img,cache=none"),
            ("-hda a.img", "--disk a.img"),
            ("-kernel bzImage", "--kernel bzImage"),
            ("-append root=/dev/vda", "--append root=/dev/vda"),
            ("-nographic", "Ctrl-A x"),
            ("-smp", "--cpus VALUE"),
        ] {
            let words: Vec<String> = typed.split(' ').map(str::to_owned).collect();
            let advice = qemu_advice(&words).unwrap();
            assert!(advice.contains(ours), "{typed}: {advice}");
        }
        assert_eq!(qemu_advice(&["-v".into(), "--memory".into(), "1G".into()]), None);
    }
}
