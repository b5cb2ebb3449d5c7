//! Prints the report for a terminal: a table and notes.
//!
//! Owns the texts and the columns. Figures and warnings are computed elsewhere.

use std::fmt::Write;

use super::figures::{bytes, count, percent, time};
use super::report::{BenchReport, CompetitorFigures, JobFigures, Latencies};
use super::warning::ABOUT;
use crate::measuring::{Distribution, Ratio};
use minivmm::text::hang;

const HEAD: [&str; 9] = ["by", "IOPS", "spread", "MB/s", "p50", "p99", "of host", "of its peer", "see"];
/// Indices of the columns with words, which are aligned left. Figures are aligned right.
const IS_WORDS: [usize; 2] = [0, 8];

/// Returns the whole text.
pub fn text(report: &BenchReport) -> String {
    let mut text = String::new();
    let image = &report.image;
    let extents = image.layout.extents.map(|count| format!(", in {count} extent{}", plural(count)));
    let protocol = &report.protocol;
    let state = if protocol.host_cache == "warm" { "filled with it" } else { "emptied of it" };
    text += &hang(
        "image  ",
        &format!(
            "{}: {}, every byte written{}; the host's cache {state} before each run",
            image.path.display(),
            bytes(image.layout.bytes as f64),
            extents.unwrap_or_default()
        ),
    );
    text += &hang("host   ", &report.host.in_words());
    text += &hang(
        "guest  ",
        &format!(
            "{}, {} CPU{}; a boot for each run, {} round{}",
            bytes(protocol.guest_memory_bytes as f64),
            protocol.guest_cpus,
            plural(protocol.guest_cpus.into()),
            protocol.rounds,
            plural(protocol.rounds as u64)
        ),
    );
    text.push('\n');
    let jobs: Vec<(&JobFigures, Vec<[String; 9]>)> =
        report.jobs.iter().map(|job| (job, rows(job, report))).filter(|(_, rows)| !rows.is_empty()).collect();
    // An empty column is omitted.
    let width = |column: usize| {
        let cells = jobs.iter().flat_map(|(_, rows)| rows).filter_map(|row| row.get(column));
        let widest = cells.map(|cell| cell.chars().count()).max().filter(|&widest| widest > 0)?;
        Some(HEAD.get(column).map_or(0, |head| head.chars().count()).max(widest))
    };
    let widths: Vec<Option<usize>> = (0..HEAD.len()).map(width).collect();
    text += &line(&HEAD.map(str::to_owned), &widths);
    for (job, rows) in &jobs {
        let _ = writeln!(text, "\n{}: {}{}", job.name, job.in_words, latencies(job));
        for row in rows {
            text += &line(row, &widths);
        }
    }
    text.push('\n');
    text += &legend(report);
    text += &notes(report);
    text
}

fn plural(count: u64) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// Returns which kinds of requests the latencies are of.
fn latencies(job: &JobFigures) -> String {
    let Some(figures) = job.competitors.iter().find_map(|who| who.figures.as_ref()) else {
        return String::new();
    };
    let kinds: Vec<_> = figures.latencies.iter().map(|latencies| format!("a {}", latencies.of)).collect();
    format!("; p50, p99 of {}", kinds.join(" + "))
}

fn rows(job: &JobFigures, report: &BenchReport) -> Vec<[String; 9]> {
    job.competitors.iter().filter_map(|who| row(job, who, report)).collect()
}

fn row(job: &JobFigures, who: &CompetitorFigures, report: &BenchReport) -> Option<[String; 9]> {
    let figures = who.figures.as_ref()?;
    let latency = |which: fn(&Latencies) -> Distribution| {
        let medians = figures.latencies.iter().map(|latencies| time(which(latencies).median));
        medians.collect::<Vec<_>>().join(" + ")
    };
    // If the peer runs the unchanged job, both ratios are equal and one column is enough.
    let has_peer = who.peer.as_deref().is_some_and(|peer| peer != super::who::HOST);
    let mut codes: Vec<&str> = Vec::new();
    for warning in &report.warnings {
        let is_its = warning.job.as_deref() == Some(&job.name) && warning.who.as_deref() == Some(&who.name);
        if is_its && !codes.contains(&warning.code) {
            codes.push(warning.code);
        }
    }
    Some([
        format!("  {}", who.name),
        count(figures.iops.median),
        figures.iops.relative_range().filter(|_| figures.iops.count > 1).map(percent).unwrap_or_default(),
        format!("{:.1}", figures.mb_s.median),
        latency(|latencies| latencies.p50_us),
        latency(|latencies| latencies.p99_us),
        ratio(who.over_host),
        if has_peer { ratio(who.over_peer) } else { String::new() },
        codes.join(" "),
    ])
}

fn line(cells: &[String; 9], widths: &[Option<usize>]) -> String {
    let mut line = String::new();
    for (column, (cell, width)) in cells.iter().zip(widths).enumerate() {
        let Some(width) = width else { continue };
        let gap = " ".repeat(width.saturating_sub(cell.chars().count()));
        match IS_WORDS.contains(&column) {
            true => line += &format!("{cell}{gap}  "),
            false => line += &format!("{gap}{cell}  "),
        }
    }
    line.truncate(line.trim_end().len());
    line.push('\n');
    line
}

fn legend(report: &BenchReport) -> String {
    let ratios = report.jobs.iter().flat_map(|job| &job.competitors).filter_map(|who| who.over_host);
    let sure = ratios.map(|ratio| ratio.sure).reduce(f64::min);
    let mut text = String::new();
    if report.protocol.rounds > 1 {
        text += &hang("spread       ", "from the least to the most IOPS of a round, over the median");
    }
    let interval = match sure {
        // One round gives no interval.
        None | Some(0.0) => String::new(),
        Some(sure) => format!(
            ": the median of the rounds' ratios, and where the true one is with {} certainty",
            percent(sure)
        ),
    };
    text += &hang(
        "of host      ",
        &format!("IOPS over those of the host's own fio at the very same job{interval}"),
    );
    let mut peers = report.jobs.iter().flat_map(|job| &job.competitors).filter_map(|who| who.peer.as_deref());
    if peers.any(|peer| peer != super::who::HOST) {
        text += &hang(
            "of its peer  ",
            "the same over the host's fio with what the mode has and promises: direct=0 where it goes through the host's \
             cache, sync=dsync where each write is stable",
        );
    }
    text
}

/// Returns the notes. Warnings with the same code share one note.
fn notes(report: &BenchReport) -> String {
    let width = ABOUT.iter().map(|about| about.0.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (code, about) in &ABOUT {
        let of: Vec<_> = report.warnings.iter().filter(|warning| warning.code == *code).collect();
        let cases: Vec<String> = of
            .iter()
            .map(|warning| match (&warning.job, &warning.who) {
                (Some(job), Some(who)) => format!("{job} {who} {}", warning.text),
                _ => warning.text.clone(),
            })
            .collect();
        if cases.is_empty() {
            continue;
        }
        let about = if about.is_empty() { String::new() } else { format!("{about}: ") };
        text += &hang(&format!("{code:width$}  "), &format!("{about}{}", cases.join("; ")));
    }
    if !text.is_empty() {
        text.insert_str(0, "\nNotes on these figures:\n");
    }
    text
}

fn ratio(ratio: Option<Ratio>) -> String {
    match ratio {
        None => String::new(),
        Some(it) if it.count < 2 => format!("{:.2}", it.median),
        Some(it) => format!("{:.2} ({:.2}-{:.2})", it.median, it.low, it.high),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits_and_their_unit() {
        for (value, text) in [
            (0.0, "0.00"),
            (9.994, "9.99"),
            (9.996, "10.0"),
            (123.4, "123"),
            (999.6, "1.00k"),
            (12345.0, "12.3k"),
            (1.5e6, "1.50M"),
        ] {
            assert_eq!(count(value), text, "{value}");
        }
        assert_eq!([time(83.0), time(1234.0), time(2.5e6)].join(" "), "83.0 us 1.23 ms 2.50 s");
        let formatted = [bytes(512.0), bytes(4096.0), bytes(256.0 * 1048576.0), bytes(1.5 * 1073741824.0)];
        assert_eq!(formatted.join(", "), "512 bytes, 4 KiB, 256 MiB, 1.50 GiB");
        assert_eq!([bytes(65536.0), bytes(100.0 * 1024.0)].join(", "), "64 KiB, 100 KiB");
        assert_eq!([percent(0.981), percent(0.012), percent(1.0)].join(" "), "98 % 1.2 % 100 %");
    }
}
