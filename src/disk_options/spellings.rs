//! How QEMU, libvirt, cloud-hypervisor and crosvm spell what the keys of a disk say here.
//!
//! Owns the hints given for a foreign key or value. Nothing here is accepted: with two spellings of one wish,
//! the reader of a command line would have to guess whether they mean the same.

use crate::text;

/// The hint for a foreign spelling.
enum Said {
    /// This was meant.
    Meant(&'static str),
    /// There is no equivalent, for this reason.
    Leave(&'static str),
}
use Said::{Leave, Meant};

/// (Keys, values, hint). A row applies to these values only, or to any value if there are none.
static KEYS: &[(&[&str], &[&str], Said)] = &[
    (&["ro", "read-only", "read_only"], &["off", "false", "no", "0"], Meant("readonly=off")),
    (&["ro", "read-only", "read_only"], &[], Meant("readonly")),
    (&["rw"], &[], Meant("readonly=off")),
    (
        &["file", "path", "filename"],
        &[],
        Leave("the path comes first, without a key: --disk PATH[,KEY=VALUE]..."),
    ),
    (&["driver", "type", "image_type"], &["raw"], Meant("format=raw")),
    (
        &["driver", "type", "image_type"],
        &["qcow2", "qcow", "vmdk", "vpc", "vhdx"],
        Leave("every image is raw"),
    ),
    (
        &["if", "bus", "driver", "device", "media", "index", "unit", "id", "node-name", "target"],
        &[],
        Leave("leave it out: every disk is virtio-blk, and their order is that of the command line"),
    ),
    (&["bootindex", "boot"], &[], Leave("leave it out: --append root=/dev/vda boots from the first disk")),
    (&["iothread", "iothreads"], &[], Leave("leave it out: each queue has a thread of its own (queues)")),
    (&["snapshot"], &[], Leave("there are no snapshots: copy the image (cp --reflink=auto)")),
    (&["cache.direct", "direct", "o_direct", "odirect"], &["off", "false"], Meant("cache=writeback")),
    (&["cache.direct", "direct", "o_direct", "odirect"], &[], Meant("cache=none")),
    (&["cache.writeback", "write-cache", "writeback"], &["off", "false"], Meant("cache=writethrough")),
    (&["cache.writeback", "write-cache"], &[], Meant("cache=writeback")),
    (
        &["cache.no-flush"],
        &["off", "false"],
        Leave("leave it out: every mode but cache=unsafe honours FLUSH"),
    ),
    (&["cache.no-flush"], &[], Meant("cache=unsafe")),
    (&["none", "writeback", "writethrough", "directsync", "unsafe"], &[""], Meant("cache=")),
    (&["aio", "io", "async"], &["threads"], Meant("engine=sync")),
    (&["aio", "io", "async"], &[], Meant("engine=io_uring")),
    (&["num-queues", "num_queues"], &[], Meant("queues")),
    (&["logical_block_size", "logical-block-size", "sector-size", "sector_size"], &[], Meant("block-size")),
    (&["unmap", "trim", "sparse"], &[], Meant("discard")),
    (
        &["detect-zeroes", "detect_zeroes"],
        &[],
        Leave("leave it out: the guest's WRITE_ZEROES frees space (discard)"),
    ),
    (
        &["share-rw", "shareable", "locking"],
        &[],
        Leave("two guests never write to one image; readers all say readonly"),
    ),
];

/// (Keys, values, hint). A row without keys applies to all keys that take on or off.
static VALUES: &[(&[&str], &[&str], Said)] = &[
    (&[], &["yes", "true", "1", "enable", "enabled", "y"], Meant("on")),
    (&[], &["no", "false", "0", "disable", "disabled", "n"], Meant("off")),
    (&["discard"], &["unmap", "trim"], Meant("on")),
    (&["discard"], &["ignore"], Meant("off")),
    (&["cache"], &["off", "direct", "o_direct"], Meant("none")),
    (&["cache"], &["wb", "on"], Meant("writeback")),
    (&["cache"], &["wt"], Meant("writethrough")),
    (&["engine"], &["native", "aio", "libaio", "uring", "async"], Meant("io_uring")),
    (&["engine"], &["threads", "psync", "blocking"], Meant("sync")),
    (&["transport"], &["virtio-pci", "pcie"], Meant("pci")),
    (&["transport"], &["virtio-mmio"], Meant("mmio")),
    (
        &["format"],
        &["qcow2", "qcow", "vmdk", "vdi", "vhdx", "vpc", "vhd", "qed"],
        Leave("`qemu-img convert -O raw` makes a raw image of it"),
    ),
];

/// Returns the hint for an unknown key, after a semicolon, or an empty string.
pub(super) fn of_key(key: &str, value: &str, known: &[&'static str]) -> String {
    match said_of_key(key, value) {
        Some(Meant("cache=")) => meant(Some(&format!("cache={}", key.to_ascii_lowercase()))),
        Some(Meant(ours)) => meant(Some(ours)),
        Some(Leave(why)) => format!("; {why}"),
        None => meant(nearest(key, known)),
    }
}

fn said_of_key(key: &str, value: &str) -> Option<&'static Said> {
    let row =
        KEYS.iter().find(|(keys, values, _)| has(keys, key) && (values.is_empty() || has(values, value)));
    row.map(|(_, _, said)| said)
}

/// Returns the hint for a value that the key does not take, after a semicolon, or an empty string.
pub(super) fn of_value(key: &str, value: &str, words: &[&'static str]) -> String {
    match said_of_value(key, value, words) {
        Some(Meant(ours)) => meant(Some(ours)),
        Some(Leave(why)) => format!("; {why}"),
        None => meant(nearest(value, words)),
    }
}

fn said_of_value(key: &str, value: &str, words: &[&'static str]) -> Option<&'static Said> {
    let is_of_key =
        |keys: &[&str]| if keys.is_empty() { words == ["on", "off"] } else { keys.contains(&key) };
    let row = VALUES.iter().find(|(keys, values, _)| is_of_key(keys) && has(values, value));
    row.map(|(_, _, said)| said)
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

fn meant(ours: Option<&str>) -> String {
    ours.map(|ours| format!("; did you mean '{ours}'?")).unwrap_or_default()
}

/// Translates QEMU's `key=value` to our spelling; `None` if no key of a disk here matches.
pub fn of_qemu(key: &str, value: &str) -> Option<String> {
    let ours = match (super::keys().find(|(known, _)| *known == key), said_of_key(key, value)) {
        (Some((_, words)), _) => match said_of_value(key, value, &words) {
            Some(Meant(ours)) => format!("{key}={ours}"),
            _ => format!("{key}={value}"),
        },
        (None, Some(Meant(ours))) if ours.contains('=') || *ours == "readonly" => (*ours).to_owned(),
        (None, Some(Meant(ours))) => format!("{ours}={value}"),
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
        assert_eq!(of_key("zzzz", "", &ours), "", "nothing is guessed");
    }

    #[test]
    fn every_value_that_is_meant_is_understood() {
        for (keys, values, said) in VALUES {
            let keys = if keys.is_empty() { &["readonly", "discard"] } else { *keys };
            for (key, value) in keys.iter().flat_map(|key| values.iter().map(move |value| (key, value))) {
                let ours = match said {
                    Meant(ours) => Some(format!("{key}={ours}")),
                    Leave(_) => None,
                };
                assert_eq!(of_qemu(key, value), ours);
            }
        }
    }
}
