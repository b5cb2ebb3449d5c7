//! Several workers on one thread, each of which goes on only when the test says so, and stops again in
//! front of its next access to what others share.
//!
//! A fiber is a worker with a stack of its own. The accesses are heard of through `minivmm_block::sync::observed`,
//! so the code in between is the production code, without a branch for it.
#![allow(dead_code, reason = "each suite uses its part")]

use std::cell::{Cell, RefCell};
use std::ptr;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use minivmm_block::sync::observed::Access;

/// In front of what a fiber stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// An access to what others share.
    Access(Access),
    /// Behind a submission: the host has the operation, and the worker has not gone on.
    Submitted,
    /// It sleeps, and looks again when it is resumed.
    Sleeps,
    /// Its round is over.
    Turned,
}

type Inside = Yielder<(), Pause>;

thread_local! {
    /// The fiber that runs now.
    static CURRENT: Cell<*const Inside> = const { Cell::new(ptr::null()) };
    /// Stacks of fibers that have ended: a run needs some, and there are very many runs.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// The fiber that runs stops here until it is resumed; outside of fibers, nothing happens.
pub fn pause(why: Pause) {
    let current = CURRENT.replace(ptr::null());
    if !current.is_null() {
        // SAFETY: it was set by the fiber that runs now, whose yielder lives as long as its body.
        unsafe { (*current).suspend(why) };
        CURRENT.set(current);
    }
}

/// Whoever leaves a fiber's body, by a panic too, leaves no pointer to it behind.
struct Leaves;

impl Drop for Leaves {
    fn drop(&mut self) {
        CURRENT.set(ptr::null());
    }
}

/// What came of resuming a fiber.
pub enum Resumed<R> {
    Paused(Pause),
    Done(R),
}

/// A worker with a stack of its own.
pub struct Fiber<R>(Option<Coroutine<(), Pause, R>>);

impl<R: 'static> Fiber<R> {
    /// Nothing of it has run yet.
    pub fn new(body: impl FnOnce() -> R + 'static) -> Self {
        let stack = STACKS.with_borrow_mut(Vec::pop).unwrap_or_default();
        Self(Some(Coroutine::with_stack(stack, move |inside: &Inside, ()| {
            CURRENT.set(inside);
            let _leaves = Leaves;
            body()
        })))
    }

    /// Lets it go on to its next pause. Not after its end.
    pub fn resume(&mut self) -> Resumed<R> {
        match self.0.as_mut().unwrap().resume(()) {
            CoroutineResult::Yield(pause) => Resumed::Paused(pause),
            CoroutineResult::Return(result) => Resumed::Done(result),
        }
    }

    pub fn is_done(&self) -> bool {
        self.0.as_ref().unwrap().done()
    }
}

impl<R> Drop for Fiber<R> {
    fn drop(&mut self) {
        let Some(mut coroutine) = self.0.take() else { return };
        // What is on its stack is dropped, without pauses: nobody is current.
        coroutine.force_unwind();
        STACKS.with_borrow_mut(|stacks| stacks.push(coroutine.into_stack()));
    }
}
