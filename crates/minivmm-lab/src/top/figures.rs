//! Formats figures in few characters.
//!
//! Owns the widths of the figures, by which columns and facts are laid out.

/// Formats a number of bytes in at most seven characters.
pub fn size(bytes: Option<f64>) -> String {
    let Some(bytes) = bytes else { return "-".to_owned() };
    let units = ["B", "K", "M", "G", "T"];
    let mut scaled = bytes;
    let mut unit = 0;
    // 1024 of a unit must be shown as 1.0 of the next.
    while scaled >= 1023.5 && unit + 1 < units.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    let places = usize::from(unit > 0 && scaled < 99.95);
    format!("{scaled:.places$}{}", units.get(unit).unwrap_or(&""))
}

/// Formats a number in at most six characters.
pub fn count(value: Option<f64>) -> String {
    let Some(value) = value else { return "-".to_owned() };
    match value {
        value if value < 999_999.5 => format!("{value:.0}"),
        value if value < 999.95e6 => format!("{:.1}M", value / 1e6),
        value => format!("{:.0}G", value / 1e9),
    }
}

/// Formats a share as a percentage.
pub fn percent(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{:.0}%", value * 100.0))
}

/// Formats a factor in at most six characters.
pub fn factor(value: Option<f64>) -> String {
    match value {
        Some(value) if value < 999.995 => format!("{value:.2}"),
        value => count(value),
    }
}
