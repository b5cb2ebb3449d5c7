//! cache=dontcache on a real file system: nothing of what goes through the device stays in the host's page cache,
//! misaligned memory needs no bounce buffer, and a host without RWF_DONTCACHE is refused with what to use instead.
//!
//! Owns the measuring of residency, by mincore(2). MINIVMM_DONTCACHE_MIB is the size of the image in MiB
//! (`make torture` takes 1024).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use minivmm::disk::cache::CachePolicy;
use minivmm::disk::{DiskConfig, Image};
use minivmm::disk_options;
use minivmm::observe::control::{self, HostCache};
use minivmm_testkit::dontcache;
use minivmm_testkit::driver::*;
use minivmm_testkit::images::{TestImage, pattern, test_dir};
use minivmm_testkit::loops::{LoopDevice, Mounted};
use minivmm_testkit::skips::skip;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const ENGINES: [&str; 2] = ["sync", "io_uring"];
const FEATURES: u64 = F_FLUSH | F_CONFIG_WCE;

fn image_bytes() -> u64 {
    let asked = std::env::var("MINIVMM_DONTCACHE_MIB").ok().and_then(|text| text.parse::<u64>().ok());
    asked.unwrap_or(256) * MIB
}

fn config(path: &Path, keys: &str) -> DiskConfig {
    DiskConfig { path: path.to_owned(), ..disk_options::parse(format!("x,{keys}")).unwrap().config }
}

/// Returns the number of bytes of the file that are in the page cache.
fn resident(file: &File) -> u64 {
    let bytes = file.metadata().unwrap().len() as usize;
    // SAFETY: a new mapping of a file, at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    assert_ne!(at, libc::MAP_FAILED);
    let mut pages = vec![0_u8; bytes.div_ceil(PAGE as usize)];
    // SAFETY: the mapping is as long as that, and `pages` has a byte for each page of it.
    let result = unsafe { libc::mincore(at, bytes, pages.as_mut_ptr()) };
    // SAFETY: the mapping made above, which nobody uses any more.
    unsafe { libc::munmap(at, bytes) };
    assert_eq!(result, 0);
    pages.iter().filter(|page| **page & 1 != 0).count() as u64 * PAGE
}

/// Brings the file to the disk and out of the page cache.
fn evict(file: &File) {
    file.sync_all().unwrap();
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) }, 0);
    assert_eq!(resident(file), 0, "somebody else uses the image");
}

/// What the page cache has of the image, in bytes.
#[derive(Debug, Default)]
struct Residency {
    /// After all of it was written to new blocks, and flushed.
    written: u64,
    /// At most, while all of it was read.
    while_read: u64,
    /// After that.
    read: u64,
    /// After all of it was written over, and flushed.
    written_over: u64,
    /// After it was read once more.
    read_again: u64,
}

/// Byte of the MiB at `at`, in the given pass.
fn byte_of(at: u64, pass: u8) -> u8 {
    (at / MIB % 251) as u8 ^ pass
}

fn write_all(rig: &mut Rig, pass: u8) {
    for at in (0..image_bytes()).step_by(MIB as usize) {
        assert_eq!(rig.write_sectors(at / 512, &vec![byte_of(at, pass); MIB as usize]), OK, "at {at}");
    }
    assert_eq!(rig.flush(), OK);
}

/// Returns the most that the page cache has of the file meanwhile.
fn read_all(rig: &mut Rig, pass: u8, file: &File) -> u64 {
    let mut most = 0;
    for at in (0..image_bytes()).step_by(MIB as usize) {
        let (status, data) = rig.read_sectors(at / 512, MIB as u32);
        assert_eq!((status, data == vec![byte_of(at, pass); MIB as usize]), (OK, true), "at {at}");
        if at / MIB % 16 == 15 {
            most = most.max(resident(file));
        }
    }
    most
}

fn residency(dir: &Path, mode: &str, engine: &str) -> Residency {
    let path = dir.join("a.img");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    file.set_len(image_bytes()).unwrap();
    let keys = format!("cache={mode},engine={engine}");
    let mut rig = Rig::live(Arc::new(Image::open(&config(&path, &keys)).unwrap()), FEATURES);
    let mut found = Residency::default();
    evict(&file);
    write_all(&mut rig, 1);
    found.written = resident(&file);
    evict(&file);
    found.while_read = read_all(&mut rig, 1, &file);
    found.read = resident(&file);
    evict(&file);
    write_all(&mut rig, 2);
    found.written_over = resident(&file);
    read_all(&mut rig, 2, &file);
    found.read_again = resident(&file);
    drop(rig);
    std::fs::remove_file(&path).unwrap();
    println!("{mode} {engine}: {found:?} of {}", image_bytes());
    found
}

/// Returns `true` if the file system in `dir` is ext4 (linux/magic.h).
fn is_ext4(dir: &Path) -> bool {
    let dir = File::open(dir).unwrap();
    // SAFETY: statfs is plain numbers, for which all zeroes are valid.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `found` is valid for writes.
    assert_eq!(unsafe { libc::fstatfs(dir.as_raw_fd(), &raw mut found) }, 0);
    found.f_type == 0xef53
}

/// readv(2): the pages that a request with RWF_DONTCACHE has made are dropped when it completes, best effort. What
/// the kernel has read ahead stays until it is read, so while the image is read some MiB of it may be there.
fn nothing_must_stay_in(dir: &Path) {
    let few = image_bytes() / 100;
    for engine in ENGINES {
        let found = residency(dir, "dontcache", engine);
        assert!(found.written <= few && found.read <= few && found.read_again <= few, "{engine}: {found:?}");
        assert!(found.while_read <= 64 * MIB, "{engine}: {found:?}");
        // ext4 completes the writeback of blocks that exist in an interrupt, where Linux drops no page
        // (mm/filemap.c); xfs defers it.
        assert!(found.written_over <= few || is_ext4(dir), "{engine}: {found:?}");
    }
}

#[test]
fn of_all_that_goes_through_the_device_nothing_stays_in_the_hosts_page_cache() {
    if !dontcache::is_here() {
        return;
    }
    let dir = test_dir();
    nothing_must_stay_in(dir.path());
    // The controls: all of it, and nothing.
    let (bytes, most) = (image_bytes(), image_bytes() / 100 * 99);
    let writeback = residency(dir.path(), "writeback", "sync");
    for part in [writeback.written, writeback.read, writeback.written_over, writeback.read_again] {
        assert!(part >= most && part <= bytes, "{writeback:?}");
    }
    let none = residency(dir.path(), "none", "sync");
    assert_eq!((none.written, none.read, none.written_over, none.read_again), (0, 0, 0, 0), "{none:?}");
}

/// As root, where mkfs.xfs is installed.
#[test]
fn on_xfs_what_is_written_over_is_dropped_too() {
    let backing = test_dir();
    let path = backing.path().join("xfs.img");
    File::create(&path).unwrap().set_len(2 * image_bytes() + 512 * MIB).unwrap();
    let made = Command::new("mkfs.xfs").arg("-q").arg(&path).status();
    if !made.is_ok_and(|status| status.success()) {
        skip("xfs", "mkfs.xfs is not installed");
        return;
    }
    let Some(device) = LoopDevice::new(&path, 512) else { return };
    let Some(mounted) = Mounted::device(&device.0) else { return };
    if !dontcache::is_taken_in(mounted.dir.path()) {
        skip("dontcache", "xfs has no RWF_DONTCACHE here (since Linux 6.15)");
        return;
    }
    nothing_must_stay_in(mounted.dir.path());
}

/// What was in the page cache before stays there (readv(2)), and what the guest writes is what others read.
#[test]
fn what_the_page_cache_has_already_stays_and_is_the_same_data() {
    if !dontcache::is_here() {
        return;
    }
    for engine in ENGINES {
        let test = TestImage::new(4 * MIB);
        let file = File::open(&test.path).unwrap();
        let mut rig = Rig::live(
            Arc::new(Image::open(&config(&test.path, &format!("cache=dontcache,engine={engine}"))).unwrap()),
            FEATURES,
        );
        assert_eq!(test.content().len() as u64, 4 * MIB);
        assert_eq!(resident(&file), 4 * MIB, "read by somebody else");
        assert_eq!(rig.read_sectors(8, 4096), (OK, test.content()[4096..8192].to_vec()), "{engine}");
        assert_eq!(rig.write_sectors(8, &[0xa5; 4096]), OK, "{engine}");
        assert_eq!(test.content()[4096..8192], [0xa5; 4096], "{engine}: before any FLUSH");
        assert_eq!(rig.flush(), OK);
        assert_eq!(resident(&file), 4 * MIB, "{engine}");
    }
}

/// A page that is left is dropped by the next read, even by one without the flag.
#[test]
fn an_image_can_be_warmed_after_a_run_in_this_mode() {
    if !dontcache::is_here() {
        return;
    }
    for engine in ENGINES {
        let test = TestImage::new(16 * MIB);
        let file = File::open(&test.path).unwrap();
        evict(&file);
        let image =
            Arc::new(Image::open(&config(&test.path, &format!("cache=dontcache,engine={engine}"))).unwrap());
        let mut rig = Rig::live(Arc::clone(&image), FEATURES);
        for at in (0..16 * MIB).step_by(MIB as usize) {
            assert_eq!(rig.write_sectors(at / 512, &vec![9; MIB as usize]), OK);
        }
        assert_eq!(rig.flush(), OK);
        control::apply(HostCache::Warm, &image).unwrap();
        assert_eq!(resident(&file), 16 * MIB, "{engine}");
        control::apply(HostCache::Drop, &image).unwrap();
        assert_eq!(resident(&file), 0, "{engine}");
    }
}

/// O_DIRECT wants memory on boundaries, and pieces as long as blocks; the page cache wants neither.
#[test]
fn memory_that_fits_no_boundary_needs_no_bounce_buffer() {
    if !dontcache::is_here() {
        return;
    }
    for engine in ENGINES {
        for (mode, needs_bounce) in [("dontcache", false), ("writeback", false), ("none", true)] {
            let test = TestImage::new(MIB);
            let image = Image::open(&config(&test.path, &format!("cache={mode},engine={engine}"))).unwrap();
            let mut rig = Rig::live(Arc::new(image), FEATURES);
            let what = format!("{mode} {engine}");
            for (kind, flags) in [(IN, WRITE), (OUT, 0), (IN, WRITE)] {
                if kind == OUT {
                    rig.fill(DATA, 0x5c, 8192);
                }
                rig.put_header(kind, 3);
                // 1536 bytes at odd addresses, in pieces of no block's length.
                let parts = [
                    (HEADER, 16, 0),
                    (DATA + 1, 700, flags),
                    (DATA + 1003, 836, flags),
                    (STATUS_BYTE, 1, WRITE),
                ];
                rig.put_chain(DESC, &parts);
                assert_eq!(rig.submit_chain().0, OK, "{what}");
                let data = [rig.peek(DATA + 1, 700), rig.peek(DATA + 1003, 836)].concat();
                let expected = match rig.read_sectors(3, 512) {
                    (OK, sector) if sector == [0x5c; 512] => vec![0x5c; 1536],
                    _ => [3, 4, 5].map(|sector| [pattern(sector); 512]).concat(),
                };
                assert_eq!(data, expected, "{what}");
            }
            let bounces = rig.image.stats.counters().bounces.load(Ordering::Relaxed);
            assert_eq!(bounces > 0, needs_bounce, "{what}: {bounces}");
        }
    }
}

#[test]
fn a_readonly_image_is_read_and_never_written_or_synced() {
    if !dontcache::is_here() {
        return;
    }
    for engine in ENGINES {
        let test = TestImage::new(MIB);
        let before = test.content();
        let keys = format!("cache=dontcache,readonly,engine={engine}");
        let image = Arc::new(Image::open(&config(&test.path, &keys)).unwrap());
        let mut rig = Rig::live(Arc::clone(&image), FEATURES);
        assert_eq!(rig.read_sectors(3, 512), (OK, vec![pattern(3); 512]));
        assert_eq!(rig.write_sectors(3, &[1; 512]), IOERR);
        assert_eq!(rig.flush(), OK);
        image.close().unwrap();
        assert_eq!(image.file().open_flags(), "O_RDONLY");
        assert!(test.content() == before);
    }
}

fn minivmm(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_minivmm")).args(arguments).output().unwrap()
}

/// The refusal of this image, by the library, by --explain and by a run.
fn must_be_refused(path: &Path, what: &str) {
    let cache = CachePolicy::by_name("dontcache").unwrap();
    let error = Image::open(&DiskConfig { cache, ..DiskConfig::new(path) }).unwrap_err();
    let disk = format!("{},cache=dontcache", path.display());
    let explained = minivmm(&["--explain", "--disk", &disk]);
    let guest = std::env::current_exe().unwrap().display().to_string();
    let ran = minivmm(&["--host=direct", "--kernel", &guest, "--initrd", "none", "--disk", &disk]);
    let stderr = |output: &Output| String::from_utf8_lossy(&output.stderr).replace('\n', " ");
    for text in [error.reason.to_string(), stderr(&explained), stderr(&ran)] {
        for word in ["RWF_DONTCACHE", "cache=none or cache=writeback"] {
            assert!(text.contains(word), "{what}: no {word} in: {text}");
        }
    }
    assert_eq!((explained.status.code(), ran.status.code()), (Some(125), Some(125)), "{what}");
}

#[test]
fn tmpfs_has_no_such_flag_and_is_refused_with_what_to_use_instead() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        skip("tmpfs", "no /dev/shm");
        return;
    };
    if dontcache::is_taken_in(dir.path()) {
        skip("tmpfs", "/dev/shm takes RWF_DONTCACHE");
        return;
    }
    let path = dir.path().join("a.img");
    std::fs::write(&path, vec![7; MIB as usize]).unwrap();
    must_be_refused(&path, "tmpfs");
    assert!(std::fs::read(&path).unwrap() == vec![7; MIB as usize], "and left as it was");
}

/// As root. A block device has the flag since Linux 7.3; before, it is refused like a file without it.
#[test]
fn a_block_device_works_or_is_refused() {
    let test = TestImage::new(MIB);
    let Some(device) = LoopDevice::new(&test.path, 512) else { return };
    let cache = CachePolicy::by_name("dontcache").unwrap();
    match Image::open(&DiskConfig { cache, ..DiskConfig::new(&device.0) }) {
        Ok(image) => {
            let mut rig = Rig::live(Arc::new(image), FEATURES);
            assert_eq!(rig.write_sectors(8, &[3; 4096]), OK);
            assert_eq!(rig.read_sectors(8, 4096), (OK, vec![3; 4096]));
        }
        Err(_) => must_be_refused(&device.0, "a loop device"),
    }
}

/// As root: an overlay over a file system that has the flag has it not, until Linux says otherwise.
#[test]
fn a_file_on_an_overlay_works_or_is_refused() {
    let dir = test_dir();
    for name in ["lower", "upper", "work", "merged"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    std::fs::write(dir.path().join("lower/a.img"), vec![7; MIB as usize]).unwrap();
    let merged = dir.path().join("merged");
    let options = ["lower", "upper", "work"].map(|name| format!("{name}dir={}/{name}", dir.path().display()));
    let mount = ["-t", "overlay", "-o", &options.join(","), "overlay"];
    if !Command::new("mount").args(mount).arg(&merged).status().is_ok_and(|status| status.success()) {
        skip("root", "no overlay can be mounted here (root only)");
        return;
    }
    let mounted = Overlay(merged);
    if !dontcache::is_taken_in(&mounted.0) {
        must_be_refused(&mounted.0.join("a.img"), "an overlay");
    }
}

/// A mounted overlay; unmounted with this.
struct Overlay(PathBuf);

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn check_tells_of_the_flag() {
    let output = minivmm(&["check", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let row = report["rows"].as_array().unwrap().iter().find(|row| row["key"] == "RWF_DONTCACHE").unwrap();
    let is_there = dontcache::is_taken_by(&File::open(env!("CARGO_BIN_EXE_minivmm")).unwrap());
    assert_eq!((&row["group"], &row["status"]), (&"features".into(), &"note".into()), "{row}");
    assert_eq!(row["number"], u64::from(is_there), "{row}");
    assert!(row["found"].as_str().unwrap().contains("cache=dontcache"), "{row}");
}

#[test]
fn explain_tells_the_calls_and_what_ext4_keeps() {
    if !dontcache::is_here() {
        return;
    }
    let test = TestImage::new(MIB);
    let disk = format!("{},cache=dontcache,engine=sync", test.path.display());
    let output = minivmm(&["--explain", "--json", "--disk", &disk]);
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let told = &told[0];
    assert_eq!(told["calls"]["start"][0], "preadv2(RWF_DONTCACHE)", "{told}");
    assert_eq!(told["calls"]["drivers"][0]["read"]["calls"][0], "preadv2(RWF_DONTCACHE)", "{told}");
    assert_eq!(told["calls"]["drivers"][0]["write"]["calls"][0], "pwritev2(RWF_DONTCACHE)", "{told}");
    let notes = told["place"]["notes"].to_string();
    let is_ext4 = is_ext4(test.path.parent().unwrap());
    assert_eq!(notes.contains("what is written over stays in the page cache"), is_ext4, "{notes}");
}
