//! minivmm's disks for other VMMs: a vhost-user-blk back end. Its binary, `minivmm-export`, is the subcommand `export`
//! of minivmm, which execs it.
//!
//! The device is [`minivmm_block`]'s, as in a VM: one worker thread, state machine and engine for each queue. The crate
//! takes the place of a transport: registers become messages on a UNIX socket, the doorbell is the front end's kick
//! eventfd, interrupts are its call eventfds, and guest memory is mapped from its descriptors.
//!
//! rust-vmm's `vhost` receives and checks the messages. Its `vhost-user-backend` does not fit: it runs virtqueue
//! threads of its own over virtio-queue's ring, where minivmm's worker has a ring of its own, on which its proofs rest;
//! and it has no inflight region.
//!
//! Dependencies point down the list, never up (`tests/tidy.rs` of the workspace enforces it):
//!
//! | module | owns | must not know |
//! |---|---|---|
//! | [`cli`] | the arguments of `export` | |
//! | [`explain`] | what the front end must do for durability | sockets, messages |
//! | [`daemon`] | the order of start, run and stop | messages |
//! | [`serve`] | a socket's thread: connections begin and end | disks |
//! | [`handler`] | from `vhost`'s messages to the back end | sockets |
//! | [`backend`] | what messages do to the device | sockets |
//! | [`ring`] | what is known of a ring before it is served | the device |
//! | [`table`] | the memory table | the device |
//! | [`inflight`] | the region that the front end keeps | the device |
//! | [`notify`] | eventfds of the front end | everything |
//! | [`message`] | whether a whole message has arrived | everything |
//! | [`socket`] | listening sockets, made and removed | everything |
//!
//! # Trust
//!
//! A front end is as hostile as a guest. No message makes this process panic, wait without end, touch memory that the
//! front end does not share, or lose what was acknowledged. What it does wrong ends its connection, and costs the
//! other disks nothing. `docs/reference/export.md` says what is done in each case.

pub mod backend;
pub mod cli;
pub mod daemon;
pub mod explain;
pub mod handler;
pub mod inflight;
pub mod message;
pub mod notify;
pub mod ring;
pub mod serve;
pub mod socket;
pub mod table;
