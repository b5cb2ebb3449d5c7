//! No doorbell and no interrupt is lost between a worker and its driver, whatever the processors make of
//! the order of their loads and stores; and each of the ring's two fences is needed for that.
//!
//! `cargo test -p minivmm-block --features observed --test fences`. The device's side is the production code: the worker's
//! round over the real ring, whose accesses the models answer (`docs/durability.md`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may")]

#[path = "../common/desc.rs"]
mod desc;
mod explore;
#[path = "../common/fiber.rs"]
mod fiber;
mod memory;
mod rings;

use std::rc::Rc;

use explore::{Explored, Lost, Without, explore, observe};
use memory::Kind;
use rings::{Pace, Rings};

/// A driver with EVENT_IDX, or without it; and with all of its requests at once, or one after the other.
const DRIVERS: [(bool, Pace); 4] =
    [(true, Pace::AtOnce), (true, Pace::InTurn), (false, Pace::AtOnce), (false, Pace::InTurn)];

/// Requests of a run: two are enough for each to meet what is left of the other. C11 has very many more states
/// than TSO, so there it is one but for one kind of driver, unless MINIVMM_REQUESTS says otherwise (`make torture`).
fn requests(kind: Kind, event_idx: bool, pace: Pace) -> u16 {
    let asked = std::env::var("MINIVMM_REQUESTS").ok().and_then(|text| text.parse().ok());
    let is_small = kind == Kind::Tso || event_idx && pace == Pace::AtOnce;
    asked.unwrap_or(if is_small { 2 } else { 1 })
}

fn try_all(
    kind: Kind,
    event_idx: bool,
    pace: Pace,
    requests: u16,
    without: Without,
) -> Result<Explored, Lost> {
    let rings = Rc::new(Rings::new(event_idx, pace, requests));
    observe(Rc::clone(&rings) as Rc<_>);
    explore(kind, &*rings, &*rings, without)
}

/// Shows Q11.
#[test]
fn no_wakeup_is_lost_in_any_order_of_loads_and_stores() {
    for kind in [Kind::Tso, Kind::C11] {
        for (event_idx, pace) in DRIVERS {
            let what = format!("{kind:?}, EVENT_IDX {event_idx}, {pace:?}");
            match try_all(kind, event_idx, pace, requests(kind, event_idx, pace), Without::default()) {
                Ok(explored) => {
                    println!("{what}: {explored:?}");
                    assert!(explored.states > 300 && explored.ends > 10, "{what}: {explored:?}");
                }
                Err(Lost { why, steps }) => panic!("{what}: {why}\n{}", steps.join("\n")),
            }
        }
    }
}

/// What each taken part is needed for, and from which model on.
/// Shows Q11.
#[test]
fn each_fence_and_each_order_is_needed() {
    let both = &[Kind::Tso, Kind::C11][..];
    let weak = &[Kind::C11][..];
    type Take = fn(&Rings) -> Without;
    let parts: [(&str, bool, &[Kind], Take); 6] = [
        ("the fence behind used.idx, EVENT_IDX", true, both, |rings| Without {
            fence_after: Some(rings.used_idx()),
            ..Without::default()
        }),
        ("the fence behind used.idx, flags", false, both, |rings| Without {
            fence_after: Some(rings.used_idx()),
            ..Without::default()
        }),
        ("the fence behind avail_event", true, both, |rings| Without {
            fence_after: Some(rings.avail_event()),
            ..Without::default()
        }),
        ("the fence behind used.flags", false, both, |rings| Without {
            fence_after: Some(rings.used_flags()),
            ..Without::default()
        }),
        ("the acquire of avail.idx", true, weak, |rings| Without {
            acquire_of: Some(rings.avail_idx()),
            ..Without::default()
        }),
        ("the release of used.idx", true, weak, |rings| Without {
            release_of: Some(rings.used_idx()),
            ..Without::default()
        }),
    ];
    for (what, event_idx, kinds, take) in parts {
        for kind in [Kind::Tso, Kind::C11] {
            let lost = [Pace::AtOnce, Pace::InTurn].into_iter().find_map(|pace| {
                let without = take(&Rings::new(event_idx, pace, 2));
                try_all(kind, event_idx, pace, 2, without).err()
            });
            match lost {
                Some(Lost { why, steps }) => {
                    assert!(kinds.contains(&kind), "{kind:?} forbids what is lost without {what}");
                    println!("{kind:?} without {what}: {why}\n    {}", steps.join("\n    "));
                }
                None => assert!(!kinds.contains(&kind), "{kind:?}: nothing is lost without {what}"),
            }
        }
    }
}
