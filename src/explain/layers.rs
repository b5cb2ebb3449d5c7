//! The host's disks below an image. Resolves partitions, loop devices and device-mapper as far as sysfs
//! describes them.
//!
//! Owns the walk from the top to the bottom, and what each disk reports about its write cache. Judges nothing.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::place::Place;
use crate::disk::Image;
use crate::files::Device;

/// One disk of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// The kernel's name of the disk.
    pub name: String,
    /// MAJOR:MINOR of the disk, or of the partition on it.
    pub device: String,
    /// queue/write_cache, "write back" or "write through"; `None` if it cannot be read.
    pub write_cache: Option<String>,
    /// queue/fua; `None` if it cannot be read.
    pub fua: Option<bool>,
}

impl Layer {
    /// Returns `true` if the disk keeps its data in memory, so that no flush makes it durable.
    pub fn is_memory(&self) -> bool {
        ["ram", "zram", "nullb"].iter().any(|prefix| {
            self.name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
    }
}

/// Most disks below one another. A deeper chain is taken for a loop.
const DEPTH_MAX: usize = 8;

/// Returns the disks below `image`, from the top down.
pub fn below(image: &Image, place: &Place) -> Vec<Layer> {
    let device = if image.file().is_device() {
        image.file().descriptor().metadata().ok().map(|found| Device::from_number(found.rdev()))
    } else {
        place.device
    };
    device.map(below_device).unwrap_or_default()
}

/// Returns `device` and the disks below it.
pub fn below_device(device: Device) -> Vec<Layer> {
    let mut layers = Vec::new();
    descend(Path::new("/sys/dev/block"), device, &mut layers, 0);
    layers
}

fn descend(sysfs: &Path, device: Device, layers: &mut Vec<Layer>, depth: usize) {
    let Ok(mut path) = sysfs.join(device.to_string()).canonicalize() else { return };
    if path.join("partition").exists() {
        path.pop();
    }
    let read = |name: &str| fs::read_to_string(path.join(name)).ok().map(|text| text.trim().to_owned());
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if layers.iter().any(|layer| layer.name == name) || depth > DEPTH_MAX {
        return;
    }
    layers.push(Layer {
        name,
        device: device.to_string(),
        write_cache: read("queue/write_cache"),
        fua: read("queue/fua").map(|text| text == "1"),
    });
    for slave in slaves(&path) {
        descend(sysfs, slave, layers, depth + 1);
    }
    if let Some(file) = read("loop/backing_file").map(PathBuf::from)
        && let Ok(file) = File::open(file)
        && let Some(device) = Place::of_file(&file).device
    {
        descend(sysfs, device, layers, depth + 1);
    }
}

/// Returns the devices that a device-mapper or md device is built on.
fn slaves(path: &Path) -> Vec<Device> {
    let Ok(entries) = fs::read_dir(path.join("slaves")) else { return Vec::new() };
    let numbers = entries.flatten().filter_map(|entry| fs::read_to_string(entry.path().join("dev")).ok());
    numbers.filter_map(|text| Device::parse(text.trim())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(root: &Path, path: &str, content: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    #[test]
    fn partitions_and_mappings_are_taken_apart() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        put(root, "devices/sda/queue/write_cache", "write back\n");
        put(root, "devices/sda/queue/fua", "1\n");
        put(root, "devices/sda/sda2/partition", "2\n");
        put(root, "devices/sda/sda2/dev", "8:2\n");
        put(root, "devices/dm-0/queue/write_cache", "write through\n");
        fs::create_dir_all(root.join("devices/dm-0/slaves")).unwrap();
        fs::create_dir_all(root.join("block")).unwrap();
        let link = |from: &str, to: &str| std::os::unix::fs::symlink(root.join(to), root.join(from)).unwrap();
        link("devices/dm-0/slaves/sda2", "devices/sda/sda2");
        link("block/253:0", "devices/dm-0");
        link("block/8:2", "devices/sda/sda2");
        let mut layers = Vec::new();
        descend(&root.join("block"), Device { major: 253, minor: 0 }, &mut layers, 0);
        let layer = |name: &str, device: &str, cache: &str, fua| Layer {
            name: name.into(),
            device: device.into(),
            write_cache: Some(cache.into()),
            fua,
        };
        assert_eq!(
            layers,
            [layer("dm-0", "253:0", "write through", None), layer("sda", "8:2", "write back", Some(true))]
        );
    }

    #[test]
    fn disks_of_memory_are_known_by_their_names() {
        for (name, memory) in
            [("ram0", true), ("zram1", true), ("nullb0", true), ("rambo", false), ("sda", false)]
        {
            assert_eq!(Layer { name: name.into(), ..Layer::default() }.is_memory(), memory, "{name}");
        }
    }
}
