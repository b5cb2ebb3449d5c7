//! Who answers where in the bus's memory: base address registers move functions, and their doorbells follow.
//!
//! Owns the places of all functions' memory. A function answers where its configuration says, inside the window
//! that the host bridge passes on. If two claim the same address, the one with the lower device number answers.
//! A guest that writes all ones to ask for a size moves nothing. How a doorbell reaches KVM is behind
//! [`DoorbellSink`].

use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, RwLock};

use super::config::{Memory, Span};
use crate::ratelimit::RateLimit;
use crate::sync::unpoisoned;
use crate::warn_limited;

/// The doorbells of one function, which follow its memory: KVM's ioeventfds; in tests, a list.
///
/// A doorbell that is bound nowhere still works: the write reaches the function's registers.
pub trait DoorbellSink: Send {
    /// Binds the doorbells to the function's memory at `base`; `None` unbinds them.
    fn place(&mut self, base: Option<u64>) -> io::Result<()>;
}

/// One function of the bus.
struct Function {
    /// What the function's configuration says about its memory.
    says: Memory,
    /// Where the function answers; `None` if nowhere.
    at: Option<Span>,
    /// Where the function answered last, for messages.
    last: Option<Span>,
    doorbells: Box<dyn DoorbellSink>,
}

struct Places {
    functions: Vec<Function>,
    errors: RateLimit,
    strays: RateLimit,
}

/// Where the functions of a bus answer.
pub struct MemoryMap {
    window: Range<u64>,
    places: Mutex<Places>,
    /// The functions that answer, sorted by address. Each access reads this; a thread that holds its lock takes
    /// no other.
    routes: RwLock<Vec<(Span, usize)>>,
}

impl MemoryMap {
    /// Creates a window in which no function answers yet. `doorbells` are those of the functions, by device
    /// number.
    pub fn new(window: Range<u64>, doorbells: impl IntoIterator<Item = Box<dyn DoorbellSink>>) -> Self {
        let function = |doorbells| Function { says: Memory::Off, at: None, last: None, doorbells };
        let functions = doorbells.into_iter().map(function).collect();
        let (errors, strays) = (RateLimit::for_guest_errors("pci"), RateLimit::for_guest_errors("pci"));
        let places = Mutex::new(Places { functions, errors, strays });
        Self { window, places, routes: RwLock::default() }
    }

    /// Returns the first address of the window.
    pub fn base(&self) -> u64 {
        self.window.start
    }

    /// Returns the function that answers at `addr`, as device number and offset, and how many of `len` bytes go
    /// there. If none answers, the number counts the bytes before the next function.
    pub fn find(&self, addr: u64, len: usize) -> (Option<(usize, u64)>, usize) {
        let routes = unpoisoned(self.routes.read());
        let limit = |end: u64| len.min(usize::try_from(end - addr).unwrap_or(len));
        let after = routes.partition_point(|(span, _)| span.base <= addr);
        let before = after.checked_sub(1).and_then(|at| routes.get(at));
        if let Some((span, device)) = before.filter(|(span, _)| addr - span.base < span.len) {
            return (Some((*device, addr - span.base)), limit(span.base + span.len));
        }
        (None, routes.get(after).map_or(len, |(next, _)| limit(next.base)))
    }

    /// Moves a function as its configuration says after a write. The caller holds the function's lock, so that
    /// the last write also arrives here last.
    pub fn update(&self, device: usize, says: Memory) {
        let mut places = self.places();
        let Some(function) = places.functions.get_mut(device).filter(|function| function.says != says) else {
            return;
        };
        function.says = says;
        let wanted = places.wanted(&self.window, device);
        places.take_away(&wanted);
        self.route(&wanted);
        places.put(&wanted);
    }

    /// Reports an access where no function answers.
    pub fn stray(&self, what: &str, addr: u64) {
        let places = &mut *self.places();
        let was = |function: &Function| function.last.is_some_and(|span| span.contains(addr));
        match places.functions.iter().enumerate().find(|(_, function)| was(function)) {
            Some((device, function)) => warn_limited!(
                places.strays,
                "pci: the guest {what} {addr:#x}, where the registers of 00:{device:02x}.0 were: {}",
                function.whereabouts()
            ),
            None => warn_limited!(
                places.strays,
                "pci: the guest {what} {addr:#x}, where no function has its registers"
            ),
        }
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        unpoisoned(self.places.lock())
    }

    fn route(&self, wanted: &[Option<Span>]) {
        let mut routes: Vec<(Span, usize)> =
            wanted.iter().enumerate().filter_map(|(device, span)| Some(((*span)?, device))).collect();
        routes.sort_by_key(|(span, _)| span.base);
        *unpoisoned(self.routes.write()) = routes;
    }
}

impl Places {
    /// Returns where each function is to answer from now on. `changed` is the function whose configuration was
    /// written.
    fn wanted(&mut self, window: &Range<u64>, changed: usize) -> Vec<Option<Span>> {
        let mut wanted: Vec<Option<Span>> = Vec::with_capacity(self.functions.len());
        for (device, function) in self.functions.iter().enumerate() {
            let span = match function.says {
                Memory::Off => None,
                Memory::Sizing => function.at,
                Memory::At(span) => Some(span),
            };
            let outside = span.filter(|span| !span.is_inside(window));
            let rival = span.and_then(|span| {
                wanted.iter().position(|other| other.is_some_and(|other: Span| other.overlaps(&span)))
            });
            if let Some(span) = outside.filter(|_| device == changed) {
                warn_limited!(
                    self.errors,
                    "pci: 00:{device:02x}.0 is to have its registers at {:#x}, outside the bus's memory \
                     ({:#x} to {:#x}): it answers nowhere until its base address register is inside again",
                    span.base,
                    window.start,
                    window.end - 1
                );
            } else if let (Some(span), Some(rival)) = (span, rival) {
                warn_limited!(
                    self.errors,
                    "pci: 00:{device:02x}.0 is to have its registers at {:#x}, where those of 00:{rival:02x}.0 \
                     are, which answers; 00:{device:02x}.0 does not until one of them moves",
                    span.base
                );
            }
            wanted.push(span.filter(|_| outside.is_none() && rival.is_none()));
        }
        wanted
    }

    /// Unbinds the doorbells of functions that move or are switched off.
    fn take_away(&mut self, wanted: &[Option<Span>]) {
        for (device, (function, wanted)) in self.functions.iter_mut().zip(wanted).enumerate() {
            if function.at.is_some()
                && function.at != *wanted
                && let Err(error) = function.doorbells.place(None)
            {
                warn_limited!(
                    self.errors,
                    "pci: the doorbells of 00:{device:02x}.0 stay bound where they were: {error}"
                );
            }
        }
    }

    /// Binds the doorbells of functions that have moved or were switched on.
    fn put(&mut self, wanted: &[Option<Span>]) {
        for (device, (function, wanted)) in self.functions.iter_mut().zip(wanted).enumerate() {
            if function.at == *wanted {
                continue;
            }
            function.last = wanted.or(function.last);
            function.at = *wanted;
            let Some(span) = wanted else { continue };
            log::debug!("pci: the registers of 00:{device:02x}.0 are at {:#x}", span.base);
            if let Err(error) = function.doorbells.place(Some(span.base)) {
                warn_limited!(
                    self.errors,
                    "pci: the doorbells of 00:{device:02x}.0 cannot be bound at {:#x}, so that each costs an exit: \
                     {error}",
                    span.base
                );
            }
        }
    }
}

impl Function {
    fn whereabouts(&self) -> String {
        match (self.says, self.at) {
            (Memory::Off, _) => "its command register switches its memory off".to_owned(),
            (Memory::Sizing, _) => "its base address register holds no address".to_owned(),
            (Memory::At(_), Some(span)) => format!("they are at {:#x} now", span.base),
            (Memory::At(span), None) => {
                format!("its base address register says {:#x}, where it cannot answer", span.base)
            }
        }
    }
}

impl Span {
    fn contains(&self, addr: u64) -> bool {
        addr.checked_sub(self.base).is_some_and(|offset| offset < self.len)
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.base) || other.contains(self.base)
    }

    fn is_inside(&self, window: &Range<u64>) -> bool {
        self.base >= window.start && self.base.checked_add(self.len).is_some_and(|end| end <= window.end)
    }
}
