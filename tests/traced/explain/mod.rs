//! `--explain --json` keeps its word: the host's system calls that strace sees from outside are those
//! that were told beforehand, for every mode, every driver there can be, and before and after a reset.
//!
//! Owns the reading of strace's log, cut by what the bare-metal guest says on its console. Needs
//! /dev/kvm (also one that cannot run Linux) and strace; without them it says that it is skipped.
//! QEMU with the same guest stands beside it where it is installed.

mod log;
mod qemu;
mod ring;

use std::process::Command;

use log::{Log, stages};
use minivmm_testkit::dontcache;
use minivmm_testkit::machine::*;
use serde_json::Value;

/// The modes that can be had here.
fn modes() -> Vec<&'static str> {
    let all = ["none", "writeback", "writethrough", "directsync", "unsafe", "dontcache"];
    dontcache::those_here(&all, |mode| *mode == "dontcache")
}

/// What `--explain --json` says of one disk.
fn explain(disk: &str) -> Value {
    let output = minivmm().args(["--explain", "--json", "--disk", disk]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let disks: Value = serde_json::from_slice(&output.stdout).unwrap();
    disks[0].clone()
}

fn calls(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|call| if_alone(call.as_str().unwrap()).to_owned()).collect()
}

/// What a call that blocks is where it is alone, as it is in all that this guest does: one request at a time.
fn if_alone(told: &str) -> &str {
    match told.split_once(" if alone, else ") {
        Some((alone, _)) if !alone.contains(", else ") => alone,
        _ => told,
    }
}

/// The words that make the guest this driver.
fn words(driver: &Value) -> String {
    let mut words = String::from("discard zeroes twice");
    for (key, word) in [("negotiates_flush", " noflush"), ("negotiates_config_wce", " nowce")] {
        words += if driver[key].as_bool().unwrap() { "" } else { word };
    }
    if let Some(value) = driver["sets_writeback"].as_u64() {
        words += &format!(" wb={value}");
    }
    words
}

/// Whether the byte reads back what the driver sets; the guest gives up where it does not.
fn takes(driver: &Value) -> bool {
    driver["sets_writeback"].is_null() || driver["sets_writeback"] == driver["writeback"]
}

fn can_run() -> bool {
    let strace = Command::new("strace").arg("-V").output().is_ok();
    if !strace {
        skip("strace", "strace is not installed, system calls are not seen");
    }
    strace && kvm()
}

fn trace(image: &Image, disk: &str, words: &str, status: i32) -> Log {
    let path = image.path.with_extension("strace");
    let mut command = log::strace(&path);
    command.arg(binary());
    start(&mut command, Entry::Elf, &format!("scenario=io {words}"));
    command.arg("--console").arg(format!("file={}", log::console(&image.path).display()));
    command.args(["--timeout", "100", "--disk", disk]);
    run(&mut command, b"").expect(exit(status), &format!("{disk} {words}"));
    Log::read(&path, &image.path)
}

/// The driver that this one is after a reset: the byte is back, and nobody has set it.
fn after_reset<'a>(drivers: &'a [Value], driver: &Value) -> &'a Value {
    let same = |key: &str, other: &Value| other[key] == driver[key];
    drivers
        .iter()
        .find(|other| {
            same("negotiates_flush", other)
                && same("negotiates_config_wce", other)
                && other["sets_writeback"].is_null()
        })
        .unwrap()
}

/// What is to be seen of this driver's guest, from the start to the end.
fn expected(told: &Value, driver: &Value) -> Vec<(&'static str, Vec<String>)> {
    let mut expected = vec![("start", calls(&told["calls"]["start"]))];
    if takes(driver) {
        let drivers = told["calls"]["drivers"].as_array().unwrap();
        expected.extend(stages(driver));
        expected.extend(stages(after_reset(drivers, driver)));
    } else {
        // It reads its own write back before it does anything, finds another, and gives up.
        expected.push(("FAILED", calls(&driver["on_setting"])));
    }
    expected.push(("end", calls(&told["calls"]["end"])));
    expected
}

#[test]
fn the_host_is_asked_for_exactly_what_was_told_beforehand() {
    if !can_run() {
        return;
    }
    for mode in modes() {
        let image = Image::new();
        let disk = image.disk(&format!("cache={mode},engine=sync"));
        let told = explain(&disk);
        let drivers = told["calls"]["drivers"].as_array().unwrap();
        assert_eq!(drivers.len(), 8);
        for driver in drivers {
            let words = words(driver);
            let what = format!("cache={mode} {words}");
            let log = trace(&image, &disk, &words, if takes(driver) { 0x20 } else { 0x25 });
            assert_eq!(log.opened.as_deref(), told["open_flags"].as_str(), "{what}");
            let expected = expected(&told, driver);
            assert_eq!(log.cut(&expected, &what), expected, "{what}");
        }
        let after = std::fs::read(&image.path).unwrap();
        assert!(
            after[64 * 512..80 * 512].iter().all(|byte| *byte == 0),
            "{mode}: erased ranges are not zero"
        );
    }
}

#[test]
fn a_readonly_disk_is_told_and_served_without_a_sync() {
    if !can_run() {
        return;
    }
    for mode in modes() {
        let image = Image::new();
        let disk = image.disk(&format!("cache={mode},readonly,engine=sync"));
        let told = explain(&disk);
        for driver in told["calls"]["drivers"].as_array().unwrap() {
            assert_eq!(driver["write"]["status"], "IOERR");
            assert!(calls(&driver["write"]["calls"]).is_empty());
        }
        let log = trace(&image, &disk, "", 0x18);
        assert_eq!(log.opened.as_deref(), told["open_flags"].as_str());
        let expected = [("start", calls(&told["calls"]["start"])), ("end", calls(&told["calls"]["end"]))];
        assert_eq!(log.cut(&expected, mode), expected);
        // Only dontcache has a call, which tries its flag.
        let tries: &[&str] = if mode == "dontcache" { &["preadv2(RWF_DONTCACHE)"] } else { &[] };
        assert_eq!(log.calls(), tries, "{mode}");
    }
}

#[test]
fn explaining_opens_for_reading_only_and_neither_writes_syncs_nor_locks() {
    if !can_run() {
        return;
    }
    for mode in modes() {
        let image = Image::new();
        let path = image.path.with_extension("strace");
        let mut command = Command::new("strace");
        command.args(["-f", "-y", "-o"]).arg(&path).arg(binary()).args(["--explain", "--disk"]);
        assert!(
            command.arg(image.disk(&format!("cache={mode},engine=sync"))).output().unwrap().status.success()
        );
        let text = std::fs::read_to_string(&path).unwrap();
        let image_name = image.path.to_str().unwrap();
        let directories = [image.path.parent().unwrap(), &std::env::current_dir().unwrap()]
            .map(|directory| directory.display().to_string());
        let touching: Vec<_> = text.lines().filter(|line| line.contains(image_name)).collect();
        assert!(touching.iter().any(|line| line.contains("openat")), "{text}");
        for line in touching {
            // A name may have any word in it.
            let line = directories.iter().fold(line.to_owned(), |line, name| line.replace(name, ""));
            for word in
                ["O_RDWR", "O_WRONLY", "O_EXCL", "write", "sync", "fallocate", "SETLK", "utime", "kvm"]
            {
                assert!(!line.contains(word) || line.contains("execve"), "{word}: {line}");
            }
        }
        assert!(!text.contains("/dev/kvm"), "explaining starts no VM");
        image.must_hold(&Image::before(), mode);
    }
}

#[test]
fn what_would_keep_a_guest_from_starting_keeps_it_from_being_explained() {
    let image = Image::new();
    let directory = image.path.parent().unwrap().display().to_string();
    for (disk, word) in [
        (format!("{directory}/missing"), "does not exist"),
        (directory.clone(), "directory"),
        (image.disk("cache=none,block-size=512,serial=x,format=raw,colour=red"), "colour"),
    ] {
        let output = minivmm().args(["--explain", "--disk", &disk]).output().unwrap();
        assert!(!output.status.success(), "{disk}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(word), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
    }
}

#[test]
fn tmpfs_is_seen_through() {
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        skip("tmpfs", "there is no /dev/shm");
        return;
    };
    let path = directory.path().join("a.img");
    std::fs::write(&path, vec![0; 8192]).unwrap();
    let told = explain(&format!("{},cache=writeback", path.display()));
    assert_eq!(told["place"]["file_system"], "tmpfs");
    assert_eq!(told["flush_reaches_disk"]["answer"], "no");
}

/// What a script in a mount namespace of its own prints; `None` where that needs rights we have not.
fn in_namespace(script: &str, directory: &std::path::Path) -> Option<Vec<Value>> {
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-ec", script, "sh"]).arg(binary()).current_dir(directory);
    let output = command.output().ok()?;
    if !output.status.success() {
        skip("root", &format!("no right to mount here: {}", String::from_utf8_lossy(&output.stderr)));
        return None;
    }
    let answers = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
    Some(answers.map(|answer| answer.unwrap()[0].clone()).collect())
}

#[test]
fn mounts_that_break_a_promise_are_seen_and_a_loop_device_is_taken_apart() {
    let directory = scratch();
    let overlay = "mkdir l u w m; truncate -s 1M l/a.img
        mount -t overlay -o lowerdir=l,upperdir=u,workdir=w,volatile overlay m
        $1 --explain --json --disk m/a.img; test -z \"$(ls u)\"";
    if let Some(told) = in_namespace(overlay, directory.path()) {
        assert_eq!(told[0]["flush_reaches_disk"]["answer"], "no", "{}", told[0]);
        assert!(told[0]["place"]["notes"].to_string().contains("volatile"), "{}", told[0]);
    }
    let ext4 = "truncate -s 16M fs.img; mkfs.ext4 -q fs.img; mkdir -p e
        loop=$(losetup -f --show fs.img); trap 'umount e; losetup -d $loop' EXIT
        mount -o nobarrier $loop e; truncate -s 1M e/a.img
        $1 --explain --json --disk e/a.img; $1 --explain --json --disk $loop,cache=none || test $? = 125";
    if let Some(told) = in_namespace(ext4, directory.path()) {
        let [file, device] = told.as_slice() else { panic!("{told:?}") };
        assert_eq!(file["flush_reaches_disk"]["answer"], "no", "{file}");
        assert!(file["host_disks"][0]["name"].as_str().unwrap().starts_with("loop"), "{file}");
        assert_eq!(
            (&device["kind"], &device["open_flags"]),
            (&"block device".into(), &"O_RDWR|O_EXCL|O_DIRECT".into())
        );
        assert!(device["refusals"].to_string().contains("is mounted on"), "{device}");
        assert!(!device["warnings"].to_string().contains("tmpfs"), "the node's own place says nothing");
    }
}
