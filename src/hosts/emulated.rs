//! The emulated host: its script, and the command line that calls it.
//!
//! Owns where the script is searched for, and how a command line is rewritten. Only places beside this binary
//! are searched: a script in the working directory is not executed. docs/hosts.md describes the script's own
//! interface.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Asked;
use crate::text::shell_word;

/// The name of the script.
const SCRIPT: &str = "emuhost";
/// Memory in MiB of an emulated host with a small guest, and the memory that a larger guest leaves it.
const MEMORY_MIB: u64 = 3072;
const SPARE_MIB: u64 = 1024;
/// Subcommands that start guests.
const WITH_GUESTS: [&str; 2] = ["bench", "study"];

/// Which parts of the emulated host exist.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// Its script, and what the script boots.
    Built(PathBuf),
    /// Only its script.
    Script(PathBuf),
    /// Neither.
    Nothing,
}

/// Looks for the emulated host, as installed and in the tree in which this binary was built.
pub fn find() -> Found {
    let Ok(binary) = std::env::current_exe() else { return Found::Nothing };
    let Some(directory) = binary.parent() else { return Found::Nothing };
    let build = std::env::var_os("MINIVMM_GUEST_BUILD").map(PathBuf::from);
    find_in(&places(directory), build.as_deref())
}

/// Returns the places to search. The tree is two or three levels above target/release or
/// target/TRIPLE/release.
fn places(directory: &Path) -> Vec<PathBuf> {
    ["../share/minivmm", "../../guest-images", "../../../guest-images"]
        .iter()
        .filter_map(|place| directory.join(place).canonicalize().ok())
        .collect()
}

fn find_in(places: &[PathBuf], build: Option<&Path>) -> Found {
    let scripts: Vec<PathBuf> =
        places.iter().map(|place| place.join(SCRIPT)).filter(|path| path.is_file()).collect();
    let is_built = |script: &&PathBuf| {
        let beside = script.with_file_name("build");
        build.unwrap_or(&beside).join("host/manifest").is_file()
    };
    match (scripts.iter().find(is_built), scripts.first()) {
        (Some(script), _) => Found::Built(script.clone()),
        (None, Some(script)) => Found::Script(script.clone()),
        (None, None) => Found::Nothing,
    }
}

/// Returns the command that runs this command line by the script, without a time limit and with memory for
/// the guest.
pub fn command(script: &Path, typed: &[OsString], asked: &Asked<'_>) -> Command {
    let memory = MEMORY_MIB.max(asked.memory_mib.saturating_add(SPARE_MIB));
    let mut command = Command::new(script);
    command.args(["run", "--timeout", "0", "--memory", &memory.to_string()]);
    if let Ok(binary) = std::env::current_exe() {
        command.arg("--binary").arg(binary.with_file_name(crate::program::VMM));
    }
    // Inside, the run must not ask again: its KVM is what it is.
    command.args(["--", crate::program::VMM]).args(with_host(typed, "direct", &asked.more));
    command
}

/// Returns the command line as typed, quoted for a shell, with another `--host`.
pub fn typed_with_host(typed: &[OsString], choice: &str) -> String {
    let program = typed.first().map_or_else(|| OsString::from(crate::program::VMM), Clone::clone);
    // minivmm has handed over to its tools, but users know only one program.
    let path = Path::new(&program);
    let is_tools = path.file_name().is_some_and(|name| name == crate::program::TOOLS);
    let program = if is_tools { path.with_file_name(crate::program::VMM).into_os_string() } else { program };
    let words = std::iter::once(program).chain(with_host(typed, choice, &[]));
    words.map(shell_word).collect::<Vec<_>>().join(" ")
}

/// Returns the arguments without the program, with this `--host` in place of any other, and with `more`.
fn with_host(typed: &[OsString], choice: &str, more: &[OsString]) -> Vec<OsString> {
    let mut left = typed.iter().skip(1).peekable();
    let mut words = Vec::new();
    if let Some(tool) = left.next_if(|word| WITH_GUESTS.iter().any(|name| **word == **name)) {
        words.push(tool.clone());
    }
    words.push(OsString::from(format!("--host={choice}")));
    words.extend(more.iter().cloned());
    while let Some(word) = left.next() {
        if word == "--" {
            // The rest is the guest's command.
            words.push(word.clone());
            words.extend(left.cloned());
            break;
        }
        if word == "--host" {
            left.next();
        } else if !word.as_bytes().starts_with(b"--host=") {
            words.push(word.clone());
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::HostChoice;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(Into::into).collect()
    }

    #[test]
    fn a_line_has_one_host_before_the_guests_command_and_behind_a_tool() {
        for (typed, expected) in [
            ("minivmm --disk a", "minivmm --host=auto --disk a"),
            ("minivmm --disk a --host direct -v", "minivmm --host=auto --disk a -v"),
            ("./minivmm --host=emulated -- ls --host=x", "./minivmm --host=auto -- ls --host=x"),
            ("minivmm study --quick", "minivmm study --host=auto --quick"),
            ("minivmm bench --host=direct --disk b", "minivmm bench --host=auto --disk b"),
            ("minivmm", "minivmm --host=auto"),
            ("/a/minivmm-tools study", "/a/minivmm study --host=auto"),
        ] {
            assert_eq!(typed_with_host(&words(typed), "auto"), expected, "{typed}");
        }
    }

    #[test]
    fn the_script_gets_no_limit_memory_for_the_guest_and_the_rest_of_the_line() {
        let asked = |memory_mib| Asked {
            choice: HostChoice::Auto,
            kernel: None,
            memory_mib,
            more: words("--kernel k"),
        };
        let line = |memory| {
            let command =
                command(Path::new("/s/emuhost"), &words("minivmm --host=auto --disk a"), &asked(memory));
            command.get_args().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        assert!(line(512).starts_with("run --timeout 0 --memory 3072 --binary /"), "{}", line(512));
        assert!(line(512).ends_with("-- minivmm --host=direct --kernel k --disk a"), "{}", line(512));
        assert!(line(8192).contains("--memory 9216"), "{}", line(8192));
    }

    #[test]
    fn one_that_is_built_goes_before_one_that_is_not() {
        let root = tempfile::tempdir().unwrap();
        let places: Vec<PathBuf> = ["a", "b", "c"].iter().map(|name| root.path().join(name)).collect();
        assert_eq!(find_in(&places, None), Found::Nothing);
        for place in &places[1..] {
            std::fs::create_dir_all(place).unwrap();
            std::fs::write(place.join(SCRIPT), "").unwrap();
        }
        assert_eq!(find_in(&places, None), Found::Script(places[1].join(SCRIPT)));
        std::fs::create_dir_all(places[2].join("build/host")).unwrap();
        std::fs::write(places[2].join("build/host/manifest"), "").unwrap();
        assert_eq!(find_in(&places, None), Found::Built(places[2].join(SCRIPT)));
        assert_eq!(find_in(&places, Some(root.path())), Found::Script(places[1].join(SCRIPT)));
    }
}
