//! The host's side of one region of guest RAM: reserved address space with the RAM inside it, placed so that
//! the host can use huge pages.
//!
//! Owns the alignment. KVM maps guest memory by huge pages (EPT and NPT entries of 2 MiB) only where the
//! guest's and the host's address have the same offset in a huge page. Linux aligns anonymous mappings by
//! itself since 6.7, but only those whose length is a multiple of 2 MiB.

use std::io;

/// Bytes of a huge page: one entry of a page directory on x86-64.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Reserved address space that holds one region of RAM. Dropping it unmaps all of it.
#[derive(Debug)]
pub struct Mapping {
    reserved: *mut libc::c_void,
    reserved_bytes: usize,
    ram: *mut u8,
}

// SAFETY: an address and a length that nobody changes; what they name is reached through raw pointers,
// by system calls and copies.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method reads or writes the memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` bytes of RAM whose host address is congruent to the guest address `base` modulo
    /// [`HUGE_PAGE`]. The reserved space before and after the RAM stays inaccessible.
    pub fn new(base: u64, bytes: usize) -> io::Result<Self> {
        let huge_page = usize::try_from(HUGE_PAGE).map_err(io::Error::other)?;
        let reserved_bytes = bytes.checked_add(huge_page).ok_or(io::ErrorKind::OutOfMemory)?;
        // Miri (`make miri`) supports only memory that is readable and writable from the start.
        let (protection, lazily) = if cfg!(miri) {
            (libc::PROT_READ | libc::PROT_WRITE, 0)
        } else {
            (libc::PROT_NONE, libc::MAP_NORESERVE)
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | lazily;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let reserved = unsafe { libc::mmap(std::ptr::null_mut(), reserved_bytes, protection, flags, -1, 0) };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let skipped = to_alignment(reserved as u64, base);
        // SAFETY: `skipped` is less than a huge page, by which the mapping is longer than the RAM.
        let ram = unsafe { reserved.cast::<u8>().add(usize::try_from(skipped).unwrap_or_default()) };
        let mapping = Self { reserved, reserved_bytes, ram };
        if !cfg!(miri) {
            mapping.open(bytes)?;
        }
        Ok(mapping)
    }

    /// Returns the address at which the RAM begins.
    pub fn ram(&self) -> *mut u8 {
        self.ram
    }

    /// Makes the RAM accessible, keeps it from child processes (O_DIRECT and fork do not mix, open(2)), and
    /// asks for huge pages.
    fn open(&self, bytes: usize) -> io::Result<()> {
        // SAFETY: the range lies inside the mapping that `self` owns, and nobody uses it yet.
        let opened = unsafe { libc::mprotect(self.ram.cast(), bytes, libc::PROT_READ | libc::PROT_WRITE) };
        if opened != 0 {
            return Err(io::Error::last_os_error());
        }
        for (advice, needed) in [(libc::MADV_DONTFORK, true), (libc::MADV_HUGEPAGE, false)] {
            // SAFETY: the same range; neither advice changes what is in it.
            let advised = unsafe { libc::madvise(self.ram.cast(), bytes, advice) };
            if advised != 0 && needed {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and unmapped only here.
        unsafe { libc::munmap(self.reserved, self.reserved_bytes) };
    }
}

/// Returns the distance in bytes from host address `host` to the next one that is congruent to `guest` modulo
/// [`HUGE_PAGE`].
fn to_alignment(host: u64, guest: u64) -> u64 {
    guest.wrapping_sub(host) % HUGE_PAGE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distance_to_alignment_makes_both_addresses_agree() {
        for (host, guest, distance) in [
            (0, 0, 0),
            (HUGE_PAGE, 4 << 30, 0),
            (0x7f12_3454_b000, 0, 0xb_5000),
            (0x7f12_3454_b000, 0x1000, 0xb_6000),
            (0x1000, 0, HUGE_PAGE - 0x1000),
            (0, 0x3000, 0x3000),
        ] {
            assert_eq!(to_alignment(host, guest), distance, "{host:#x} {guest:#x}");
            assert_eq!((host + distance) % HUGE_PAGE, guest % HUGE_PAGE);
        }
    }

    #[test]
    fn ram_of_any_size_is_aligned_and_nothing_beside_it_is_accessible() {
        let mut between = Vec::new();
        for (base, bytes) in [
            (0, 1 << 20),
            (0, 0x30_1000),
            (4 << 30, 5 << 20),
            (0x5000, 0x2000),
            (0, 64 << 20),
            (4 << 30, 0x1000),
        ] {
            // Small mappings between them, so that the kernel's own choice of address is aligned only by
            // chance.
            between.push(Mapping::new(0, 0x1000).unwrap());
            let mapping = Mapping::new(base, bytes).unwrap();
            assert_eq!(mapping.ram() as u64 % HUGE_PAGE, base % HUGE_PAGE, "{base:#x} {bytes:#x}");
            assert!(is_readable(mapping.ram()) && is_readable(mapping.ram().wrapping_add(bytes - 1)));
            assert!(!is_readable(mapping.ram().wrapping_add(bytes)), "behind RAM");
            if mapping.ram().cast() != mapping.reserved {
                assert!(!is_readable(mapping.ram().wrapping_sub(1)), "before RAM");
            }
            between.push(mapping);
        }
    }

    /// Returns `true` if the kernel can read the byte at `address` on our behalf.
    fn is_readable(address: *const u8) -> bool {
        let (_reader, writer) = std::io::pipe().unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&writer);
        // SAFETY: the kernel checks the address and reports EFAULT if nothing readable is there.
        unsafe { libc::write(fd, address.cast(), 1) == 1 }
    }
}
