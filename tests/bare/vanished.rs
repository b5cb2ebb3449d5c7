//! An image that is deleted, cut, or whose name another file takes, while the VM runs.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use minivmm_testkit::machine::*;

use crate::stats::Echo;

/// What is to be done with an image while a guest has it.
type Deed = fn(&Path);

fn delete(image: &Path) {
    fs::remove_file(image).unwrap();
}

fn replace(image: &Path) {
    let other = image.with_extension("new");
    fs::write(&other, "another").unwrap();
    fs::rename(other, image).unwrap();
}

#[test]
fn it_is_told_at_once_and_the_end_is_that_of_lost_data() {
    if !kvm() {
        return;
    }
    for deed in [delete as Deed, replace] {
        let image = Image::new();
        let mut guest = Echo::start(&["--disk", &image.disk("cache=writeback")]);
        deed(&image.path);
        let told = guest.hears("all that the guest writes is lost");
        assert!(told.contains(image.path.to_str().unwrap()), "{told}");
        let save = told.split('`').nth(1).unwrap().to_owned();
        assert!(save.contains(&format!("/proc/{}/fd/", guest.id())), "{save}");
        guest.answers();
        let end = guest.end_with(FAILURE);
        assert!(end.contains("was deleted") && end.contains("is lost"), "{end}");
        assert_eq!(end.matches("deleted").count(), 1, "{end}");
    }
}

#[test]
fn the_command_that_is_told_saves_the_image() {
    if !kvm() {
        return;
    }
    // SAFETY: geteuid has no argument and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        skip("root", "only root can inspect minivmm's descriptors");
        return;
    }
    let image = Image::new();
    let saved = image.path.with_file_name("SAVED.img");
    let mut guest = Echo::start(&["--disk", &image.disk("cache=none")]);
    delete(&image.path);
    let told = guest.hears("all that the guest writes is lost");
    let save = told.split('`').nth(1).unwrap().replace("sudo ", "");
    let directory = image.path.parent().unwrap();
    assert!(
        Command::new("sh").arg("-ec").arg(&save).current_dir(directory).status().unwrap().success(),
        "{save}"
    );
    assert!(fs::read(&saved).unwrap() == Image::before(), "{save}");
    guest.answers();
    guest.end_with(FAILURE);
}

#[test]
fn the_statistics_tell_it_too() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    let stats = image.path.with_file_name("stats.json");
    let mut guest =
        Echo::start(&["--disk", &image.disk("cache=none"), &format!("--stats={}", stats.display())]);
    delete(&image.path);
    guest.hears("all that the guest writes is lost");
    guest.end_with(FAILURE);
    let found: serde_json::Value = serde_json::from_slice(&fs::read(&stats).unwrap()).unwrap();
    assert_eq!(found["disks"][0]["deleted"], true, "{found:#}");
}

#[test]
fn what_loses_nothing_is_no_failure() {
    if !kvm() {
        return;
    }
    // Another name is left.
    let image = Image::new();
    fs::hard_link(&image.path, image.path.with_extension("link")).unwrap();
    let mut guest = Echo::start(&["--disk", &image.disk("cache=none")]);
    delete(&image.path);
    guest.signal();
    guest.answers();
    assert!(!guest.end().contains("deleted"));
    // Nothing can have been written.
    let image = Image::new();
    let mut guest = Echo::start(&["--disk", &image.disk("cache=none,readonly")]);
    delete(&image.path);
    assert!(guest.hears("deleted").contains("goes on"));
    guest.end();
    // It had no name from the beginning: a scratch disk that goes by itself.
    let image = Image::new();
    let file = fs::File::options().read(true).write(true).open(&image.path).unwrap();
    delete(&image.path);
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
    let disk = format!("/proc/self/fd/{},cache=writeback", file.as_raw_fd());
    let guest = Echo::start(&["--disk", &disk]);
    assert!(!guest.end().contains("deleted"));
}

fn cut(image: &Path, bytes: u64) {
    fs::File::options().write(true).open(image).unwrap().set_len(bytes).unwrap();
}

/// The guest makes no request meanwhile.
#[test]
fn an_image_that_is_cut_is_told_and_its_end_is_that_of_lost_data() {
    if !kvm() {
        return;
    }
    for as_long_again in [false, true] {
        let image = Image::new();
        let stats = image.path.with_file_name("stats.json");
        let stats_option = format!("--stats={}", stats.display());
        let mut guest = Echo::start(&["--disk", &image.disk("cache=writeback"), &stats_option]);
        cut(&image.path, 4096);
        let told = guest.hears("has cut disk image");
        assert!(told.contains(image.path.to_str().unwrap()), "{told}");
        assert!(told.contains(&format!("from {IMAGE_BYTES} to 4096 bytes")), "{told}");
        if as_long_again {
            cut(&image.path, IMAGE_BYTES as u64);
        }
        guest.answers();
        let end = guest.end_with(FAILURE);
        assert!(end.contains("was cut by another program") && end.contains("is lost"), "{end}");
        assert_eq!(end.matches(" cut ").count(), 1, "{end}");
        let found: serde_json::Value = serde_json::from_slice(&fs::read(&stats).unwrap()).unwrap();
        assert_eq!(found["disks"][0]["cut_to_bytes"], 4096, "{found:#}");
    }
}

#[test]
fn an_image_that_grows_or_is_only_read_loses_nothing() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    let mut guest = Echo::start(&["--disk", &image.disk("cache=none,readonly")]);
    cut(&image.path, 4096);
    assert!(guest.hears("has cut disk image").contains("warning"));
    guest.end();
    let image = Image::new();
    let mut guest = Echo::start(&["--disk", &image.disk("cache=none")]);
    cut(&image.path, 2 * IMAGE_BYTES as u64);
    guest.signal();
    guest.answers();
    assert!(!guest.end().contains(" cut "));
}
