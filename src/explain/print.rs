//! Prints an explanation for people: 80 columns wide, and drivers with the same results together.

use crate::disk::cache::POLICIES;

use super::{Driver, Explanation, RequestOutcome};
use crate::text::hang;

/// Returns the text of all disks, one after the other.
pub fn to_text(disks: &[Explanation]) -> String {
    disks.iter().map(disk_text).collect::<Vec<_>>().join("\n")
}

fn line(name: &str, words: &str) -> String {
    hang(&format!("  {name:<12} "), words)
}

fn disk_text(disk: &Explanation) -> String {
    let mut page = format!("{}: cache={}, {}, {}\n", disk.image, disk.cache, size(disk.bytes), disk.kind);
    page += &line("opened", &disk.open_flags);
    page += &line("blocks", &blocks(disk));
    page += &line("offers", &disk.features.join(" "));
    let threads = if disk.queues == 1 { "1, with a thread" } else { "{}, with a thread each" };
    page += &line("queues", &threads.replace("{}", &disk.queues.to_string()));
    let cache = if disk.writeback != 0 { "on" } else { "off" };
    let seen = if disk.writeback != 0 { "write back" } else { "write through" };
    let words =
        format!("{cache}: config.writeback is {}, Linux says \"{seen}\" (cache_type)", disk.writeback);
    page += &line("write cache", &words);
    page += &line("engine", &format!("{}, writes that must be stable: {}", disk.engine, disk.stable));
    page += &line("at start", &calls(&disk.calls.start));
    page += &line("at the end", &calls(&disk.calls.end));
    for (labels, driver) in groups(&disk.calls.drivers) {
        page.push('\n');
        for (at, label) in labels.iter().enumerate() {
            page += &hang(
                if at == 0 { "  A driver that negotiates " } else { "                        or " },
                label,
            );
        }
        page += &driver_text(driver);
    }
    page.push('\n');
    page += &below(disk);
    for warning in &disk.warnings {
        page += &hang("warning: ", warning);
    }
    for why in &disk.refusals {
        page += &hang("a run would be refused: ", why);
    }
    page
}

fn size(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 20) { format!("{} MiB", bytes >> 20) } else { format!("{bytes} bytes") }
}

fn blocks(disk: &Explanation) -> String {
    let blocks = &disk.blocks;
    let mut sizes = format!("{} bytes for the guest, {} on the host", blocks.logical, blocks.physical);
    if let Some(other) = blocks.other_modes {
        let is_direct = blocks.memory_alignment != 1;
        let others: Vec<_> = POLICIES.iter().filter(|it| it.direct != is_direct).map(|it| it.name).collect();
        let modes = others.join(", ");
        sizes += &format!(
            ", {other} for the guest in the modes {modes} (block-size=4096 keeps it the same in all; partition tables need \
             that)"
        );
    }
    if blocks.memory_alignment == 1 {
        return format!("{sizes}; no alignment, because of the {}", blocks.found_by);
    }
    format!(
        "{sizes}; O_DIRECT wants memory on multiples of {}, offsets and lengths on {} (found by {})",
        blocks.memory_alignment, blocks.offset_alignment, blocks.found_by
    )
}

fn calls(calls: &[&str]) -> String {
    if calls.is_empty() { "nothing".into() } else { calls.join(", then ").replace("FALLOC_FL_", "") }
}

/// Returns what a driver negotiates and does.
fn label(driver: &Driver) -> String {
    let negotiates = match (driver.negotiates_flush, driver.negotiates_config_wce) {
        (true, true) => "FLUSH and CONFIG_WCE",
        (true, false) => "FLUSH only",
        (false, true) => "CONFIG_WCE only",
        (false, false) => "neither FLUSH nor CONFIG_WCE",
    };
    match driver.sets_writeback {
        Some(value) => format!("{negotiates}, then sets writeback to {value}"),
        // Linux does this since 3.7, until its user changes cache_type.
        None if driver.negotiates_flush && driver.negotiates_config_wce => format!("{negotiates} (Linux)"),
        None => negotiates.into(),
    }
}

/// Groups the drivers whose results are all the same, under the first of each group.
fn groups(drivers: &[Driver]) -> Vec<(Vec<String>, &Driver)> {
    let mut groups: Vec<(Vec<String>, &Driver)> = Vec::new();
    for driver in drivers {
        match groups.iter_mut().find(|(_, first)| same(first, driver)) {
            Some((labels, _)) => labels.push(label(driver)),
            None => groups.push((vec![label(driver)], driver)),
        }
    }
    groups
}

fn outcomes(driver: &Driver) -> [(&'static str, &RequestOutcome); 6] {
    [
        ("read", &driver.read),
        ("write", &driver.write),
        ("FLUSH", &driver.flush),
        ("DISCARD", &driver.discard),
        ("WRITE_ZEROES", &driver.write_zeroes),
        ("  with unmap", &driver.write_zeroes_unmap),
    ]
}

fn same(a: &Driver, b: &Driver) -> bool {
    a.on_setting == b.on_setting && outcomes(a) == outcomes(b)
}

fn driver_text(driver: &Driver) -> String {
    let mut text = String::new();
    if !driver.on_setting.is_empty() {
        text += &hang("    by setting it ", &calls(&driver.on_setting));
    }
    for (name, outcome) in outcomes(driver) {
        let mut words = match outcome.status {
            "OK" => calls(&outcome.calls),
            status => format!("{status}, {}", calls(&outcome.calls)),
        };
        // Only writes are shown, because whatever else shares a sync shares it in the same way.
        if let (Some(two), "write") = (&outcome.two_at_once, name) {
            words += &format!("; for two at once {}", calls(two));
        }
        text += &hang(&format!("    {name:<13} "), &words);
    }
    text
}

fn below(disk: &Explanation) -> String {
    let mut text = String::new();
    let place = &disk.place;
    if !place.file_system.is_empty() {
        let words = format!("{} of {} on {}", place.file_system, place.source, place.mount_point);
        text += &line("file system", &words);
        text += &line("mounted", &place.options.join(" "));
    }
    for note in &place.notes {
        text += &line("note", note);
    }
    for layer in &disk.host_disks {
        let cache = layer.write_cache.as_deref().unwrap_or("unknown");
        let fua = match layer.fua {
            Some(true) => "yes",
            Some(false) => "no",
            None => "unknown",
        };
        text += &line(
            "host disk",
            &format!("{} ({}): write cache: {cache}, FUA: {fua}", layer.name, layer.device),
        );
    }
    let reach = &disk.flush_reaches_disk;
    text + &line("disk flush", &format!("{}: {}", reach.answer, reach.because))
}
