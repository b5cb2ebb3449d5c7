//! The files that a command line names, for `files::output`: what it reads, and what it writes anew.
//!
//! Owns only the list. Every new option that names a file must be added here.

use super::{Args, find_guest};
use crate::disk::writelog;
use crate::disks::report::{ObserveTarget, StatsTarget};
use crate::files::{Input, Inventory, Output, output};
use crate::vmm::Plan;

/// The option of the status file.
pub const STATUS_FILE: &str = "--status-file";

impl Args {
    /// Returns the part of the machine that concerns its disks and files.
    pub(super) fn plan(&self) -> Plan {
        Plan {
            disks: super::disks(&self.disks, self.cpus),
            transport: self.transport,
            has_console: self.job.is_given() || self.observe.is_some(),
            files: self.files(),
        }
    }

    /// Returns all files that a run with these arguments names.
    pub fn files(&self) -> Inventory {
        let mut inputs: Vec<Input> = Vec::new();
        let mut input = |option, path| inputs.push(Input { option, path });
        for disk in &self.disks {
            input(output::DISK, disk.config.path.clone());
        }
        // A missing test guest is reported later.
        let found = find_guest::find(self.kernel.is_none(), self.initrd.is_none()).ok();
        let (kernel, initrd) = found.map(|guest| (guest.kernel, guest.initrd)).unzip();
        for (option, given, bundled) in
            [("--kernel", &self.kernel, kernel), ("--initrd", &self.initrd, initrd)]
        {
            let path = given.clone().or(bundled);
            path.into_iter().for_each(|path| input(option, path));
        }
        self.modules.iter().flatten().for_each(|path| input("--modules", path.clone()));
        self.job.added().for_each(|path| input("--add", path.to_owned()));
        let mut outputs = Vec::new();
        outputs.extend(self.job.status_file().map(|path| Output::text(STATUS_FILE, path)));
        outputs.extend(self.console.as_ref().and_then(|console| console.output()));
        if let Some(Some(path)) = &self.stats {
            outputs.extend(StatsTarget::Json(path.clone()).output());
        }
        if let Some(path) = &self.observe {
            let target = ObserveTarget { path: path.clone(), interval: self.observe_interval };
            outputs.push(target.output());
        }
        let logs = self.disks.iter().filter_map(|disk| disk.config.log_writes.as_deref());
        outputs.extend(logs.map(writelog::as_output));
        Inventory { inputs, outputs }
    }
}
