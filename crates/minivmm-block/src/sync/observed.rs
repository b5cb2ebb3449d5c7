//! std's primitives, each of which says beforehand what it is about to do.
//!
//! Owns the wrappers and the observer, one per thread. An observer may run other work in the middle of the
//! operation that called it: tests interleave queues on one thread that way. It may also answer in place of the
//! memory: tests run the rings over a model of memory that way.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{self, Ordering};
use std::sync::{self, LockResult, MutexGuard};

/// What a thread is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// A load. If the observer returns `Some`, that is the value loaded.
    Load {
        /// The address of the atomic.
        at: usize,
        /// The memory order that the code asks for.
        order: Ordering,
    },
    /// A store. If the observer returns `Some`, nothing is stored.
    Store {
        /// The address of the atomic.
        at: usize,
        /// The value to be stored.
        value: u64,
        /// The memory order that the code asks for.
        order: Ordering,
    },
    /// A swap or compare-exchange. The observer cannot replace it.
    Update {
        /// The address of the atomic.
        at: usize,
    },
    /// A fence. If the observer returns `Some`, no fence is executed.
    Fence(Ordering),
    /// The locking of a mutex. The observer cannot replace it.
    Lock,
}

/// Called before each access of a thread.
pub type Observer = Rc<dyn Fn(Access) -> Option<u64>>;

thread_local! {
    static OBSERVER: RefCell<Option<Observer>> = const { RefCell::new(None) };
}

/// Sets the observer of this thread's accesses; `None` removes it.
pub fn observe(observer: Option<Observer>) {
    OBSERVER.with(|cell| *cell.borrow_mut() = observer);
}

fn tell(access: Access) -> Option<u64> {
    // The observer may run code that calls it again, so the cell is not borrowed meanwhile.
    let observer = OBSERVER.with(|cell| cell.borrow().clone());
    observer.and_then(|observer| observer(access))
}

/// Executes std's fence, unless the observer answers in its place.
pub fn fence(order: Ordering) {
    if tell(Access::Fence(order)).is_none() {
        atomic::fence(order);
    }
}

macro_rules! integers {
    ($($name:ident: $int:ty),*) => {$(
        /// Wraps std's atomic of that name.
        #[repr(transparent)]
        #[derive(Debug, Default)]
        pub struct $name(atomic::$name);

        impl $name {
            /// Creates the atomic, as std's `new` does.
            pub const fn new(value: $int) -> Self {
                Self(atomic::$name::new(value))
            }

            /// Wraps std's `from_ptr`.
            ///
            /// # Safety
            ///
            /// As for std's.
            pub unsafe fn from_ptr<'a>(ptr: *mut $int) -> &'a Self {
                // SAFETY: the caller vouches for the pointer, and the wrapper is transparent.
                unsafe { &*ptr.cast() }
            }

            fn at(&self) -> usize {
                self.0.as_ptr().addr()
            }

            /// Loads the value, unless the observer answers with another.
            pub fn load(&self, order: Ordering) -> $int {
                let answer = tell(Access::Load { at: self.at(), order });
                answer.and_then(|value| value.try_into().ok()).unwrap_or_else(|| self.0.load(order))
            }

            /// Stores `value`, unless the observer answers in its place.
            pub fn store(&self, value: $int, order: Ordering) {
                let as_told = u64::try_from(value).unwrap_or_default();
                if tell(Access::Store { at: self.at(), value: as_told, order }).is_none() {
                    self.0.store(value, order);
                }
            }

            /// Compares and exchanges, as std's `compare_exchange` does.
            pub fn compare_exchange(
                &self,
                current: $int,
                new: $int,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$int, $int> {
                tell(Access::Update { at: self.at() });
                self.0.compare_exchange(current, new, success, failure)
            }
        }
    )*};
}

integers!(AtomicU8: u8, AtomicU16: u16, AtomicU32: u32, AtomicU64: u64, AtomicI32: i32);

/// Wraps std's AtomicBool. The observer hears of its accesses but cannot answer in their place.
#[derive(Debug, Default)]
pub struct AtomicBool(atomic::AtomicBool);

impl AtomicBool {
    /// Creates the atomic, as std's `new` does.
    pub const fn new(value: bool) -> Self {
        Self(atomic::AtomicBool::new(value))
    }

    fn at(&self) -> usize {
        self.0.as_ptr().addr()
    }

    /// Loads the value.
    pub fn load(&self, order: Ordering) -> bool {
        tell(Access::Load { at: self.at(), order });
        self.0.load(order)
    }

    /// Stores `value`.
    pub fn store(&self, value: bool, order: Ordering) {
        tell(Access::Store { at: self.at(), value: u64::from(value), order });
        self.0.store(value, order);
    }

    /// Stores `value` and returns the previous one.
    pub fn swap(&self, value: bool, order: Ordering) -> bool {
        tell(Access::Update { at: self.at() });
        self.0.swap(value, order)
    }
}

/// Wraps std's Mutex.
#[derive(Debug, Default)]
pub struct Mutex<T>(sync::Mutex<T>);

impl<T> Mutex<T> {
    /// Creates the mutex, as std's `new` does.
    pub const fn new(value: T) -> Self {
        Self(sync::Mutex::new(value))
    }

    /// Locks the mutex, as std's `lock` does.
    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        tell(Access::Lock);
        self.0.lock()
    }
}
