//! Guest memory that another process shares through file descriptors, and its loss.
//!
//! Owns the mappings, the checks of what is mapped, and the handler of SIGBUS. Whoever shares a file can truncate it,
//! and every access beyond its end then raises SIGBUS, which would end this process. With [`survive_lost_memory`] the
//! handler puts empty memory in the place of what is lost, makes every later translation of the [`Ram`] fail, and
//! tells its [`MemoryLoss`]. System calls and io_uring report EFAULT on their own.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{Mappings, Ram, RamError, Regions};
use crate::sync::unpoisoned;

/// A region of guest memory in a file that another process shares.
#[derive(Debug, Clone, Copy)]
pub struct SharedRegion<'a> {
    /// First guest physical address.
    pub guest: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// The file: a memfd, or a file on tmpfs, hugetlbfs, ext4 or xfs.
    pub file: BorrowedFd<'a>,
    /// Where the region begins in the file, a multiple of 4096.
    pub offset: u64,
}

/// Tells that memory of a [`Ram`] is lost, because its file was truncated.
#[derive(Debug)]
pub struct MemoryLoss {
    lost: AtomicBool,
    wake: EventFd,
}

impl MemoryLoss {
    /// Creates it, with nothing lost.
    pub fn new() -> io::Result<Arc<Self>> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Arc::new(Self { lost: AtomicBool::new(false), wake }))
    }

    /// Returns `true` once memory is lost.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// Async-signal-safe.
    fn tell(&self) {
        self.lost.store(true, Ordering::SeqCst);
        let one = 1u64;
        // SAFETY: writes eight bytes of `one` to an eventfd that `self` keeps open.
        unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
    }
}

/// The descriptor becomes readable once memory is lost.
impl AsRawFd for MemoryLoss {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// One shared region in this process. Dropping it forgets it and unmaps it.
#[derive(Debug)]
pub(super) struct SharedMapping {
    mapped: *mut libc::c_void,
    mapped_bytes: usize,
    /// Where the region begins in it.
    skipped: usize,
    loss: Arc<MemoryLoss>,
}

// SAFETY: an address and lengths that nobody changes; what they name is reached through raw pointers, by system
// calls and copies.
unsafe impl Send for SharedMapping {}
// SAFETY: as above; no method reads or writes the memory.
unsafe impl Sync for SharedMapping {}

impl SharedMapping {
    fn new(region: &SharedRegion, loss: &Arc<MemoryLoss>) -> Result<Self, String> {
        let page = page_bytes(region)?;
        // A mapping begins and ends at a page of the file, which for hugetlbfs is a huge one.
        let begin = region.offset - region.offset % page;
        let end = region.offset.checked_add(region.bytes).and_then(|end| end.checked_next_multiple_of(page));
        let end = end.ok_or("its end wraps")?;
        let mapped_bytes = usize::try_from(end - begin).map_err(|_| "it is too large")?;
        let skipped = usize::try_from(region.offset - begin).map_err(|_| "it is too large")?;
        let offset = libc::off_t::try_from(begin).map_err(|_| "its offset is too large")?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let fd = region.file.as_raw_fd();
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let mapped = unsafe { libc::mmap(null_mut(), mapped_bytes, protection, flags, fd, offset) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().to_string());
        }
        let mapping = Self { mapped, mapped_bytes, skipped, loss: Arc::clone(loss) };
        // SAFETY: the range is the mapping; the advice changes nothing that is in it.
        unsafe { libc::madvise(mapped, mapped_bytes, libc::MADV_DONTFORK) };
        Ok(mapping)
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        forget(self.mapped.addr());
        // SAFETY: mapped in `new` with this length, and unmapped only here.
        unsafe { libc::munmap(self.mapped, self.mapped_bytes) };
    }
}

/// Checks that a region can be mapped and accessed. Returns the size of the file's pages in bytes.
fn page_bytes(region: &SharedRegion) -> Result<u64, String> {
    const PAGE: u64 = 4096;
    if region.bytes == 0 || !region.offset.is_multiple_of(PAGE) {
        return Err("it is empty, or its offset in the file is not a multiple of 4096".to_owned());
    }
    let host = |error: rustix::io::Errno| io::Error::from(error).to_string();
    let found = rustix::fs::fstat(region.file).map_err(host)?;
    if rustix::fs::FileType::from_raw_mode(found.st_mode) != rustix::fs::FileType::RegularFile {
        return Err("it is no regular file".to_owned());
    }
    let system = rustix::fs::fstatfs(region.file).map_err(host)?;
    // A page fault must end: a file system in user space need not answer it (linux/magic.h).
    let page = match system.f_type {
        // tmpfs, and with it a memfd; ext2 to ext4; xfs.
        0x0102_1994 | 0xef53 | 0x5846_5342 => PAGE,
        // hugetlbfs.
        0x9584_58f6 => u64::try_from(system.f_bsize).unwrap_or(PAGE).max(PAGE),
        _ => return Err("it is no memfd, and no file on tmpfs, hugetlbfs, ext4 or xfs".to_owned()),
    };
    let file_bytes = u64::try_from(found.st_size).unwrap_or(0);
    match region.offset.checked_add(region.bytes) {
        Some(end) if end <= file_bytes => Ok(page),
        _ => Err(format!("it begins at {:#x} of a file of {file_bytes:#x} bytes", region.offset)),
    }
}

impl Ram {
    /// Maps guest RAM that another process shares. If its files are truncated later, `loss` is told, provided that
    /// [`survive_lost_memory`] was called. The files can be closed afterwards.
    pub fn from_shared(regions: &[SharedRegion], loss: &Arc<MemoryLoss>) -> Result<Self, RamError> {
        let mut sorted: Vec<&SharedRegion> = regions.iter().collect();
        sorted.sort_by_key(|region| region.guest);
        let mut mapped = Vec::with_capacity(sorted.len());
        let mut mappings = Vec::with_capacity(sorted.len());
        for region in sorted {
            let refused = |why: String| RamError::Shared { guest: region.guest, bytes: region.bytes, why };
            let mapping = SharedMapping::new(region, loss).map_err(refused)?;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let bytes = usize::try_from(region.bytes).map_err(|error| refused(error.to_string()))?;
            let at = mapping.mapped.cast::<u8>().wrapping_add(mapping.skipped);
            // SAFETY: `bytes` bytes from here are inside the mapping, which is kept beside the region for as long as
            // it lives.
            let found = unsafe { MmapRegion::build_raw(at, bytes, protection, libc::MAP_SHARED) };
            let found = found.map_err(|error| refused(error.to_string()))?;
            let found = GuestRegionMmap::new(found, GuestAddress(region.guest));
            mapped.push(found.ok_or_else(|| refused("its end wraps".to_owned()))?);
            mappings.push(mapping);
        }
        let places: Vec<_> =
            mappings.iter().map(|it| (it.mapped.addr(), it.mapped_bytes, Arc::clone(&it.loss))).collect();
        let all = GuestMemoryMmap::from_regions(mapped).map_err(|e| RamError::Regions(e.to_string()))?;
        let ram = Self(Arc::new(Regions::new(all, Mappings::Shared(mappings))));
        for (start, bytes, loss) in places {
            let full = RamError::Regions("too many regions are shared with this process".to_owned());
            remember(start, bytes, &ram.0, &loss).ok_or(full)?;
        }
        Ok(ram)
    }
}

/// A shared mapping as the handler of SIGBUS finds it. A free place has `start` 0.
struct Place {
    start: AtomicUsize,
    bytes: AtomicUsize,
    /// What the mapping belongs to. It lives until the place is freed.
    regions: AtomicPtr<Regions>,
    loss: AtomicPtr<MemoryLoss>,
}

/// The most shared mappings that a process may have.
const PLACES_MAX: usize = 4096;
static PLACES: [Place; PLACES_MAX] = [const {
    Place {
        start: AtomicUsize::new(0),
        bytes: AtomicUsize::new(0),
        regions: AtomicPtr::new(null_mut()),
        loss: AtomicPtr::new(null_mut()),
    }
}; PLACES_MAX];
/// Held while places are taken and freed. The handler only reads.
static CHANGING: Mutex<()> = Mutex::new(());

/// Takes a place for a mapping of `regions`. Returns `None` if all are taken.
fn remember(start: usize, bytes: usize, regions: &Arc<Regions>, loss: &Arc<MemoryLoss>) -> Option<()> {
    let _changing = unpoisoned(CHANGING.lock());
    let place = PLACES.iter().find(|place| place.start.load(Ordering::SeqCst) == 0)?;
    place.bytes.store(bytes, Ordering::SeqCst);
    place.regions.store(Arc::as_ptr(regions).cast_mut(), Ordering::SeqCst);
    place.loss.store(Arc::as_ptr(loss).cast_mut(), Ordering::SeqCst);
    // Last, because the handler takes a place with a start for whole.
    place.start.store(start, Ordering::SeqCst);
    Some(())
}

fn forget(start: usize) {
    let _changing = unpoisoned(CHANGING.lock());
    for place in PLACES.iter().filter(|place| place.start.load(Ordering::SeqCst) == start) {
        place.start.store(0, Ordering::SeqCst);
    }
}

/// Handles SIGBUS from now on, for the whole process: an access to shared memory that its owner has truncated reads
/// zeroes. Any other SIGBUS ends the process as before.
pub fn survive_lost_memory() -> io::Result<()> {
    // SAFETY: zero is a valid value of this plain structure: an empty mask, no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_bus_error as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the structure is complete, and the handler calls only async-signal-safe functions.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO `info` is this signal's, which is the kernel's report of an access. Each thread has an
    // errno of its own, which the interrupted code may be about to read.
    let (address, errno) = unsafe { ((*info).si_addr().addr(), *libc::__errno_location()) };
    if !replace(address) {
        // Returning repeats the access, which then ends the process.
        // SAFETY: sets a signal's action to the default.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Puts empty memory in the place of the shared mapping around `address`. Returns `false` if there is none.
///
/// The thread that has accessed `address` holds the mapping's `Ram`, so the place does not change meanwhile. Other
/// places may; one that is being taken or freed is not mistaken for this one, because its start is read twice.
fn replace(address: usize) -> bool {
    for place in &PLACES {
        let start = place.start.load(Ordering::SeqCst);
        let bytes = place.bytes.load(Ordering::SeqCst);
        let regions = place.regions.load(Ordering::SeqCst);
        let loss = place.loss.load(Ordering::SeqCst);
        let is_inside = start != 0 && address >= start && address - start < bytes;
        if !is_inside || place.start.load(Ordering::SeqCst) != start {
            continue;
        }
        // SAFETY: the place's mapping is alive, and so are what it belongs to and its `MemoryLoss`.
        unsafe {
            (*regions).withdraw();
            (*loss).tell();
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: replaces exactly the mapping of this place, which belongs to a `SharedMapping`. Whoever accesses it
        // meanwhile finds the one or the other. All of it is replaced, because a part of a huge page cannot be.
        let mapped = unsafe { libc::mmap(start as *mut libc::c_void, bytes, protection, flags, -1, 0) };
        return mapped != libc::MAP_FAILED;
    }
    false
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::mem::{Iov, Segment, read_bytes, write_bytes};

    const PAGE: u64 = 4096;

    fn memory(pages: u64) -> File {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(pages * PAGE).unwrap();
        file
    }

    #[test]
    fn regions_are_found_in_any_order_and_at_their_offsets() {
        let (low, high) = (memory(4), memory(2));
        let region = |guest, bytes, file, offset| SharedRegion { guest, bytes, file, offset };
        let loss = MemoryLoss::new().unwrap();
        let regions =
            [region(1 << 20, 2 * PAGE, high.as_fd(), 0), region(0, PAGE + 10, low.as_fd(), 2 * PAGE)];
        let ram = Ram::from_shared(&regions, &loss).unwrap();
        let other = Ram::from_shared(&[region(0, 4 * PAGE, low.as_fd(), 0)], &loss).unwrap();
        write_bytes(&ram, PAGE + 1, b"shared").unwrap();
        let mut found = [0; 6];
        read_bytes(&other, 3 * PAGE + 1, &mut found).unwrap();
        assert_eq!(&found, b"shared");
        assert!(ram.host(PAGE + 9, 2).is_err() && ram.host(1 << 20, 8192).is_ok());
    }

    #[test]
    fn what_cannot_be_mapped_is_refused_with_its_reason() {
        let file = memory(2);
        let null = File::open("/dev/null").unwrap();
        let loss = MemoryLoss::new().unwrap();
        for (bytes, file, offset, reason) in [
            (3 * PAGE, &file, 0, "of a file of 0x2000 bytes"),
            (PAGE, &file, 2 * PAGE, "of a file of 0x2000 bytes"),
            (PAGE, &file, u64::MAX - PAGE + 1, "of a file of 0x2000 bytes"),
            (PAGE, &file, 512, "multiple of 4096"),
            (0, &file, 0, "empty"),
            (PAGE, &null, 0, "no regular file"),
        ] {
            let region = SharedRegion { guest: 0, bytes, file: file.as_fd(), offset };
            let error = Ram::from_shared(&[region], &loss).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        let twice = SharedRegion { guest: 0, bytes: 2 * PAGE, file: file.as_fd(), offset: 0 };
        let over = SharedRegion { guest: PAGE, bytes: PAGE, ..twice };
        assert!(Ram::from_shared(&[twice, over], &loss).is_err(), "regions over each other");
    }

    #[test]
    fn truncated_memory_reads_zeroes_once_and_then_is_no_memory() {
        survive_lost_memory().unwrap();
        let (cut, whole) = (memory(4), memory(1));
        let region = |guest, bytes, file| SharedRegion { guest, bytes, file, offset: 0 };
        let loss = MemoryLoss::new().unwrap();
        let regions = [region(0, 4 * PAGE, cut.as_fd()), region(1 << 20, PAGE, whole.as_fd())];
        let ram = Ram::from_shared(&regions, &loss).unwrap();
        let unharmed = MemoryLoss::new().unwrap();
        let other = Ram::from_shared(&[region(0, PAGE, whole.as_fd())], &unharmed).unwrap();
        write_bytes(&ram, 3 * PAGE, &[7; 100]).unwrap();
        let held = Iov::new(&ram, &[Segment { addr: 3 * PAGE, len: 16 }]).unwrap();
        cut.set_len(0).unwrap();
        let mut found = [1; 100];
        read_bytes(&ram, 3 * PAGE, &mut found).unwrap();
        assert_eq!((found, loss.is_lost()), ([0; 100], true));
        // What was translated before can still be accessed; nothing else can be translated.
        // SAFETY: the piece was checked when it was made, and `ram` keeps its memory mapped.
        assert_eq!(unsafe { held.as_iovecs()[0].iov_base.cast::<u8>().read_volatile() }, 0);
        assert!(ram.host(0, 1).is_err() && ram.host(1 << 20, 1).is_err());
        assert!(!unharmed.is_lost() && other.host(0, 1).is_ok());
        drop((ram, held));
        assert_eq!(
            PLACES
                .iter()
                .filter(|place| place.loss.load(Ordering::SeqCst) == Arc::as_ptr(&loss).cast_mut()
                    && place.start.load(Ordering::SeqCst) != 0)
                .count(),
            0
        );
    }
}
