//! `--observe` and `host-cache=` of real runs: what each mode leaves in the host's cache of what the
//! guest has read and written.

use std::fs;

use minivmm::observe::csv::Row;
use minivmm_testkit::machine::*;

use crate::disk::modes;

/// The rows of an observation.
fn rows(text: &str) -> Vec<Row> {
    let (header, lines) = text.split_once('\n').unwrap();
    lines
        .lines()
        .map(|line| Row::parse(header, line).unwrap_or_else(|| panic!("{line} below {header}")))
        .collect()
}

/// T1: in the direct modes and in dontcache nothing of the image is in the host's cache, in the cached ones what
/// the guest has read and written, to the byte: this guest touches one block of 4 KiB at sector 8.
#[test]
fn the_hosts_cache_has_what_the_guest_has_touched_in_cached_modes_and_nothing_in_direct_ones() {
    if !kvm() {
        return;
    }
    for mode in modes() {
        let image = Image::new();
        let csv = image.path.with_extension("csv");
        let disk = image.disk(&format!("cache={},host-cache=drop", mode.name));
        let observe = csv.display().to_string();
        let args = ["--disk", &disk, "--observe", &observe, "--observe-interval", "0.02"];
        run_plain(Entry::Elf, "scenario=io", &args).expect(exit(0x20), mode.name);
        let text = fs::read_to_string(&csv).unwrap();
        let found = rows(&text);
        let (first, last) = (found.first().unwrap(), found.last().unwrap());
        let number = |row: &Row, name: &str| row.number(name).unwrap_or_else(|| panic!("{name} of {text}"));
        assert!(
            found.iter().all(|row| row.text("disk") == "vda" && row.text("cache") == mode.name),
            "{text}"
        );
        let in_order = |a: &Row, b: &Row| number(a, "time_s") <= number(b, "time_s");
        assert!(found.is_sorted_by(in_order), "{text}");

        assert_eq!(number(first, "host_cached_bytes"), 0.0, "{}: dropped before: {text}", mode.name);
        assert_eq!((number(first, "reads"), number(first, "writes")), (0.0, 0.0), "{text}");
        let cached = number(last, "host_cached_bytes");
        if mode.direct || mode.dontcache {
            assert_eq!(cached, 0.0, "{}: {text}", mode.name);
        } else {
            // What the file system reads ahead around one block may be there too.
            assert!(cached >= BLOCK_BYTES as f64, "{}: {text}", mode.name);
        }
        for (column, expected) in [
            ("reads", 1.0),
            ("writes", 1.0),
            ("flushes", 1.0),
            ("read_bytes", 4096.0),
            ("written_bytes", 4096.0),
        ] {
            assert_eq!(number(last, column), expected, "{}: {column} of {text}", mode.name);
        }
        // The last look comes before the closing fdatasync.
        let at_risk = if mode.honours_flush { 0.0 } else { 4096.0 };
        assert_eq!(number(last, "bytes_at_risk"), at_risk, "{}: {text}", mode.name);
        if let Some(dirty) = last.number("host_dirty_bytes") {
            assert!(dirty <= if mode.honours_flush { 0.0 } else { 4096.0 }, "{}: {text}", mode.name);
        }
        // This guest says nothing of itself, and that is not a 0.
        for column in ["guest_cached_bytes", "guest_flushes", "double_cached_bytes"] {
            assert_eq!(last.text(column), "", "{column} of {text}");
        }
        image.must_hold(&Image::after(), mode.name);
    }
}

#[test]
fn a_warmed_image_is_wholly_in_the_hosts_cache_when_the_guest_starts() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    let csv = image.path.with_extension("csv");
    let observe = csv.display().to_string();
    for (wish, bytes) in [("drop", 0), ("warm", IMAGE_BYTES), ("keep", IMAGE_BYTES)] {
        let disk = image.disk(&format!("cache=writeback,host-cache={wish}"));
        run_plain(Entry::Elf, "scenario=io", &["--disk", &disk, "--observe", &observe])
            .expect(exit(0x20), wish);
        let text = fs::read_to_string(&csv).unwrap();
        assert_eq!(rows(&text)[0].number("host_cached_bytes"), Some(bytes as f64), "{wish}: {text}");
        if wish == "drop" {
            continue;
        }
        // All of what was read came from memory.
        assert_eq!(rows(&text).last().unwrap().number("host_hit_share"), Some(1.0), "{wish}: {text}");
    }
}

#[test]
fn an_observation_that_cannot_be_written_is_refused_before_the_guest_runs() {
    if !kvm() {
        return;
    }
    let image = Image::new();
    let disk = image.disk("cache=writeback");
    let itself = image.path.display().to_string();
    for (path, word) in [("/nonexistent/a.csv", "No such file"), (itself.as_str(), "same file as --disk")] {
        let ran =
            run_plain(Entry::Elf, "scenario=io", &["--disk", &disk, "--observe", path]).expect(FAILURE, path);
        assert!(ran.log.contains(word) && ran.log.contains(path), "{}", ran.log);
        assert!(!ran.console.contains("wrote"), "{}", ran.console);
    }
    image.must_hold(&Image::before(), "refused");
    // A device that is always full: the header is refused at once.
    let ran = run_plain(Entry::Elf, "scenario=io", &["--disk", &disk, "--observe", "/dev/full"]);
    let ran = ran.expect(FAILURE, "/dev/full");
    assert!(ran.log.contains("No space left"), "{}", ran.log);
}
