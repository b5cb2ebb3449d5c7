//! Files of the host that a command names: what minivmm refuses to write to, and nothing of them is lost.
//!
//! Needs neither KVM nor a guest: every refusal comes before the machine is built. What needs root (loop devices,
//! mounts) says so where it is not run.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use minivmm_testkit::loops::{LoopDevice, Mounted};
use minivmm_testkit::skips::skip;
use minivmm_testkit::tools;

const FAILURE: i32 = 125;

/// A directory with an image, a kernel and the like: files that are not to change.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let place = Self { dir };
        for name in ["a.img", "other.img", "kernel", "initrd", "added"] {
            fs::write(place.at(name), Self::content()).unwrap();
        }
        fs::hard_link(place.at("a.img"), place.at("hard")).unwrap();
        std::os::unix::fs::symlink("a.img", place.at("soft")).unwrap();
        std::os::unix::fs::symlink("new", place.at("dangling")).unwrap();
        place
    }

    /// JSON at its beginning, so that nothing but its being an input keeps it from being replaced.
    fn content() -> Vec<u8> {
        let mut content = b"{\"text\": 1}\n".repeat(400);
        content.resize(1 << 20, b' ');
        content
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Refused by a run, and by `--explain` with the same words and status.
    fn must_refuse_and_explain(&self, args: &[&str], words: &[&str]) {
        self.must_refuse(args, words);
        self.must_refuse(&[&["--explain"], args].concat(), words);
    }

    /// A run comes as far as the kernel, which is none, and `--explain` has no objection.
    fn must_pass(&self, args: &[&str], warning: &str) {
        let told = self.minivmm(args);
        let told = String::from_utf8_lossy(&told.stderr);
        assert!(told.contains("kernel") && told.contains(warning), "{args:?}: {told}");
        assert!(!told.contains("cannot use disk image"), "{args:?}: {told}");
        let told = self.minivmm(&[&["--explain"], args].concat());
        assert_eq!(told.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&told.stderr));
        assert!(words_of(&told.stdout).contains(warning), "{args:?}: {}", words_of(&told.stdout));
    }

    /// A file of this size with the file system of mkfs.ext4, or `None`, said aloud.
    fn ext4(&self, name: &str) -> Option<PathBuf> {
        let path = self.at(name);
        File::create(&path).unwrap().set_len(16 << 20).unwrap();
        match Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&path).status() {
            Ok(status) if status.success() => Some(path),
            other => {
                println!("not run: there is no mkfs.ext4 here: {other:?}");
                None
            }
        }
    }

    fn minivmm(&self, args: &[&str]) -> Output {
        let guest = ["--kernel", "kernel", "--initrd", "initrd", "--timeout", "20"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_minivmm"));
        command.current_dir(self.dir.path()).args(guest).args(args);
        command.output().unwrap()
    }

    /// Status 125 with these words, and every file as it was.
    fn must_refuse(&self, args: &[&str], words: &[&str]) {
        let output = self.minivmm(args);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(FAILURE), "{args:?}: {told}");
        for word in words {
            assert!(told.contains(word), "{args:?}: {word} is missing in: {told}");
        }
        for name in ["a.img", "other.img", "kernel", "initrd", "added", "hard", "soft"] {
            let path = self.at(name);
            if path.exists() {
                assert!(fs::read(path).unwrap() == Self::content(), "{args:?} changed {name}");
            }
        }
        assert!(!self.at("new").exists(), "{args:?} made a file");
    }
}

/// Text without the line breaks that a page of 80 columns has.
fn words_of(text: &[u8]) -> String {
    String::from_utf8_lossy(text).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A lock as a VM has it on its image, as long as this lives.
fn lock(path: &Path, kind: libc::c_int, start: i64, len: i64) -> File {
    let file = File::options().read(true).write(true).open(path).unwrap();
    // SAFETY: flock is plain numbers, for which all zeroes are valid.
    let mut wanted: libc::flock = unsafe { std::mem::zeroed() };
    (wanted.l_type, wanted.l_start, wanted.l_len) = (libc::c_short::try_from(kind).unwrap(), start, len);
    // SAFETY: `wanted` is a valid flock for the length of the call.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const wanted) }, 0);
    file
}

#[test]
fn no_output_destroys_what_the_command_was_given() {
    let place = Place::new();
    for (name, input) in [
        ("a.img", "--disk a.img"),
        ("hard", "--disk a.img"),
        ("soft", "--disk a.img"),
        ("./a.img", "--disk a.img"),
        ("kernel", "--kernel kernel"),
        ("initrd", "--initrd initrd"),
        ("added", "--add added"),
    ] {
        let (console, stats) = (format!("file={name}"), format!("--stats={name}"));
        let outputs: [&[&str]; 4] =
            [&["--status-file", name], &["--console", &console], &[&stats], &["--observe", name]];
        for output in outputs {
            let args = [&["--disk", "a.img", "--add", "added"], output, &["--", "true"]].concat();
            place.must_refuse(&args, &[name, "same file as", input]);
        }
        let disk = format!("a.img,log-writes={name}");
        place.must_refuse(&["--disk", &disk, "--add", "added", "--", "true"], &[name, "same file as", input]);
    }
}

#[test]
fn two_outputs_of_one_command_are_two_files() {
    let place = Place::new();
    place
        .must_refuse(&["--status-file", "dangling", "--stats=new"], &["dangling", "writes to the same file"]);
    for (first, second) in [("new", "dangling"), ("./new", "new")] {
        let console = format!("file={first}");
        let stats = format!("--stats={second}");
        place.must_refuse(&["--console", &console, &stats], &[second, "writes to the same file"]);
    }
    let (one, two) = ("a.img,log-writes=new", "other.img,log-writes=dangling");
    place.must_refuse(&["--disk", one, "--disk", two], &["writes to the same file"]);
}

#[test]
fn an_image_of_somebody_else_is_left_alone_locked_or_not() {
    let place = Place::new();
    let whole = lock(&place.at("other.img"), libc::F_WRLCK, 0, 0);
    place.must_refuse(&["--status-file", "other.img"], &["other.img", "has locked it"]);
    place.must_refuse(&["--console", "file=other.img"], &["other.img", "has locked it"]);
    drop(whole);
    // As QEMU does.
    let byte = lock(&place.at("other.img"), libc::F_RDLCK, 100, 1);
    place.must_refuse(&["--stats=other.img"], &["other.img", "has locked it"]);
    drop(byte);
    // Nobody has it, and it is in no argument.
    File::create(place.at("zeroes.img")).unwrap().set_len(1 << 20).unwrap();
    for output in
        [&["--status-file", "zeroes.img"][..], &["--console", "file=zeroes.img"], &["--stats=zeroes.img"]]
    {
        place.must_refuse(output, &["zeroes.img", "what it holds would be lost"]);
        assert_eq!(fs::read(place.at("zeroes.img")).unwrap(), vec![0; 1 << 20]);
    }
}

#[test]
fn the_status_file_tells_of_another_output_that_is_refused() {
    let place = Place::new();
    place.must_refuse(&["--status-file", "status", "--console", "file=a.img", "--disk", "a.img"], &["a.img"]);
    let status = fs::read_to_string(place.at("status")).unwrap();
    assert!(status.contains("\"failure\"") && status.contains("same file as --disk"), "{status}");
    // An older one is replaced.
    place.must_refuse(&["--status-file", "status", "--stats=."], &["directory"]);
    let status = fs::read_to_string(place.at("status")).unwrap();
    assert!(status.contains("directory") && !status.contains("same file"), "{status}");
}

#[test]
fn standard_output_is_a_place_for_the_status_and_keeps_what_it_has() {
    let place = Place::new();
    let out = File::create(place.at("out")).unwrap();
    let mut command = Command::new("sh");
    let script = "echo before; \"$0\" --kernel kernel --initrd none --status-file /dev/stdout; echo after";
    command.current_dir(place.dir.path()).arg("-c").arg(script).arg(env!("CARGO_BIN_EXE_minivmm"));
    assert!(command.stdout(out).output().unwrap().status.success());
    let out = fs::read_to_string(place.at("out")).unwrap();
    assert!(out.starts_with("before\n{") && out.ends_with("}\nafter\n"), "{out}");
}

#[test]
fn nothing_is_printed_to_a_disk() {
    let place = Place::new();
    for more in ["--kernel kernel --initrd none", "--explain", "--explain --json"] {
        let mut command = Command::new("sh");
        let script = format!("\"$0\" {more} --disk hard >> a.img");
        let program = env!("CARGO_BIN_EXE_minivmm");
        let output = command.current_dir(place.dir.path()).args(["-c", &script, program]).output().unwrap();
        let told = words_of(&output.stderr);
        assert_eq!(output.status.code(), Some(FAILURE), "{script}: {told}");
        assert!(told.contains("standard output") && told.contains("--disk hard"), "{told}");
        assert!(fs::read(place.at("a.img")).unwrap() == Place::content(), "{script}");
    }
}

#[test]
fn a_bench_report_destroys_neither_image_nor_job_file() {
    let place = Place::new();
    for (args, input) in [
        (&["bench", "--disk", "a.img", "--json", "hard"][..], "--disk a.img"),
        (&["bench", "--disk", "a.img", "--jobs", "added", "--json", "added"], "--jobs added"),
    ] {
        let mut command = Command::new(tools::minivmm().with_file_name("minivmm-tools"));
        let output = command.current_dir(place.dir.path()).args(args).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(FAILURE) && told.contains(input), "{args:?}: {told}");
        assert!(fs::read(place.at("a.img")).unwrap() == Place::content(), "{args:?}");
    }
}

#[test]
fn what_a_run_refuses_explain_refuses_with_the_same_words() {
    let place = Place::new();
    fs::write(place.at("letter"), "dear").unwrap();
    place.must_refuse_and_explain(
        &["--disk", "a.img,log-writes=a.img"],
        &["log-writes= to a.img", "same file"],
    );
    place.must_refuse_and_explain(&["--disk", "a.img,log-writes=letter"], &["letter", "an older write log"]);
    place.must_refuse_and_explain(&["--disk", "a.img,log-writes=no/log"], &["no/log", "the directory no"]);
    place.must_refuse_and_explain(&["--disk", "a.img", "--disk", "hard"], &["a.img", "hard", "share bytes"]);
    place.must_refuse_and_explain(&["--disk", "a.img", "--stats=soft"], &["--stats to soft", "--disk a.img"]);
    place.must_refuse_and_explain(&["--disk", "gone.img"], &["gone.img", "does not exist"]);
    let all = |count: usize, key: &str| {
        let disk = format!("a.img,readonly{key}");
        let args: Vec<String> = (0..count).flat_map(|_| ["--disk".into(), disk.clone()]).collect();
        args
    };
    for (args, words) in [
        (all(27, ""), ["too many disks: 27", "26"]),
        (all(20, ",transport=mmio"), ["too many virtio-mmio devices: 20", "transport=pci"]),
    ] {
        place.must_refuse_and_explain(&args.iter().map(String::as_str).collect::<Vec<_>>(), &words);
    }
    let byte = lock(&place.at("a.img"), libc::F_WRLCK, 0, 0);
    place.must_refuse_and_explain(&["--disk", "a.img"], &["a.img", "another VM"]);
    drop(byte);
    place.must_pass(&["--disk", "a.img,readonly", "--disk", "hard,readonly"], "");
    // What can be explained is, beside what is refused; JSON has the reasons, disk by disk.
    let _byte = lock(&place.at("a.img"), libc::F_WRLCK, 0, 0);
    let output = place.minivmm(&["--explain", "--json", "--disk", "a.img", "--disk", "other.img"]);
    assert_eq!(output.status.code(), Some(FAILURE));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let refusals = |at: usize| told[at]["refusals"].as_array().unwrap().len();
    assert_eq!((refusals(0), refusals(1)), (1, 0), "{told:#}");
}

#[test]
fn what_cannot_be_a_disk_is_told_with_what_was_meant_and_a_line_that_can_be_pasted() {
    let place = Place::new();
    let put = |name: &str, first: &[u8]| {
        let mut content = first.to_vec();
        content.resize(if first.is_empty() { 0 } else { 4096 }, 0);
        fs::write(place.at(name), content).unwrap();
    };
    put("it's empty", b"");
    put("a vm.vhdx", b"vhdxfile");
    for (name, magic) in [
        ("a.gz", &b"\x1f\x8b\x08"[..]),
        ("a.xz", b"\xfd7zXZ\0"),
        ("a.zst", b"\x28\xb5\x2f\xfd"),
        ("a.bz2", b"BZh9"),
    ] {
        put(name, magic);
    }
    for (disk, words) in [
        ("no such.img", "does not exist: check its name, or make it, as in `truncate -s 1G 'no such.img'`"),
        ("path=a.img", "without a key: --disk a.img"),
        ("path=no.img", "truncate -s 1G path=no.img"),
        ("dangling", "a symbolic link to new, which does not exist"),
        ("it's empty", r"`truncate -s 1G 'it'\''s empty'`"),
        ("a vm.vhdx", "`qemu-img convert -O raw 'a vm.vhdx' 'a vm.vhdx.raw'`"),
        (
            "a.gz",
            "compressed (gzip), and what a guest writes would destroy it: unpack it with `gzip -dc a.gz > a.gz.raw`",
        ),
        ("a.xz", "`xz -dc a.xz > a.xz.raw`"),
        ("a.zst", "`zstd -dc a.zst > a.zst.raw`"),
        ("a.bz2", "`bzip2 -dc a.bz2 > a.bz2.raw`"),
    ] {
        place.must_refuse_and_explain(&["--disk", disk], &[words]);
    }
    place.must_pass(&["--disk", "a.gz,readonly", "--disk", "a.xz,format=raw"], "");
}

#[test]
fn a_status_file_that_cannot_be_written_is_named() {
    Place::new()
        .must_refuse(&["--status-file", "/dev/full"], &["cannot write the status file: /dev/full: No space"]);
}

#[test]
fn an_image_larger_than_the_hosts_memory_is_not_read_into_its_cache() {
    let place = Place::new();
    if let Err(error) = File::create(place.at("huge")).unwrap().set_len(8 << 40) {
        skip("large-files", &format!("no file of 8 TiB can be made here: {error}"));
        return;
    }
    let guest =
        ["--host=direct", "--kernel", env!("CARGO_BIN_EXE_minivmm"), "--disk", "huge,host-cache=warm"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_minivmm"));
    command.current_dir(place.dir.path()).args(["--initrd", "none", "--timeout", "20"]).args(guest);
    let output = command.output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(FAILURE), "{told}");
    assert!(told.contains("huge") && told.contains("bytes of this host's memory"), "{told}");
}

#[test]
fn a_program_that_has_an_image_by_flock_is_named() {
    let place = Place::new();
    let ready = "exec 9<>a.img; flock 9; echo ready; read line";
    let mut holder = Command::new("sh");
    holder.args(["-c", ready]).current_dir(place.dir.path());
    holder.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let Ok(mut holder) = holder.spawn() else { panic!("no sh") };
    let mut line = [0; 6];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut line).unwrap();
    let id = format!("process {}", holder.id());
    place.must_refuse_and_explain(&["--disk", "a.img"], &["a.img", &id, "flock", "shared-with-host"]);
    place.must_pass(&["--disk", "a.img,shared-with-host"], "");
    drop(holder.stdin.take());
    holder.wait().unwrap();
    place.must_pass(&["--disk", "a.img"], "");
}

#[test]
fn an_image_behind_a_loop_device_is_refused_mounted_or_not() {
    let place = Place::new();
    let Some(image) = place.ext4("e.img") else { return };
    let Some(device) = LoopDevice::new(&image, 512) else { return };
    let name = device.0.display().to_string();
    fs::hard_link(&image, place.at("link")).unwrap();
    let attached = format!("{name} is attached to it");
    for disk in ["e.img", "link", "e.img,cache=writeback"] {
        let remedy = format!("losetup -d {name}");
        place.must_refuse_and_explain(&["--disk", disk], &[&attached, &remedy, "shared-with-host"]);
    }
    place.must_pass(&["--disk", "e.img,shared-with-host"], &attached);
    place.must_pass(&["--disk", "e.img,readonly"], &attached);
    // Two names of the same bytes.
    place.must_refuse_and_explain(
        &["--disk", &name, "--disk", "e.img,shared-with-host"],
        &["share bytes", &name],
    );
    // A report must not go there either: its beginning is text.
    let text = place.at("text");
    fs::write(&text, "text\n".repeat(1 << 16)).unwrap();
    let Some(report) = LoopDevice::new(&text, 512) else { return };
    let word = format!("{} is attached to it", report.0.display());
    place.must_refuse(&["--console", "file=text"], &[&word, "this host uses it"]);
    assert_eq!(fs::metadata(&text).unwrap().len(), 5 << 16);

    let Some(mounted) = Mounted::device(&device.0) else { return };
    let point = mounted.dir.path().display().to_string();
    let words = format!("is mounted on {point}");
    place.must_refuse_and_explain(&["--disk", "e.img"], &[&words, &format!("umount {point}")]);
    place.must_refuse_and_explain(&["--disk", &name], &[&words]);
    place.must_pass(&["--disk", &format!("{name},readonly")], &words);
    drop(mounted);
    drop(device);
    place.must_pass(&["--disk", "e.img"], "");
}

#[test]
fn a_swap_file_is_refused() {
    let place = Place::new();
    let script = "dd if=/dev/zero of=swap bs=1M count=2 2>&1; chmod 600 swap; mkswap swap && swapon swap";
    let made = Command::new("sh").args(["-ec", script]).current_dir(place.dir.path()).output().unwrap();
    if !made.status.success() {
        skip("swap", &format!("this user, or this file system, cannot swap: {}", words_of(&made.stderr)));
        return;
    }
    let refused = std::panic::catch_unwind(|| {
        place.must_refuse_and_explain(&["--disk", "swap"], &["it is swap space", "swapoff"]);
    });
    assert!(Command::new("swapoff").arg(place.at("swap")).status().unwrap().success());
    refused.unwrap();
}

#[test]
fn a_partition_table_for_other_blocks_is_warned_of() {
    let place = Place::new();
    let gpt = |name: &str, block: usize| {
        let mut image = vec![0; 1 << 20];
        image[block..block + 8].copy_from_slice(b"EFI PART");
        image[block + 24] = 1;
        fs::write(place.at(name), image).unwrap();
    };
    gpt("512.img", 512);
    gpt("4096.img", 4096);
    let warning = "was made for blocks of";
    for (disk, told) in [
        ("512.img,cache=writeback", false),
        ("512.img,cache=writeback,block-size=4096", true),
        ("4096.img,cache=writeback", true),
        ("4096.img,cache=writeback,block-size=4096", false),
    ] {
        for args in [&["--disk", disk][..], &["--explain", "--disk", disk]] {
            let output = place.minivmm(args);
            let text = words_of(&[output.stdout, output.stderr].concat());
            assert_eq!(text.contains(warning), told, "{args:?}: {text}");
        }
    }
    // A host's disk with blocks of 4096 bytes, where mode none needs them. (An image on it: see below.)
    let Some(device) = LoopDevice::new(&place.at("512.img"), 4096) else { return };
    let name = device.0.display().to_string();
    for mode in ["none", "writeback"] {
        place.must_pass(&["--disk", &format!("{name},cache={mode}")], "made for blocks of 512 bytes");
    }
    place.must_pass(&["--disk", &format!("{name},cache=writeback,block-size=512")], "");
}

/// A file system on a disk with blocks of 4096 bytes: what mode none needs, writeback does not.
#[test]
fn an_image_on_a_4kn_disk_loses_its_partitions_with_a_warning() {
    let place = Place::new();
    let host = place.at("host.img");
    File::create(&host).unwrap().set_len(64 << 20).unwrap();
    let Some(device) = LoopDevice::new(&host, 4096) else { return };
    assert!(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&device.0).status().unwrap().success());
    let Some(mounted) = Mounted::device(&device.0) else { return };
    let image = mounted.dir.path().join("g.img");
    let mut bytes = vec![0; 1 << 20];
    bytes[512..520].copy_from_slice(b"EFI PART");
    bytes[512 + 24] = 1;
    fs::write(&image, bytes).unwrap();
    let disk = |keys: &str| format!("{}{keys}", image.display());
    place.must_pass(&["--disk", &disk(",cache=none")], "use cache=writeback,block-size=512");
    place.must_pass(&["--disk", &disk(",cache=writeback")], "");
    // The change of the size itself is told beforehand, whatever is in the image.
    for (mode, other) in [("none", 512), ("writeback", 4096)] {
        let output = place.minivmm(&["--explain", "--json", "--disk", &disk(&format!(",cache={mode}"))]);
        let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(told[0]["blocks"]["other_modes"], other, "{mode}: {told:#}");
    }
}
