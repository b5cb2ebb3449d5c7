//! How much memory a kernel needs to unpack its initramfs.
//!
//! Owns the estimate. Linux unpacks into a tmpfs that may fill half of the memory that was free when it was
//! mounted (mm/shmem.c, `shmem_default_max_blocks`; init/do_mounts.c, `init_rootfs`). The archives still take
//! memory at that time. What does not fit is lost: the kernel prints one line and boots on.

use super::tail::Tail;
use crate::layout::{KIB, MIB, RAM_HOLE};

/// The bytes that the kernel keeps for each page: a `struct page` of 64 bytes per 4096.
const PAGE_SHARE: u64 = 64;
/// What a kernel reserves besides its image before it mounts its root. Measured were 8 MiB with Debian's 6.1
/// and 6.12 (docs/results/boot.md); this is twice that.
const RESERVED_BYTES: u64 = 16 * MIB;
/// The memory in which the guest's programs work.
const WORKING_BYTES: u64 = 24 * MIB;
const BOUNCE_BYTES: u64 = 64 * MIB;
/// Suggested values of --memory are multiples of this.
const STEP: u64 = 16 * MIB;
/// The factor by which a compressed initramfs is assumed to grow; some grow more.
const PACKED_GROWS: u64 = 3;

/// What must be in memory at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// The size of the unpacked kernel image.
    pub kernel_bytes: u64,
    /// The size of the initramfs file.
    pub initrd_bytes: u64,
    /// `true` if that file is compressed.
    pub packed: bool,
    /// The size of the archive appended to it.
    pub tail_bytes: u64,
    /// The size of that archive, unpacked.
    pub tail_unpacked_bytes: u64,
    /// `true` if the root file system takes at most half of the free memory.
    pub half: bool,
}

/// The guest has too little memory for what it has to unpack.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest needs --memory {}, and has {}: its kernel takes {} MiB, its initramfs {} MiB, the command and what \
     is added {} MiB; while they are unpacked they are in memory twice{}",
    in_letters(*suggested_bytes), in_letters(*memory_bytes), mib(need.kernel_bytes), mib(need.initrd_bytes),
    mib(need.tail_unpacked_bytes), if need.half { ", and may fill half of what is free" } else { "" }
)]
pub struct TooLittle {
    need: Need,
    memory_bytes: u64,
    /// A memory size in bytes that is enough.
    pub suggested_bytes: u64,
}

/// Returns `true` if a kernel with this command line makes its root file system a tmpfs (init/do_mounts.c):
/// it does so unless it is to mount another root.
pub fn has_tmpfs_root(cmdline: &str) -> bool {
    let values =
        |name: &'static str| cmdline.split_whitespace().filter_map(move |word| word.strip_prefix(name));
    let other_root = values("root=").any(|root| !root.is_empty());
    !other_root && values("rootfstype=").next_back().is_none_or(|types| types.contains("tmpfs"))
}

impl Need {
    /// Creates the need of a kernel of `kernel_bytes` with an initramfs and `tail`. `initrd` is the length of
    /// the file, and `true` if it is compressed.
    pub fn new(kernel_bytes: u64, initrd: (u64, bool), tail: &Tail<'_>, cmdline: &str) -> Self {
        Self {
            kernel_bytes,
            initrd_bytes: initrd.0,
            packed: initrd.1,
            tail_bytes: tail.total_bytes(),
            tail_unpacked_bytes: tail.unpacked_bytes,
            half: has_tmpfs_root(cmdline),
        }
    }

    /// Returns a size in bytes below which the boot cannot succeed.
    fn least(&self) -> u64 {
        self.total(1, 0)
    }

    /// Returns a size in bytes that is enough.
    fn enough(&self) -> u64 {
        let grown = if self.packed { PACKED_GROWS } else { 1 };
        let total = self.total(grown, RESERVED_BYTES).saturating_add(WORKING_BYTES);
        // With RAM above 4 GiB the kernel keeps bounce buffers below it (kernel/dma/swiotlb.c).
        let total = if total > RAM_HOLE { total.saturating_add(BOUNCE_BYTES) } else { total };
        total.checked_next_multiple_of(STEP).unwrap_or(u64::MAX)
    }

    fn total(&self, grown: u64, reserved: u64) -> u64 {
        let archives = self.initrd_bytes.saturating_add(self.tail_bytes);
        let unpacked = self.initrd_bytes.saturating_mul(grown).saturating_add(self.tail_unpacked_bytes);
        let root = unpacked.saturating_mul(if self.half { 2 } else { 1 });
        let sum = [self.kernel_bytes, reserved, archives, root].into_iter().fold(0, u64::saturating_add);
        sum.saturating_add(sum / (PAGE_SHARE - 1))
    }

    /// Checks that a guest with `memory_bytes` of memory can unpack all of it.
    pub fn check(&self, memory_bytes: u64) -> Result<(), TooLittle> {
        if memory_bytes >= self.least() {
            return Ok(());
        }
        Err(TooLittle { need: *self, memory_bytes, suggested_bytes: self.enough() })
    }
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(MIB)
}

/// Formats a size as --memory takes it.
fn in_letters(bytes: u64) -> String {
    if bytes.is_multiple_of(MIB) { format!("{}M", bytes / MIB) } else { format!("{}K", bytes / KIB) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(added_mib: u64) -> Need {
        Need {
            kernel_bytes: 40 * MIB,
            initrd_bytes: 10 * MIB,
            packed: false,
            tail_bytes: added_mib * MIB,
            tail_unpacked_bytes: added_mib * MIB,
            half: true,
        }
    }

    #[test]
    fn what_cannot_be_unpacked_is_refused_with_a_figure_that_is_enough() {
        for (added, memory, fits) in [
            (0, 48, false),
            (0, 96, true),
            (90, 256, false),
            (90, 400, true),
            (150, 512, false),
            (100, 512, true),
        ] {
            let checked = need(added).check(memory * MIB);
            assert_eq!(checked.is_ok(), fits, "{added} MiB in {memory}M");
            let Err(error) = checked else { continue };
            assert_eq!(need(added).check(error.suggested_bytes), Ok(()));
            let text = error.to_string();
            assert!(
                text.contains(&format!("needs --memory {}M, and has {memory}M", error.suggested_bytes / MIB))
            );
        }
        assert_eq!(need(150).enough(), 576 * MIB);
        assert!(need(u64::MAX / MIB).check(u64::MAX - 1).is_err(), "nothing wraps");
    }

    #[test]
    fn the_root_is_a_tmpfs_unless_another_root_is_named() {
        for (line, tmpfs) in [
            ("console=ttyS0", true),
            ("root=/dev/vda", false),
            ("root=", true),
            ("rootfstype=ramfs", false),
            ("rootfstype=tmpfs root=/dev/vda", false),
            ("rootfstype=tmpfs", true),
        ] {
            assert_eq!(has_tmpfs_root(line), tmpfs, "{line}");
        }
        let ramfs = Need { half: false, ..need(150) };
        assert_eq!(ramfs.check(400 * MIB), Ok(()));
    }
}
