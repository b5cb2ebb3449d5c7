//! Detects that an image vanishes while the VM runs: its file is deleted, replaced by a rename, or cut
//! (`truncate -s`).
//!
//! Owns the detection. The kernel reports changes of a name at once (inotify), if the file system can. It
//! reports changes of size only among all of the guest's writes. Sizes are therefore checked every second,
//! which also finds changed names that were not reported. No thread waits for either: the main loop has one
//! more descriptor and one more timeout.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use super::OpenDisk;

/// The number of bytes of events that one read takes. Their content is ignored: every file is checked anyway.
const EVENTS_BYTES: usize = 4096;
/// How often the files are checked.
const LOOK: Duration = Duration::from_secs(1);

/// The files of the images, and what has been reported of them.
pub struct ImageFiles {
    renamed: Option<OwnedFd>,
    /// What has been reported, per disk.
    told: Vec<Told>,
    looked: Instant,
}

#[derive(Debug, Clone, Copy, Default)]
struct Told {
    deleted: bool,
    cut: bool,
}

impl ImageFiles {
    /// Starts to watch the files of these images.
    pub fn watch(disks: &[OpenDisk]) -> Self {
        let renamed = watch(disks).inspect_err(|error| log::info!("cannot watch the images' names: {error}"));
        Self { renamed: renamed.ok(), told: vec![Told::default(); disks.len()], looked: Instant::now() }
    }

    /// The descriptor to wait for before a call of [`ImageFiles::look`]; `None` if names cannot be watched.
    pub fn as_raw_fd(&self) -> Option<RawFd> {
        self.renamed.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Returns the time until the next check is due, or `None` if there is no disk.
    pub fn wait(&self) -> Option<Duration> {
        (!self.told.is_empty()).then(|| LOOK.saturating_sub(self.looked.elapsed()))
    }

    /// Reports each image that has vanished, once.
    pub fn look(&mut self, disks: &[OpenDisk]) {
        self.looked = Instant::now();
        if let Some(renamed) = &self.renamed {
            let mut events = [0; EVENTS_BYTES];
            while rustix::io::read(renamed, &mut events).is_ok_and(|count| count > 0) {}
        }
        for (disk, told) in disks.iter().zip(&mut self.told) {
            if !told.deleted && disk.image.file().is_deleted() {
                told.deleted = true;
                tell_deleted(disk);
            }
            if !told.cut
                && let Some((before, now)) = disk.image.file().cut()
            {
                told.cut = true;
                tell_cut(disk, before, now);
            }
        }
    }
}

fn watch(disks: &[OpenDisk]) -> io::Result<OwnedFd> {
    let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    for disk in disks.iter().filter(|disk| !disk.image.file().is_device()) {
        // Watched through its descriptor, so that it is the file which is open. The link count is an
        // attribute.
        let path = format!("/proc/self/fd/{}", disk.image.file().descriptor().as_raw_fd());
        inotify::add_watch(&changes, path, WatchFlags::ATTRIB)?;
    }
    Ok(changes)
}

fn tell_deleted(disk: &OpenDisk) {
    let path = disk.path.display();
    if disk.image.config().readonly {
        log::warn!(
            "disk image {path} was deleted, or another file has taken its name; the guest goes on with the old one"
        );
        return;
    }
    let (pid, fd) = (std::process::id(), disk.image.file().descriptor().as_raw_fd());
    log::error!(
        "disk image {path} was deleted, or another file has taken its name: all that the guest writes is lost when \
         minivmm ends. Until then root can save it (the process cannot be inspected by its own user): `kill -STOP {pid}; \
         sudo cp --sparse=always /proc/{pid}/fd/{fd} SAVED.img; kill -CONT {pid}`"
    );
}

fn tell_cut(disk: &OpenDisk, before: u64, now: u64) {
    let path = disk.path.display();
    if disk.image.config().readonly {
        log::warn!(
            "another program has cut disk image {path} from {before} to {now} bytes: the guest's reads beyond fail"
        );
        return;
    }
    log::error!(
        "another program has cut disk image {path} from {before} to {now} bytes: what lay beyond is lost. The guest's \
         reads there fail, or find zeroes once it has written further on; end it, and restore the image from a backup"
    );
}
