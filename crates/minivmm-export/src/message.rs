//! Whether a whole message has arrived.
//!
//! Owns the look at a connection before `vhost` reads from it. `vhost` waits for the rest of half a message without end,
//! and where a message has more descriptors than it has room for, it takes the header for not received and waits for
//! another. So it is called only for a message that is there as a whole.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Bytes of a header: the request, flags, and the size of the payload.
const HEADER_BYTES: usize = 12;
/// Offset of the size in a header.
const SIZE: usize = 8;
/// The longest payload that `vhost` reads; it refuses a longer one by the header.
const PAYLOAD_MAX: usize = 4096;
/// The most descriptors that `vhost` has room for.
const DESCRIPTORS_MAX: usize = 32;
/// Room for a control message with so many descriptors, in words.
const CONTROL_WORDS: usize = (DESCRIPTORS_MAX * size_of::<RawFd>()).div_ceil(8) + 3;

/// What has arrived on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrived {
    /// Nothing more will: the front end has closed its side. `vhost` says how.
    End,
    /// A part of a message.
    Part,
    /// A whole message, or a header that is refused whatever follows.
    Whole,
    /// A message with more descriptors than any may have.
    TooManyDescriptors,
}

/// Looks at what has arrived, and leaves it there.
pub fn look(connection: &UnixStream) -> io::Result<Arrived> {
    let mut header = [0u8; HEADER_BYTES];
    let mut control = [0u64; CONTROL_WORDS];
    let mut piece = libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: HEADER_BYTES };
    // SAFETY: zero is a valid value of this plain structure.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut piece, 1);
    let descriptors = u32::try_from(DESCRIPTORS_MAX * size_of::<RawFd>()).map_err(io::Error::other)?;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: computes a number, which is less than the buffer's length.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(descriptors) } as usize;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the message points to buffers that live until the call returns.
    let received = unsafe { libc::recvmsg(connection.as_raw_fd(), &raw mut message, flags) };
    let Ok(received) = usize::try_from(received) else {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::WouldBlock { Ok(Arrived::Part) } else { Err(error) };
    };
    // The kernel has made copies of what comes with the message.
    drop(descriptors_of(&message));
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        return Ok(Arrived::TooManyDescriptors);
    }
    let size = header.last_chunk().map_or(0, |size: &[u8; HEADER_BYTES - SIZE]| u32::from_ne_bytes(*size));
    let payload = usize::try_from(size).map_err(io::Error::other)?;
    Ok(match received {
        0 => Arrived::End,
        HEADER_BYTES if payload > PAYLOAD_MAX || waiting(connection)? >= HEADER_BYTES + payload => {
            Arrived::Whole
        }
        _ => Arrived::Part,
    })
}

/// Returns the descriptors of a received message, which are ours.
fn descriptors_of(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut found = Vec::new();
    // SAFETY: the kernel has written the control message, inside its buffer; each descriptor in it is new.
    unsafe {
        let first = libc::CMSG_FIRSTHDR(message);
        if !first.is_null() && (*first).cmsg_type == libc::SCM_RIGHTS {
            let bytes = (*first).cmsg_len - libc::CMSG_LEN(0) as usize;
            let data = libc::CMSG_DATA(first).cast::<RawFd>();
            for at in 0..bytes / size_of::<RawFd>() {
                found.push(OwnedFd::from_raw_fd(data.add(at).read_unaligned()));
            }
        }
    }
    found
}

/// Returns the number of bytes that have arrived and were not read.
fn waiting(connection: &UnixStream) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: the call writes one number into `count`.
    if unsafe { libc::ioctl(connection.as_raw_fd(), libc::FIONREAD, &raw mut count) } < 0 {
        return Err(io::Error::last_os_error());
    }
    usize::try_from(count).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_message_is_whole_when_its_payload_is_there() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(look(&ours).unwrap(), Arrived::Part, "nothing has come");
        let header = [2u32, 1, 8].map(u32::to_ne_bytes).concat();
        theirs.write_all(&header[..7]).unwrap();
        assert_eq!(look(&ours).unwrap(), Arrived::Part);
        theirs.write_all(&header[7..]).unwrap();
        theirs.write_all(&[0; 7]).unwrap();
        assert_eq!(look(&ours).unwrap(), Arrived::Part);
        theirs.write_all(&[0; 1]).unwrap();
        assert_eq!(look(&ours).unwrap(), Arrived::Whole);
        assert_eq!(look(&ours).unwrap(), Arrived::Whole, "looking takes nothing");
    }

    #[test]
    fn a_size_that_no_message_has_needs_no_payload_and_an_end_is_an_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[2u32, 1, 4097].map(u32::to_ne_bytes).concat()).unwrap();
        assert_eq!(look(&ours).unwrap(), Arrived::Whole);
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(look(&ours).unwrap(), Arrived::End);
    }
}
