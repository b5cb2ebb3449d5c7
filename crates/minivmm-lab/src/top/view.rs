//! How a sample of an observation is shown on a terminal.
//!
//! Owns the texts and the layout. Nothing is cut off: what does not fit is omitted as a whole
//! (`columns`, `lines_of`).

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, RenderDirection, Sparkline};

use super::columns::table;
use super::figures::{count, percent, size};
use super::history::{Disk, History};

/// What a screen shows besides the history.
#[derive(Debug, Clone, Copy)]
pub struct Screen<'a> {
    /// Path of the observation.
    pub name: &'a str,
    /// True if more samples may come.
    pub goes_on: bool,
    /// True if colours are used.
    pub colours: bool,
}

/// Draws the newest sample.
pub fn draw(frame: &mut Frame<'_>, history: &History, screen: &Screen<'_>) {
    let width = frame.area().width;
    let first = history.disks.first();
    let facts: Vec<Line<'_>> = first
        .map_or(vec![], |disk| facts_of(disk, history.lately()))
        .iter()
        .flat_map(|fact| lines_of(fact, width))
        .collect();
    let height = |count: usize| Constraint::Length(u16::try_from(count).unwrap_or(u16::MAX));
    let [title, disks, facts_area, curves] = Layout::vertical([
        Constraint::Length(1),
        height(history.disks.len() + 2),
        height(facts.len() + 1),
        Constraint::Min(0),
    ])
    .areas(frame.area());
    frame.render_widget(title_of(history, screen, width), title);
    frame.render_widget(table(&history.disks, disks.width, screen.colours), disks);
    frame.render_widget(Paragraph::new(facts), facts_area);
    draw_curves(frame, history, screen, curves);
}

/// Returns the title line with as many of its parts as fit. The state is kept longest.
fn title_of<'a>(history: &History, screen: &Screen<'_>, width: u16) -> Line<'a> {
    let seconds = history.disks.first().and_then(|disk| disk.last().number("time_s")).unwrap_or_default();
    let (state, colour) = if screen.goes_on { ("running", Color::Green) } else { ("ended", Color::Gray) };
    let file = screen.name.rsplit('/').next().unwrap_or_default();
    let time = format!("{seconds:.1} s");
    let whole = |name: &str, keys: &str| format!("minivmm top  {name}  {time}  {state}{keys}");
    let texts = [
        whole(screen.name, "  (q quits)"),
        whole(file, "  (q quits)"),
        whole(file, ""),
        format!("{file}  {time}  {state}"),
        format!("{time}  {state}"),
        state.to_owned(),
    ];
    let text = texts.into_iter().find(|text| fits(text, width)).unwrap_or_default();
    let Some((before, after)) = text.split_once(state).filter(|_| screen.colours) else {
        return Line::from(text).bold();
    };
    let coloured = Span::styled(state, Style::new().fg(colour));
    Line::from(vec![Span::from(before.to_owned()), coloured, Span::from(after.to_owned())]).bold()
}

fn fits(text: &str, width: u16) -> bool {
    text.chars().count() <= usize::from(width)
}

/// A label, and the parts of its text, which are not broken.
type Fact = (&'static str, Vec<String>);

/// Returns what concerns all disks together.
fn facts_of(disk: &Disk, lately: Option<f64>) -> Vec<Fact> {
    let bytes = |column: &str| disk.bytes(column);
    let guest = match disk.last().text("guest_age_s") {
        "" => vec!["tells nothing of itself".to_owned(), "(the test guest does)".to_owned()],
        age => vec![
            format!("cached {},", bytes("guest_cached_bytes")),
            format!("buffers {},", bytes("guest_buffers_bytes")),
            format!("grown by {};", bytes("guest_cache_growth_bytes")),
            format!("dirty {},", bytes("guest_dirty_bytes")),
            format!("writeback {}", bytes("guest_writeback_bytes")),
            format!("({age} s ago)"),
        ],
    };
    let host = match disk.last().text("host_disk") {
        "" => vec!["its disk cannot be seen".to_owned()],
        name => vec![
            format!("{name}:"),
            format!("reads {}/s,", size(disk.rate("host_disk_read_bytes"))),
            format!("writes {}/s,", size(disk.rate("host_disk_written_bytes"))),
            format!("{} FLUSH/s,", count(disk.rate("host_disk_flushes"))),
            "for everybody".to_owned(),
        ],
    };
    let hits = vec![
        "from the host's cache:".to_owned(),
        format!("{} of the bytes lately,", percent(lately)),
        format!("{} so far", percent(disk.hit_share())),
    ];
    vec![("guest", guest), ("host", host), ("reads", hits)]
}

/// Width of a label in characters.
const LABEL: u16 = 8;

/// Returns a fact as lines of at most `width` characters, broken between its parts. A part that does not fit a
/// line is left out.
fn lines_of((label, parts): &Fact, width: u16) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    let indent = usize::from(LABEL);
    let mut line = format!("{label:<indent$}");
    let mut is_empty = true;
    for part in parts.iter().filter(|part| fits(part, width.saturating_sub(LABEL))) {
        let gap = if is_empty { "" } else { " " };
        if !is_empty && !fits(&format!("{line}{gap}{part}"), width) {
            lines.push(Line::from(std::mem::replace(&mut line, " ".repeat(indent))));
            line.push_str(part);
            continue;
        }
        line.push_str(gap);
        line.push_str(part);
        is_empty = false;
    }
    if !is_empty {
        lines.push(Line::from(line));
    }
    lines
}

fn draw_curves(frame: &mut Frame<'_>, history: &History, screen: &Screen<'_>, area: Rect) {
    let parts = Layout::vertical(vec![Constraint::Fill(1); history.disks.len()]).split(area);
    for (disk, part) in history.disks.iter().zip(parts.iter()).filter(|(_, part)| part.height > 1) {
        draw_curve(frame, disk, screen, *part);
    }
}

/// Draws the curve of a disk: a title, the newest sample at the right edge, and the times below if there is
/// room.
fn draw_curve(frame: &mut Frame<'_>, disk: &Disk, screen: &Screen<'_>, area: Rect) {
    let axis_rows = u16::from(area.height > 2);
    let [title, curve, axis] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(1), Constraint::Length(axis_rows)])
            .areas(area);
    let most = size(Some(disk.cached.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0) as f64));
    let titles = [
        format!("{} in the host's cache, at most {most}", disk.name()),
        format!("{} cached, at most {most}", disk.name()),
        disk.name().to_owned(),
    ];
    let text = titles.into_iter().find(|text| fits(text, title.width)).unwrap_or_default();
    frame.render_widget(Line::from(text), title);
    let samples: Vec<&(f64, u64)> = disk.cached.iter().rev().take(usize::from(curve.width)).collect();
    let style = if screen.colours { Style::new().fg(Color::Cyan) } else { Style::new() };
    let bytes = samples.iter().map(|(_, bytes)| *bytes);
    let line = Sparkline::default().data(bytes).direction(RenderDirection::RightToLeft).style(style);
    frame.render_widget(line, curve);
    if axis_rows > 0
        && let (Some((newest, _)), Some((oldest, _))) = (samples.first(), samples.last())
    {
        let drawn = u16::try_from(samples.len()).unwrap_or(axis.width).min(axis.width);
        let under = Rect { x: axis.x + axis.width - drawn, width: drawn, ..axis };
        draw_axis(frame, *oldest, *newest, under, axis);
    }
}

/// Draws the times of the oldest and the newest sample at the ends of `under`, which is the width of the curve,
/// and the time in the middle. Below a short curve only the newest is drawn, at the right edge.
fn draw_axis(frame: &mut Frame<'_>, oldest: f64, newest: f64, under: Rect, axis: Rect) {
    let label = |seconds: f64| format!("{seconds:.1} s");
    let length = |text: &str| u16::try_from(text.chars().count()).unwrap_or(u16::MAX);
    let [first, middle, last] = [oldest, f64::midpoint(oldest, newest), newest].map(label);
    if fits(&last, axis.width) {
        frame.render_widget(Line::from(last.as_str()).alignment(Alignment::Right), axis);
    }
    let room = |texts: &[&str]| texts.iter().map(|text| length(text).saturating_add(2)).sum::<u16>();
    if under.width >= room(&[&first, &last]) {
        frame.render_widget(Line::from(first.as_str()), under);
    }
    if under.width >= room(&[&first, &middle, &last]).saturating_mul(2) {
        frame.render_widget(Line::from(middle.as_str()).alignment(Alignment::Center), under);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::buffer::Buffer;

    use super::*;
    use minivmm::observe::csv::Row;

    const HEADER: &str = "time_s,disk,cache,host_cached_bytes,reads,read_bytes,flushes,guest_age_s,guest_cached_bytes,\
                          double_cached_bytes,host_hit_share,flush_amplification,host_disk";

    fn history(rows: &[&str]) -> History {
        let mut history = History::default();
        rows.iter().for_each(|row| history.take(Row::parse(HEADER, row).unwrap()));
        history
    }

    fn buffer(history: &History, width: u16, height: u16, screen: &Screen<'_>) -> Buffer {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, history, screen)).unwrap();
        terminal.backend().buffer().clone()
    }

    /// Returns the lines of the screen.
    fn lines(history: &History, width: u16, height: u16, goes_on: bool) -> Vec<String> {
        let screen = Screen { name: "/somewhere/else/a.csv", goes_on, colours: false };
        let buffer = buffer(history, width, height, &screen);
        let symbols: Vec<&str> = buffer.content().iter().map(|cell| cell.symbol()).collect();
        symbols.chunks(usize::from(width)).map(|line| line.concat()).collect()
    }

    fn screen(history: &History, width: u16, height: u16, goes_on: bool) -> String {
        lines(history, width, height, goes_on).concat()
    }

    /// Returns the history of two busy disks, with enough samples to fill any of the screens.
    fn busy() -> History {
        let mut history = History::default();
        let header = "time_s,disk,cache,host_cached_bytes,host_dirty_bytes,host_writeback_bytes,double_cached_bytes,reads,\
             read_bytes,writes,written_bytes,flushes,flush_amplification,bytes_at_risk,guest_age_s,guest_cached_bytes,\
             guest_buffers_bytes,guest_cache_growth_bytes,guest_dirty_bytes,guest_writeback_bytes,host_disk,\
             host_disk_read_bytes,host_disk_written_bytes,host_disk_flushes,host_hit_share,process_read_bytes";
        for sample in 0..300_u32 {
            let seconds = f64::from(sample) / 2.0;
            for (disk, mode) in [("vda", "writethrough"), ("vdb", "none")] {
                let grown = u64::from(sample) * 123_456_789;
                let row = format!(
                    "{seconds},{disk},{mode},{grown},{grown},{grown},{grown},{},{grown},{},{grown},{},12.34,{grown},0.012,{grown},\
                     {grown},{grown},{grown},{grown},nvme0n1,{grown},{grown},{},0.987,{}",
                    sample * 54_321,
                    sample * 54_322,
                    sample * 1_234,
                    sample * 4_321,
                    grown / 2
                );
                history.take(Row::parse(header, &row).unwrap());
            }
        }
        history
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
        let text = screen(&found, 110, 30, true);
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
        assert!(screen(&found, 110, 30, false).contains("ended"));
        assert!(text.contains("- of the bytes lately, 25% so far"), "{text}");
        let silent = history(&["1.0,vda,none,0,0,0,0,,,,,,"]);
        assert!(screen(&silent, 100, 30, true).contains("tells nothing of itself"));
        for (width, height) in [(1, 1), (20, 3), (300, 100)] {
            screen(&found, width, height, true);
        }
        assert!(screen(&History::default(), 80, 24, true).contains("a.csv"));
    }

    /// Collects all words of the screens. A word or unit that was cut off would be a new word.
    #[test]
    fn no_width_cuts_a_word_or_a_unit() {
        let found = busy();
        let is_bar = |text: &str| {
            text.chars()
                .any(|c| "\u{2581}\u{2582}\u{2583}\u{2584}\u{2585}\u{2586}\u{2587}\u{2588}".contains(c))
        };
        let words = |width: u16| -> BTreeSet<String> {
            let lines = lines(&found, width, 40, true);
            let words = lines.iter().flat_map(|line| line.split_whitespace().map(str::to_owned));
            words.filter(|word| !is_bar(word)).collect()
        };
        // The times below a curve depend on the width. Another test covers them.
        let is_time = |word: &str| word.parse::<f64>().is_ok_and(|_| word.contains('.'));
        let whole: BTreeSet<String> = words(300);
        for word in
            ["HOST", "wrback", "xFLUSH", "at", "risk", "writethrough", "34.4G", "12.34", "108642", "nvme0n1:"]
        {
            assert!(whole.contains(word), "no {word} in {whole:?}");
        }
        for width in 40..=200 {
            let others: Vec<String> =
                words(width).into_iter().filter(|word| !whole.contains(word) && !is_time(word)).collect();
            // The shorter forms of the title and of the curves' titles.
            let known = ["a.csv", "cached,"];
            assert!(others.iter().all(|word| known.contains(&word.as_str())), "{width} columns: {others:?}");
        }
    }

    #[test]
    fn figures_end_where_their_heading_ends() {
        for width in [40, 60, 80, 100, 120] {
            let lines = lines(&busy(), width, 30, true);
            let heading = lines.iter().find(|line| line.contains("HOST")).unwrap();
            let end = heading.find("HOST").unwrap() + 4;
            for row in lines.iter().filter(|line| line.starts_with("vd") && !line.contains("cache")).take(2) {
                assert_eq!(&row[end - 1..end], "G", "{width}: {row}");
                assert!(row[end..].starts_with(' ') || row.len() == end, "{width}: {row}");
            }
        }
    }

    #[test]
    fn the_axis_tells_when_and_the_newest_moment_is_at_the_right() {
        for width in 40..=200_u16 {
            let lines = lines(&busy(), width, 40, true);
            let axes: Vec<&String> = lines.iter().filter(|line| line.ends_with("149.5 s")).collect();
            assert_eq!(axes.len(), 2, "{width}: {lines:#?}");
            // A column of the screen is half a second.
            let oldest = 149.5 - f64::from(width - 1) / 2.0;
            assert!(axes[0].starts_with(&format!("{oldest:.1} s ")), "{width}: {}", axes[0]);
        }
        let young = history(&["1.0,vda,none,4096,0,0,0,,,,,,", "1.5,vda,none,8192,0,0,0,,,,,,"]);
        let lines = lines(&young, 60, 20, true);
        assert!(lines.iter().any(|line| line.ends_with("1.5 s") && line.trim() == "1.5 s"), "{lines:#?}");
    }

    #[test]
    fn colours_are_there_only_where_they_are_wanted() {
        let found = busy();
        let colours_of = |colours| {
            let screen = Screen { name: "a.csv", goes_on: true, colours };
            let buffer = buffer(&found, 120, 30, &screen);
            buffer
                .content()
                .iter()
                .map(|cell| cell.fg)
                .filter(|colour| *colour != Color::Reset)
                .collect::<Vec<_>>()
        };
        assert_eq!(colours_of(false), []);
        for colour in [Color::Cyan, Color::Yellow, Color::Red, Color::Green] {
            assert!(colours_of(true).contains(&colour), "{colour}");
        }
    }

    #[test]
    fn the_share_lately_is_of_all_disks() {
        let mut found = History::default();
        for row in ["0,vda,100,50", "0,vdb,1000,50", "1,vda,300,150", "1,vdb,1200,150"] {
            found.take(Row::parse("time_s,disk,read_bytes,process_read_bytes", row).unwrap());
        }
        assert_eq!(found.lately(), Some(0.75), "100 of 400 bytes came from a disk");
    }
}
