//! Formats figures for people, with three digits and a unit.
//!
//! Owns the units and the rounding, which the table and the warnings share.

/// Formats a number with three digits.
pub fn count(value: f64) -> String {
    match value {
        v if v >= 999_500.0 => format!("{}M", digits(v / 1e6)),
        v if v >= 999.5 => format!("{}k", digits(v / 1e3)),
        v => digits(v),
    }
}

fn digits(value: f64) -> String {
    match value {
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// Formats a time that is given in microseconds.
pub fn time(us: f64) -> String {
    match us {
        v if v >= 999_500.0 => format!("{} s", digits(v / 1e6)),
        v if v >= 999.5 => format!("{} ms", digits(v / 1e3)),
        v => format!("{} us", digits(v)),
    }
}

/// Formats a number of bytes for people.
pub fn bytes(bytes: f64) -> String {
    let units = [(f64::from(1 << 30), "GiB"), (f64::from(1 << 20), "MiB"), (1024.0, "KiB")];
    match units.into_iter().find(|unit| bytes >= unit.0) {
        Some((unit, name)) => {
            let digits = digits(bytes / unit);
            let whole = [".00", ".0"].iter().find_map(|zeroes| digits.strip_suffix(zeroes));
            format!("{} {name}", whole.unwrap_or(&digits))
        }
        None => format!("{bytes:.0} bytes"),
    }
}

/// Formats a share as a percentage.
pub fn percent(share: f64) -> String {
    match share * 100.0 {
        whole if whole >= 10.0 => format!("{whole:.0} %"),
        small => format!("{small:.1} %"),
    }
}
