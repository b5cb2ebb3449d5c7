//! A vhost-user front end, message by message, with a driver of split rings in memory that it shares.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use minivmm_testkit::desc::{self, Part};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::daemon::PATIENCE;

/// Messages, by their names in the specification.
#[rustfmt::skip]
pub mod msg {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// Protocol features: MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
pub const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;
/// VERSION_1, FLUSH, CONFIG_WCE, MQ and PROTOCOL_FEATURES.
pub const FEATURES: u64 = 1 << 32 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 30;

/// Version 1, and version 1 with NEED_REPLY.
pub const V1: u32 = 1;
pub const NEED_REPLY: u32 = 1 | 8;

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const WRITE: u16 = 2;

pub const SIZE: u16 = 16;
pub const MEMORY: u64 = 1 << 20;
/// Where the driver's addresses and the front end's own begin. Neither is a real address of this process.
pub const GUEST: u64 = 0x1_0000_0000;
pub const USER: u64 = 0x7000_0000_0000;
/// A queue's part of memory, and offsets in it; slot `n` of a queue has a header, a status and a page of data.
const QUEUE: u64 = 0x4_0000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUSES: u64 = 0x4000;
const DATA: u64 = 0x1_0000;

/// Shared memory, mapped here.
pub struct Memory {
    pub file: File,
    at: *mut u8,
}

impl Memory {
    pub fn new(bytes: u64) -> Self {
        // SAFETY: the name is a string with its terminator, and the descriptor is new.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(bytes).unwrap();
        Self::of(file, bytes)
    }

    pub fn of(file: File, bytes: u64) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of a file that nobody here truncates while it is read.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes as usize,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        Self { file, at: at.cast() }
    }

    /// The memory from `offset` on.
    pub fn from(self, offset: u64) -> Self {
        Self { file: self.file, at: self.at.wrapping_add(offset as usize) }
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping, which lives until the process ends.
            unsafe { self.at.add(at as usize + index).write_volatile(*byte) };
        }
    }

    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        // SAFETY: inside the mapping.
        std::array::from_fn(|index| unsafe { self.at.add(at as usize + index).read_volatile() })
    }
}

/// A connection.
pub struct FrontEnd {
    pub stream: UnixStream,
    pub memory: Memory,
    pub queues: Vec<Queue>,
}

/// The driver's side of a queue.
pub struct Queue {
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
    available: u16,
}

fn le(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn state(index: u32, number: u32) -> Vec<u8> {
    [index.to_le_bytes(), number.to_le_bytes()].concat()
}

/// The payload of ADD_MEM_REG.
pub fn region(guest: u64, bytes: u64, user: u64, offset: u64) -> Vec<u8> {
    le(&[0, guest, bytes, user, offset])
}

/// The payload of SET_MEM_TABLE with one region.
pub fn table(guest: u64, bytes: u64, user: u64, offset: u64) -> Vec<u8> {
    [le(&[1]), le(&[guest, bytes, user, offset])].concat()
}

impl FrontEnd {
    /// Connects, and says nothing.
    pub fn connect(dir: &Path) -> Self {
        let stream = UnixStream::connect(dir.join("s")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, memory: Memory::new(MEMORY), queues: Vec::new() }
    }

    /// Connects and negotiates, without memory or rings.
    pub fn negotiated(dir: &Path) -> Self {
        let mut front_end = Self::connect(dir);
        front_end.send(msg::SET_OWNER, V1, &[], &[]).unwrap();
        let offered = front_end.ask(msg::GET_FEATURES, &[]);
        front_end.set(msg::SET_PROTOCOL_FEATURES, &le(&[PROTOCOL]), &[]);
        assert_eq!(offered & FEATURES & !(1 << 12), FEATURES & !(1 << 12), "{offered:#x}");
        front_end.set(msg::SET_FEATURES, &le(&[FEATURES & offered]), &[]);
        front_end
    }

    /// Connects with `queues` live queues.
    pub fn live(dir: &Path, queues: u32) -> Self {
        let mut front_end = Self::negotiated(dir);
        front_end.share_memory();
        (0..queues).for_each(|_| front_end.add_queue());
        (0..queues).for_each(|index| front_end.start_queue(index, 0));
        front_end
    }

    pub fn share_memory(&mut self) {
        let fd = self.memory.file.as_raw_fd();
        self.set(msg::SET_MEM_TABLE, &table(GUEST, MEMORY, USER, 0), &[fd]);
    }

    pub fn add_queue(&mut self) {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        self.queues.push(Queue { kick: event(), call: event(), err: event(), available: 0 });
    }

    /// Sets up and enables a queue, which begins at `base`.
    pub fn start_queue(&mut self, index: u32, base: u32) {
        let Queue { kick, call, err, .. } = &self.queues[index as usize];
        let [kick, call, err] = [kick, call, err].map(AsRawFd::as_raw_fd);
        let at = USER + u64::from(index) * QUEUE;
        self.set(msg::SET_VRING_NUM, &state(index, u32::from(SIZE)), &[]);
        self.set(msg::SET_VRING_BASE, &state(index, base), &[]);
        let addresses = [state(index, 0), le(&[at, at + USED, at + AVAIL, 0])].concat();
        self.set(msg::SET_VRING_ADDR, &addresses, &[]);
        self.set(msg::SET_VRING_KICK, &le(&[u64::from(index)]), &[kick]);
        self.set(msg::SET_VRING_CALL, &le(&[u64::from(index)]), &[call]);
        self.set(msg::SET_VRING_ERR, &le(&[u64::from(index)]), &[err]);
        self.set(msg::SET_VRING_ENABLE, &state(index, 1), &[]);
    }

    /// Sends a message as it is.
    pub fn send(&mut self, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let header = [request, flags, payload.len() as u32].map(u32::to_le_bytes).concat();
        self.send_bytes(&[header, payload.to_vec()].concat(), fds)
    }

    /// Sends bytes with descriptors, in one sendmsg.
    pub fn send_bytes(&mut self, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let data = std::mem::size_of_val(fds);
        // SAFETY: CMSG_SPACE computes a number.
        let mut control = vec![0u64; unsafe { libc::CMSG_SPACE(data as u32) } as usize / 8 + 1];
        // SAFETY: zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        (message.msg_iov, message.msg_iovlen) = (&raw mut piece, 1);
        if !fds.is_empty() {
            message.msg_control = control.as_mut_ptr().cast();
            // SAFETY: as above.
            message.msg_controllen = unsafe { libc::CMSG_SPACE(data as u32) } as usize;
            // SAFETY: the buffer has room for the header and its descriptors.
            unsafe {
                let header = libc::CMSG_FIRSTHDR(&raw const message);
                (*header).cmsg_level = libc::SOL_SOCKET;
                (*header).cmsg_type = libc::SCM_RIGHTS;
                (*header).cmsg_len = libc::CMSG_LEN(data as u32) as usize;
                std::ptr::copy_nonoverlapping(fds.as_ptr().cast(), libc::CMSG_DATA(header), data);
            }
        }
        // SAFETY: the message and all that it points to are alive.
        let sent = unsafe { libc::sendmsg(self.stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Receives a reply's payload, and a descriptor if one comes with it.
    pub fn reply(&mut self, request: u32) -> io::Result<(Vec<u8>, Option<File>)> {
        let mut header = [0u8; 12];
        let mut piece = libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() };
        let mut control = [0u64; 8];
        // SAFETY: zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        (message.msg_iov, message.msg_iovlen) = (&raw mut piece, 1);
        (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control));
        // SAFETY: the message and all that it points to are alive.
        let got = unsafe { libc::recvmsg(self.stream.as_raw_fd(), &raw mut message, libc::MSG_WAITALL) };
        match got {
            12 => {}
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n if n < 0 => return Err(io::Error::last_os_error()),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        // SAFETY: the kernel has filled the buffer; a descriptor in it is new.
        let file = unsafe {
            let first = libc::CMSG_FIRSTHDR(&raw const message);
            (!first.is_null())
                .then(|| File::from_raw_fd(libc::CMSG_DATA(first).cast::<RawFd>().read_unaligned()))
        };
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (request, 1 | 4), "the reply's number and flags");
        let mut payload = vec![0; word(8) as usize];
        self.stream.read_exact(&mut payload)?;
        Ok((payload, file))
    }

    /// Asks for a number.
    pub fn ask(&mut self, request: u32, payload: &[u8]) -> u64 {
        self.send(request, V1, payload, &[]).unwrap();
        let (reply, _) = self.reply(request).unwrap();
        u64::from_le_bytes(reply.try_into().unwrap())
    }

    /// Sends a message and returns the acknowledgement that it asks for: 0 is success.
    pub fn acknowledged(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) -> io::Result<u64> {
        self.send(request, NEED_REPLY, payload, fds)?;
        let (reply, _) = self.reply(request)?;
        Ok(u64::from_le_bytes(reply.try_into().unwrap()))
    }

    /// Sends a message that must be accepted.
    #[track_caller]
    pub fn set(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) {
        // REPLY_ACK counts from its own negotiation on.
        assert_eq!(self.acknowledged(request, payload, fds).unwrap(), 0, "message {request}");
    }

    /// Stops a queue and returns its base.
    pub fn stop_queue(&mut self, index: u32) -> u32 {
        let reply = self.ask(msg::GET_VRING_BASE, &state(index, 0));
        assert_eq!(reply as u32, index);
        (reply >> 32) as u32
    }

    /// Reads bytes of the configuration space.
    pub fn config(&mut self, offset: u32, bytes: u32) -> Vec<u8> {
        let asked = [offset, bytes, 0].map(u32::to_le_bytes).concat();
        self.send(msg::GET_CONFIG, V1, &[asked.clone(), vec![0; bytes as usize]].concat(), &[]).unwrap();
        let (reply, _) = self.reply(msg::GET_CONFIG).unwrap();
        assert_eq!(reply[..12], asked[..], "the reply repeats what was asked");
        reply[12..].to_vec()
    }

    /// Sets config.writeback.
    pub fn set_writeback(&mut self, on: bool) {
        let payload = [[32u32, 1, 0].map(u32::to_le_bytes).concat(), vec![u8::from(on)]].concat();
        self.set(msg::SET_CONFIG, &payload, &[]);
    }

    /// Gets an inflight region for `queues` queues: its description, and its file.
    pub fn get_inflight(&mut self, queues: u16) -> (Vec<u8>, File) {
        let numbers = [queues.to_le_bytes(), SIZE.to_le_bytes()].concat();
        let asked = [le(&[0, 0]), numbers, vec![0; 4]].concat();
        self.send(msg::GET_INFLIGHT_FD, V1, &asked, &[]).unwrap();
        let (reply, file) = self.reply(msg::GET_INFLIGHT_FD).unwrap();
        (reply, file.unwrap())
    }

    /// The driver's address of a slot's data.
    pub fn data(queue: u32, slot: u16) -> u64 {
        u64::from(queue) * QUEUE + DATA + 4096 * u64::from(slot)
    }

    /// Puts a request into the queue, at descriptors of its own.
    pub fn put(&mut self, queue: u32, slot: u16, kind: u32, sector: u64, bytes: u32) {
        let base = GUEST + u64::from(queue) * QUEUE;
        let (header, status) = (HEADERS + 16 * u64::from(slot), STATUSES + u64::from(slot));
        let at = u64::from(queue) * QUEUE;
        self.memory.write(at + header, &[le(&[u64::from(kind)]), le(&[sector])].concat());
        self.memory.write(at + status, &[0xaa]);
        let data = (GUEST + Self::data(queue, slot), bytes, if kind == IN { WRITE } else { 0 });
        let ends = [(base + header, 16, 0), (base + status, 1, WRITE)];
        let parts: Vec<Part> = match bytes {
            0 => ends.to_vec(),
            _ => vec![ends[0], data, ends[1]],
        };
        self.put_chain(queue, 3 * slot, &parts);
    }

    /// Makes a chain of descriptors from `head` on available.
    pub fn put_chain(&mut self, queue: u32, head: u16, parts: &[Part]) {
        let at = u64::from(queue) * QUEUE;
        for (index, &(addr, len, flags)) in parts.iter().enumerate() {
            let (number, is_last) = (head + index as u16, index + 1 == parts.len());
            let flags = if is_last { flags } else { flags | 1 };
            let bytes = desc::bytes((addr, len, flags, number + 1));
            self.memory.write(at + 16 * u64::from(number), &bytes);
        }
        self.make_available(queue, head);
    }

    pub fn make_available(&mut self, queue: u32, head: u16) {
        let at = u64::from(queue) * QUEUE;
        let state = &mut self.queues[queue as usize];
        self.memory.write(at + AVAIL + 4 + 2 * u64::from(state.available % SIZE), &head.to_le_bytes());
        state.available = state.available.wrapping_add(1);
        self.memory.write(at + AVAIL + 2, &state.available.to_le_bytes());
    }

    pub fn kick(&self, queue: u32) {
        self.queues[queue as usize].kick.write(1).unwrap();
    }

    pub fn used(&self, queue: u32) -> u16 {
        u16::from_le_bytes(self.memory.read(u64::from(queue) * QUEUE + USED + 2))
    }

    /// The heads that came back, oldest first; at most as many as the ring has.
    pub fn used_heads(&self, queue: u32) -> Vec<u16> {
        let entry = |at: u16| {
            let place = u64::from(queue) * QUEUE + USED + 4 + 8 * u64::from(at % SIZE);
            u32::from_le_bytes(self.memory.read(place)) as u16
        };
        (0..self.used(queue)).map(entry).collect()
    }

    pub fn status(&self, queue: u32, slot: u16) -> u8 {
        self.memory.read::<1>(u64::from(queue) * QUEUE + STATUSES + u64::from(slot))[0]
    }

    /// Waits until the queue has returned `count` chains in all.
    #[track_caller]
    pub fn wait_used(&self, queue: u32, count: u16) {
        let begin = Instant::now();
        while self.used(queue) != count {
            assert!(begin.elapsed() < PATIENCE, "{} of {count} came back", self.used(queue));
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Does one request and returns its status.
    #[track_caller]
    pub fn request(&mut self, queue: u32, kind: u32, sector: u64, bytes: u32) -> u8 {
        self.put(queue, 0, kind, sector, bytes);
        self.kick(queue);
        let all = self.queues[queue as usize].available;
        self.wait_used(queue, all);
        self.status(queue, 0)
    }

    #[track_caller]
    pub fn write(&mut self, queue: u32, sector: u64, byte: u8) {
        self.memory.write(Self::data(queue, 0), &[byte; 4096]);
        assert_eq!(self.request(queue, OUT, sector, 4096), 0);
    }

    #[track_caller]
    pub fn read(&mut self, queue: u32, sector: u64) -> [u8; 4096] {
        self.memory.write(Self::data(queue, 0), &[0xee; 4096]);
        assert_eq!(self.request(queue, IN, sector, 4096), 0);
        self.memory.read(Self::data(queue, 0))
    }

    /// Goes on with the memory and the queues of a connection that is gone.
    pub fn carry_on(&mut self, before: Self) {
        (self.memory, self.queues) = (before.memory, before.queues);
    }

    /// Waits until the back end has closed the connection.
    #[track_caller]
    pub fn is_disconnected(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("not disconnected: {error}"),
        }
    }
}

impl FrontEnd {
    /// Sends one number.
    pub fn set_number(&mut self, request: u32, number: u64) -> io::Result<u64> {
        self.acknowledged(request, &le(&[number]), &[])
    }
}
