//! An emulated host of a trial's own, its guests, and their ends.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::records::Claim;

const IMAGE_MIB: u32 = 16;
/// Longer than five guests take to boot side by side.
const PATIENCE: Duration = Duration::from_secs(150);
/// Longer than a trial.
const WRITE_SECONDS: u32 = 600;

static STARTED: AtomicU32 = AtomicU32::new(0);

fn tree(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn emuhost() -> Command {
    let mut command = Command::new(tree("guest-images/emuhost"));
    command.stdin(Stdio::null());
    command
}

/// Whether the emulated host has been built; hosts that are to be killed are emulated on every machine.
pub fn is_possible() -> Option<()> {
    let built = tree("guest-images/build/host/initrd.cpio").exists();
    if !built {
        println!("skipped: there is no emulated host (make emuhost)");
    }
    built.then_some(())
}

/// The guests' program, static.
fn records() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("records");
        let made = Command::new("gcc")
            .args(["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&program)
            .arg(tree("tests/killed/records.c"))
            .status()
            .unwrap();
        assert!(made.success());
        program
    };
    BUILT.get_or_init(build).clone()
}

/// What a guest says, heard as it comes.
pub struct GuestLog {
    child: Child,
    claim: Arc<Mutex<Claim>>,
    text: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
}

impl GuestLog {
    fn of(mut child: Child) -> Self {
        let (claim, text) = (Arc::<Mutex<Claim>>::default(), Arc::<Mutex<String>>::default());
        let (theirs, their_text) = (Arc::clone(&claim), Arc::clone(&text));
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || {
            // What was heard before the end of the host counts; a line cut in two does not.
            for line in lines.map_while(Result::ok) {
                their_text.lock().unwrap().push_str(&(line.clone() + "\n"));
                theirs.lock().unwrap().hear(&line);
            }
        });
        Self { child, claim, text, reader }
    }

    /// Waits for the first records; a guest that never writes is a failure of the harness.
    pub fn wait_for_record(&self, mode: &str) {
        let begin = Instant::now();
        while self.claim.lock().unwrap().written == 0 {
            assert!(begin.elapsed() < PATIENCE, "{mode}: nothing written:\n{}", self.text.lock().unwrap());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// All that it has said, once it can say no more.
    pub fn claim(mut self) -> Claim {
        let _ = self.child.wait();
        self.reader.join().unwrap();
        *self.claim.lock().unwrap()
    }
}

/// A host that is going to be killed.
pub struct EmulatedHost {
    dir: PathBuf,
}

impl EmulatedHost {
    pub fn start() -> Self {
        let number = STARTED.fetch_add(1, Ordering::SeqCst);
        let name = format!("killed-{}-{number}", std::process::id());
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let host = Self { dir };
        let started = emuhost()
            .args([
                "start",
                "--binary",
                env!("CARGO_BIN_EXE_minivmm"),
                "--memory",
                "3072",
                "--disk-size",
                "1G",
                "--put",
            ])
            .arg(format!("{}:records", records().display()))
            .arg(&host.dir)
            .output()
            .unwrap();
        assert!(started.status.success(), "{started:?}");
        // Nothing is written back by its age before the host is killed: this is legal, and without it
        // the controls would lose nothing.
        host.sh("echo 0 >/proc/sys/vm/dirty_writeback_centisecs");
        host
    }

    fn sh(&self, script: &str) {
        let done = emuhost()
            .args(["exec", "--no-tty", "--timeout", "120"])
            .arg(&self.dir)
            .args(["--", "sh", "-c", script])
            .output();
        let done = done.unwrap();
        assert!(done.status.success(), "{script}: {done:?}");
    }

    /// An image a mode: all holes, or wholly written before.
    pub fn make_images(&mut self, modes: &[&str], holes: bool) {
        let images: Vec<_> = modes.iter().map(|mode| format!("{mode}.img")).collect();
        let images = images.join(" ");
        self.sh(&if holes {
            format!("truncate -s {IMAGE_MIB}M {images} && sync")
        } else {
            format!("for f in {images}; do dd if=/dev/zero of=$f bs=1M count={IMAGE_MIB} 2>/dev/null || exit 1; done; sync")
        });
    }

    /// Starts the guest of a mode; its lines come out while it writes.
    pub fn guest(&self, mode: &str, flush_every: u32) -> GuestLog {
        let script = format!(
            "exec minivmm --memory 128M --add records:/usr/bin/records --disk {mode}.img,cache={mode} \
             -- records /dev/vda {flush_every} {WRITE_SECONDS}"
        );
        let child = emuhost()
            .args(["exec", "--no-tty"])
            .arg(&self.dir)
            .args(["--", "sh", "-c", &script])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        GuestLog::of(child)
    }

    /// A crash: the emulator is ended at once.
    pub fn kill(&mut self) {
        let killed = emuhost().arg("kill").arg(&self.dir).status().unwrap();
        assert!(killed.success());
    }

    /// Ends every VMM at once; the host lives on.
    pub fn kill_vmms(&mut self) {
        self.sh("killall -9 minivmm");
    }

    /// An orderly end: all is written back.
    pub fn power_off(&mut self) {
        let stopped = emuhost().arg("stop").arg(&self.dir).status().unwrap();
        assert!(stopped.success());
    }

    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk.img")
    }
}

impl Drop for EmulatedHost {
    fn drop(&mut self) {
        let _ = emuhost().arg("kill").arg(&self.dir).output();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
