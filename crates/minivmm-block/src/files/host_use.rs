//! What the host itself does with the bytes of a file or block device: mounts, loop devices, swap, partitions,
//! and RAID and device-mapper above it.
//!
//! Owns the search and its words. A guest that writes to such an image destroys the host's file system, or the
//! host destroys the guest's.
//!
//! Two uses are not found. One is a mount in another mount namespace of a device that is only read. The other
//! is a loop device whose file was renamed or is in another namespace, if the user may not open /dev/loopN.

use std::fs::{self, File, Metadata};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::identity::{Device, FileId};
use super::locks;
use crate::text::shell_word;

/// Stacks of devices deeper than this are taken for a cycle.
const DEPTH_MAX: usize = 8;
/// The request's number in `linux/loop.h`.
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;

/// One use that the host makes of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostUse {
    /// The use, in words: "it is mounted on /mnt".
    pub what: String,
    /// The command that ends the use; `None` if there is none.
    pub remedy: Option<String>,
    /// `true` if the host may write to the image through this use.
    pub writes: bool,
}

/// Returns all uses that the host makes of the file or block device that `found` describes.
pub fn of(found: &Metadata) -> Vec<HostUse> {
    Host::default().uses_of(found)
}

/// Returns `true` if a write to one is a write to the other: the same file or device, a disk and its partition,
/// a loop device and its file, or two loop devices over one file.
pub fn share_bytes(a: &Metadata, b: &Metadata) -> bool {
    Host::default().share_bytes(Node::of(a), Node::of(b))
}

/// Describes uses in words, with their remedies: "it is mounted on /mnt (to end that: umount /mnt)".
pub fn in_words(uses: &[HostUse]) -> String {
    let what: Vec<_> = uses.iter().map(|it| it.what.as_str()).collect();
    let mut remedies: Vec<_> = uses.iter().filter_map(|it| it.remedy.as_deref()).collect();
    remedies.dedup();
    match remedies.is_empty() {
        true => what.join(", and "),
        false => format!("{} (to end that: {})", what.join(", and "), remedies.join("; ")),
    }
}

/// Decodes the octal codes that /proc/self/mountinfo and /proc/swaps use for blanks and backslashes.
pub fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, real)| text.replace(code, real))
}

/// The file or device that is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    File(FileId),
    Block(Device),
}

impl Node {
    fn of(found: &Metadata) -> Self {
        match found.file_type().is_block_device() {
            true => Self::Block(Device::from_number(found.rdev())),
            false => Self::File(FileId::of(found)),
        }
    }

    fn at(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().map(|found| Self::of(&found))
    }
}

/// An attached loop device.
struct Loop {
    /// The name in /sys/block.
    name: String,
    device: Device,
    /// The path of its file, as the kernel reports it.
    path: PathBuf,
    /// The file or device below it; `None` if that cannot be found out.
    below: Option<Node>,
    readonly: bool,
}

/// One line of mountinfo.
struct Mount {
    device: Option<Device>,
    point: String,
    source: String,
    readonly: bool,
}

/// Where the host describes itself; tests use other directories.
struct Host {
    sys: PathBuf,
    proc: PathBuf,
    dev: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { sys: "/sys".into(), proc: "/proc".into(), dev: "/dev".into() }
    }
}

impl Host {
    fn uses_of(&self, found: &Metadata) -> Vec<HostUse> {
        let mut uses = Vec::new();
        let node = Node::of(found);
        let loops = self.loops();
        self.add_uses(node, "it", &loops, &mut uses, 0);
        if let Node::Block(device) = node {
            self.add_family(device, &loops, &mut uses);
            self.add_below(device, &loops, &mut uses);
        }
        uses
    }

    fn share_bytes(&self, a: Node, b: Node) -> bool {
        let loops = self.loops();
        let (below_a, below_b) = (self.chain(a, &loops), self.chain(b, &loops));
        if below_a.contains(&b) || below_b.contains(&a) {
            return true;
        }
        // Partitions of one loop device do not overlap. Two loop devices may show the same part of a file; that is
        // not known, so they count as sharing it.
        let top = |node| match node {
            Node::Block(device) => Some(self.disk_of(device).unwrap_or(device)),
            Node::File(_) => None,
        };
        let file = |chain: &[Node]| chain.iter().copied().find(|node| matches!(node, Node::File(_)));
        file(&below_a).is_some() && file(&below_a) == file(&below_b) && top(a) != top(b)
    }

    /// Returns `node`, followed by what it is a part of or stands on, level by level.
    fn chain(&self, node: Node, loops: &[Loop]) -> Vec<Node> {
        let mut chain = vec![node];
        while let Some(&Node::Block(device)) = chain.last()
            && chain.len() <= DEPTH_MAX
        {
            let disk = self.disk_of(device).map(Node::Block);
            let below = || loops.iter().find(|it| it.device == device).and_then(|it| it.below);
            match disk.or_else(below) {
                Some(next) => chain.push(next),
                None => break,
            }
        }
        chain
    }

    /// Adds the uses of `node` itself, which messages call `name`.
    fn add_uses(&self, node: Node, name: &str, loops: &[Loop], uses: &mut Vec<HostUse>, depth: usize) {
        if depth > DEPTH_MAX {
            return;
        }
        for mount in self.mounts().iter().filter(|mount| mount.is_of(node)) {
            uses.push(HostUse {
                what: format!("{name} is mounted on {}", mount.point),
                remedy: Some(format!("umount {}", shell_word(&mount.point))),
                writes: !mount.readonly,
            });
        }
        for path in self.swaps().iter().filter(|path| Node::at(path) == Some(node)) {
            uses.push(HostUse {
                what: format!("{name} is swap space"),
                remedy: Some(format!("swapoff {}", shell_word(path))),
                writes: true,
            });
        }
        for above in loops.iter().filter(|it| it.below == Some(node)) {
            self.add_loop(above, name, loops, uses, depth);
        }
        if let Node::Block(device) = node {
            self.add_holders(device, name, uses);
        }
    }

    /// Adds a loop device that stands on `name`, and that device's own uses.
    fn add_loop(&self, it: &Loop, name: &str, loops: &[Loop], uses: &mut Vec<HostUse>, depth: usize) {
        let path = self.dev.join(&it.name).display().to_string();
        let mut further = Vec::new();
        self.add_uses(Node::Block(it.device), &path, loops, &mut further, depth + 1);
        for partition in self.partitions(it.device) {
            let name = self.name_of(partition);
            self.add_uses(Node::Block(partition), &name, loops, &mut further, depth + 1);
        }
        // Once attached, it may be written to at any time, even if nobody uses it yet.
        let writes = !it.readonly && (further.is_empty() || further.iter().any(|it| it.writes));
        uses.extend(further);
        uses.push(HostUse {
            what: format!("the loop device {path} is attached to {name}"),
            remedy: Some(format!("losetup -d {path}")),
            writes,
        });
    }

    /// Adds devices that are made of this one: RAID, LVM, dm-crypt, bcache, and btrfs over several devices.
    fn add_holders(&self, device: Device, name: &str, uses: &mut Vec<HostUse>) {
        let place = self.sys_place(device);
        for holder in names_in(&place.join("holders")) {
            let readonly = read(&place.join("holders").join(&holder).join("ro")).as_deref() == Some("1");
            uses.push(HostUse {
                what: format!("{name} is a part of {}", self.dev.join(&holder).display()),
                remedy: None,
                writes: !readonly,
            });
        }
        let Some(own) = fs::canonicalize(&place).ok().and_then(|path| Some(path.file_name()?.to_owned()))
        else {
            return;
        };
        for file_system in names_in(&self.sys.join("fs/btrfs")) {
            let devices = self.sys.join("fs/btrfs").join(&file_system).join("devices");
            // A btrfs on one device is found among the mounts.
            if names_in(&devices).len() > 1 && devices.join(&own).exists() {
                uses.push(HostUse {
                    what: format!("{name} is a part of the mounted btrfs {file_system}"),
                    remedy: None,
                    writes: true,
                });
            }
        }
    }

    /// Adds the uses of a disk's partitions, or of a partition's disk.
    fn add_family(&self, device: Device, loops: &[Loop], uses: &mut Vec<HostUse>) {
        let relatives = self.partitions(device).into_iter().chain(self.disk_of(device));
        for relative in relatives {
            let name = self.name_of(relative);
            self.add_uses(Node::Block(relative), &name, loops, uses, 1);
        }
    }

    /// Adds the other uses of the file or device below a loop device.
    fn add_below(&self, device: Device, loops: &[Loop], uses: &mut Vec<HostUse>) {
        let disk = self.disk_of(device).unwrap_or(device);
        let Some(it) = loops.iter().find(|it| it.device == disk) else { return };
        let Some(below) = it.below else { return };
        let others: Vec<Loop> = self.loops().into_iter().filter(|other| other.device != disk).collect();
        let name = it.path.display().to_string();
        self.add_uses(below, &name, &others, uses, 1);
        // The path may lead to another file by now.
        let is_locked = Node::at(&it.path) == Some(below)
            && File::open(&it.path).is_ok_and(|file| locks::is_locked(&file, it.readonly));
        if is_locked {
            uses.push(HostUse {
                what: format!("another VM has locked {name}, which is below it"),
                remedy: None,
                writes: true,
            });
        }
    }

    fn loops(&self) -> Vec<Loop> {
        let block = self.sys.join("block");
        let attached = |name: String| {
            let place = block.join(&name);
            let path = PathBuf::from(read(&place.join("loop/backing_file"))?);
            let device = Device::parse(&read(&place.join("dev"))?)?;
            let readonly = read(&place.join("ro")).as_deref() == Some("1");
            // The device knows its file by number. The path may be that of another namespace, or be deleted.
            let below = status(&self.dev.join(&name)).ok().or_else(|| Node::at(&path));
            Some(Loop { name, device, path, below, readonly })
        };
        let names = names_in(&block).into_iter().filter(|name| name.starts_with("loop"));
        names.filter_map(attached).collect()
    }

    fn mounts(&self) -> Vec<Mount> {
        let text = fs::read_to_string(self.proc.join("self/mountinfo")).unwrap_or_default();
        text.lines().filter_map(Mount::parse).collect()
    }

    fn swaps(&self) -> Vec<PathBuf> {
        let text = fs::read_to_string(self.proc.join("swaps")).unwrap_or_default();
        let path = |line: &str| line.split_whitespace().next().map(|path| PathBuf::from(unescape(path)));
        text.lines().skip(1).filter_map(path).collect()
    }

    fn sys_place(&self, device: Device) -> PathBuf {
        self.sys.join("dev/block").join(device.to_string())
    }

    fn partitions(&self, device: Device) -> Vec<Device> {
        let place = self.sys_place(device);
        let numbers = names_in(&place).into_iter().filter_map(|name| {
            let partition = place.join(name);
            partition.join("partition").exists().then(|| read(&partition.join("dev"))).flatten()
        });
        numbers.filter_map(|text| Device::parse(&text)).collect()
    }

    /// Returns the disk of this partition; `None` if `device` is no partition.
    fn disk_of(&self, device: Device) -> Option<Device> {
        let place = fs::canonicalize(self.sys_place(device)).ok()?;
        place.join("partition").exists().then_some(())?;
        Device::parse(&read(&place.parent()?.join("dev"))?)
    }

    fn name_of(&self, device: Device) -> String {
        let place = fs::canonicalize(self.sys_place(device)).unwrap_or_default();
        place.file_name().map_or(device.to_string(), |name| self.dev.join(name).display().to_string())
    }
}

impl Mount {
    /// Parses a line of mountinfo (proc(5)). Its fields: id, parent, device, root, mount point, options,
    /// optional fields, a hyphen, type, source, the file system's own options.
    fn parse(line: &str) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mount: Vec<&str> = mount.split(' ').collect();
        let file_system: Vec<&str> = file_system.split(' ').collect();
        let is_readonly = |options: &str| options.split(',').any(|option| option == "ro");
        Some(Self {
            device: Device::parse(mount.get(2)?),
            point: unescape(mount.get(4)?),
            source: unescape(file_system.get(1)?),
            // The option of the file system. A mount may itself be read-only while another one writes.
            readonly: is_readonly(file_system.get(2)?),
        })
    }

    /// Returns `true` if this is a file system on `node`. Some (erofs, FUSE) name a regular file as their
    /// source.
    fn is_of(&self, node: Node) -> bool {
        let is_source = || self.source.starts_with('/') && Node::at(Path::new(&self.source)) == Some(node);
        match node {
            Node::Block(device) if self.device == Some(device) => true,
            // File systems on several devices, or with device numbers of their own (btrfs).
            Node::Block(_) => is_source(),
            Node::File(_) => !self.source.starts_with("/dev/") && is_source(),
        }
    }
}

/// Asks a loop device what it stands on.
fn status(path: &Path) -> io::Result<Node> {
    /// `struct loop_info64` of `linux/loop.h`.
    #[repr(C)]
    struct LoopInfo {
        device: u64,
        inode: u64,
        rdevice: u64,
        others: [u64; 26],
    }
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let mut info = MaybeUninit::<LoopInfo>::zeroed();
    // SAFETY: the request writes a loop_info64 of 232 bytes, as large as `info`, which holds numbers alone.
    let info = unsafe {
        if libc::ioctl(file.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        info.assume_init()
    };
    Ok(match info.rdevice {
        0 => Node::File(FileId { device: info.device, inode: info.inode }),
        number => Node::Block(Device::from_number(number)),
    })
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim_end_matches('\n').to_owned())
}

fn names_in(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<_> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests;
