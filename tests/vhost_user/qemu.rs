//! A Linux guest, or firmware, in plain QEMU: its disks are vhost-user-blk devices, its processor is emulated.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use minivmm_testkit::cpio;
use minivmm_testkit::places;
use minivmm_testkit::skips::skip;

use super::daemon::Export;

/// Longer than any guest here takes on a busy machine; who meets it hangs.
pub const PATIENCE: Duration = Duration::from_secs(200);

const MEMORY_MIB: u32 = 384;

/// What a guest's job can use: `tell NAME VALUE` is heard by [`Heard::told`].
pub const WORDS: &str = "tell() { echo \"T $*\"; }\n";

fn emulator() -> PathBuf {
    std::env::var_os("MINIVMM_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into()).into()
}

/// Whether guests with these kernels can run here. If not, says why.
pub fn can_run(kernels: &[&str]) -> bool {
    for program in [emulator(), "qemu-storage-daemon".into()] {
        if Command::new(&program).arg("--version").output().is_err() {
            skip("qemu", &format!("{} is not installed (make test-deps)", program.display()));
            return false;
        }
    }
    let missing = kernels.iter().find(|kernel| !images(kernel).join("initrd.cpio").exists());
    if let Some(kernel) = missing {
        skip("images", &format!("no guest with kernel {kernel} is built (make guest-all)"));
    }
    missing.is_none()
}

/// Returns where the kernel and the initramfs of the test guest with this kernel are.
pub fn images(kernel: &str) -> PathBuf {
    places::root().join("guest-images/build").join(kernel)
}

/// A virtual machine that is not started yet.
pub struct Machine {
    dir: PathBuf,
    arguments: Vec<String>,
    chardevs: usize,
}

impl Machine {
    /// Describes a machine of this type (`pc`, `q35`) in `dir`, with memory that back ends can map.
    pub fn new(dir: &Path, board: &str) -> Self {
        let memory = format!("memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on");
        let (mib, board) = (MEMORY_MIB.to_string(), format!("{board},memory-backend=memory"));
        // One thread for both processors: with one each, QEMU 7.2 now and then shows one of them an int3 with which the
        // other has patched the kernel, and which is gone again.
        let words = [
            ["-machine", &board, "-accel", "tcg,thread=single"],
            ["-cpu", "max", "-smp", "2"],
            ["-m", &mib, "-object", &memory],
        ];
        let mut machine = Self { dir: dir.to_owned(), arguments: Vec::new(), chardevs: 0 };
        machine.more(&words.concat()).more(&["-nodefaults", "-display", "none", "-serial", "stdio"]);
        machine
    }

    /// Adds arguments of QEMU's.
    pub fn more(&mut self, words: &[&str]) -> &mut Self {
        self.arguments.extend(words.iter().map(|&word| word.to_owned()));
        self
    }

    /// Adds a disk. The guest calls the first vda, the second vdb.
    pub fn disk(&mut self, export: &Export) -> &mut Self {
        // From 1 on: a kernel that is given to QEMU has bootindex 0.
        self.chardevs += 1;
        let (number, queues) = (self.chardevs, export.queues);
        let chardev = format!("socket,id=c{number},path={},reconnect=1", export.socket());
        // The legacy interface, which OVMF prefers, has no VERSION_1, and back ends are little-endian only.
        let device = format!(
            "vhost-user-blk-pci,chardev=c{number},num-queues={queues},bootindex={number},disable-legacy=on"
        );
        self.more(&["-chardev", &chardev, "-device", &device])
    }

    /// Boots the test guest with this kernel for one job, a shell script; `archives` are unpacked over its initramfs.
    pub fn linux(
        &mut self,
        kernel: &str,
        job: &str,
        programs: &[(&str, &[u8])],
        archives: &[&[u8]],
    ) -> &mut Self {
        let mut initrd = fs::read(images(kernel).join("initrd.cpio")).unwrap();
        initrd.extend(cpio::job_with(&format!("{WORDS}{job}"), programs));
        initrd.extend(archives.concat());
        fs::write(self.dir.join("initrd.cpio"), initrd).unwrap();
        // The ELF image spares the emulated processor the unpacking.
        let kernel = images(kernel).join("vmlinux");
        let append = "console=ttyS0 quiet reboot=k panic=-1 no_timer_check";
        self.more(&["-kernel", kernel.to_str().unwrap(), "-initrd", "initrd.cpio", "-append", append])
    }

    /// Starts it. A guest that reboots goes on where `reboots`, and ends QEMU elsewhere.
    pub fn start(&mut self, reboots: bool) -> Running {
        if !reboots {
            self.more(&["-no-reboot"]);
        }
        let mut child = Command::new(emulator())
            .args(&self.arguments)
            .current_dir(&self.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(self.dir.join("qemu.log")).unwrap())
            .spawn()
            .unwrap();
        let serial = Arc::<Mutex<String>>::default();
        let theirs = Arc::clone(&serial);
        let mut output = child.stdout.take().unwrap();
        let reader = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                theirs.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Running { child, serial, reader: Some(reader), dir: self.dir.clone() }
    }
}

/// A machine that runs.
pub struct Running {
    child: Child,
    serial: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    dir: PathBuf,
}

impl Running {
    /// Returns what has come over the serial line.
    pub fn serial(&self) -> String {
        self.serial.lock().unwrap().clone()
    }

    /// Waits until this is so of what has come over the serial line.
    #[track_caller]
    pub fn wait_until(&mut self, what: &str, is_so: impl Fn(&str) -> bool) {
        let begin = Instant::now();
        while !is_so(&self.serial.lock().unwrap()) {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "{what}: QEMU has ended with {ended:?}: {}", self.everything());
            assert!(begin.elapsed() < PATIENCE, "{what}: not after {PATIENCE:?}: {}", self.everything());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Types a line at the guest's console.
    pub fn say(&mut self, line: &str) {
        let keyboard = self.child.stdin.as_mut().unwrap();
        writeln!(keyboard, "{line}").and_then(|()| keyboard.flush()).unwrap();
    }

    /// Ends QEMU with SIGKILL; returns all that had come over the serial line.
    pub fn kill(mut self) -> Heard {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.reader.take().unwrap().join().unwrap();
        Heard(self.serial())
    }

    /// Waits until the guest has ended and QEMU with it.
    #[track_caller]
    pub fn finish(mut self) -> Heard {
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(begin.elapsed() < PATIENCE, "the guest hangs: {}", self.everything());
            std::thread::sleep(Duration::from_millis(20));
        };
        self.reader.take().unwrap().join().unwrap();
        assert!(status.success(), "{status}: {}", self.everything());
        Heard(self.serial())
    }

    /// Returns the serial line, and what QEMU and the back end have said; of the two, what came first tells most.
    pub fn everything(&self) -> String {
        let beginning = |name: &str| {
            let log = fs::read(self.dir.join(name)).unwrap_or_default();
            String::from_utf8_lossy(&log[..log.len().min(4000)]).into_owned()
        };
        let (qemu, daemon) = (beginning("qemu.log"), beginning("daemon.log"));
        format!("\n--- serial line\n{}\n--- QEMU\n{qemu}\n--- back end\n{daemon}", self.serial())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All that a guest has said.
#[derive(Debug)]
pub struct Heard(pub String);

impl Heard {
    /// Returns the value of the guest's `tell NAME VALUE`.
    #[track_caller]
    pub fn told(&self, name: &str) -> &str {
        let lines = self.0.lines().map(str::trim);
        let mut values =
            lines.filter_map(|line| line.strip_prefix("T ")?.strip_prefix(name)?.strip_prefix(' '));
        values.next().unwrap_or_else(|| panic!("the guest did not tell {name}:\n{}", self.0)).trim()
    }

    /// Fails, with all that was said, unless the guest has told `name` and the checksum of the first MiB of `image`.
    #[track_caller]
    pub fn expect_sum(&self, name: &str, image: &Path, mib: u64) {
        let script = format!("head -c {mib}M \"$0\" | sha256sum");
        let output = Command::new("sh").arg("-c").arg(script).arg(image).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let sum = String::from_utf8(output.stdout).unwrap();
        let word = |text: &str| text.split_whitespace().next().unwrap_or_default().to_owned();
        assert_eq!(word(self.told(name)), word(&sum), "{name}, in:\n{}", self.0);
    }

    /// Fails, with all that was said, unless the guest has told this.
    #[track_caller]
    pub fn expect(&self, name: &str, value: &str) {
        assert_eq!(self.told(name), value, "{name}, in:\n{}", self.0);
    }
}
