//! The table of `minivmm top`: its columns, which of them fit a width, and how figures are written.
//!
//! Owns all three. A column is shown whole or not at all, so that the unit of a figure is never cut off.

use ratatui::layout::{Alignment, Constraint};
use ratatui::style::{Color, Style};
use ratatui::text::Text;
use ratatui::widgets::{Cell, Row as TableRow, Table};

use super::figures::{count, factor, size};
use super::history::Disk;

/// The meaning of a figure, which decides its colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    Plain,
    /// Bytes in a cache.
    Cached,
    /// Bytes that are not written yet.
    Dirty,
    /// Bytes that a crash of the host would lose.
    AtRisk,
}

/// A column of the table.
struct Column {
    heading: &'static str,
    width: u16,
    /// The column with the highest number is omitted first if there is no room for all.
    dispensable: u8,
    alignment: Alignment,
    meaning: Meaning,
    text: fn(&Disk) -> String,
}

/// Creates a column for a name or word, aligned left.
const fn word(heading: &'static str, width: u16, dispensable: u8, text: fn(&Disk) -> String) -> Column {
    Column { heading, width, dispensable, alignment: Alignment::Left, meaning: Meaning::Plain, text }
}

/// Creates a column for a figure, aligned right.
const fn figure(heading: &'static str, width: u16, dispensable: u8, text: fn(&Disk) -> String) -> Column {
    Column { heading, width, dispensable, alignment: Alignment::Right, meaning: Meaning::Plain, text }
}

const fn of(meaning: Meaning, column: Column) -> Column {
    Column { meaning, ..column }
}

/// All columns, in their order on the screen. The width of a column is that of its longest possible text.
const COLUMNS: [Column; 13] = [
    word("disk", 4, 0, |disk| disk.name().to_owned()),
    word("cache", 12, 6, |disk| disk.last().text("cache").to_owned()),
    of(Meaning::Cached, figure("HOST", 7, 1, |disk| disk.bytes("host_cached_bytes"))),
    of(Meaning::Dirty, figure("dirty", 7, 7, |disk| disk.bytes("host_dirty_bytes"))),
    of(Meaning::Dirty, figure("wrback", 7, 12, |disk| disk.bytes("host_writeback_bytes"))),
    of(Meaning::Cached, figure("BOTH", 7, 10, |disk| disk.bytes("double_cached_bytes"))),
    figure("r/s", 6, 8, |disk| count(disk.rate("reads"))),
    figure("r B/s", 7, 3, |disk| size(disk.rate("read_bytes"))),
    figure("w/s", 6, 9, |disk| count(disk.rate("writes"))),
    figure("w B/s", 7, 2, |disk| size(disk.rate("written_bytes"))),
    figure("FL/s", 6, 5, |disk| count(disk.rate("flushes"))),
    figure("xFLUSH", 6, 11, |disk| factor(disk.last().number("flush_amplification"))),
    of(Meaning::AtRisk, figure("at risk", 7, 4, |disk| disk.bytes("bytes_at_risk"))),
];
/// Width of the gap between two columns.
const SPACING: u16 = 1;

/// Returns the columns that fit into `width`.
fn shown(width: u16) -> Vec<&'static Column> {
    let mut columns: Vec<&Column> = COLUMNS.iter().collect();
    let needed = |columns: &[&Column]| -> u16 {
        let gaps = u16::try_from(columns.len().saturating_sub(1)).unwrap_or(u16::MAX);
        columns.iter().map(|column| column.width).sum::<u16>() + gaps * SPACING
    };
    while needed(&columns) > width {
        let Some(most) = columns.iter().map(|column| column.dispensable).max() else { break };
        columns.retain(|column| column.dispensable != most);
    }
    columns
}

/// Returns the table of all disks for this width.
pub fn table<'a>(disks: &'a [Disk], width: u16, colours: bool) -> Table<'a> {
    let columns = shown(width);
    let aligned = |column: &Column, text: String| Text::from(text).alignment(column.alignment);
    let heading = |column: &&Column| Cell::from(aligned(column, column.heading.to_owned()));
    let headings = TableRow::new(columns.iter().map(heading)).style(Style::new().underlined());
    let cell = |column: &Column, disk: &Disk| {
        let text = (column.text)(disk);
        // A figure without its unit would be wrong, so a text that is too long is not shown.
        let fits = text.chars().count() <= usize::from(column.width);
        let style = style_of(column.meaning, &text, colours);
        Cell::from(aligned(column, if fits { text } else { "?".into() })).style(style)
    };
    let rows = disks.iter().map(|disk| TableRow::new(columns.iter().map(|column| cell(column, disk))));
    let widths: Vec<Constraint> = columns.iter().map(|column| Constraint::Length(column.width)).collect();
    Table::new(rows.collect::<Vec<_>>(), widths).header(headings).column_spacing(SPACING)
}

fn style_of(meaning: Meaning, text: &str, colours: bool) -> Style {
    let nothing = matches!(text, "-" | "0" | "0B");
    match meaning {
        _ if !colours || nothing => Style::new(),
        Meaning::Plain => Style::new(),
        Meaning::Cached => Style::new().fg(Color::Cyan),
        Meaning::Dirty => Style::new().fg(Color::Yellow),
        Meaning::AtRisk => Style::new().fg(Color::Red),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_numbers_are_short() {
        for (bytes, text) in [
            (0.0, "0B"),
            (1023.0, "1023B"),
            (1023.9, "1.0K"),
            (1024.0, "1.0K"),
            (99.99 * 1024.0, "100K"),
            (150.0 * 1024.0, "150K"),
            (1e12, "931G"),
            (1e18, "909495T"),
        ] {
            assert_eq!(size(Some(bytes)), text);
        }
        assert_eq!(size(None), "-");
        for (number, text) in [(0.4, "0"), (999_999.0, "999999"), (1e6, "1.0M"), (1.2e9, "1G")] {
            assert_eq!(count(Some(number)), text);
        }
        for (number, text) in [(1.0, "1.00"), (999.99, "999.99"), (1000.0, "1000"), (2.5e6, "2.5M")] {
            assert_eq!(factor(Some(number)), text);
        }
    }

    #[test]
    fn whole_columns_go_and_the_most_telling_stay() {
        let headings = |width| shown(width).iter().map(|column| column.heading).collect::<Vec<_>>();
        assert_eq!(headings(200).len(), COLUMNS.len());
        assert_eq!(
            headings(80),
            ["disk", "cache", "HOST", "dirty", "r/s", "r B/s", "w/s", "w B/s", "FL/s", "at risk"]
        );
        assert_eq!(headings(40), ["disk", "HOST", "r B/s", "w B/s", "at risk"]);
        assert_eq!(headings(5), ["disk"]);
        assert_eq!(headings(1), [""; 0]);
    }
}
