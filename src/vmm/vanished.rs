//! An image whose name goes while the VM runs: deleted, or replaced by a rename.
//!
//! Owns the notice. The kernel tells of it at once (inotify), where the file system can; else it is noticed with the
//! statistics and at the end. No thread waits for it: the main loop has one more descriptor.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use super::stop::OpenDisk;

/// Bytes of events that are read at once. What they say is looked up anyway.
const EVENTS_BYTES: usize = 4096;

/// The images' names.
pub struct Names {
    changes: Option<OwnedFd>,
    /// Of each disk, whether it is told.
    told: Vec<bool>,
}

impl Names {
    /// Watches the names of these images from here on.
    pub fn watch(disks: &[OpenDisk]) -> Self {
        let changes = watch(disks).inspect_err(|error| log::info!("cannot watch the images' names: {error}"));
        Self { changes: changes.ok(), told: vec![false; disks.len()] }
    }

    /// To be waited for; then [`Names::look`].
    pub fn as_raw_fd(&self) -> Option<RawFd> {
        self.changes.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Tells of each image whose name has gone, once.
    pub fn look(&mut self, disks: &[OpenDisk]) {
        if let Some(changes) = &self.changes {
            let mut events = [0; EVENTS_BYTES];
            while rustix::io::read(changes, &mut events).is_ok_and(|count| count > 0) {}
        }
        for (disk, told) in disks.iter().zip(&mut self.told) {
            if !*told && disk.image.is_deleted() {
                *told = true;
                tell(disk);
            }
        }
    }
}

fn watch(disks: &[OpenDisk]) -> io::Result<OwnedFd> {
    let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    for disk in disks.iter().filter(|disk| !disk.image.is_device()) {
        // By the descriptor, so that it is the file which is open. The count of links is an attribute.
        let path = format!("/proc/self/fd/{}", disk.image.file().as_raw_fd());
        inotify::add_watch(&changes, path, WatchFlags::ATTRIB)?;
    }
    Ok(changes)
}

fn tell(disk: &OpenDisk) {
    let path = disk.path.display();
    if disk.image.readonly() {
        log::warn!(
            "disk image {path} was deleted, or another file has taken its name; the guest goes on with the old one"
        );
        return;
    }
    let (pid, fd) = (std::process::id(), disk.image.file().as_raw_fd());
    log::error!(
        "disk image {path} was deleted, or another file has taken its name: all that the guest writes is lost when \
         minivmm ends. Until then root can save it (the process cannot be inspected by its own user): `kill -STOP {pid}; \
         sudo cp --sparse=always /proc/{pid}/fd/{fd} SAVED.img; kill -CONT {pid}`"
    );
}
