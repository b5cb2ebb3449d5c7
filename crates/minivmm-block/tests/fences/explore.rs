//! Every order in which a device and its driver may go on, over a model of memory.
//!
//! The device is the production worker, its driver a few lines after the specification. Both stop in
//! front of each access to the rings; what a load finds is the model's answer. A run is a list of choices:
//! who goes on, and which of the values that the model allows is found. All lists are tried, those that
//! lead to a state that was seen before once only. A side's state is what it has found so far, since its
//! program is the same every time.

use std::cell::Cell;
use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::rc::Rc;
use std::sync::atomic::Ordering;

use minivmm_block::sync::observed::{self, Access};

use super::fiber::{Fiber, Pause, Resumed, pause};
use super::memory::{Bell, Kind, Memory, Place, SIDES};

pub const DEVICE: usize = 0;
pub const DRIVER: usize = 1;
const NAMES: [&str; SIDES] = ["device", "driver"];

/// What is taken out of the device, to see that it is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Without {
    /// The fence behind a store to this place.
    pub fence_after: Option<Place>,
    /// Loads of this place acquire nothing.
    pub acquire_of: Option<Place>,
    /// Stores to this place release nothing.
    pub release_of: Option<Place>,
}

/// The rings' places, and whether who goes on matters in front of them.
pub trait Layout {
    fn places(&self) -> usize;
    fn place(&self, address: usize) -> Option<Place>;
    fn name(&self, place: Place) -> String;
    /// Entries are told from each other by the indices: which value is found matters, when does not.
    fn is_entry(&self, place: Place) -> bool;
}

/// Two programs, new for each run. They ring each other by the cells.
pub trait Programs {
    fn start(&self) -> [Fiber<Result<(), String>>; SIDES];
    /// A side has rung since this was last asked.
    fn took_ring(&self, side: usize) -> bool;
}

thread_local! {
    /// What the model answers to the access in front of which a side has paused.
    static ANSWER: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Has this thread's accesses to the rings answered by the model.
pub fn observe(layout: Rc<dyn Layout>) {
    observed::observe(Some(Rc::new(move |access| match access {
        Access::Load { at, .. } | Access::Store { at, .. } if layout.place(at).is_none() => None,
        Access::Lock | Access::Update { .. } => None,
        _ => {
            pause(Pause::Access(access));
            ANSWER.take()
        }
    })));
}

/// What a side stands in front of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Access(Access),
    Sleeps,
    Ended,
}

/// A step that was taken, for the story of a run that goes wrong.
#[derive(Debug)]
enum Told {
    Loads(Place, u64, usize),
    Stores(Place, u64),
    Fence,
    NoFence,
    Rings,
    Wakes,
    Writes,
    Fails(String),
}

/// A run that goes wrong: how, and every step to it.
#[derive(Debug)]
pub struct Lost {
    pub why: String,
    pub steps: Vec<String>,
}

/// What was explored.
#[derive(Debug, Default)]
pub struct Explored {
    pub states: usize,
    pub runs: usize,
    pub ends: usize,
}

/// One run, at some point of it.
struct Run<'a> {
    kind: Kind,
    programs: &'a dyn Programs,
    layout: &'a dyn Layout,
    without: Without,
    fibers: [Fiber<Result<(), String>>; SIDES],
    next: [Next; SIDES],
    memory: Memory,
    /// Rung, and not woken by yet.
    bells: [Option<Bell>; SIDES],
    /// What each side has found so far.
    found: [u64; SIDES],
    /// The place that each side has stored to last.
    stored: [Option<Place>; SIDES],
    steps: Vec<(usize, Told)>,
}

/// What may happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// A side executes the access that it stands in front of, and finds the value of this number.
    Goes(usize, usize),
    Wakes(usize),
    /// The oldest store of a side's buffer reaches memory.
    Writes(usize),
}

impl<'a> Run<'a> {
    fn new(kind: Kind, programs: &'a dyn Programs, layout: &'a dyn Layout, without: Without) -> Self {
        let mut run = Self {
            kind,
            programs,
            layout,
            without,
            fibers: programs.start(),
            next: [Next::Sleeps; SIDES],
            memory: Memory::new(kind, layout.places()),
            bells: [None, None],
            found: [0; SIDES],
            stored: [None; SIDES],
            steps: Vec::new(),
        };
        for side in 0..SIDES {
            run.advance(side, None);
        }
        run
    }

    fn say(&mut self, side: usize, told: Told) {
        self.steps.push((side, told));
    }

    /// All steps, in words.
    fn story(&self) -> Vec<String> {
        let words = |(side, told): &(usize, Told)| {
            let what = match told {
                Told::Loads(place, value, 0) => format!("loads {} = {value}", self.layout.name(*place)),
                Told::Loads(place, value, _) => {
                    format!("loads {} = {value}, which is not the newest", self.layout.name(*place))
                }
                Told::Stores(place, value) => format!("stores {} = {value}", self.layout.name(*place)),
                Told::Fence => "fence".to_owned(),
                Told::NoFence => "(no fence)".to_owned(),
                Told::Rings if *side == DRIVER => "rings the doorbell".to_owned(),
                Told::Rings => "interrupts".to_owned(),
                Told::Wakes => "wakes".to_owned(),
                Told::Writes => "(the oldest store of its buffer reaches memory)".to_owned(),
                Told::Fails(why) => why.clone(),
            };
            format!("{}: {what}", NAMES[*side])
        };
        self.steps.iter().map(words).collect()
    }

    /// A side goes on to its next access; `answer` is what it finds.
    fn advance(&mut self, side: usize, answer: Option<u64>) {
        ANSWER.set(answer);
        self.next[side] = loop {
            match self.fibers[side].resume() {
                Resumed::Paused(Pause::Access(access)) => break Next::Access(access),
                Resumed::Paused(Pause::Sleeps) => break Next::Sleeps,
                Resumed::Paused(_) => {}
                Resumed::Done(Ok(())) => break Next::Ended,
                Resumed::Done(Err(why)) => {
                    self.say(side, Told::Fails(why));
                    break Next::Ended;
                }
            }
        };
        let mut hasher = DefaultHasher::new();
        (self.found[side], answer).hash(&mut hasher);
        self.found[side] = hasher.finish();
        // Rung on the way to where it stands now.
        if self.programs.took_ring(side) {
            let other = 1 - side;
            self.say(side, Told::Rings);
            let bell = self.memory.bell(side);
            match &mut self.bells[other] {
                Some(earlier) => earlier.join(&bell),
                none => *none = Some(bell),
            }
        }
    }

    fn place(&self, access: Access) -> Option<Place> {
        match access {
            Access::Load { at, .. } | Access::Store { at, .. } => self.layout.place(at),
            _ => None,
        }
    }

    fn goes(&self, side: usize, access: Access) -> Vec<Step> {
        let values = match (access, self.place(access)) {
            (Access::Load { .. }, Some(place)) => self.memory.loads(side, place).len(),
            _ => 1,
        };
        (0..values).map(|number| Step::Goes(side, number)).collect()
    }

    /// Whether what a side does next may as well be done before all that the other side can do.
    fn disturbs_nobody(&self, side: usize, access: Access) -> bool {
        match access {
            // In TSO it goes into a buffer that nobody else sees. In C11 the older values can still be found,
            // until its side has passed it on by something later.
            Access::Store { .. } => true,
            // Found or not, nothing else is found by it.
            Access::Load { .. } => self.place(access).is_some_and(|place| self.layout.is_entry(place)),
            Access::Fence(_) => self.kind == Kind::Tso && self.memory.buffered(side).is_none(),
            _ => false,
        }
    }

    /// All that may happen next.
    fn steps_from_here(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for side in 0..SIDES {
            if self.memory.buffered(side).is_some_and(|place| self.layout.is_entry(place)) {
                return vec![Step::Writes(side)];
            }
            if let Next::Access(access) = self.next[side]
                && self.disturbs_nobody(side, access)
            {
                // So nobody else need be tried before.
                return self.goes(side, access);
            }
        }
        for side in 0..SIDES {
            match self.next[side] {
                Next::Access(access) => steps.extend(self.goes(side, access)),
                Next::Sleeps if self.bells[side].is_some() => steps.push(Step::Wakes(side)),
                _ => {}
            }
            if self.memory.buffered(side).is_some() {
                steps.push(Step::Writes(side));
            }
        }
        steps
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Writes(side) => {
                self.memory.write_buffer(side);
                self.say(side, Told::Writes);
            }
            Step::Wakes(side) => {
                self.say(side, Told::Wakes);
                if let Some(bell) = self.bells[side].take() {
                    self.memory.wake(side, &bell);
                }
                self.advance(side, None);
            }
            Step::Goes(side, number) => {
                let Next::Access(access) = self.next[side] else { return };
                let answer = self.execute(side, access, number);
                self.advance(side, Some(answer));
            }
        }
    }

    /// The model executes what a side stands in front of.
    fn execute(&mut self, side: usize, access: Access, number: usize) -> u64 {
        let place = self.place(access);
        let is_device = side == DEVICE;
        let relaxed =
            |order, is_without: bool| if is_without && is_device { Ordering::Relaxed } else { order };
        match (access, place) {
            (Access::Load { order, .. }, Some(place)) => {
                let order = relaxed(order, self.without.acquire_of == Some(place));
                let value = self.memory.load(side, place, order, number);
                self.say(side, Told::Loads(place, value, number));
                value
            }
            (Access::Store { value, order, .. }, Some(place)) => {
                let order = relaxed(order, self.without.release_of == Some(place));
                self.memory.store(side, place, value, order);
                self.stored[side] = Some(place);
                self.say(side, Told::Stores(place, value));
                0
            }
            _ => {
                if is_device && self.stored[side].is_some() && self.stored[side] == self.without.fence_after {
                    self.say(side, Told::NoFence);
                } else {
                    self.memory.fence(side);
                    self.say(side, Told::Fence);
                }
                0
            }
        }
    }

    fn state(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.memory, &self.bells, self.found, self.stored).hash(&mut hasher);
        hasher.finish()
    }

    /// What is wrong with a run in which nothing can happen any more.
    fn judge(&self) -> Result<(), String> {
        match self.next {
            [Next::Sleeps, Next::Ended]
                if self.steps.iter().any(|(_, told)| matches!(told, Told::Fails(_))) =>
            {
                Err("the driver found what was not written for it".to_owned())
            }
            [Next::Sleeps, Next::Ended] => Ok(()),
            [Next::Ended, _] => Err("the worker has failed".to_owned()),
            [_, Next::Sleeps] => Err("both sleep, and not every request is answered and seen".to_owned()),
            other => Err(format!("stuck: {other:?}")),
        }
    }
}

/// Tries everything; the first run that goes wrong, if one does.
pub fn explore(
    kind: Kind,
    programs: &dyn Programs,
    layout: &dyn Layout,
    without: Without,
) -> Result<Explored, Lost> {
    let mut explored = Explored::default();
    let mut seen = HashSet::new();
    // Of each choice of the run: which was taken, of how many.
    let mut choices: Vec<(usize, usize)> = Vec::new();
    loop {
        explored.runs += 1;
        let mut run = Run::new(kind, programs, layout, without);
        let mut at = 0;
        loop {
            let steps = run.steps_from_here();
            if steps.is_empty() {
                explored.ends += 1;
                run.judge().map_err(|why| Lost { why, steps: run.story() })?;
                break;
            }
            if at == choices.len() {
                // New ground, unless another way led here before.
                if !seen.insert(run.state()) {
                    break;
                }
                choices.push((0, steps.len()));
            }
            let step = steps[choices[at].0];
            at += 1;
            run.take(step);
        }
        explored.states = seen.len();
        // The last choice that has another way to go.
        while let Some((taken, of)) = choices.pop() {
            if taken + 1 < of {
                choices.push((taken + 1, of));
                break;
            }
        }
        if choices.is_empty() {
            return Ok(explored);
        }
    }
}
