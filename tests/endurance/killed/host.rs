//! An emulated host of a trial's own, its guests, and their ends.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use minivmm_testkit::cpio;
use minivmm_testkit::records::{self, Claim};

const IMAGE_MIB: u32 = 16;
/// Longer than five guests take to boot side by side, also in QEMU.
const PATIENCE: Duration = Duration::from_secs(400);
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
        super::skip("emuhost", "there is no emulated host (make emuhost)");
    }
    built.then_some(())
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
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let reader = std::thread::spawn(move || {
            let mut line = Vec::new();
            // What was heard before the end of the host counts; a line cut in two does not.
            while output.read_until(b'\n', &mut line).is_ok() && line.ends_with(b"\n") {
                let text = String::from_utf8_lossy(&line).into_owned();
                line.clear();
                theirs.lock().unwrap().hear(&text);
                their_text.lock().unwrap().push_str(&text);
            }
        });
        Self { child, claim, text, reader }
    }

    /// Waits for the first records, with `promised` for some that are promised; a guest that never writes is
    /// a failure of the harness.
    pub fn wait_for_record(&self, mode: &str, promised: bool) {
        let begin = Instant::now();
        let is_there = |claim: Claim| if promised { claim.promised() > 0 } else { claim.written > 0 };
        while !is_there(*self.claim.lock().unwrap()) {
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

/// Who runs the guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Vmm {
    Minivmm,
    /// The emulator's own binary, inside the emulated host.
    Qemu,
}

/// QEMU with its libraries and firmware, for use in an emulated host.
fn packed_qemu() -> PathBuf {
    static PACKED: OnceLock<PathBuf> = OnceLock::new();
    let pack = || {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("qemu");
        let packed = Command::new(tree("guest-images/pack-qemu")).arg(&dir).output().unwrap();
        assert!(packed.status.success(), "{packed:?}");
        dir
    };
    PACKED.get_or_init(pack).clone()
}

/// A host that is going to be killed.
pub struct EmulatedHost {
    dir: PathBuf,
    vmm: Vmm,
}

impl EmulatedHost {
    /// Starts one; with `logged`, what its disk is given is recorded.
    pub fn start(vmm: Vmm, logged: bool) -> Self {
        let number = STARTED.fetch_add(1, Ordering::SeqCst);
        let name = format!("killed-{}-{number}", std::process::id());
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let host = Self { dir, vmm };
        let mut start = emuhost();
        start.args(["start", "--binary", env!("CARGO_BIN_EXE_minivmm"), "--memory", "3072"]);
        start.args(["--disk-size", "1G", "--put"]).arg(format!("{}:records", records::program().display()));
        if vmm == Vmm::Qemu {
            start.arg("--put").arg(format!("{}:qemu", packed_qemu().display()));
        }
        if logged {
            std::fs::create_dir_all(&host.dir).unwrap();
            start.arg("--log-writes").arg(host.log());
        }
        let started = start.arg(&host.dir).output().unwrap();
        assert!(started.status.success(), "{started:?}");
        // Nothing is written back by its age before the host is killed, and no journal is committed by its
        // age, which would flush the disk: both are legal, and without it the controls would lose nothing.
        host.sh("echo 0 >/proc/sys/vm/dirty_writeback_centisecs && mount -o remount,commit=600 /data");
        if vmm == Vmm::Qemu {
            host.put_job();
        }
        host
    }

    /// An initramfs whose job writes the records; for QEMU, which cannot bring a program in.
    fn put_job(&self) {
        let program = std::fs::read(records::program()).unwrap();
        let job = "set -- $(cat /proc/cmdline); for word; do case $word in every=*) every=${word#*=};; esac; done; \
                   exec /job/records /dev/vda $every SECONDS";
        let job = job.replace("SECONDS", &WRITE_SECONDS.to_string());
        let local = self.dir.join("job.cpio");
        std::fs::write(&local, cpio::job_with(&job, &[("records", &program)])).unwrap();
        let pushed = emuhost().arg("push").arg(&self.dir).arg(&local).arg("job.cpio").output().unwrap();
        assert!(pushed.status.success(), "{pushed:?}");
        self.sh("cat guest/6.12/initrd.cpio job.cpio >records.cpio");
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
        let script = match self.vmm {
            Vmm::Minivmm => format!(
                "exec minivmm --memory 128M --add records:/usr/bin/records --disk {mode}.img,cache={mode} \
                 -- records /dev/vda {flush_every} {WRITE_SECONDS}"
            ),
            Vmm::Qemu => format!(
                "export LD_LIBRARY_PATH=/data/qemu/lib; exec /data/qemu/bin/qemu-system-x86_64 -L /data/qemu/share \
                 -machine microvm,rtc=off -accel kvm -cpu host -m 128M -nodefaults -no-user-config -display none \
                 -no-reboot -serial stdio -kernel guest/6.12/vmlinux -initrd records.cpio \
                 -append 'console=ttyS0 quiet reboot=k panic=-1 every={flush_every}' \
                 -drive file={mode}.img,format=raw,if=none,id=disk,cache={mode} \
                 -global virtio-mmio.force-legacy=false -device virtio-blk-device,drive=disk"
            ),
        };
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
        self.sh(match self.vmm {
            Vmm::Minivmm => "killall -9 minivmm",
            Vmm::Qemu => "killall -9 qemu-system-x86_64",
        });
    }

    /// An orderly end: all is written back.
    pub fn power_off(&mut self) {
        let stopped = emuhost().arg("stop").arg(&self.dir).status().unwrap();
        assert!(stopped.success());
    }

    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk.img")
    }

    /// What the disk was given, if that is recorded.
    pub fn log(&self) -> PathBuf {
        self.dir.join("disk.log")
    }
}

impl Drop for EmulatedHost {
    fn drop(&mut self) {
        let _ = emuhost().arg("kill").arg(&self.dir).output();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
