//! minivmm as an ordinary user of a host whose kernel is known: 6.12, where KVM's thread for huge pages counts
//! against the user's limit of processes, and 6.1, where io_uring's workers do.
//!
//! Runs in emulated hosts, started here. Where this machine's KVM runs Linux, `tests/as-user` runs the suites with
//! kernels as such a user instead, and this one says so.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use minivmm_testkit::skips::skip;

/// An emulated host, killed when dropped.
struct EmulatedHost {
    dir: PathBuf,
}

fn emuhost() -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-images/emuhost"));
    command.stdin(Stdio::null());
    command
}

impl EmulatedHost {
    fn start(kernel: &str) -> Self {
        let name = format!("ordinary-{kernel}-{}", std::process::id());
        let host = Self { dir: Path::new(env!("CARGO_TARGET_TMPDIR")).join(name) };
        let binary = env!("CARGO_BIN_EXE_minivmm");
        let started = emuhost()
            .args(["start", "--kernel", kernel, "--binary", binary])
            .arg(&host.dir)
            .output()
            .unwrap();
        assert!(started.status.success(), "the emulated host did not start: {started:?}");
        host
    }

    fn sh(&self, script: &str) -> Output {
        let mut exec = emuhost();
        exec.args(["exec", "--no-tty", "--timeout", "240"]).arg(&self.dir).args(["--", "sh", "-c", script]);
        exec.output().unwrap()
    }
}

impl Drop for EmulatedHost {
    fn drop(&mut self) {
        let _ = emuhost().arg("kill").arg(&self.dir).status();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Whether emulated hosts are what runs kernels here. If not, says why.
fn emulated() -> bool {
    let which = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-images/which-host");
    let said = String::from_utf8(Command::new(which).output().unwrap().stdout).unwrap();
    if said.starts_with("directly") {
        skip("emuhost", &format!("guests run {}: tests/as-user runs the suites with kernels", said.trim()));
    }
    !said.starts_with("directly")
}

/// A guest with a disk in each of three modes, all by io_uring, that writes and flushes each.
const SCRIPT: &str = r#"
echo 'ordinary:x:12345:12345::/tmp:/bin/sh' >>/etc/passwd
mkdir -p /data/o && chown ordinary /data/o && cd /data/o || exit 99
exec su -s /bin/sh ordinary -c '
cd /data/o; uname -r; id -u
truncate -s 16M none.img writeback.img directsync.img
io=engine=io_uring
MINIVMM_GUEST=/data/guest/6.12 /data/bin/minivmm --timeout 200 --stats=stats.json \
    --disk none.img,cache=none,$io --disk writeback.img,cache=writeback,$io --disk directsync.img,cache=directsync,$io \
    -- sh -c "for d in vda vdb vdc; do seq 100000 | dd of=/dev/\$d bs=64k conv=fsync || exit; done"
status=$?
for i in none writeback directsync; do seq 100000 | cmp -n 588895 - $i.img && echo same; done
tr -d " \n" <stats.json
exit $status'
"#;

fn guests_write_and_flush_on(kernel: &str) {
    if !emulated() {
        return;
    }
    let ran = EmulatedHost::start(kernel).sh(SCRIPT);
    let (out, log) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert_eq!(ran.status.code(), Some(0), "{out}\n{log}");
    let mut lines = out.lines();
    assert!(lines.next().unwrap().starts_with(&format!("{kernel}.")), "{out}");
    assert_eq!(lines.next(), Some("12345"), "{out}");
    assert_eq!(lines.by_ref().filter(|line| *line == "same").count(), 3, "{out}\n{log}");
    let stats: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    for disk in stats["disks"].as_array().unwrap() {
        assert_eq!(disk["engine"], "io_uring", "{disk:#}");
        assert_eq!(disk["requests"]["errors"], 0, "{disk:#}");
        assert!(disk["requests"]["write"].as_u64() > Some(0), "{disk:#}");
    }
    let flushes = |at: usize| stats["disks"][at]["requests"]["flush"].as_u64().unwrap();
    assert!(flushes(0) > 0 && flushes(1) > 0, "{stats:#}");
    assert!(!log.contains("canceled") && !log.contains("os error"), "{log}");
}

#[test]
fn an_ordinary_users_guest_writes_and_flushes_on_host_6_12() {
    guests_write_and_flush_on("6.12");
}

#[test]
fn an_ordinary_users_guest_writes_and_flushes_on_host_6_1() {
    guests_write_and_flush_on("6.1");
}
