//! The sandbox of a whole VM: what each thread has given up, and that no thread calls what its row lacks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use minivmm::sandbox::Role;
use minivmm_testkit::dontcache;
use minivmm_testkit::machine::*;

use crate::given::listed;
use crate::stats::Echo;

/// A thread of the VM by its name.
fn role(name: &str) -> Role {
    match name {
        "minivmm" => Role::Main,
        "console" => Role::Console,
        "observe" => Role::Observe,
        "end" => Role::End,
        "fault-delays" => Role::Delays,
        name if name.starts_with("vcpu") => Role::Vcpu,
        _ => Role::Worker,
    }
}

/// The value of a line of /proc/PID/task/TID/status.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {status}")).trim()
}

#[test]
fn every_thread_of_a_running_machine_has_given_up_what_it_does_not_need() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    let csv = image.path.with_extension("csv");
    let disk = image.disk("cache=none,queues=2,fault=delay=1ms:flush");
    for (mode, filtered, privileged) in [("on", "2", false), ("log", "2", true), ("off", "0", true)] {
        let mut guest =
            Echo::start(&["--sandbox", mode, "--disk", &disk, "--observe", &csv.display().to_string()]);
        guest.answers();
        let mut roles = BTreeSet::new();
        for task in fs::read_dir(format!("/proc/{}/task", guest.id())).unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let name = field(&status, "Name");
            roles.insert(role(name).name());
            assert_eq!(field(&status, "Seccomp"), filtered, "{mode} {name}");
            assert_eq!(field(&status, "NoNewPrivs"), if mode == "off" { "0" } else { "1" }, "{mode} {name}");
            let none = "0000000000000000";
            if !privileged {
                for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
                    assert_eq!(field(&status, set), none, "{mode} {name} {set}");
                }
            }
        }
        let expected = ["console", "end", "fault-delays", "main", "observe", "vcpu", "worker"];
        assert_eq!(roles.into_iter().collect::<Vec<_>>(), expected, "{mode}");
        if mode == "on" {
            let limits = |process: &str| fs::read_to_string(format!("/proc/{process}/limits")).unwrap();
            let soft = |limits: &str, name: &str| {
                let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
                line[name.len()..].split_whitespace().next().unwrap().to_owned()
            };
            let (ours, theirs) = (limits("self"), limits(&guest.id().to_string()));
            assert_eq!(soft(&theirs, "Max core file size"), "0", "{theirs}");
            // An ordinary user's limit also counts the threads that the kernel makes for io_uring and KVM.
            for untouched in ["Max processes", "Max locked memory", "Max address space", "Max file size"] {
                assert_eq!(soft(&theirs, untouched), soft(&ours, untouched), "{untouched}");
            }
            let highest = fs::read_dir("/proc/self/fd").unwrap().count() as u64;
            assert!(soft(&theirs, "Max open files").parse::<u64>().unwrap() < 512 + highest, "{theirs}");
        }
        let said = guest.end();
        assert!(!said.contains("has called"), "{mode}: {said}");
    }
}

/// Per thread's name: the calls after it has entered.
fn calls_in_the_sandbox(log: &str) -> BTreeMap<String, BTreeSet<String>> {
    let (mut names, mut entered, mut found) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
    for line in log.lines() {
        let Some((thread, what)) = line.split_once(' ') else { continue };
        let what = what.trim_start();
        if let Some(name) = what.strip_prefix("prctl(PR_SET_NAME, \"") {
            names.insert(thread.to_owned(), name.split('"').next().unwrap().to_owned());
        }
        let Some((call, _)) = what.split_once('(') else { continue };
        let is_name = call.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !is_name || what.starts_with("<...") {
            continue;
        }
        let name = names.get(thread).map_or("minivmm", String::as_str);
        if entered.contains(thread) {
            found.entry(name.to_owned()).or_insert_with(BTreeSet::new).insert(call.to_owned());
        }
        if call == "seccomp" || what.starts_with("prctl(PR_SET_SECCOMP") {
            entered.insert(thread.to_owned());
        }
    }
    found
}

/// strace over minivmm, and where it writes.
fn strace(image: &Image) -> Option<(Command, PathBuf)> {
    if Command::new("strace").arg("-V").output().is_err() {
        skip("strace", "strace is not installed");
        return None;
    }
    let log = image.path.with_extension("strace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o"]).arg(&log).arg(binary()).args(visible());
    Some((strace, log))
}

/// Each thread's calls against its row; `needed` must be among the threads.
#[track_caller]
fn must_be_in_the_table(log: &Path, needed: &[&str], what: &str) {
    let found = calls_in_the_sandbox(&fs::read_to_string(log).unwrap());
    for needed in needed {
        assert!(found.contains_key(*needed), "{what}: {needed} is not among {:?}", found.keys());
    }
    for (name, calls) in found {
        for call in &calls {
            // Older than cachestat(2), strace has its number.
            let call = if call == "syscall_0x1c3" { "cachestat" } else { call };
            let known = role(&name).calls().any(|row| row.name == call);
            assert!(known, "{what}: {name} has called {call}");
        }
        println!("{what}: {name}: {calls:?}");
    }
}

#[test]
fn under_strace_no_thread_calls_what_its_row_lacks() {
    if !kvm() {
        return;
    }
    for keys in [
        "cache=none,engine=io_uring",
        "cache=writeback,engine=sync",
        "cache=directsync,engine=sync",
        "cache=directsync,engine=io_uring,stable=group",
        "cache=writethrough",
        "cache=unsafe,discard=on",
        "cache=none,engine=io_uring,buffers=fixed,poll-us=0",
        "cache=none,fault=delay=1ms:flush",
        "cache=dontcache,engine=sync",
        "cache=dontcache,engine=io_uring",
    ] {
        if keys.contains("buffers=fixed") && !may_lock(512) {
            continue;
        }
        if keys.contains("dontcache") && !dontcache::is_here() {
            continue;
        }
        let image = Image::new();
        let Some((mut strace, log)) = strace(&image) else { return };
        let (csv, json) = (image.path.with_extension("csv"), image.path.with_extension("json"));
        start(&mut strace, Entry::Elf, "scenario=io").args(["--console", "stdio", "--timeout", "60"]);
        strace.args(["--disk", &image.disk(keys), "--observe"]).arg(&csv);
        strace.arg(format!("--stats={}", json.display()));
        run(&mut strace, b"").expect(exit(0x20), keys);
        must_be_in_the_table(&log, &["minivmm", "vcpu0", "end", "observe"], keys);
    }
}

#[test]
fn a_write_log_is_written_and_ended_in_the_sandbox() {
    if !kvm() {
        return;
    }
    for engine in ["io_uring", "sync"] {
        let image = Image::new();
        let writes = image.path.with_extension("writes");
        let disk = image.disk(&format!("cache=none,engine={engine},log-writes={}", writes.display()));
        let ran = run_plain(Entry::Elf, "scenario=io", &["--disk", &disk]).expect(exit(0x20), engine);
        assert!(!ran.log.contains("has called"), "{}", ran.log);
        let told = listed(&writes);
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        assert!(told.contains("write") && told.contains("flush"), "{engine}: {told}");

        let image = Image::new();
        let writes = image.path.with_extension("writes");
        let disk = image.disk(&format!("cache=none,engine={engine},log-writes={}", writes.display()));
        let Some((mut strace, log)) = strace(&image) else { return };
        start(&mut strace, Entry::Elf, "scenario=io").args(["--timeout", "60", "--disk", &disk]);
        run(&mut strace, b"").expect(exit(0x20), engine);
        must_be_in_the_table(&log, &["minivmm", "vcpu0", "end"], engine);
    }
}

#[test]
fn however_a_run_ends_no_thread_calls_what_its_row_lacks() {
    if !kvm() {
        return;
    }
    for (scenario, timeout, status) in [
        ("hang", "1", TIMED_OUT),
        ("triple", "60", FAILURE),
        ("exit=7", "60", exit(7)),
        ("chatter", "1", TIMED_OUT),
    ] {
        for transport in ["mmio", "pci"] {
            let image = Image::new();
            let what = format!("{scenario} {transport}");
            let Some((mut strace, log)) = strace(&image) else { return };
            strace.arg("--kernel").arg(Entry::Elf.kernel()).args(["--initrd", "none"]);
            strace.args(["--transport", transport, "--cmdline", &format!("scenario={scenario}")]);
            strace.args(["--console", "off", "--stats", "--timeout", timeout]);
            strace.args(["--disk", &image.disk("cache=none,queues=2")]);
            let ran = run(&mut strace, b"").expect(status, &what);
            assert!(!ran.log.contains("has called"), "{what}: {}", ran.log);
            must_be_in_the_table(&log, &["minivmm", "end"], &what);
        }
    }
}
