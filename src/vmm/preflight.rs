//! What is found wrong with a machine before any of its files is opened, created or emptied.
//!
//! Owns the rules for the machine's disks and files taken together. A run reports the first violation,
//! `--explain` reports all. Errors of a single image are found by `disk::Image`, for both.

use super::{Config, ConsoleTarget, VmmError};
use crate::disk_options::DiskOptions;
use crate::disks::{self, DISKS_MAX};
use crate::files::{Inventory, Output};
use crate::layout;
use crate::virtio::TransportChoice;

/// The part of a machine's configuration that the rules for disks and files need.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The disks, in order.
    pub disks: Vec<DiskOptions>,
    /// The transport of the virtio devices, unless a disk names its own.
    pub transport: TransportChoice,
    /// `true` if there is also a virtio-console, for a command or for an observation.
    pub has_console: bool,
    /// All files that the command line names.
    pub files: Inventory,
}

impl Plan {
    pub(super) fn of(config: &Config) -> Self {
        Self {
            disks: config.disks.clone(),
            transport: config.transport,
            has_console: config.job.is_some() || config.observe.is_some(),
            files: config.files.clone(),
        }
    }

    /// Returns every reason for which a run would be refused.
    pub fn refusals(&self) -> Vec<VmmError> {
        let mut refusals: Vec<VmmError> = self.files.check().into_iter().map(VmmError::from).collect();
        let asked = self.disks.len();
        if asked > DISKS_MAX {
            refusals.push(VmmError::TooManyDisks { asked, max: DISKS_MAX });
        }
        let is_mmio = |disk: &&DiskOptions| disk.transport.unwrap_or(self.transport) == TransportChoice::Mmio;
        let console = self.has_console && self.transport == TransportChoice::Mmio;
        let mmio = self.disks.iter().filter(is_mmio).count() + usize::from(console);
        refusals.extend(too_many_mmio(mmio).err());
        refusals.extend(disks::shared_bytes(&self.disks).into_iter().map(VmmError::from));
        refusals
    }
}

impl ConsoleTarget {
    /// Returns the output file, or `None` if the target is no file.
    pub fn output(&self) -> Option<Output> {
        match self {
            Self::File(path) => Some(Output::text("--console", path)),
            Self::Stdio | Self::Stderr | Self::Off => None,
        }
    }
}

/// Returns an error if there are fewer interrupt lines than virtio-mmio devices.
pub(super) fn too_many_mmio(asked: usize) -> Result<(), VmmError> {
    let max = layout::VIRTIO_IRQS.len();
    if asked > max { Err(VmmError::TooManyMmio { asked, max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk_options;

    fn plan(disks: &[&str], transport: TransportChoice, has_console: bool) -> Vec<String> {
        let disks = disks.iter().map(|text| disk_options::parse(text).unwrap()).collect();
        let plan = Plan { disks, transport, has_console, files: Inventory::default() };
        plan.refusals().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn disks_have_letters_and_mmio_devices_lines() {
        let many = |count: usize, key: &str| vec![format!("/nonexistent{key}"); count];
        let refused = |count, key: &str, transport, console| {
            let disks = many(count, key);
            plan(&disks.iter().map(String::as_str).collect::<Vec<_>>(), transport, console).join(" ")
        };
        let (pci, mmio) = (TransportChoice::Pci, TransportChoice::Mmio);
        let lines = layout::VIRTIO_IRQS.len();
        assert_eq!(refused(DISKS_MAX, "", pci, true), "");
        assert!(refused(DISKS_MAX + 1, "", pci, false).contains("too many disks: 27"));
        assert_eq!(refused(lines, "", mmio, false), "");
        assert!(refused(lines, "", mmio, true).contains("too many virtio-mmio devices"));
        assert!(refused(lines + 1, ",transport=mmio", pci, false).contains("too many virtio-mmio devices"));
        assert_eq!(refused(lines, ",transport=mmio", pci, true), "", "the console is behind PCI");
    }

    #[test]
    fn the_same_image_twice_is_for_readers_only() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let path = image.path().display().to_string();
        let readonly = format!("{path},readonly");
        let pci = TransportChoice::Pci;
        assert!(plan(&[&path, &path], pci, false)[0].contains("share bytes"));
        assert!(plan(&[&readonly, &path], pci, false)[0].contains("share bytes"));
        assert!(plan(&[&readonly, &readonly], pci, false).is_empty());
    }
}
