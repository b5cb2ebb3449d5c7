//! Sockets that are made, passed, left behind and removed; exit statuses; what is refused at the start.

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;

use minivmm_testkit::images::{TestImage, pattern};

use super::daemon::{Daemon, command, until};
use super::front_end::{FLUSH, FrontEnd, IN};
use super::protocol::{disk, image};

/// Runs it to its end, which comes at once. Returns its exit status and what it has said.
fn refused(dir: &std::path::Path, words: &[&str]) -> (i32, String) {
    let _ = std::fs::remove_file(dir.join("log"));
    let status = command(dir, words).status().unwrap();
    (status.code().unwrap(), std::fs::read_to_string(dir.join("log")).unwrap())
}

#[test]
fn a_socket_of_the_dead_is_replaced_and_nothing_else_is() {
    let (dir, first) = image();
    let other = TestImage::new(1 << 20);
    let socket = dir.path().join("s");
    let daemon = Daemon::start(dir.path(), &disk(&first, "queues=1"));
    // Another disk's daemon wants the same socket, and a second one the same image.
    let (status, said) = refused(dir.path(), &["--disk", &disk(&other, "queues=1"), "--socket", "s"]);
    assert!(status == 125 && said.contains("another process listens on it"), "{status} {said}");
    let (status, said) = refused(dir.path(), &["--disk", &disk(&first, "queues=1"), "--socket", "t"]);
    assert!(status == 125 && said.contains("lock"), "{status} {said}");
    assert!(!dir.path().join("t").exists());
    assert_eq!(FrontEnd::live(dir.path(), 1).read(0, 1)[..512], [pattern(1); 512], "the first goes on");
    daemon.kill();
    assert!(socket.exists(), "nobody has removed it");
    let daemon = Daemon::start(dir.path(), &disk(&first, "queues=1"));
    assert_eq!(FrontEnd::live(dir.path(), 1).read(0, 1)[..512], [pattern(1); 512]);
    assert_eq!(daemon.end(), 128 + libc::SIGTERM);
    assert!(!socket.exists(), "it is removed at the end");
    std::fs::write(&socket, "somebody's").unwrap();
    let (status, said) = refused(dir.path(), &["--disk", &disk(&first, "queues=1"), "--socket", "s"]);
    assert!(status == 125 && said.contains("is no socket"), "{status} {said}");
    assert_eq!(std::fs::read(&socket).unwrap(), b"somebody's");
    let (status, said) = refused(dir.path(), &["--disk", &disk(&first, "queues=1"), "--socket", "gone/s"]);
    assert!(status == 125 && said.contains("cannot listen on gone/s"), "{status} {said}");
}

#[test]
fn a_name_that_somebody_else_has_taken_stays_his() {
    let (dir, image) = image();
    let daemon = Daemon::start(dir.path(), &disk(&image, "queues=1"));
    std::fs::remove_file(dir.path().join("s")).unwrap();
    let _his = UnixListener::bind(dir.path().join("s")).unwrap();
    assert_eq!(daemon.end(), 128 + libc::SIGTERM);
    assert!(dir.path().join("s").exists());
}

#[test]
fn a_listening_socket_can_be_passed() {
    let (dir, image) = image();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let fd = listener.as_raw_fd();
    let keys = disk(&image, "queues=1");
    let mut command = command(dir.path(), &["--disk", &keys, "--fd", "9"]);
    // SAFETY: dup2 may be called between fork and exec, and takes numbers.
    unsafe {
        command.pre_exec(move || {
            libc::dup2(fd, 9);
            Ok(())
        });
    }
    let mut child = command.spawn().unwrap();
    assert_eq!(FrontEnd::live(dir.path(), 1).read(0, 2)[..512], [pattern(2); 512]);
    minivmm_testkit::machine::kill(child.id() as i32, libc::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(128 + libc::SIGINT));
    assert!(dir.path().join("s").exists(), "whoever made it removes it");
    for (number, why) in [("250", "no open descriptor"), ("0", "no listening stream socket")] {
        let (status, said) = refused(dir.path(), &["--disk", &keys, "--fd", number]);
        assert!(status == 125 && said.contains(why), "{number}: {status} {said}");
    }
}

#[test]
fn the_umask_says_who_may_connect() {
    let (dir, image) = image();
    let mut command = command(dir.path(), &["--disk", &disk(&image, "queues=1"), "--socket", "s"]);
    // SAFETY: umask may be called between fork and exec, and takes a number.
    unsafe {
        command.pre_exec(|| {
            libc::umask(0o027);
            Ok(())
        });
    }
    let mut child = command.spawn().unwrap();
    until("the socket is there", || dir.path().join("s").exists());
    assert_eq!(dir.path().join("s").metadata().unwrap().permissions().mode() & 0o777, 0o750);
    minivmm_testkit::machine::kill(child.id() as i32, libc::SIGTERM);
    child.wait().unwrap();
}

#[test]
fn a_sync_that_failed_is_told_at_the_end_whoever_was_told_before() {
    let (dir, image) = image();
    let daemon = Daemon::start(dir.path(), &disk(&image, "cache=writeback,queues=1,fault=flush-fail=once"));
    let mut front_end = FrontEnd::live(dir.path(), 1);
    front_end.write(0, 0, 1);
    assert_eq!(front_end.request(0, FLUSH, 0, 0), 1, "IOERR");
    drop(front_end);
    // The latch is the image's: the next front end finds it as well.
    let mut front_end = FrontEnd::live(dir.path(), 1);
    assert_eq!(front_end.request(0, FLUSH, 0, 0), 1, "IOERR for ever");
    assert_eq!(front_end.request(0, IN, 0, 512), 0);
    drop(front_end);
    assert_eq!(daemon.end(), 125);
    assert!(std::fs::read_to_string(dir.path().join("log")).unwrap().contains("fdatasync"));
}

#[test]
fn the_disk_is_explained_with_what_its_front_end_must_do() {
    let (dir, image) = image();
    let keys = disk(&image, "cache=writeback");
    let words = ["export", "--explain", "--disk", &keys, "--socket", "s"];
    let run = |more: &[&str]| {
        let output = std::process::Command::new(minivmm_testkit::tools::minivmm())
            .args(words.iter().chain(more))
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = run(&[]);
    for word in
        ["cache=writeback", "The front end on s", "pass the guest's FLUSH on", "config-wce", "share=on"]
    {
        assert!(text.contains(word), "{word}: {text}");
    }
    let json: serde_json::Value = serde_json::from_str(&run(&["--json"])).unwrap();
    assert_eq!((&json[0]["socket"], &json[0]["disk"]["cache"]), (&"s".into(), &"writeback".into()));
    assert!(json[0]["front_end"].as_array().unwrap().len() >= 3);
    assert!(!dir.path().join("s").exists(), "nothing was done");
}
