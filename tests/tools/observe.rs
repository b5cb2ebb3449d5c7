//! What is told of the host's cache against an outside view (util-linux's fincore), `host-cache=`, and the
//! file of `--observe`: its columns against its documentation, and `minivmm top` of it.
//!
//! What the guest says of itself is in tests/guests/observe_guest.rs; a guest without a kernel in tests/bare.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use minivmm::disk::Image;
use minivmm::disk_options;
use minivmm::observe::cache::{ResidencySource, Watched};
use minivmm::observe::control::HostCache;
use minivmm::observe::control::{self, drop_cache, warm_cache};
use minivmm::observe::follow;
use minivmm::observe::limit::{LimitError, MemoryLimit};
use minivmm::observe::{Residency, csv};
use minivmm_testkit::alone;
use minivmm_testkit::pty;
use minivmm_testkit::skips::skip;
use minivmm_testkit::tools;
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// A directory on a file system with a page cache of its own that can be dropped.
fn scratch() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

/// A file whose content lies on the disk, and none of it in the cache.
fn cold_file(directory: &TempDir, bytes: usize) -> (PathBuf, File) {
    let path = directory.path().join("disk.img");
    fs::write(&path, content(bytes)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    drop_cache(&file).unwrap();
    (path, file)
}

/// Bytes in the cache as fincore says, which asks mincore(2) or cachestat(2) itself; `None` without it.
fn fincore(path: &Path) -> Option<u64> {
    let found =
        Command::new("fincore").args(["--bytes", "--noheadings", "--output", "RES"]).arg(path).output();
    let found = found.ok().filter(|output| output.status.success())?;
    String::from_utf8(found.stdout).unwrap().trim().parse().ok()
}

#[track_caller]
fn must_agree(path: &Path, file: &File, what: &str) -> Residency {
    let ours = Residency::of(file).unwrap();
    match fincore(path) {
        Some(theirs) => assert_eq!(ours.cached_bytes(), theirs, "{what}"),
        None => println!("fincore is not installed: {what} is compared with nothing"),
    }
    ours
}

#[test]
fn the_cache_holds_what_was_read_and_what_is_dirty_as_fincore_says() {
    let directory = scratch();
    let (path, file) = cold_file(&directory, 8 * MIB + 100);
    assert_eq!(must_agree(&path, &file, "dropped").cached, 0);

    // No read-ahead, so that half is half.
    // SAFETY: posix_fadvise takes numbers and touches no memory.
    assert_eq!(unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) }, 0);
    let mut half = vec![0; 4 * MIB];
    file.read_exact_at(&mut half, 0).unwrap();
    assert!(half == content(4 * MIB));
    let read = must_agree(&path, &file, "half read");
    assert_eq!(read.cached_bytes(), 4 * MIB as u64);

    file.write_all_at(&vec![7; MIB], 4 * MIB as u64).unwrap();
    let written = must_agree(&path, &file, "written behind it");
    assert_eq!(written.cached_bytes(), 5 * MIB as u64);
    if written.source == ResidencySource::Cachestat {
        assert_eq!(read.dirty, Some(0));
        // The kernel may have begun to write them back already.
        let moving = written.dirty.unwrap() + written.writeback.unwrap();
        assert!(moving <= 256, "{written:?}");
        // T9: dirty pages are not let go. Those that are not may be.
        // SAFETY: as above.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        let advised = Residency::of(&file).unwrap();
        assert!(advised.cached <= 256, "what was clean is gone: {advised:?}");
    }
    file.sync_data().unwrap();
    let synced = Residency::of(&file).unwrap();
    assert!(synced.dirty.is_none_or(|pages| pages == 0) && synced.writeback.is_none_or(|pages| pages == 0));

    let watched = Watched::new(&file);
    file.read_exact_at(&mut half, 0).unwrap();
    let page = synced.page_bytes;
    assert_eq!(watched.measure_range(0, 3 * page).unwrap().cached, 3);
    assert_eq!(watched.measure_range(6 * MIB as u64, MIB as u64).unwrap().cached, 0);
}

#[test]
fn dropping_writes_first_and_warming_brings_all_of_it() {
    let directory = scratch();
    let (path, file) = cold_file(&directory, 3 * MIB + 1);
    let mut expected = content(3 * MIB + 1);
    expected.splice(MIB..2 * MIB, vec![9; MIB]);
    file.write_all_at(&vec![9; MIB], MIB as u64).unwrap();
    drop_cache(&file).unwrap();
    assert_eq!(must_agree(&path, &file, "dropped when dirty").cached, 0);
    // It comes from the disk now, so it was there.
    assert!(fs::read(&path).unwrap() == expected, "what was dirty is lost");

    drop_cache(&file).unwrap();
    warm_cache(&file).unwrap();
    let warm = must_agree(&path, &file, "warmed");
    assert_eq!(warm.cached_bytes(), (3 * MIB as u64 + 1).next_multiple_of(warm.page_bytes));
}

#[test]
fn pages_that_another_holds_are_an_error_that_says_so() {
    let directory = scratch();
    let (_, file) = cold_file(&directory, MIB);
    // SAFETY: a new mapping of an open file, at a place of the kernel's choice.
    let at = unsafe {
        libc::mmap(std::ptr::null_mut(), MIB, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    assert_ne!(at, libc::MAP_FAILED);
    // SAFETY: the first byte of the mapping, which is a file of this length.
    let first = unsafe { at.cast::<u8>().read_volatile() };
    assert_eq!(first, 0);
    let error = drop_cache(&file).unwrap_err().to_string();
    assert!(error.contains("maps the file"), "{error}");
    // SAFETY: the mapping made above, which nobody uses any more.
    unsafe { libc::munmap(at, MIB) };
    drop_cache(&file).unwrap();
}

#[test]
fn a_disk_starts_with_the_cache_that_its_key_wishes_in_every_mode() {
    let directory = scratch();
    let (path, file) = cold_file(&directory, 2 * MIB);
    let modes = ["none", "writethrough", "writeback", "directsync", "unsafe", "dontcache"];
    for mode in minivmm_testkit::dontcache::those_here(&modes, |mode| *mode == "dontcache") {
        for (wish, bytes) in [("warm", 2 * MIB as u64), ("drop", 0), ("warm", 2 * MIB as u64)] {
            let text = format!("{},cache={mode},host-cache={wish}", path.display());
            let options = disk_options::parse(&text).unwrap();
            let image = Image::open(&options.config).unwrap();
            control::apply(options.host_cache, &image).unwrap();
            assert_eq!(must_agree(&path, &file, &text).cached_bytes(), bytes, "{text}");
            // Nothing happens to what is kept.
            control::apply(HostCache::Keep, &image).unwrap();
            assert_eq!(Residency::of(&file).unwrap().cached_bytes(), bytes, "{text}");
        }
    }
    assert!(fs::read(&path).unwrap() == content(2 * MIB));
}

#[test]
fn on_tmpfs_there_is_nothing_to_drop_and_the_error_tells_why() {
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        skip("tmpfs", "no /dev/shm");
        return;
    };
    let path = directory.path().join("disk.img");
    fs::write(&path, content(MIB)).unwrap();
    let text = format!("{},cache=writeback,host-cache=drop", path.display());
    let options = disk_options::parse(text).unwrap();
    let image = Image::open(&options.config).unwrap();
    if !image.file().is_on_tmpfs() {
        skip("tmpfs", "/dev/shm is no tmpfs");
        return;
    }
    let error = control::apply(options.host_cache, &image).unwrap_err();
    let reason = std::error::Error::source(&error).unwrap().to_string();
    assert!(error.to_string().contains("host-cache=drop") && reason.contains("tmpfs"), "{error}: {reason}");
    assert_eq!(fs::read(&path).unwrap().len(), MIB);
}

/// Below an overlay the pages are the upper file's. Needs root and a kernel with overlayfs.
#[test]
fn on_an_overlay_the_upper_file_is_looked_at() {
    let directory = scratch();
    let at = |name: &str| directory.path().join(name);
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir(at(name)).unwrap();
    }
    fs::write(at("lower/disk.img"), content(MIB)).unwrap();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        at("lower").display(),
        at("upper").display(),
        at("work").display()
    );
    let mounted =
        Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(at("merged")).status();
    if !mounted.is_ok_and(|status| status.success()) {
        skip("root", "overlayfs cannot be mounted here");
        return;
    }
    let outcome = std::panic::catch_unwind(|| {
        let path = at("merged/disk.img");
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        drop_cache(&file).unwrap();
        assert_eq!(Residency::of(&file).unwrap().cached, 0);
        warm_cache(&file).unwrap();
        let upper = File::open(at("upper/disk.img")).unwrap();
        let found = Residency::of(&file).unwrap();
        assert_eq!(found.cached_bytes(), MIB as u64);
        assert_eq!(found, Residency::of(&upper).unwrap());
        drop_cache(&file).unwrap();
        assert_eq!(Residency::of(&upper).unwrap().cached, 0);
    });
    assert!(Command::new("umount").arg(at("merged")).status().unwrap().success());
    outcome.unwrap();
}

#[test]
fn every_column_is_documented_and_every_documented_column_is_there() {
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/observe-csv.md"))
            .unwrap();
    let table = text.split("## The columns").nth(1).unwrap().split("\n## ").next().unwrap();
    let documented: Vec<String> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('|'))
        .flat_map(|(names, _)| {
            names.split(',').map(|name| name.trim().trim_matches('`').to_owned()).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(documented, csv::columns().collect::<Vec<_>>());
}

#[test]
fn a_memory_limit_holds_or_tells_why_it_cannot() {
    // In a process of its own: a limit is on all threads of this one.
    let mut run = alone::command(module_path!(), "limited");
    let output = run.env("MINIVMM_TEST_LIMIT", "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    println!("{text}");
}

/// The limited process of the test before it; nothing else.
#[test]
fn limited() {
    if std::env::var_os("MINIVMM_TEST_LIMIT").is_none() {
        return;
    }
    let bytes = 64 * MIB as u64;
    match MemoryLimit::of_this_process(bytes) {
        Ok(limit) => {
            let group = limit.group().to_owned();
            let read = |file: &str| fs::read_to_string(group.join(file)).unwrap();
            assert_eq!(read("memory.max").trim(), bytes.to_string());
            assert!(read("cgroup.procs").lines().any(|pid| pid == std::process::id().to_string()));
            // The page cache that a limited process brings in is limited too.
            let directory = scratch();
            let mut file = File::create(directory.path().join("large")).unwrap();
            for _ in 0..128 {
                file.write_all(&vec![1; MIB]).unwrap();
            }
            file.sync_data().unwrap();
            assert!(Residency::of(&file).unwrap().cached_bytes() < bytes);
            drop(limit);
            assert!(!group.exists(), "the cgroup is gone");
        }
        Err(error) => {
            let text = error.to_string();
            println!("no limit here: {text}");
            assert!(matches!(error, LimitError::NoController) == text.contains("no cgroup v2"));
        }
    }
}

/// The lines of an observation that ended.
const OBSERVATION: &str =
    "time_s,disk,cache,host_cached_bytes,reads\n0.0,vda,none,0,0\n0.5,vda,none,4096,50\n";

#[test]
fn top_prints_lines_where_there_is_no_terminal_and_ends_with_the_observation() {
    let directory = scratch();
    let path = directory.path().join("a.csv");
    let mut writer = File::create(&path).unwrap();
    assert!(follow::lock_as_writer(&writer).unwrap());
    writer.write_all(OBSERVATION.as_bytes()).unwrap();
    let top = Command::new(tools::minivmm()).arg("top").arg(&path).stdout(Stdio::piped()).spawn();
    let mut top = top.unwrap();
    let mut lines = BufReader::new(top.stdout.take().unwrap()).lines();
    let mut next = || lines.next().map(Result::unwrap);
    assert!(next().unwrap().contains("vda none: host 0B"));
    assert!(next().unwrap().contains("host 4.0K (dirty -, writeback -), guest -"));
    // It follows: the rest comes when it is written.
    assert!(top.try_wait().unwrap().is_none());
    writer.write_all(b"1.0,vda,none,8192,").unwrap();
    writer.write_all(b"100\n").unwrap();
    let line = next().unwrap();
    assert!(line.contains("host 8.0K") && line.contains("100 r/s"), "{line}");
    drop(writer);
    assert_eq!(next(), None);
    assert!(top.wait().unwrap().success());
}

#[test]
fn top_refuses_what_is_no_observation() {
    for (path, word) in [("/nonexistent", "No such file"), ("/proc/self/status", "not an observation")] {
        let output = Command::new(tools::minivmm()).args(["top", path]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(125), "{text}");
        assert!(text.contains(word) && text.contains(path), "{text}");
    }
}

/// On a terminal of tmux's: it shows the newest, takes another size, and q puts everything back.
#[test]
fn top_draws_on_a_terminal_until_q_is_pressed() {
    let directory = scratch();
    let path = directory.path().join("a.csv");
    fs::write(&path, OBSERVATION).unwrap();
    let socket = directory.path().join("tmux");
    let tmux = |args: &[&str]| {
        let output = Command::new("tmux").arg("-S").arg(&socket).args(args).output()?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let top = format!("{} top {}; echo status $?; sleep 60", tools::minivmm().display(), path.display());
    if tmux(&["new", "-d", "-x", "100", "-y", "30", &top]).is_err() {
        skip("tmux", "tmux is not installed");
        return;
    }
    let shows = |word: &str| {
        for _ in 0..200 {
            let screen = tmux(&["capture-pane", "-p"]).unwrap();
            if screen.contains(word) {
                return screen;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let screen = tmux(&["capture-pane", "-p"]).unwrap();
        tmux(&["kill-server"]).unwrap();
        panic!("no {word} in\n{screen}");
    };
    let screen = shows("ended");
    assert!(screen.contains("vda  none") && screen.contains("4.0K"), "{screen}");
    tmux(&["resize-window", "-x", "60", "-y", "10"]).unwrap();
    shows("minivmm top");
    tmux(&["send-keys", "q"]).unwrap();
    let screen = shows("status 0");
    tmux(&["kill-server"]).unwrap();
    assert!(!screen.contains("minivmm top"), "the screen is as it was: {screen}");
}

/// Whatever stops it, the terminal is the shell's meanwhile: its modes, and the screen without top.
#[test]
fn top_gives_the_terminal_back_while_it_is_stopped() {
    let directory = scratch();
    let path = directory.path().join("a.csv");
    fs::write(&path, OBSERVATION).unwrap();
    let (user, program) = pty::open();
    let before = pty::Modes::of(&program);
    let io = || Stdio::from(program.try_clone().unwrap());
    let mut command = Command::new(tools::minivmm());
    command.arg("top").arg(&path).env("TERM", "xterm").stdin(io()).stdout(io()).stderr(io());
    // SAFETY: what it calls may be called between fork and exec.
    unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, pty::take_control) };
    let mut top = command.spawn().unwrap();
    // It holds the terminal open.
    drop(command);
    let pid = i32::try_from(top.id()).unwrap();
    let mut user = File::from(user);
    // What it draws is read, or it would wait for room.
    let mut drawn = user.try_clone().unwrap();
    let drawn = std::thread::spawn(move || {
        let (mut all, mut part) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = std::io::Read::read(&mut drawn, &mut part) {
            all.extend_from_slice(&part[..count]);
        }
        String::from_utf8_lossy(&all).into_owned()
    });
    // SAFETY: kill takes numbers; the child is not reaped yet.
    let kill = |signal| unsafe { libc::kill(pid, signal) };
    for signal in [Some(libc::SIGTSTP), Some(libc::SIGTTIN), Some(libc::SIGTTOU), None] {
        let what = format!("{signal:?}, or Ctrl-Z");
        pty::wait_until(|| pty::Modes::of(&program).is_raw(), &what);
        match signal {
            Some(signal) => _ = kill(signal),
            None => user.write_all(b"\x1a").unwrap(),
        }
        pty::wait_until(|| pty::is_stopped(pid), &what);
        assert_eq!(pty::Modes::of(&program), before, "{what}");
        kill(libc::SIGCONT);
    }
    pty::wait_until(|| pty::Modes::of(&program).is_raw(), "it goes on");
    user.write_all(b"q").unwrap();
    assert!(top.wait().unwrap().success());
    assert_eq!(pty::Modes::of(&program), before);
    drop(program);
    let drawn = drawn.join().unwrap();
    assert_eq!(drawn.matches("\x1b[?1049h").count(), 5, "the other screen, once and after each stop");
    assert_eq!(drawn.matches("\x1b[?1049l").count(), 5, "and back");
}
