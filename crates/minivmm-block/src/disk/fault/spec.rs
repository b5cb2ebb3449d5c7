//! The grammar of `fault=`: which operations are hit, and how (`docs/crash-testing.md`).
//!
//! Owns the parsing of rules, and the errors that say what would be valid. [`super::plan`] decides what happens
//! to an operation.
//!
//! ```text
//! SPEC   = ITEM ["+" ITEM]...
//! ITEM   = ACTION ":" KIND [":" WHEN]...  |  "flush-fail=once"  |  "flush-fail=always"  |  "seed=" NUMBER
//! ACTION = "fail" | "fail=EIO" | "fail=ENOSPC" | "delay=" TIME | "short" | "tear" | "lose"
//! KIND   = "read" | "write" | "flush" | "discard"
//! WHEN   = "nth=" N | "every=" N | "once" | "chance=" PERCENT "%" | "sectors=" FIRST "-" LAST
//! TIME   = NUMBER ("us" | "ms" | "s")
//! ```

use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

/// The longest delay: longer than any driver waits.
const DELAY_MAX: Duration = Duration::from_secs(600);

/// All rules of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultSpec {
    /// The rules, in the order given.
    pub rules: Vec<Rule>,
    /// The seed for chance and for the shapes of torn and short transfers.
    pub seed: u64,
    /// The text as given, for messages.
    pub text: String,
}

/// One rule: what happens to which operations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// What happens.
    pub action: Action,
    /// The kind of operation it happens to.
    pub kind: FaultedOp,
    /// Sectors of 512 bytes, of which the operation must touch one; `None` for anywhere.
    pub sectors: Option<RangeInclusive<u64>>,
    /// Which of the matching operations it happens to.
    pub when: When,
}

/// What is done to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It is not done, and fails with this errno. A write with RWF_DSYNC that fails as a flush is still
    /// written.
    Fail(i32),
    /// It is held this long before it begins.
    Delay(Duration),
    /// It transfers only a beginning, of whole blocks, and reports the short count.
    Short,
    /// It writes only some blocks, the first or the last, and fails with EIO.
    Tear,
    /// It is not done, and succeeds: a lie. A write with RWF_DSYNC that is lost as a flush is written without
    /// RWF_DSYNC.
    Lose,
}

/// Which of the host's operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultedOp {
    /// Reads.
    Read,
    /// Writes, with RWF_DSYNC or without.
    Write,
    /// fdatasync, and the sync of a write with RWF_DSYNC.
    Flush,
    /// Operations that punch holes or zero a range: DISCARD and WRITE_ZEROES.
    Discard,
}

/// Which of the operations that match a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// All of them.
    Always,
    /// Only this one, counted from 1.
    Nth(u64),
    /// Every nth: with 3 the third, the sixth, ...
    Every(u64),
    /// With this chance in percent.
    Chance(u8),
}

/// Why the value of `fault=` cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid fault '{item}': {why}")]
pub struct FaultError {
    item: String,
    why: String,
}

impl FromStr for FaultSpec {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let (mut rules, mut seed) = (Vec::new(), None);
        for item in text.split('+') {
            let parsed = parse_item(item).map_err(|why| FaultError { item: item.to_owned(), why })?;
            match parsed {
                Item::Rule(rule) => rules.push(rule),
                Item::Seed(_) if seed.is_some() => {
                    return Err(FaultError { item: item.to_owned(), why: "there is a seed already".into() });
                }
                Item::Seed(number) => seed = Some(number),
            }
        }
        if rules.is_empty() {
            return Err(FaultError {
                item: text.to_owned(),
                why: "it has no rule, such as fail:flush".into(),
            });
        }
        Ok(Self { rules, seed: seed.unwrap_or(0), text: text.to_owned() })
    }
}

impl FaultSpec {
    /// Returns `true` if a rule may report success for what was not done.
    pub fn lies(&self) -> bool {
        self.rules.iter().any(|rule| rule.action == Action::Lose)
    }
}

enum Item {
    Rule(Rule),
    Seed(u64),
}

fn parse_item(item: &str) -> Result<Item, String> {
    match item.split_once('=') {
        Some(("seed", number)) => {
            let wrong = |_| format!("a seed is a number, and '{number}' is none");
            return number.parse().map(Item::Seed).map_err(wrong);
        }
        Some(("flush-fail", which)) => {
            let when = match which {
                "once" => When::Nth(1),
                "always" => When::Always,
                _ => return Err("flush-fail is once or always".into()),
            };
            let action = Action::Fail(libc::EIO);
            return Ok(Item::Rule(Rule { action, kind: FaultedOp::Flush, sectors: None, when }));
        }
        _ => {}
    }
    let mut parts = item.split(':');
    let action = parse_action(parts.next().unwrap_or_default())?;
    let kind = parse_kind(parts.next().unwrap_or_default())?;
    let mut rule = Rule { action, kind, sectors: None, when: When::Always };
    for part in parts {
        rule.add(part)?;
    }
    rule.check()?;
    Ok(Item::Rule(rule))
}

impl Rule {
    fn add(&mut self, part: &str) -> Result<(), String> {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        if name == "sectors" {
            if self.sectors.is_some() {
                return Err("sectors is given twice".into());
            }
            self.sectors = Some(parse_sectors(value)?);
            return Ok(());
        }
        let count = || {
            let number = value.parse().ok().filter(|&number: &u64| number > 0);
            number.ok_or_else(|| format!("{name} takes a number from 1, and '{value}' is none"))
        };
        let when = match name {
            "nth" => When::Nth(count()?),
            "every" => When::Every(count()?),
            "once" if value.is_empty() => When::Nth(1),
            "chance" => When::Chance(parse_percent(value)?),
            _ => {
                return Err(format!(
                    "'{part}' is none of nth=N, every=N, once, chance=P%, sectors=FIRST-LAST"
                ));
            }
        };
        if self.when != When::Always {
            return Err("only one of nth, every, once and chance goes with a rule".into());
        }
        self.when = when;
        Ok(())
    }

    /// Refuses combinations that make no sense.
    fn check(&self) -> Result<(), String> {
        let why = match (self.action, self.kind) {
            (Action::Short, FaultedOp::Flush | FaultedOp::Discard) => "only reads and writes can be short",
            (Action::Tear, FaultedOp::Read | FaultedOp::Flush | FaultedOp::Discard) => {
                "only writes can be torn"
            }
            (Action::Lose, FaultedOp::Read) => "a read cannot be lost",
            (_, FaultedOp::Flush) if self.sectors.is_some() => "a flush is of no sectors",
            _ => return Ok(()),
        };
        Err(why.into())
    }
}

fn parse_action(text: &str) -> Result<Action, String> {
    match text.split_once('=').unwrap_or((text, "")) {
        ("fail", "" | "EIO") => Ok(Action::Fail(libc::EIO)),
        ("fail", "ENOSPC") => Ok(Action::Fail(libc::ENOSPC)),
        ("fail", other) => Err(format!("fail is with EIO or ENOSPC, not '{other}'")),
        ("delay", time) => parse_time(time).map(Action::Delay),
        ("short", "") => Ok(Action::Short),
        ("tear", "") => Ok(Action::Tear),
        ("lose", "") => Ok(Action::Lose),
        _ => Err(format!("'{text}' is none of fail, fail=ENOSPC, delay=TIME, short, tear, lose")),
    }
}

fn parse_kind(text: &str) -> Result<FaultedOp, String> {
    match text {
        "read" => Ok(FaultedOp::Read),
        "write" => Ok(FaultedOp::Write),
        "flush" => Ok(FaultedOp::Flush),
        "discard" => Ok(FaultedOp::Discard),
        "" => Err("it needs an operation behind a colon: read, write, flush or discard".into()),
        _ => Err(format!("'{text}' is none of read, write, flush, discard")),
    }
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("a delay is a number of us, ms or s, such as 5ms, up to 600s; '{text}' is none");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let micros = match text.get(digits.len()..) {
        Some("us") => Some(number),
        Some("ms") => number.checked_mul(1_000),
        Some("s") => number.checked_mul(1_000_000),
        _ => None,
    };
    let time = micros.map(Duration::from_micros).filter(|&time| time <= DELAY_MAX);
    time.ok_or_else(wrong)
}

fn parse_percent(text: &str) -> Result<u8, String> {
    let number = text.strip_suffix('%').and_then(|digits| digits.parse().ok());
    let found = number.filter(|percent| (1..=100).contains(percent));
    found.ok_or_else(|| format!("a chance is from 1% to 100%, and '{text}' is none"))
}

fn parse_sectors(text: &str) -> Result<RangeInclusive<u64>, String> {
    let wrong = || format!("sectors are FIRST-LAST, of 512 bytes each, as in 0-7; '{text}' are none");
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let (first, last) = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
    if first <= last { Ok(first..=last) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Rule {
        let spec: FaultSpec = text.parse().unwrap();
        assert_eq!(spec.rules.len(), 1, "{text}");
        spec.rules[0].clone()
    }

    #[test]
    fn rules_are_what_they_say() {
        use Action::{Delay, Fail, Lose, Short, Tear};
        let ms = Duration::from_millis;
        for (text, action, kind, when) in [
            ("fail:flush", Fail(libc::EIO), FaultedOp::Flush, When::Always),
            ("flush-fail=once", Fail(libc::EIO), FaultedOp::Flush, When::Nth(1)),
            ("flush-fail=always", Fail(libc::EIO), FaultedOp::Flush, When::Always),
            ("fail=ENOSPC:write:nth=3", Fail(libc::ENOSPC), FaultedOp::Write, When::Nth(3)),
            ("fail=EIO:discard:once", Fail(libc::EIO), FaultedOp::Discard, When::Nth(1)),
            ("delay=5ms:read:every=10", Delay(ms(5)), FaultedOp::Read, When::Every(10)),
            ("delay=1500us:flush", Delay(Duration::from_micros(1500)), FaultedOp::Flush, When::Always),
            ("delay=2s:discard", Delay(ms(2000)), FaultedOp::Discard, When::Always),
            ("short:write:chance=50%", Short, FaultedOp::Write, When::Chance(50)),
            ("tear:write", Tear, FaultedOp::Write, When::Always),
            ("lose:flush:every=2", Lose, FaultedOp::Flush, When::Every(2)),
        ] {
            assert_eq!(one(text), Rule { action, kind, sectors: None, when }, "{text}");
        }
        assert_eq!(one("fail:read:sectors=8-15:once").sectors, Some(8..=15));
        let many: FaultSpec = "lose:write:sectors=0-0+seed=7+delay=1ms:flush".parse().unwrap();
        assert_eq!((many.rules.len(), many.seed, many.lies()), (2, 7, true));
    }

    #[test]
    fn what_cannot_be_is_refused_and_the_error_says_what_could() {
        for (text, needle) in [
            ("", "none of fail"),
            ("seed=1", "no rule"),
            ("seed=x+fail:read", "a seed is a number"),
            ("seed=1+seed=2+fail:read", "already"),
            ("fail", "behind a colon"),
            ("fail:fsync", "read, write, flush, discard"),
            ("fail=EPERM:read", "EIO or ENOSPC"),
            ("flush-fail=twice", "once or always"),
            ("delay:read", "5ms"),
            ("delay=5:read", "5ms"),
            ("delay=601s:read", "600s"),
            ("delay=99999999999999999999s:read", "5ms"),
            ("delay=18446744073709551615s:read", "5ms"),
            ("short:flush", "only reads and writes"),
            ("tear:read", "only writes"),
            ("lose:read", "cannot be lost"),
            ("fail:flush:sectors=0-1", "no sectors"),
            ("fail:read:sectors=9-8", "FIRST-LAST"),
            ("fail:read:sectors=1-2:sectors=1-2", "twice"),
            ("fail:read:nth=0", "from 1"),
            ("fail:read:nth=1:every=2", "only one"),
            ("fail:read:chance=0%", "1% to 100%"),
            ("fail:read:chance=50", "1% to 100%"),
            ("fail:read:sometimes", "nth=N"),
            ("fail:read++fail:write", "none of fail"),
        ] {
            let error = text.parse::<FaultSpec>().unwrap_err().to_string();
            assert!(error.contains(needle), "{text}: {error}");
        }
    }
}
