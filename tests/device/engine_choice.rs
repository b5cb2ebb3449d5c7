//! Which engine a disk gets on which host, and what an engine leaves behind when it goes.

use std::error::Error;
use std::fs::File;
use std::sync::Arc;

use minivmm::disk::choice::{Chosen, EngineKind, choose};
use minivmm::disk::{DiskConfig, Image};
use minivmm::disk_options;
use minivmm_testkit::driver::*;
use minivmm_testkit::images::TestImage;

use super::FORKS;

fn config(text: &str) -> DiskConfig {
    disk_options::parse(text).unwrap().config
}

fn with_engine(test: &TestImage, mode: &str, engine: &str) -> DiskConfig {
    config(&format!("{},cache={mode},engine={engine}", test.path.display()))
}

/// From now on io_uring_setup fails in this thread, as on hosts whose seccomp filter has no io_uring.
fn forbid_io_uring() {
    let code = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let errno = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let mut filter = [
        code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
        code(libc::BPF_RET | libc::BPF_K, 0, 0, errno),
        code(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: no pointers; and then a filter that is valid for the length of the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

#[test]
fn auto_takes_the_blocking_engine_where_io_uring_is_forbidden_and_says_why() {
    let test = TestImage::new(1 << 20);
    // A filter is a thread's own.
    std::thread::spawn(move || {
        forbid_io_uring();
        for mode in ["none", "writeback"] {
            let image = Arc::new(Image::open(&with_engine(&test, mode, "auto")).unwrap());
            let Chosen { engines, kind, why } = choose(&image, None, 1).unwrap();
            assert_eq!((kind, image.stats.engine()), (EngineKind::Blocking, "sync"));
            assert!(why.unwrap().contains("forbids io_uring"));
            // Both hold the file, and with it the lock.
            drop((engines, image));
            let image = Arc::new(Image::open(&with_engine(&test, mode, "io_uring")).unwrap());
            let Err(error) = choose(&image, None, 1) else { panic!("io_uring is forbidden") };
            let text = format!("{error}: {}", error.source().unwrap());
            for needle in ["test.img", "engine=sync", "io_uring_setup"] {
                assert!(text.contains(needle), "{text}");
            }
        }
        // And the device works.
        let image = Arc::new(Image::open(&with_engine(&test, "none", "auto")).unwrap());
        let mut rig = Rig::live(image, F_FLUSH);
        assert_eq!(rig.write_sectors(8, &[7; 4096]), OK);
        assert_eq!(rig.flush(), OK);
        assert_eq!(rig.read_sectors(8, 4096), (OK, vec![7; 4096]));
    })
    .join()
    .unwrap();
}

#[test]
fn auto_takes_the_blocking_engine_on_tmpfs() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("a.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    for (engine, kind) in [("auto", EngineKind::Blocking), ("io_uring", EngineKind::Uring)] {
        let options = config(&format!("{},cache=writeback,engine={engine}", path.display()));
        let image = Arc::new(Image::open(&options).unwrap());
        let chosen = choose(&image, None, 1).unwrap();
        assert_eq!(chosen.kind, kind, "{engine}");
        assert_eq!(chosen.why.is_some(), engine == "auto");
    }
}

#[test]
fn an_image_is_free_as_soon_as_its_device_is_gone() {
    let test = TestImage::new(1 << 20);
    // The child of another test would hold the lock as well, for a moment.
    let _no_child = FORKS.lock();
    for round in 0..20 {
        let image = Arc::new(Image::open(&with_engine(&test, "none", "io_uring")).unwrap());
        let mut rig = Rig::live(image, F_FLUSH);
        assert_eq!(rig.write_sectors(round, &[round as u8; 512]), OK);
        drop(rig);
        let seen = Image::look(&with_engine(&test, "none", "sync")).unwrap();
        assert!(!seen.file().is_locked_by_another(), "round {round}: the ring still has the image");
    }
}

#[test]
fn guest_memory_that_cannot_be_pinned_is_an_error_that_names_the_limit() {
    let test = TestImage::new(1 << 20);
    let options = config(&format!("{},engine=io_uring,buffers=fixed", test.path.display()));
    let image = Arc::new(Image::open(&options).unwrap());
    // Memory that the kernel refuses to register: not mapped any more by the time it looks.
    let ram = minivmm::mem::map_ram(&[(0, 1 << 20)]).unwrap();
    let (_, host, bytes) = ram.regions()[0];
    // SAFETY: nobody touches this RAM, and a mapping of nothing takes its place until it goes.
    let hidden = unsafe { libc::mprotect(host as *mut libc::c_void, bytes as usize, libc::PROT_NONE) };
    assert_eq!(hidden, 0);
    let Err(error) = choose(&image, Some(&ram), 1) else { panic!("it cannot be registered") };
    let text = error.source().unwrap().to_string();
    for needle in ["1048576 bytes", "ulimit -l", "buffers=plain"] {
        assert!(text.contains(needle), "{text}");
    }
}
