//! The sandbox by itself: threads of a child of this test enter as each role, and then do what they may not.
//! And the table of `docs/reference/sandbox-calls.md`, which is the code's. What a whole VM does in it is `tests/bare`'s.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::process::Output;

use minivmm::sandbox::roles::{Call, When};
use minivmm::sandbox::{self, Mode, Role, SandboxEntry, ground};
use minivmm_testkit::alone;
use minivmm_testkit::skips::skip;

/// Says to a child what it is to do: "MODE ROLE DEED".
const ASKED: &str = "MINIVMM_SANDBOX_TEST";

/// What a guest that has taken a thread over would like to do.
const DEEDS: [(&str, fn()); 12] = [
    ("openat", || _ = File::open("/etc/passwd")),
    ("execve", || _ = exec()),
    ("socket", || _ = TcpStream::connect("127.0.0.1:1")),
    ("ptrace", || call(libc::SYS_ptrace, [0; 3])),
    ("clone", || call(libc::SYS_clone, [17, 0, 0])),
    ("clone3", || call(libc::SYS_clone3, [0, 0, 0])),
    ("fork", || call(libc::SYS_fork, [0; 3])),
    ("vfork", || call(libc::SYS_vfork, [0; 3])),
    ("unlink", || call(libc::SYS_unlink, [c"/nowhere".as_ptr() as i64, 0, 0])),
    ("io_uring_setup", || call(libc::SYS_io_uring_setup, [1, 0, 0])),
    ("mprotect", || call(libc::SYS_mprotect, [0, 4096, i64::from(libc::PROT_EXEC)])),
    ("tgkill", || call(libc::SYS_tgkill, [1, 1, 0])),
];

fn exec() -> i32 {
    let arguments = [c"/bin/true".as_ptr(), std::ptr::null()];
    // SAFETY: a string and an array with their ends; if it succeeds this test's child is gone, which it fails for.
    unsafe { libc::execv(arguments[0], arguments.as_ptr()) }
}

fn call(number: i64, [a, b, c]: [i64; 3]) {
    // SAFETY: none of the calls above touches memory of this process.
    unsafe { libc::syscall(number, a, b, c) };
}

/// Not a test: what a child of the tests does. Without being asked it does nothing.
#[test]
fn child() {
    let Ok(asked) = std::env::var(ASKED) else { return };
    let words: Vec<&str> = asked.split(' ').collect();
    let role = Role::ALL.into_iter().find(|role| role.name() == words[1]).unwrap();
    if words[2] == "without-privileges" {
        // SAFETY: takes a number. Fails where this test is nobody special already.
        unsafe { libc::setuid(65534) };
    }
    if words[2] == "landlock" {
        let status = ground::leave(&[]);
        eprintln!(
            "left {}, open {:?}",
            status.is_ok(),
            File::open("/etc/passwd").map_err(|error| error.kind())
        );
        eprintln!("bind {:?}", TcpListener::bind("127.0.0.1:0").map(|_| ()).map_err(|error| error.kind()));
        std::process::exit(0);
    }
    sandbox::arm(Mode::by_name(words[0]).unwrap(), &Role::ALL, sandbox::VM_SPARE_DESCRIPTORS).unwrap();
    let entry = SandboxEntry::new(role);
    let deed = DEEDS.iter().find(|(name, _)| *name == words[2]).map(|(_, deed)| *deed);
    let thread = std::thread::spawn(move || {
        entry.enter();
        sandbox::wait_for_all();
        eprintln!("entered");
        if let Some(deed) = deed {
            deed();
            deed();
        }
        eprintln!("did it");
    });
    thread.join().unwrap();
    std::process::exit(0);
}

fn ask(mode: &str, role: Role, deed: &str) -> (i32, String) {
    let Output { status, stderr, .. } = alone::command(module_path!(), "child")
        .env(ASKED, format!("{mode} {} {deed}", role.name()))
        .output()
        .unwrap();
    (status.code().unwrap_or(-1), String::from_utf8_lossy(&stderr).into_owned())
}

#[test]
fn what_no_role_may_ends_the_process_and_is_named() {
    for role in Role::ALL {
        for (deed, _) in DEEDS {
            let (status, said) = ask("on", role, deed);
            let expected = format!("minivmm: a {} thread has called {deed} (", role.name());
            assert_eq!(status, 125, "{role:?} {deed}: {said}");
            assert!(said.contains("entered") && said.contains(&expected), "{role:?} {deed}: {said}");
            assert!(!said.contains("did it"), "{role:?} {deed}: {said}");
        }
    }
}

#[test]
fn what_a_role_has_no_row_for_is_another_roles() {
    // FLUSH is the workers' and the end's, and nobody else's.
    for role in Role::ALL {
        let may = role.calls().any(|call| call.number == libc::SYS_fdatasync);
        assert_eq!(may, matches!(role, Role::Worker | Role::End), "{role:?}");
    }
    // Nobody has what makes descriptors, threads or programs.
    for forbidden in [
        libc::SYS_open,
        libc::SYS_openat,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_execve,
        libc::SYS_execveat,
    ] {
        assert!(
            Role::ALL.iter().all(|role| role.calls().all(|call| call.number != forbidden)),
            "{forbidden}"
        );
    }
}

#[test]
fn log_names_a_forbidden_call_once_and_makes_it() {
    let (status, said) = ask("log", Role::Worker, "openat");
    assert_eq!(status, 0, "{said}");
    assert!(said.contains("did it"), "{said}");
    let told = "minivmm: a worker thread has called openat (257); with --sandbox=on that would end minivmm";
    assert_eq!(said.matches(told).count(), 1, "{said}");
}

#[test]
fn a_thread_that_keeps_to_its_row_goes_on_in_every_mode_also_without_privileges() {
    for (mode, _) in Mode::ALL {
        for role in Role::ALL {
            for deed in ["nothing", "without-privileges"] {
                let (status, said) = ask(mode, role, deed);
                assert!(status == 0 && said.contains("did it"), "{mode} {role:?} {deed}: {status} {said}");
                assert!(!said.contains("has called"), "{mode} {role:?} {deed}: {said}");
            }
        }
    }
}

#[test]
fn without_the_filter_landlock_opens_nothing_either() {
    if ground::version() == 0 {
        skip("landlock", "this kernel has no Landlock");
        return;
    }
    let (status, said) = ask("off", Role::Main, "landlock");
    assert_eq!(status, 0, "{said}");
    assert!(said.contains("left true, open Err(PermissionDenied)"), "{said}");
    if ground::version() >= 4 {
        assert!(said.contains("bind Err(PermissionDenied)"), "{said}");
    }
}

/// A row as docs/reference/sandbox-calls.md has it.
fn row(call: &Call) -> String {
    let names = |list: Vec<&str>| list.join(", ");
    let when = match call.when {
        When::Always => String::new(),
        When::Request(requests) => format!(": {}", names(requests.iter().map(|(name, _)| *name).collect())),
        When::Command(commands) => format!(": {}", names(commands.iter().map(|(name, _)| *name).collect())),
        When::NotExecutable => ": not PROT_EXEC".into(),
        When::ThisProcess => ": this process".into(),
    };
    format!("| `{}`{when} | {} |", call.name, call.reason)
}

#[test]
fn the_documentation_has_the_codes_table() {
    let mut expected = String::new();
    let mut table = |title: &str, calls: &[Call]| {
        expected += &format!("\n**{title}**\n\n| call | for |\n|---|---|\n");
        calls.iter().for_each(|call| expected += &(row(call) + "\n"));
    };
    table("every thread", Role::common());
    Role::ALL
        .into_iter()
        .filter(|role| !role.own().is_empty())
        .for_each(|role| table(role.name(), role.own()));
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reference/sandbox-calls.md"))
            .unwrap();
    assert!(text.contains(&expected), "docs/reference/sandbox-calls.md is to contain:\n{expected}");
}
