//! Hints for keys and values of a disk that are spelled as in QEMU, libvirt, cloud-hypervisor or crosvm.
//!
//! Owns the hints. No foreign spelling is accepted: if an option had two spellings, the reader of a command line
//! would have to guess whether they mean the same.

use crate::text;

/// The hint for a foreign spelling.
enum Hint {
    /// Suggest this spelling. One that ends in `=` takes the user's key as its value.
    Use(&'static str),
    /// There is no equivalent; give this reason or remedy.
    Explain(&'static str),
}
use Hint::{Explain, Use};

/// (Keys, values, hint). A row applies to these values only, or to any value if there are none.
static KEYS: &[(&[&str], &[&str], Hint)] = &[
    (&["ro", "read-only", "read_only"], &["off", "false", "no", "0"], Use("readonly=off")),
    (&["ro", "read-only", "read_only"], &[], Use("readonly")),
    (&["rw"], &[], Use("readonly=off")),
    (
        &["file", "path", "filename"],
        &[],
        Explain("the path comes first, without a key: --disk PATH[,KEY=VALUE]..."),
    ),
    (&["driver", "type", "image_type"], &["raw"], Use("format=raw")),
    (
        &["driver", "type", "image_type"],
        &["qcow2", "qcow", "vmdk", "vpc", "vhdx"],
        Explain("every image is raw"),
    ),
    (
        &["if", "bus", "driver", "device", "media", "index", "unit", "id", "node-name", "target"],
        &[],
        Explain("leave it out: every disk is virtio-blk, and their order is that of the command line"),
    ),
    (&["bootindex", "boot"], &[], Explain("leave it out: --append root=/dev/vda boots from the first disk")),
    (&["iothread", "iothreads"], &[], Explain("leave it out: each queue has a thread of its own (queues)")),
    (&["snapshot"], &[], Explain("there are no snapshots: copy the image (cp --reflink=auto)")),
    (&["cache.direct", "direct", "o_direct", "odirect"], &["off", "false"], Use("cache=writeback")),
    (&["cache.direct", "direct", "o_direct", "odirect"], &[], Use("cache=none")),
    (&["cache.writeback", "write-cache", "writeback"], &["off", "false"], Use("cache=writethrough")),
    (&["cache.writeback", "write-cache"], &[], Use("cache=writeback")),
    (
        &["cache.no-flush"],
        &["off", "false"],
        Explain("leave it out: every mode but cache=unsafe honours FLUSH"),
    ),
    (&["cache.no-flush"], &[], Use("cache=unsafe")),
    (&["none", "writeback", "writethrough", "directsync", "unsafe", "dontcache"], &[""], Use("cache=")),
    (&["aio", "io", "async"], &["threads"], Use("engine=sync")),
    (&["aio", "io", "async"], &[], Use("engine=io_uring")),
    (&["num-queues", "num_queues"], &[], Use("queues")),
    (&["logical_block_size", "logical-block-size", "sector-size", "sector_size"], &[], Use("block-size")),
    (&["unmap", "trim", "sparse"], &[], Use("discard")),
    (
        &["detect-zeroes", "detect_zeroes"],
        &[],
        Explain("leave it out: the guest's WRITE_ZEROES frees space (discard)"),
    ),
    (
        &["share-rw", "shareable", "locking"],
        &[],
        Explain("two guests never write to one image; readers all say readonly"),
    ),
];

/// (Keys, values, hint). A row without keys applies to all keys that take on or off.
static VALUES: &[(&[&str], &[&str], Hint)] = &[
    (&[], &["yes", "true", "1", "enable", "enabled", "y"], Use("on")),
    (&[], &["no", "false", "0", "disable", "disabled", "n"], Use("off")),
    (&["discard"], &["unmap", "trim"], Use("on")),
    (&["discard"], &["ignore"], Use("off")),
    (&["cache"], &["off", "direct", "o_direct"], Use("none")),
    (&["cache"], &["wb", "on"], Use("writeback")),
    (&["cache"], &["wt"], Use("writethrough")),
    // Linux's flag, and the name that it had before it was merged.
    (&["cache"], &["rwf_dontcache", "rwf_uncached"], Use("dontcache")),
    (&["engine"], &["native", "aio", "libaio", "uring", "async"], Use("io_uring")),
    (&["engine"], &["threads", "psync", "blocking"], Use("sync")),
    (&["transport"], &["virtio-pci", "pcie"], Use("pci")),
    (&["transport"], &["virtio-mmio"], Use("mmio")),
    (
        &["format"],
        &["qcow2", "qcow", "vmdk", "vdi", "vhdx", "vpc", "vhd", "qed"],
        Explain("`qemu-img convert -O raw` makes a raw image of it"),
    ),
];

/// Returns the hint for an unknown key, after a semicolon, or an empty string.
pub(super) fn hint_after_key(key: &str, value: &str, known: &[&'static str]) -> String {
    match hint_for_key(key, value) {
        Some(Use("cache=")) => did_you_mean(Some(&format!("cache={}", key.to_ascii_lowercase()))),
        Some(Use(ours)) => did_you_mean(Some(ours)),
        Some(Explain(why)) => format!("; {why}"),
        None => did_you_mean(nearest(key, known)),
    }
}

fn hint_for_key(key: &str, value: &str) -> Option<&'static Hint> {
    let row =
        KEYS.iter().find(|(keys, values, _)| has(keys, key) && (values.is_empty() || has(values, value)));
    row.map(|(_, _, hint)| hint)
}

/// Returns the hint for a value that the key does not take, after a semicolon, or an empty string.
pub(super) fn hint_after_value(key: &str, value: &str, words: &[&'static str]) -> String {
    match hint_for_value(key, value, words) {
        Some(Use(ours)) => did_you_mean(Some(ours)),
        Some(Explain(why)) => format!("; {why}"),
        None => did_you_mean(nearest(value, words)),
    }
}

fn hint_for_value(key: &str, value: &str, words: &[&'static str]) -> Option<&'static Hint> {
    let is_of_key =
        |keys: &[&str]| if keys.is_empty() { words == ["on", "off"] } else { keys.contains(&key) };
    let row = VALUES.iter().find(|(keys, values, _)| is_of_key(keys) && has(values, value));
    row.map(|(_, _, hint)| hint)
}

/// Returns `true` if `word` is one of `words`, ignoring case.
fn has(words: &[&str], word: &str) -> bool {
    words.iter().any(|it| it.eq_ignore_ascii_case(word))
}

/// Returns the known word that differs only in case or by a typing error.
fn nearest(word: &str, words: &[&'static str]) -> Option<&'static str> {
    let lower = word.to_ascii_lowercase();
    words.iter().copied().find(|it| *it == lower).or_else(|| text::nearest(word, words.iter().copied()))
}

fn did_you_mean(ours: Option<&str>) -> String {
    ours.map(|ours| format!("; did you mean '{ours}'?")).unwrap_or_default()
}

/// Translates QEMU's `key=value` to our spelling; `None` if no key of a disk here matches.
pub fn from_qemu(key: &str, value: &str) -> Option<String> {
    let ours = match (super::keys().find(|(known, _)| *known == key), hint_for_key(key, value)) {
        (Some((_, words)), _) => match hint_for_value(key, value, &words) {
            Some(Use(ours)) => format!("{key}={ours}"),
            _ => format!("{key}={value}"),
        },
        (None, Some(Use(ours))) if ours.contains('=') || *ours == "readonly" => (*ours).to_owned(),
        (None, Some(Use(ours))) => format!("{ours}={value}"),
        (None, _) => return None,
    };
    super::parse(format!("a,{ours}")).is_ok().then_some(ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_spelling_of_others_is_a_key_here() {
        let ours: Vec<_> = super::super::keys().map(|(key, _)| key).collect();
        for theirs in KEYS.iter().flat_map(|(keys, ..)| *keys) {
            assert!(!ours.contains(theirs), "{theirs} is understood");
        }
        assert_eq!(hint_after_key("zzzz", "", &ours), "", "nothing is guessed");
    }

    /// QEMU has no such mode: its cache= are five (qemu-options.hx), and no key beside them adds one.
    #[test]
    fn nothing_of_qemus_means_dontcache() {
        for value in ["none", "writeback", "writethrough", "directsync", "unsafe"] {
            assert_eq!(from_qemu("cache", value), Some(format!("cache={value}")));
        }
        for key in ["cache.direct", "cache.writeback", "cache.no-flush"] {
            for value in ["on", "off"] {
                let ours = from_qemu(key, value).unwrap_or_default();
                assert!(!ours.contains("dontcache"), "{key}={value}: {ours}");
            }
        }
    }

    #[test]
    fn every_value_that_is_meant_is_understood() {
        for (keys, values, hint) in VALUES {
            let keys = if keys.is_empty() { &["readonly", "discard"] } else { *keys };
            for (key, value) in keys.iter().flat_map(|key| values.iter().map(move |value| (key, value))) {
                let ours = match hint {
                    Use(ours) => Some(format!("{key}={ours}")),
                    Explain(_) => None,
                };
                assert_eq!(from_qemu(key, value), ours);
            }
        }
    }
}
