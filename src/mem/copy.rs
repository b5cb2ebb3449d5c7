//! Copies of bytes that somebody else may be changing meanwhile.
//!
//! Owns the one copy that may touch guest memory. A `memmove` would be a data race in Rust's eyes
//! as soon as two queues bounce the same guest buffer; what an `asm` block does to memory is, like
//! what a system call does, no access of Rust's.

/// Copies `len` bytes, right for overlapping ranges. Bytes that change meanwhile arrive old or new,
/// each by itself.
///
/// # Safety
///
/// Both ranges must be mapped, `from` readable and `to` writable, for the length of the call, and
/// if one of them is memory that Rust knows of, no reference that excludes this use may exist.
pub unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    let distance = (to as usize).wrapping_sub(from as usize);
    let one = |at: usize| {
        // SAFETY: `at` is inside both ranges.
        unsafe { to.add(at).write_volatile(from.add(at).read_volatile()) };
    };
    if distance < len {
        // The target begins inside the source: backwards, or the source's end would be lost.
        return (0..len).rev().for_each(one);
    }
    // Miri executes no assembly, and is there to look at each access.
    if cfg!(miri) {
        return (0..len).for_each(one);
    }
    // SAFETY: the caller vouches for both ranges; the ABI has cleared the direction flag. As fast as
    // `memmove` from some hundred bytes on (`tests/memory.rs` tells).
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}
