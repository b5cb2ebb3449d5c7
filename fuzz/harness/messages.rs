//! vhost-user messages: whatever a front end sends, with whatever descriptors, the back end handles it or ends the
//! connection, and the next front end finds the disk as new.
//!
//! Owns the front end. The disk below completes everything at once, and has no storage.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use minivmm::blk::BlockDevice;
use minivmm::disk::cache::{POLICIES, WriteCache};
use minivmm::disk::disk_queue::{DiskQueue, StableBy};
use minivmm::disk::engine::{Ended, Engine, HostOp, OpToken, Wake};
use minivmm::disk::geometry::{Alignment, Geometry};
use minivmm::disk::{DiskConfig, Image};
use minivmm::mem::{self, MemoryLoss, Ram, SharedRegion};
use minivmm_export::backend::Backend;
use minivmm_export::serve::{Messages, Next};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::input::Input;
use super::logs;

const QUEUES: u16 = 2;
const STEPS_MAX: usize = 64;
const MEMORY: u64 = 0x1_0000;
const USER: u64 = 0x7000_0000_0000;
/// Where the good driver at the end has its rings, its header, its data and its status.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const DATA: u64 = 0x4000;
const STATUS: u64 = 0x5000;
/// So long a worker may take for a request that is good.
const PATIENCE: Duration = Duration::from_secs(20);

/// Completes everything at once, and waits for the doorbell and the kick.
#[derive(Default)]
struct AtOnce {
    ended: Vec<Ended>,
    kick: Option<Arc<std::os::fd::OwnedFd>>,
}

impl Engine for AtOnce {
    fn submit(&mut self, token: OpToken, op: HostOp) -> Result<(), HostOp> {
        let bytes = match &op {
            HostOp::Readv { iov, .. } | HostOp::Writev { iov, .. } => iov.bytes(),
            _ => 0,
        };
        self.ended.push(Ended { token, result: Ok(usize::try_from(bytes).unwrap()) });
        Ok(())
    }

    fn wait(&mut self, wake: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        let Wake::Doorbell(doorbell) = wake else {
            ended.append(&mut self.ended);
            return Ok(());
        };
        if self.ended.is_empty() {
            let kick = self.kick.as_ref().map_or(-1, |kick| kick.as_raw_fd());
            let waits = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            let mut polled = [waits(doorbell.as_raw_fd()), waits(kick)];
            // SAFETY: two valid pollfds for the length of the call.
            unsafe { libc::poll(polled.as_mut_ptr(), 2, -1) };
            if polled[0].revents != 0 {
                let _ = doorbell.read();
            }
            if let Some(kick) = &self.kick {
                minivmm::doorbell::clear(kick);
            }
        }
        ended.append(&mut self.ended);
        Ok(())
    }

    fn listen_to(&mut self, kick: Option<Arc<std::os::fd::OwnedFd>>) -> io::Result<()> {
        self.kick = kick;
        Ok(())
    }
}

fn backend(mode: usize) -> Backend {
    let geometry = Geometry {
        capacity_sectors: 2048,
        logical_block: 512,
        physical_block: 512,
        alignment: Alignment { memory: 1, offset: 1, found_by: "the fuzzer" },
    };
    let config = DiskConfig {
        cache: &POLICIES[mode % POLICIES.len()],
        queues: Some(QUEUES),
        poll_us: Some(0),
        ..DiskConfig::new("/fuzz.img")
    };
    let image = Arc::new(Image::simulated(&config, geometry).expect("a simulated image"));
    let cache = Arc::new(WriteCache::new(config.cache));
    let disk = || {
        let engine = Box::<AtOnce>::default();
        DiskQueue::new(Arc::clone(&image), Arc::clone(&cache), engine, StableBy::Dsync)
    };
    let disks = (0..QUEUES).map(|_| disk()).collect();
    let device = BlockDevice::with_disks("vda", Arc::clone(&image), cache, disks).expect("threads");
    Backend::new(device, image).expect("an eventfd")
}

/// What a front end may pass.
struct Things {
    memory: File,
    small: File,
    null: File,
    kick: EventFd,
    call: EventFd,
}

impl Things {
    fn new() -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        Self {
            memory: memfd(MEMORY),
            small: memfd(4096),
            null: File::open("/dev/null").expect("/dev/null"),
            kick: event(),
            call: event(),
        }
    }

    fn pick(&self, input: &mut Input<'_>) -> RawFd {
        match input.below(8) {
            0..=2 => self.memory.as_raw_fd(),
            3 => self.small.as_raw_fd(),
            4 => self.null.as_raw_fd(),
            5 => self.call.as_raw_fd(),
            _ => self.kick.as_raw_fd(),
        }
    }
}

fn memfd(bytes: u64) -> File {
    // SAFETY: the name is a string with its terminator, and the descriptor is new.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(bytes).expect("memory");
    file
}

/// The connection, from both ends.
struct Wire {
    ours: UnixStream,
    messages: Messages,
    loss: Arc<MemoryLoss>,
}

impl Wire {
    fn connect(backend: &Arc<Mutex<Backend>>) -> Self {
        let loss = backend.lock().unwrap().begin().expect("an eventfd");
        let (ours, theirs) = UnixStream::pair().expect("a socket");
        ours.set_nonblocking(true).expect("a socket");
        let messages = Messages::new(theirs, Arc::clone(backend)).expect("a socket");
        Self { ours, messages, loss }
    }

    /// Sends bytes with descriptors, lets the back end handle what is whole, and takes its replies. Returns `false` if
    /// the connection is to end.
    fn send(&mut self, bytes: &[u8], fds: &[RawFd]) -> bool {
        if fds.is_empty() {
            self.ours.write_all(bytes).expect("the back end takes what it is sent");
        } else {
            send_with_descriptors(&self.ours, bytes, fds);
        }
        for _ in 0..=bytes.len() {
            let next = self.messages.handle_next().expect("a connection that is open");
            let mut replies = [0; 4096];
            while self.ours.read(&mut replies).is_ok_and(|count| count > 0) {}
            match next {
                Next::Handled => {}
                Next::Waiting => return !self.loss.is_lost(),
                Next::Ended(_) => return false,
            }
        }
        panic!("more messages were handled than there were bytes");
    }

    fn message(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) -> bool {
        let size = u32::try_from(payload.len()).unwrap();
        let header = [request, 1, size].map(u32::to_le_bytes).concat();
        self.send(&[header, payload.to_vec()].concat(), fds)
    }
}

fn send_with_descriptors(to: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let data = u32::try_from(size_of_val(fds)).unwrap();
    let mut control = [0u64; 64];
    // SAFETY: zero is a valid msghdr; the buffer has room for 40 descriptors; all lives until the call returns.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut piece, 1);
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(data) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(data) as usize;
        std::ptr::copy_nonoverlapping(fds.as_ptr().cast(), libc::CMSG_DATA(header), size_of_val(fds));
        libc::sendmsg(to.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL);
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn pair(index: u32, number: u32) -> Vec<u8> {
    [index.to_le_bytes(), number.to_le_bytes()].concat()
}

/// An address that often is one of the front end's.
fn address(input: &mut Input<'_>) -> u64 {
    match input.below(4) {
        0 => input.edgy(),
        _ => USER + (u64::from(input.u16()) & 0xfff0),
    }
}

/// A message that mostly makes sense: its number, its payload, and how many descriptors come with it.
fn compose(input: &mut Input<'_>) -> (u32, Vec<u8>, usize) {
    let index = u32::from(input.u8() % 3);
    let number = match input.below(3) {
        0 => u32::try_from(input.edgy() & 0xffff_ffff).unwrap(),
        _ => 1 << input.below(6),
    };
    let bytes = [MEMORY, 4096, 0x8000, input.edgy()][input.below(4)];
    let region = [
        [0, 0x1000, 0x1_0000, input.edgy()][input.below(4)],
        bytes,
        address(input),
        u64::from(input.u8() & 3) << 12,
    ];
    match input.below(20) {
        0 => (1, vec![], 0),
        1 | 2 => {
            (2, words(&[[0x1_4000_0a00, 0x1_4000_1a04, 0x1_0000_0000, input.edgy()][input.below(4)]]), 0)
        }
        3 => (15, vec![], 0),
        4 => (16, words(&[[0xb209, input.edgy()][input.below(2)]]), 0),
        5 => (5, [words(&[1]), words(&region)].concat(), 1),
        6 => (37, [words(&[0]), words(&region)].concat(), 1),
        7 => (38, [words(&[0]), words(&region)].concat(), 0),
        8 => (8, pair(index, number), 0),
        9 => {
            let rings = [address(input), address(input), address(input), 0];
            (9, [pair(index, 0), words(&rings)].concat(), 0)
        }
        10 => (10, pair(index, number), 0),
        11 => (11, pair(index, 0), 0),
        12 => (12, words(&[u64::from(index)]), 1),
        13 => (13, words(&[u64::from(index)]), 1),
        14 => (14, words(&[u64::from(index)]), 1),
        15 => (18, pair(index, number & 1), 0),
        16 => (24, [pair(number & 63, 8), vec![0; 12]].concat(), 0),
        17 => (25, [pair(32, 1), vec![0; 4], vec![input.u8()]].concat(), 0),
        18 => (31 + u32::from(input.flag()), words(&[number.into(), 0, u64::from(index) | 16 << 16]), 1),
        _ => (34, vec![], 0),
    }
}

pub fn run(data: &[u8]) {
    static SURVIVE: Once = Once::new();
    SURVIVE.call_once(|| mem::survive_lost_memory().expect("a handler"));
    logs::begin();
    let mut input = Input::new(data);
    let backend = Arc::new(Mutex::new(backend(input.below(POLICIES.len()))));
    let things = Things::new();
    let mut wire = Wire::connect(&backend);
    let mut steps = 0;
    while !input.is_empty() && steps < STEPS_MAX {
        steps += 1;
        let goes_on = match input.below(8) {
            0 => wire.send(input.bytes(64), &[]),
            1 => {
                scribble(&things.memory, &mut input);
                let _ = things.kick.write(1);
                !wire.loss.is_lost()
            }
            2 if input.once_in(8) => {
                things.memory.set_len(0).and_then(|()| things.memory.set_len(MEMORY)).expect("memory");
                true
            }
            _ => {
                let (request, payload, usual) = compose(&mut input);
                let count = if input.once_in(8) { input.below(40) } else { usual };
                let fds: Vec<RawFd> = (0..count).map(|_| things.pick(&mut input)).collect();
                wire.message(request, &payload, &fds)
            }
        };
        if !goes_on {
            backend.lock().unwrap().end();
            wire = Wire::connect(&backend);
        }
    }
    drop(wire);
    backend.lock().unwrap().end();
    good_front_end(&backend);
    backend.lock().unwrap().end();
    logs::check();
}

/// Writes into the memory that the front end shares: rings, tables, anything.
fn scribble(memory: &File, input: &mut Input<'_>) {
    let at = u64::from(input.u16());
    let _ = std::os::unix::fs::FileExt::write_all_at(memory, input.bytes(48), at.min(MEMORY - 48));
}

/// A front end that keeps to the specification reads a block.
fn good_front_end(backend: &Arc<Mutex<Backend>>) {
    let things = Things::new();
    let mut wire = Wire::connect(backend);
    let region = SharedRegion { guest: 0, bytes: MEMORY, file: things.memory.as_fd(), offset: 0 };
    let loss = MemoryLoss::new().expect("an eventfd");
    let ram = Ram::from_shared(&[region], &loss).expect("memory");
    let write = |at: u64, bytes: &[u8]| mem::write_bytes(&ram, at, bytes).expect("inside");
    for (index, (addr, len, flags)) in
        [(HEADER, 16u32, 1u16), (DATA, 512, 3), (STATUS, 1, 2)].into_iter().enumerate()
    {
        let next = u16::try_from(index + 1).unwrap();
        let descriptor =
            [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        write(16 * index as u64, &descriptor);
    }
    write(STATUS, &[0xaa]);
    write(AVAILABLE + 2, &1u16.to_le_bytes());
    let events = [things.kick.as_raw_fd(), things.call.as_raw_fd()];
    for (request, payload, fds) in [
        (1, vec![], vec![]),
        (16, words(&[0xb209]), vec![]),
        (2, words(&[0x1_4000_0200]), vec![]),
        (5, [words(&[1]), words(&[0, MEMORY, USER, 0])].concat(), vec![things.memory.as_raw_fd()]),
        (8, pair(1, 16), vec![]),
        (10, pair(1, 0), vec![]),
        (9, [pair(1, 0), words(&[USER, USER + USED, USER + AVAILABLE, 0])].concat(), vec![]),
        (12, words(&[1]), vec![events[0]]),
        (13, words(&[1]), vec![events[1]]),
        (18, pair(1, 1), vec![]),
    ] {
        assert!(wire.message(request, &payload, &fds), "a good front end's message {request} was refused");
    }
    let begin = Instant::now();
    let mut status = [0xaa];
    while status == [0xaa] {
        assert!(begin.elapsed() < PATIENCE, "a good request does not come back");
        mem::read_bytes(&ram, STATUS, &mut status).expect("inside");
        std::thread::yield_now();
    }
    assert_eq!(status, [0], "a good request fails");
}
