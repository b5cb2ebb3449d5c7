//! What is measured: competitors, modes and jobs, a table each.
//!
//! Another competitor, mode or job is one row.

use serde::Serialize;

use crate::image::Resident;

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// fio on the host, on the image itself: what a guest cannot reach.
    HostFio,
    /// minivmm with this `--transport`.
    Minivmm(&'static str),
    /// QEMU with this `-machine`, this virtio-blk device, an iothread, and this `aio=`.
    Qemu {
        /// `-machine`.
        machine: &'static str,
        /// The device's type.
        device: &'static str,
        /// `aio=` of the drive.
        aio: &'static str,
    },
}

/// One who runs the jobs.
#[derive(Debug, Clone, Copy)]
pub struct Competitor {
    /// In the table, and for `--who`.
    pub name: &'static str,
    /// What is started.
    pub kind: Kind,
}

const MICROVM: &str = "microvm,rtc=off";
const MMIO: &str = "virtio-blk-device";
const PCI: &str = "virtio-blk-pci";

/// All of them, in the order of the table.
pub const COMPETITORS: [Competitor; 7] = [
    Competitor { name: "host-fio", kind: Kind::HostFio },
    Competitor { name: "minivmm-pci", kind: Kind::Minivmm("pci") },
    Competitor { name: "minivmm-mmio", kind: Kind::Minivmm("mmio") },
    Competitor {
        name: "qemu-microvm-io_uring",
        kind: Kind::Qemu { machine: MICROVM, device: MMIO, aio: "io_uring" },
    },
    Competitor {
        name: "qemu-microvm-native",
        kind: Kind::Qemu { machine: MICROVM, device: MMIO, aio: "native" },
    },
    Competitor {
        name: "qemu-q35-io_uring",
        kind: Kind::Qemu { machine: "q35", device: PCI, aio: "io_uring" },
    },
    Competitor { name: "qemu-q35-native", kind: Kind::Qemu { machine: "q35", device: PCI, aio: "native" } },
];

impl Competitor {
    /// Whether it is QEMU.
    pub fn is_qemu(&self) -> bool {
        matches!(self.kind, Kind::Qemu { .. })
    }

    /// Why it cannot be had in a mode.
    pub fn refuses(&self, mode: &Mode) -> Option<&'static str> {
        match self.kind {
            Kind::Qemu { aio: "native", .. } if !mode.direct => {
                Some("QEMU's aio=native wants O_DIRECT (cache.direct=on)")
            }
            _ => None,
        }
    }
}

/// A cache mode, by the name that minivmm and QEMU share.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Mode {
    /// `cache=`.
    pub name: &'static str,
    /// Whether the image is opened with O_DIRECT.
    #[serde(skip)]
    pub direct: bool,
    /// Whether every write is stable before it is reported (the guest sees no write cache).
    #[serde(skip)]
    pub through: bool,
}

/// All of them. Those without O_DIRECT begin with the whole image in the host's page cache, the
/// others with nothing of it.
pub const MODES: [Mode; 3] = [
    Mode { name: "none", direct: true, through: false },
    Mode { name: "writeback", direct: false, through: false },
    Mode { name: "directsync", direct: true, through: true },
];

impl Mode {
    /// What is in the host's page cache before each job.
    pub fn resident(&self) -> Resident {
        if self.direct { Resident::None } else { Resident::All }
    }

    /// The mode and that state, for the table.
    pub fn title(&self) -> String {
        let state = match self.resident() {
            Resident::None => "dropped",
            Resident::All => "cached",
        };
        format!("{}, {state}", self.name)
    }
}

/// What a job works on in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// The disk itself.
    Disk,
    /// A file, wholly written, in an ext4 that the guest makes on the disk.
    Ext4,
}

/// One job of fio.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    /// For the table, and for `--only`.
    pub name: &'static str,
    /// What it works on.
    pub target: Target,
    /// fio's options.
    pub options: &'static [&'static str],
}

impl Job {
    /// Whether it goes past the guest's page cache.
    pub fn direct(&self) -> bool {
        self.options.contains(&"--direct=1")
    }

    /// Whether it writes.
    pub fn writes(&self) -> bool {
        !self.options.iter().any(|option| ["--rw=read", "--rw=randread"].contains(option))
    }

    /// Whether it is told in MiB/s.
    pub fn large(&self) -> bool {
        self.options.contains(&"--bs=128k")
    }

    /// Whether it makes writes stable itself.
    fn syncs(&self) -> bool {
        self.options
            .iter()
            .any(|option| ["--fdatasync", "--fsync", "--sync"].iter().any(|sync| option.starts_with(sync)))
    }

    /// Whether a mode shows anything of this job that none and writeback do not: directsync is about
    /// writes.
    pub fn wants(&self, mode: &Mode) -> bool {
        !mode.through || self.writes()
    }

    /// What the options say, for fio on the host and on the image itself in this mode.
    pub fn on_host(&self, mode: &Mode) -> Vec<String> {
        let mut options: Vec<String> =
            self.options.iter().filter(|o| !o.starts_with("--direct=")).map(|&o| o.into()).collect();
        options.push(format!("--direct={}", u8::from(mode.direct && self.direct())));
        if mode.through && self.writes() && !self.syncs() {
            options.push("--sync=dsync".into());
        }
        options
    }
}

const RING: &str = "--ioengine=io_uring";
const CALLS: &str = "--ioengine=psync";

/// All of them, in the order in which a guest runs them: those that make a file system last.
pub const JOBS: [Job; 11] = [
    disk("randread-4k-d1", &["--rw=randread", "--bs=4k", "--iodepth=1", "--direct=1", RING]),
    disk("randread-4k-d32", &["--rw=randread", "--bs=4k", "--iodepth=32", "--direct=1", RING]),
    disk("randwrite-4k-d1", &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--direct=1", RING]),
    disk("randwrite-4k-d32", &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--direct=1", RING]),
    disk("mixed-4k-d32", &["--rw=randrw", "--rwmixread=70", "--bs=4k", "--iodepth=32", "--direct=1", RING]),
    disk("seqread-128k-d8", &["--rw=read", "--bs=128k", "--iodepth=8", "--direct=1", RING]),
    disk("seqwrite-128k-d8", &["--rw=write", "--bs=128k", "--iodepth=8", "--direct=1", RING]),
    disk("randwrite-4k-d1-fdatasync", &["--rw=randwrite", "--bs=4k", "--direct=1", "--fdatasync=1", CALLS]),
    disk("append-4k-d1-odsync", &["--rw=write", "--bs=4k", "--direct=1", "--sync=dsync", CALLS]),
    ext4("ext4-randwrite-4k-d1-fsync", &["--rw=randwrite", "--bs=4k", "--direct=0", "--fsync=1", CALLS]),
    ext4("ext4-log-4k-d1-odsync", &["--rw=write", "--bs=4k", "--direct=1", "--sync=dsync", CALLS]),
];

const fn disk(name: &'static str, options: &'static [&'static str]) -> Job {
    Job { name, target: Target::Disk, options }
}

const fn ext4(name: &'static str, options: &'static [&'static str]) -> Job {
    Job { name, target: Target::Ext4, options }
}

/// The size of the file in ext4.
pub const FILE_MIB: u64 = 64;

/// One who boots to init only.
#[derive(Debug, Clone, Copy)]
pub struct Booter {
    /// In the table, and for `--who`.
    pub name: &'static str,
    /// `-machine` of QEMU; minivmm's has none.
    pub machine: Option<&'static str>,
}

/// All of them. Of QEMU's the best median counts. Without ACPI the serial line needs the PIC.
pub const BOOTERS: [Booter; 4] = [
    Booter { name: "minivmm", machine: None },
    Booter { name: "qemu-microvm-lean", machine: Some("microvm,pit=off,rtc=off,acpi=off,x-option-roms=off") },
    Booter { name: "qemu-microvm-acpi", machine: Some("microvm,pic=off,pit=off,rtc=off,acpi=on") },
    Booter { name: "qemu-q35", machine: Some("q35") },
];
