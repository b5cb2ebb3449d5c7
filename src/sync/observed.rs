//! std's primitives, each of which says beforehand what it is about to do.
//!
//! Owns the wrappers and the observer, one a thread. An observer may run other work in the middle of
//! what asked it, which is how tests interleave queues on one thread. It may also answer in the place of
//! the memory, which is how they run the rings over a model of memory.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{self, Ordering};
use std::sync::{self, LockResult, MutexGuard};

/// What is about to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// A load. The observer may answer with the value.
    Load {
        /// The address of the atomic.
        at: usize,
        /// The order that the code asks for.
        order: Ordering,
    },
    /// A store. The observer may swallow it, by any answer.
    Store {
        /// The address of the atomic.
        at: usize,
        /// What is stored.
        value: u64,
        /// The order that the code asks for.
        order: Ordering,
    },
    /// A swap or compare-exchange.
    Update {
        /// The address of the atomic.
        at: usize,
    },
    /// A fence.
    Fence(Ordering),
    /// A mutex is locked.
    Lock,
}

/// What hears of the accesses of a thread.
pub type Observer = Rc<dyn Fn(Access) -> Option<u64>>;

thread_local! {
    static OBSERVER: RefCell<Option<Observer>> = const { RefCell::new(None) };
}

/// From now on `observer` hears of this thread's accesses, or nobody.
pub fn observe(observer: Option<Observer>) {
    OBSERVER.with(|cell| *cell.borrow_mut() = observer);
}

fn tell(access: Access) -> Option<u64> {
    // The observer may run code that tells it more, so nothing is borrowed meanwhile.
    let observer = OBSERVER.with(|cell| cell.borrow().clone());
    observer.and_then(|observer| observer(access))
}

/// std's fence.
pub fn fence(order: Ordering) {
    if tell(Access::Fence(order)).is_none() {
        atomic::fence(order);
    }
}

macro_rules! integers {
    ($($name:ident: $int:ty),*) => {$(
        /// std's atomic of that name.
        #[repr(transparent)]
        #[derive(Debug, Default)]
        pub struct $name(atomic::$name);

        impl $name {
            /// std's `new`.
            pub const fn new(value: $int) -> Self {
                Self(atomic::$name::new(value))
            }

            /// std's `from_ptr`.
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

            /// std's `load`.
            pub fn load(&self, order: Ordering) -> $int {
                let answer = tell(Access::Load { at: self.at(), order });
                answer.and_then(|value| value.try_into().ok()).unwrap_or_else(|| self.0.load(order))
            }

            /// std's `store`.
            pub fn store(&self, value: $int, order: Ordering) {
                let as_told = u64::try_from(value).unwrap_or_default();
                if tell(Access::Store { at: self.at(), value: as_told, order }).is_none() {
                    self.0.store(value, order);
                }
            }

            /// std's `compare_exchange`.
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

/// std's AtomicBool.
#[derive(Debug, Default)]
pub struct AtomicBool(atomic::AtomicBool);

impl AtomicBool {
    /// std's `new`.
    pub const fn new(value: bool) -> Self {
        Self(atomic::AtomicBool::new(value))
    }

    fn at(&self) -> usize {
        self.0.as_ptr().addr()
    }

    /// std's `load`.
    pub fn load(&self, order: Ordering) -> bool {
        tell(Access::Load { at: self.at(), order });
        self.0.load(order)
    }

    /// std's `store`.
    pub fn store(&self, value: bool, order: Ordering) {
        tell(Access::Store { at: self.at(), value: u64::from(value), order });
        self.0.store(value, order);
    }

    /// std's `swap`.
    pub fn swap(&self, value: bool, order: Ordering) -> bool {
        tell(Access::Update { at: self.at() });
        self.0.swap(value, order)
    }
}

/// std's Mutex.
#[derive(Debug, Default)]
pub struct Mutex<T>(sync::Mutex<T>);

impl<T> Mutex<T> {
    /// std's `new`.
    pub const fn new(value: T) -> Self {
        Self(sync::Mutex::new(value))
    }

    /// std's `lock`.
    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        tell(Access::Lock);
        self.0.lock()
    }
}
