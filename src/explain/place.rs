//! Where an image lies: its file system, and which of its mount options affect durability.
//!
//! Owns the parsing of /proc/self/mountinfo, and the table of file systems and options that break or weaken a
//! promise. Knows nothing of the disks below.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use serde::Serialize;

use crate::disk::Image;
use crate::files::Device;
use crate::files::host_use::unescape;

/// A mounted file system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Type of the file system.
    pub file_system: String,
    /// What is mounted, for example a device.
    pub source: String,
    /// The mount point.
    pub mount_point: String,
    /// Options of the mount and of the file system.
    pub options: Vec<String>,
    /// What affects durability, in words.
    pub notes: Vec<String>,
    /// Why a FLUSH does not get past this file system; `None` if it may.
    #[serde(skip)]
    pub flush_stops: Option<String>,
    /// Why it is unknown whether a FLUSH gets past this file system; `None` if it is known.
    #[serde(skip)]
    pub flush_unknown: Option<String>,
    /// The host's disk that holds the file system; `None` if there is none or it is not known.
    #[serde(skip)]
    pub device: Option<Device>,
}

/// What happens to a FLUSH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flush {
    Passes,
    Stops,
    Unknown,
}

/// A rule for when a note is made.
struct Rule {
    file_systems: &'static [&'static str],
    /// Any of these options must be set; empty for no condition.
    options: &'static [&'static str],
    /// True if the rule applies only to images that are opened with O_DIRECT.
    direct: bool,
    flush: Flush,
    note: &'static str,
}

const ANY: &[&str] = &[];

static RULES: [Rule; 8] = [
    Rule {
        file_systems: &["tmpfs", "ramfs"],
        options: ANY,
        direct: true,
        flush: Flush::Stops,
        note: "O_DIRECT is fiction here: everything is in memory, in the page cache",
    },
    Rule {
        file_systems: &["tmpfs", "ramfs"],
        options: ANY,
        direct: false,
        flush: Flush::Stops,
        note: "everything is in memory: fdatasync does nothing, and nothing survives a crash of the host",
    },
    Rule {
        file_systems: &["overlay"],
        // Linux 6.18 shows the option `volatile` as `fsync=volatile`.
        options: &["volatile", "fsync=volatile"],
        direct: false,
        flush: Flush::Stops,
        note: "mounted volatile: fdatasync and RWF_DSYNC do nothing",
    },
    Rule {
        file_systems: &["overlay"],
        options: ANY,
        direct: false,
        flush: Flush::Passes,
        note: "the image is a file of the layer below; opened for writing for the first time it is copied to the upper one",
    },
    Rule {
        file_systems: ANY,
        options: &["nobarrier", "barrier=0", "fsync_mode=nobarrier"],
        direct: false,
        flush: Flush::Stops,
        note: "mounted without barriers: fdatasync writes, but sends the disk no flush",
    },
    Rule {
        file_systems: &["btrfs"],
        options: ANY,
        direct: false,
        flush: Flush::Passes,
        note: "copy on write: each fdatasync costs the disk two flushes",
    },
    Rule {
        file_systems: &["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "afs", "virtiofs", "lustre"],
        options: ANY,
        direct: false,
        flush: Flush::Unknown,
        note: "a file system of another machine: what its server does with a sync cannot be seen from here",
    },
    Rule {
        file_systems: &["zfs"],
        options: ANY,
        direct: false,
        flush: Flush::Unknown,
        note: "the data set's property sync decides what fdatasync does (sync=disabled: nothing); it cannot be seen here",
    },
];

const CHECKSUMS: &str = "btrfs with checksums: since Linux 6.14 an O_DIRECT write goes through the page cache (chattr +C on \
                         the empty file, or the mount option nodatasum, avoids it)";

const OVERWRITTEN: &str = "ext4 drops what is read and what is written to new blocks; what is written over stays in the page cache, \
                           clean, until it is read or reclaimed (Linux 6.18; xfs drops it)";

impl Place {
    /// Finds where `image` lies.
    pub fn of(image: &Image) -> Self {
        let mut place = Self::of_file(image.file().descriptor());
        if image.file().is_device() {
            // The file system found is the one of the device's node. It says nothing about the data.
            return Self { mount_point: place.mount_point, ..Self::default() };
        }
        place.judge(image.config().cache.direct);
        if place.file_system == "btrfs"
            && image.config().cache.direct
            && !place.is_unchecked(image.file().descriptor())
        {
            place.notes.push(CHECKSUMS.into());
        }
        if place.file_system == "ext4" && image.config().cache.drop_behind {
            place.notes.push(OVERWRITTEN.into());
        }
        place
    }

    /// Finds where `file` lies, without judging it.
    pub fn of_file(file: &File) -> Self {
        let fdinfo =
            fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).unwrap_or_default();
        let id =
            fdinfo.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim).unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut place = mounts
            .lines()
            .find(|line| line.split(' ').next() == Some(id))
            .and_then(parse_mount)
            .unwrap_or_default();
        place.find_device(file);
        place
    }

    /// Finds the disk. btrfs and overlay report device numbers of their own, which belong to no disk.
    fn find_device(&mut self, file: &File) {
        let own = file.metadata().ok().map(|found| Device::from_number(found.dev()));
        self.device = match own {
            Some(device) if device.major != 0 => Some(device),
            _ => self.device.filter(|device| device.major != 0).or_else(|| self.device_of_source()),
        };
    }

    fn device_of_source(&self) -> Option<Device> {
        if self.file_system == "overlay" {
            let upper = self.options.iter().find_map(|option| option.strip_prefix("upperdir="))?;
            let device = Device::from_number(fs::metadata(upper).ok()?.dev());
            return Some(device).filter(|device| device.major != 0);
        }
        let found = fs::metadata(&self.source).ok()?;
        found.file_type().is_block_device().then(|| Device::from_number(found.rdev()))
    }

    fn judge(&mut self, direct: bool) {
        for rule in &RULES {
            let here = rule.file_systems.is_empty() || rule.file_systems.contains(&self.file_system.as_str());
            let so =
                rule.options.is_empty() || self.options.iter().any(|o| rule.options.contains(&o.as_str()));
            if !here || !so || (rule.direct && !direct) {
                continue;
            }
            self.notes.push(rule.note.into());
            let reason = Some(format!("{}: {}", self.file_system, rule.note));
            match rule.flush {
                Flush::Passes => {}
                Flush::Stops => self.flush_stops = reason,
                Flush::Unknown => self.flush_unknown = reason,
            }
        }
        if self.file_system.starts_with("fuse") {
            let note = "a file system of a program (FUSE): what it does with a sync is its own affair";
            self.notes.push(note.into());
            self.flush_unknown = Some(note.into());
        }
    }

    /// Returns `true` if btrfs keeps no checksums of `file`.
    fn is_unchecked(&self, file: &File) -> bool {
        const FS_NOCOW_FL: libc::c_long = 0x0080_0000;
        let mounted = self.options.iter().any(|option| option == "nodatasum" || option == "nodatacow");
        let mut flags: libc::c_long = 0;
        // SAFETY: the request writes one long to the pointer, which is valid for it.
        let asked = unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) };
        mounted || (asked == 0 && flags & FS_NOCOW_FL != 0)
    }
}

/// Parses a line of mountinfo (proc(5)): id, parent, device, root, mount point, options, optional fields, a
/// hyphen, type, source, options of the file system.
fn parse_mount(line: &str) -> Option<Place> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mount: Vec<&str> = mount.split(' ').collect();
    let mut file_system = file_system.split(' ');
    let mut options: Vec<String> = mount.get(5)?.split(',').map(str::to_owned).collect();
    let (kind, source) = (file_system.next()?, file_system.next()?);
    for option in file_system.next().unwrap_or_default().split(',') {
        if !option.is_empty() && !options.iter().any(|known| known == option) {
            options.push(unescape(option));
        }
    }
    Some(Place {
        file_system: kind.to_owned(),
        source: unescape(source),
        mount_point: unescape(mount.get(4)?),
        options,
        device: Device::parse(mount.get(2)?),
        ..Place::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(line: &str, direct: bool) -> Place {
        let mut place = parse_mount(line).unwrap();
        place.judge(direct);
        place
    }

    #[test]
    fn a_line_of_mountinfo_is_taken_apart() {
        let line = "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext4 /dev/root rw,errors=continue";
        let found = place(line, true);
        assert_eq!((found.file_system.as_str(), found.source.as_str()), ("ext4", "/dev/root"));
        assert_eq!(found.mount_point, "/mnt 2");
        assert_eq!(found.options, ["rw", "noatime", "errors=continue"]);
        assert_eq!(found.device, Some(Device { major: 98, minor: 0 }));
        assert!(found.notes.is_empty() && found.flush_stops.is_none());
        assert_eq!(parse_mount("nonsense"), None);
    }

    #[test]
    fn what_breaks_a_promise_is_noted() {
        for (line, direct, word, stops, unknown) in [
            ("1 1 0:5 / /tmp rw - tmpfs tmpfs rw", true, "fiction", true, false),
            ("1 1 0:5 / /tmp rw - tmpfs tmpfs rw", false, "in memory", true, false),
            ("1 1 0:5 / / rw - overlay overlay rw,upperdir=/u,volatile", true, "volatile", true, false),
            ("1 1 0:5 / / rw - overlay overlay rw,upperdir=/u,fsync=volatile", true, "volatile", true, false),
            ("1 1 0:5 / / rw - overlay overlay rw,upperdir=/u", true, "layer below", false, false),
            ("1 1 8:1 / / rw - ext4 /dev/sda1 rw,nobarrier", true, "barriers", true, false),
            ("1 1 8:1 / / rw - ext4 /dev/sda1 rw,barrier=0", true, "barriers", true, false),
            ("1 1 8:1 / / rw - f2fs /dev/sda1 rw,fsync_mode=nobarrier", true, "barriers", true, false),
            ("1 1 0:9 / / rw - btrfs /dev/sda1 rw", false, "two flushes", false, false),
            ("1 1 0:9 / / rw - nfs4 host:/x rw", false, "server", false, true),
            ("1 1 0:9 / / rw - fuse.sshfs x rw", false, "FUSE", false, true),
            ("1 1 0:9 / / rw - zfs pool rw", false, "sync=disabled", false, true),
        ] {
            let found = place(line, direct);
            assert!(found.notes.iter().any(|note| note.contains(word)), "{line}: {found:?}");
            assert_eq!(
                (found.flush_stops.is_some(), found.flush_unknown.is_some()),
                (stops, unknown),
                "{line}"
            );
        }
    }

    #[test]
    fn this_very_file_system_is_found() {
        let file = tempfile::tempfile().unwrap();
        let found = Place::of_file(&file);
        assert!(!found.file_system.is_empty() && found.mount_point.starts_with('/'), "{found:?}");
    }
}
