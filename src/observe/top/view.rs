//! How a moment of an observation looks: as a line, and on a terminal.
//!
//! Owns the words and the layout, and the rates, which are the difference of the last two rows of a disk.

use std::collections::VecDeque;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Cell, Paragraph, Row as TableRow, Sparkline, Table};

use crate::observe::csv::Row;

/// Moments that a curve shows at most.
const MOMENTS_MAX: usize = 512;

/// What has been seen of each disk.
#[derive(Debug, Default)]
pub struct History {
    disks: Vec<Disk>,
    lines: Vec<String>,
}

#[derive(Debug, Default)]
struct Disk {
    name: String,
    last: Row,
    before: Option<Row>,
    /// Bytes in the host's cache, the oldest first.
    cached: VecDeque<u64>,
}

impl History {
    /// One more row.
    pub fn take(&mut self, row: Row) {
        let name = row.text("disk").to_owned();
        let at = self.disks.iter().position(|disk| disk.name == name).unwrap_or_else(|| {
            self.disks.push(Disk { name, ..Disk::default() });
            self.disks.len() - 1
        });
        let Some(disk) = self.disks.get_mut(at) else { return };
        disk.take(row);
        self.lines.push(disk.line());
    }

    /// As `host_hit_share` is defined, for what was read between the last two moments.
    fn lately(&self) -> Option<f64> {
        let asked: f64 = self.disks.iter().filter_map(|disk| disk.growth("read_bytes")).sum();
        let from_disk = self.disks.first()?.growth("process_read_bytes")?;
        (asked > 0.0).then(|| 1.0 - from_disk.min(asked) / asked)
    }

    /// The lines of the rows since the last call.
    pub fn take_lines(&mut self) -> Vec<String> {
        std::mem::take(&mut self.lines)
    }
}

impl Disk {
    fn take(&mut self, row: Row) {
        if self.cached.len() == MOMENTS_MAX {
            self.cached.pop_front();
        }
        self.cached.push_back(row.text("host_cached_bytes").parse().unwrap_or(0));
        let before = std::mem::replace(&mut self.last, row);
        self.before = (!before.text("disk").is_empty()).then_some(before);
    }

    /// What a column has grown by in a second.
    fn rate(&self, column: &str) -> Option<f64> {
        let before = self.before.as_ref()?;
        let seconds = self.last.number("time_s")? - before.number("time_s")?;
        let grown = self.growth(column)?;
        (seconds > 0.0 && grown >= 0.0).then_some(grown / seconds)
    }

    /// The share of all reads so far that the host's cache has served. All disks share the figure.
    fn hit_share(&self) -> Option<f64> {
        self.last.number("host_hit_share")
    }

    /// What a column has grown by since the row before.
    fn growth(&self, column: &str) -> Option<f64> {
        Some(self.last.number(column)? - self.before.as_ref()?.number(column)?)
    }

    fn line(&self) -> String {
        let bytes = |column: &str| size(self.last.number(column));
        format!(
            "{:>8.1} s {} {}: host {} (dirty {}, writeback {}), guest {}, both {}; {} r/s {}/s, {} w/s {}/s, {} FLUSH/s; \
             hits {}, FLUSHes x{}, at risk {}",
            self.last.number("time_s").unwrap_or_default(),
            self.name,
            self.last.text("cache"),
            bytes("host_cached_bytes"),
            bytes("host_dirty_bytes"),
            bytes("host_writeback_bytes"),
            bytes("guest_cache_growth_bytes"),
            bytes("double_cached_bytes"),
            count(self.rate("reads")),
            size(self.rate("read_bytes")),
            count(self.rate("writes")),
            size(self.rate("written_bytes")),
            count(self.rate("flushes")),
            percent(self.hit_share()),
            factor(self.last.number("flush_amplification")),
            bytes("bytes_at_risk"),
        )
    }

    fn cells(&self) -> TableRow<'_> {
        let bytes = |column: &str| size(self.last.number(column));
        let cells = [
            self.name.clone(),
            self.last.text("cache").to_owned(),
            bytes("host_cached_bytes"),
            bytes("host_dirty_bytes"),
            bytes("host_writeback_bytes"),
            bytes("double_cached_bytes"),
            count(self.rate("reads")),
            size(self.rate("read_bytes")),
            count(self.rate("writes")),
            size(self.rate("written_bytes")),
            count(self.rate("flushes")),
            factor(self.last.number("flush_amplification")),
            bytes("bytes_at_risk"),
        ];
        TableRow::new(cells.map(Cell::from))
    }
}

/// What stands above the table's columns.
const HEADINGS: [&str; 13] = [
    "disk", "cache", "HOST", "dirty", "wrback", "BOTH", "r/s", "B/s", "w/s", "B/s", "FL/s", "xFLUSH",
    "at risk",
];
const WIDTHS: [u16; 13] = [4, 12, 7, 7, 7, 7, 6, 7, 6, 7, 5, 6, 7];

/// Draws the newest moment.
pub fn draw(frame: &mut Frame<'_>, history: &History, name: &str, goes_on: bool) {
    let disks = u16::try_from(history.disks.len()).unwrap_or(u16::MAX);
    let [title, table, facts, curves] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(disks.saturating_add(2)),
        Constraint::Length(4),
        Constraint::Min(0),
    ])
    .areas(frame.area());
    let first = history.disks.first();
    let seconds = first.and_then(|disk| disk.last.number("time_s")).unwrap_or_default();
    let state = if goes_on { "running" } else { "ended" };
    let text = format!("minivmm top  {name}  {seconds:.1} s  {state}  (q quits)");
    frame.render_widget(Line::from(text).bold(), title);
    let rows = history.disks.iter().map(Disk::cells);
    let headings = TableRow::new(HEADINGS.map(Cell::from)).style(Style::new().underlined());
    frame.render_widget(Table::new(rows, WIDTHS.map(Constraint::Length)).header(headings), table);
    if let Some(disk) = first {
        frame.render_widget(Paragraph::new(facts_of(disk, history.lately())), facts);
    }
    draw_curves(frame, history, curves);
}

/// What is of all disks together.
fn facts_of(disk: &Disk, lately: Option<f64>) -> Vec<Line<'static>> {
    let bytes = |column: &str| size(disk.last.number(column));
    let guest = match disk.last.text("guest_age_s") {
        "" => "guest   tells nothing of itself (the test guest does)".to_owned(),
        age => format!(
            "guest   cached {}, buffers {}, grown by {}; dirty {}, writeback {} ({age} s ago)",
            bytes("guest_cached_bytes"),
            bytes("guest_buffers_bytes"),
            bytes("guest_cache_growth_bytes"),
            bytes("guest_dirty_bytes"),
            bytes("guest_writeback_bytes"),
        ),
    };
    let host = match disk.last.text("host_disk") {
        "" => "host    its disk cannot be seen".to_owned(),
        name => format!(
            "host    {name}: reads {}/s, writes {}/s, {} FLUSH/s, for everybody",
            size(disk.rate("host_disk_read_bytes")),
            size(disk.rate("host_disk_written_bytes")),
            count(disk.rate("host_disk_flushes")),
        ),
    };
    let hits = format!(
        "reads   from the host's cache: {} of the bytes lately, {} so far",
        percent(lately),
        percent(disk.hit_share())
    );
    vec![Line::from(guest), Line::from(host), Line::from(hits)]
}

fn draw_curves(frame: &mut Frame<'_>, history: &History, area: Rect) {
    let parts = Layout::vertical(vec![Constraint::Fill(1); history.disks.len()]).split(area);
    for (disk, part) in history.disks.iter().zip(parts.iter()).filter(|(_, part)| part.height > 1) {
        let most = disk.cached.iter().copied().max().unwrap_or(0);
        let title = format!("{} in the host's cache, at most {}", disk.name, size(Some(most as f64)));
        let newest = disk.cached.len().saturating_sub(usize::from(part.width));
        let curve: Vec<u64> = disk.cached.iter().skip(newest).copied().collect();
        frame.render_widget(Sparkline::default().data(curve).block(Block::new().title(title)), *part);
    }
}

/// Bytes, in seven places at most.
fn size(bytes: Option<f64>) -> String {
    let Some(bytes) = bytes else { return "-".to_owned() };
    let units = ["B", "K", "M", "G", "T"];
    let mut scaled = bytes;
    let mut unit = 0;
    while scaled >= 1024.0 && unit + 1 < units.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    let places = usize::from(unit > 0 && scaled < 100.0);
    format!("{scaled:.places$}{}", units.get(unit).unwrap_or(&""))
}

fn count(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.0}"))
}

fn percent(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{:.0}%", value * 100.0))
}

fn factor(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.2}"))
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    const HEADER: &str = "time_s,disk,cache,host_cached_bytes,reads,read_bytes,flushes,guest_age_s,guest_cached_bytes,\
                          double_cached_bytes,host_hit_share,flush_amplification,host_disk";

    fn history(rows: &[&str]) -> History {
        let mut history = History::default();
        rows.iter().for_each(|row| history.take(Row::parse(HEADER, row).unwrap()));
        history
    }

    fn screen(history: &History, width: u16, height: u16, goes_on: bool) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, history, "a.csv", goes_on)).unwrap();
        let cells = terminal.backend().buffer().content().iter();
        cells.map(|cell| cell.symbol()).collect::<String>()
    }

    #[test]
    fn a_line_has_figures_and_rates_of_its_disk() {
        let mut found = history(&[
            "1.0,vda,none,0,10,0,0,,,,,,vda",
            "1.0,vdb,writeback,0,0,0,0,,,,,,vda",
            "1.5,vda,none,1048576,60,2097152,5,0.01,4096,4096,0.25,1.5,vda",
        ]);
        let lines = found.take_lines();
        assert_eq!(lines.len(), 3);
        assert!(
            lines[0].contains("vda none: host 0B (dirty -") && lines[0].contains("; - r/s"),
            "{}",
            lines[0]
        );
        for word in ["host 1.0M", "both 4.0K", "100 r/s 4.0M/s", "10 FLUSH/s", "hits 25%", "FLUSHes x1.50"] {
            assert!(lines[2].contains(word), "no {word} in {}", lines[2]);
        }
        assert!(found.take_lines().is_empty());
    }

    #[test]
    fn a_screen_of_any_size_shows_what_fits() {
        let found = history(&[
            "1.0,vda,writeback,0,0,0,0,,,,,,",
            "2.0,vda,writeback,8388608,100,8388608,3,0.010,4096,4096,0.25,1.5,sda",
        ]);
        let text = screen(&found, 100, 30, true);
        for word in [
            "a.csv",
            "2.0 s",
            "running",
            "vda",
            "writeback",
            "8.0M",
            "100",
            "1.50",
            "sda",
            "25%",
            "at most 8.0M",
        ] {
            assert!(text.contains(word), "no {word} in {text}");
        }
        assert!(screen(&found, 100, 30, false).contains("ended"));
        assert!(text.contains("- of the bytes lately, 25% so far"), "{text}");
        let silent = history(&["1.0,vda,none,0,0,0,0,,,,,,"]);
        assert!(screen(&silent, 100, 30, true).contains("tells nothing of itself"));
        for (width, height) in [(1, 1), (20, 3), (300, 100)] {
            screen(&found, width, height, true);
        }
        assert!(screen(&History::default(), 80, 24, true).contains("a.csv"));
    }

    #[test]
    fn the_share_lately_is_of_all_disks() {
        let mut found = History::default();
        for row in ["0,vda,100,50", "0,vdb,1000,50", "1,vda,300,150", "1,vdb,1200,150"] {
            found.take(Row::parse("time_s,disk,read_bytes,process_read_bytes", row).unwrap());
        }
        assert_eq!(found.lately(), Some(0.75), "100 of 400 bytes came from a disk");
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [
            (0.0, "0B"),
            (1023.0, "1023B"),
            (1024.0, "1.0K"),
            (150.0 * 1024.0, "150K"),
            (1e12, "931G"),
            (1e18, "909495T"),
        ] {
            assert_eq!(size(Some(bytes)), text);
        }
        assert_eq!(size(None), "-");
    }
}
