//! A virtio-blk device (virtio 1.2, 5.2) for any VMM: split queues, six cache modes, io_uring or blocking I/O,
//! and a durability contract that is proven by tests.
//!
//! *O_DIRECT, O_SYNC, and fsync are not the same mechanism.* A cache mode is a row of four decisions
//! ([`disk::cache::CachePolicy`]): does data pass the host's page cache by, does it stay there, may a completed
//! write still be volatile, and does the guest's FLUSH reach the disk?
//!
//! The crate knows no KVM, no transport, no command line and no sandbox. The embedder brings guest memory, a
//! transport that has the device's registers, a way to interrupt the driver, and, if it likes, a way to start
//! threads. `examples/serve.rs` is a small embedder.
//!
//! # Architecture
//!
//! | module | owns | must not know |
//! |---|---|---|
//! | [`blk`] | the device: features, configuration space, requests, a worker for each queue | transports |
//! | [`virtio`] | the traits between device and transport; the split queue | blocks, files |
//! | [`disk`] | one host image: open flags, locks, cache policy, state machine, engines, first sync error | virtio |
//! | [`mem`] | guest memory, and pieces of it that the kernel may read and write | everything |
//! | [`files`] | which files are the same, who uses one, and every open for output | guests, disks |
//! | [`threads`] | how threads are started | everything |
//! | [`slab`] | numbers that a guest never sees, and what is kept under them | everything |
//! | [`sync`] | std's atomics and mutex, which tests may watch | everything |
//! | [`doorbell`] | how an eventfd is rung | everything |
//! | [`ratelimit`] | rate-limited log lines | everything |
//! | [`text`] | words of messages | everything |
//!
//! From top to bottom: a [`virtio::queue::Ring`] pops descriptor chains, [`blk::request`] parses each,
//! [`disk::disk_queue::DiskQueue`] turns a request into host operations and decides when it is complete, and a
//! [`disk::engine::Engine`] executes the operations. Everything that decides about durability is in `DiskQueue`,
//! above the engine, so that a simulated engine can try all of it.
//!
//! # Using it
//!
//! 1. Open the image that a [`disk::DiskConfig`] describes: [`disk::Image::open`] checks the configuration, then
//!    checks, locks and probes the image, and writes nothing to it. Show the user its [`disk::Image::warnings`].
//! 2. Make the device: [`blk::BlockDevice::with_ram`]. All its threads are started here, and wait.
//! 3. Answer the transport's registers by [`virtio::VirtioDevice`]: features, configuration space, and at
//!    FEATURES_OK [`virtio::VirtioDevice::negotiated`].
//! 4. At DRIVER_OK hand over the queues: [`virtio::VirtioDevice::activate`]. From here on the workers serve them.
//! 5. At a reset, or before the memory goes away: [`virtio::VirtioDevice::reset`], which waits for all I/O in
//!    flight.
//! 6. At the end: [`disk::Image::close`] makes stable what is not, where the mode honours FLUSH, and reports what
//!    could not be made stable.
//!
//! # I/O model
//!
//! Each queue has one worker thread, one state machine and one engine. Queues share the image, its error latch and
//! its `writeback` byte, and nothing else. A worker blocks in its engine until its doorbell is rung or an operation
//! completes; before it blocks it spins for either, for as long as spinning has paid lately (`blk::poll`). A
//! request has at most one host operation in flight. Requests complete in any order (virtio 5.2.6). All
//! completions of a batch are published by one store of the used index, with at most one interrupt.
//!
//! Nothing is allocated for a request once the queues run. The worker opens no file and starts no thread, so the
//! embedder can confine it.
//!
//! # Error model
//!
//! - **The image cannot be used**: [`disk::ImageError`], with the path, the reason and what to do. Nothing was
//!   written.
//! - **The host's disk failed**: the request completes with IOERR, and the device goes on. A short transfer is
//!   continued, EINTR repeated; no short transfer is ever reported as whole.
//! - **A sync failed**: the image's error latch ([`disk::latch`]) is set for ever. From then on no write or FLUSH
//!   that would have to be stable is acknowledged by any queue, because the kernel reports a writeback error once
//!   and then forgets it.
//! - **The driver broke the protocol**: a chain that makes no sense completes with IOERR or UNSUPP; a ring that
//!   cannot be followed asks for a reset ([`virtio::Interrupt::needs_reset`]). Log lines about either are
//!   limited in their rate. No input from a guest causes a panic.
//!
//! # Durability contract
//!
//! As virtio 5.2.6.2 demands, and nothing weaker:
//!
//! - A FLUSH that is acknowledged means that every write that completed before the FLUSH was submitted is on the
//!   disk: an fdatasync of this image has started after those writes ended, and has succeeded, and no sync of the
//!   image has ever failed.
//! - A write is acknowledged only once it is stable in three cases: FLUSH was not negotiated; FLUSH was negotiated
//!   without CONFIG_WCE and the cache mode has no write cache; CONFIG_WCE was negotiated and the `writeback` byte
//!   was 0 when the write was submitted or when it completed. "Stable" means that it was written with RWF_DSYNC, or
//!   that an fdatasync that started after the write had ended has succeeded.
//! - A success counts only when every sync that overlapped it has been judged, because the kernel may have
//!   reported the error to one of those.
//! - Discards and write-zeroes are writes in this respect.
//! - `unsafe` is the one mode that breaks this, on purpose; [`disk::Image::warnings`] says so.
//!
//! # Memory ownership
//!
//! [`mem::Ram`] is guest memory; clones share it. It can be the embedder's ([`mem::Ram::from_memory`]) or mapped
//! here ([`mem::map_ram`]). No Rust reference ever points into it, because the guest may change any byte at any
//! time: bytes are copied in and out, or a [`mem::Iov`], a checked list of pieces, is handed to a system call. An
//! `Iov` keeps the memory alive, so an operation that the kernel still works on never outlives its buffer. Each
//! ring entry, descriptor and header is read once. A direct transfer whose pieces are not aligned goes
//! through a private buffer.
//!
//! # Threads
//!
//! The device starts its threads through [`threads::Threads`] ([`disk::Image::with_threads`]), by default as std
//! does. They are all started while the device is made.

#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

pub mod blk;
pub mod disk;
pub mod doorbell;
pub mod files;
pub mod mem;
pub mod ratelimit;
pub mod slab;
pub mod sync;
pub mod text;
pub mod threads;
pub mod virtio;

#[cfg(test)]
mod tests {
    /// An embedder can box each public error, send it to another thread and print its causes.
    #[test]
    fn every_public_error_is_an_error_that_threads_can_pass_on() {
        fn is_error<E: std::error::Error + Send + Sync + 'static>() {}
        is_error::<crate::blk::DeviceError>();
        is_error::<crate::blk::worker::TurnError>();
        is_error::<crate::blk::worker::WorkerGone>();
        is_error::<crate::disk::ConfigError>();
        is_error::<crate::disk::ImageError>();
        is_error::<crate::disk::choice::EngineError>();
        is_error::<crate::disk::fault::spec::FaultError>();
        is_error::<crate::disk::op::DiskError>();
        is_error::<crate::disk::problem::ImageProblem>();
        is_error::<crate::disk::uring::UringError>();
        is_error::<crate::files::output::Problem>();
        is_error::<crate::mem::OutsideRam>();
        is_error::<crate::mem::RamError>();
        is_error::<crate::virtio::ActivateError>();
        is_error::<crate::virtio::queue::ChainFault>();
        is_error::<crate::virtio::queue::QueueConfigError>();
        is_error::<crate::virtio::queue::RingError>();
    }
}
