//! Owns the syntax of sizes: a number, and a letter for its power of 1024.

use crate::layout::{GIB, KIB, MIB};

/// The minimum guest memory: no kernel boots with less.
const MEMORY_MIN: u64 = 16 * MIB;
/// The maximum guest memory. KVM takes less than 2^31 pages in one slot (KVM_MEM_MAX_NR_PAGES). More, in
/// several slots, was tried on no host.
const MEMORY_MAX: u64 = 8 << 40;

/// Parses a size of guest memory, and checks it against this host.
pub fn memory(text: &str) -> Result<u64, String> {
    memory_on(text, address_bits())
}

/// Returns the number of bits of a physical address on this host, which is also a guest's. Every x86-64
/// processor has CPUID 0x80000008.
fn address_bits() -> u32 {
    #[allow(unused_unsafe, reason = "newer compilers know it to be safe")]
    // SAFETY: every CPU that this is built for (x86-64) has the instruction.
    let sizes = unsafe { std::arch::x86_64::__cpuid(0x8000_0008) };
    sizes.eax & 0xff
}

fn memory_on(text: &str, address_bits: u32) -> Result<u64, String> {
    let bytes = bytes(text)?;
    if bytes < MEMORY_MIN {
        let meant = if bytes.saturating_mul(MIB) >= MEMORY_MIN { text } else { "16" };
        let hint = if text.bytes().all(|byte| byte.is_ascii_digit()) {
            format!(" (a number without a letter counts bytes; did you mean {meant}M?)")
        } else {
            String::new()
        };
        return Err(format!("it is less than 16M, in which no kernel boots{hint}"));
    }
    if bytes > MEMORY_MAX {
        return Err("it is more than 8T, the largest guest memory".into());
    }
    // The gap below 4 GiB moves the rest of the memory up.
    let most = 1_u64.checked_shl(address_bits).unwrap_or(u64::MAX).saturating_sub(GIB);
    if bytes > most {
        let most = most / GIB;
        return Err(format!(
            "it is more than this host's {address_bits} bits of physical address can reach ({most}G)"
        ));
    }
    if !bytes.is_multiple_of(MIB) {
        return Err("it is not a multiple of 1M".into());
    }
    Ok(bytes)
}

/// Parses the size of an image.
pub fn disk(text: &str) -> Result<u64, String> {
    match bytes(text)? {
        bytes if bytes < MIB => Err("it is less than 1M; a number without a letter counts bytes".into()),
        bytes if !bytes.is_multiple_of(4096) => Err("it is not a multiple of 4K".into()),
        bytes => Ok(bytes),
    }
}

/// Parses `text` into bytes.
fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || "expected a number followed by K, M, G or T: 512M, 4G".to_string();
    let units = [('K', KIB), ('M', MIB), ('G', GIB), ('T', 1 << 40)];
    let last = text.chars().last().map(|letter| letter.to_ascii_uppercase());
    let unit = units.iter().find(|(letter, _)| Some(*letter) == last);
    let (digits, unit) = match unit {
        Some((letter, unit)) => (text.get(..text.len() - letter.len_utf8()).ok_or_else(wrong)?, *unit),
        None => (text, 1),
    };
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let count: u64 = digits.parse().map_err(|_| wrong())?;
    count.checked_mul(unit).ok_or_else(|| "it is more than this computer can count".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_powers_of_1024() {
        for (text, bytes) in [
            ("512M", 512 * MIB),
            ("4G", 4 * GIB),
            ("4g", 4 * GIB),
            ("131072k", 128 * MIB),
            ("134217728", 128 * MIB),
            ("1T", 1 << 40),
        ] {
            assert_eq!(memory_on(text, 46), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_the_hosts_addresses_do_not_reach_is_refused_with_the_figure() {
        assert_eq!(memory_on("1023G", 40), Ok(1023 * GIB));
        for (text, bits) in [("1T", 39), ("1T", 40), ("512G", 39), ("64G", 36)] {
            let error = memory_on(text, bits).unwrap_err();
            assert!(
                error.contains(&format!("{bits} bits"))
                    && error.contains(&format!("({}G)", (1_u64 << (bits - 30)) - 1)),
                "{error}"
            );
        }
    }

    #[test]
    fn an_image_has_whole_blocks() {
        assert_eq!(disk("1G"), Ok(GIB));
        assert_eq!(disk("1028K"), Ok(1028 * KIB));
        for (text, word) in [("64", "less than 1M"), ("1048577", "multiple of 4K"), ("1.5G", "512M")] {
            let error = disk(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_help() {
        for (text, word) in [
            ("", "512M"),
            ("M", "512M"),
            ("1.5G", "512M"),
            ("-1G", "512M"),
            ("+1G", "512M"),
            ("512MB", "512M"),
            ("4\u{fc}", "512M"),
            ("512", "did you mean 512M"),
            ("8M", "less than 16M"),
            ("1", "did you mean 16M"),
            ("9T", "more than 8T"),
            ("99999999999999G", "count"),
            ("33554433", "multiple"),
        ] {
            let error = memory_on(text, 52).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
