//! What lies where in the memory region of a virtio function.
//!
//! Owns the map from bytes to parts, and to the registers of the common configuration (virtio 4.1.4.3). What a
//! register means is up to the transport.

use super::super::core::{Half, QueuePart, Reg};
use crate::pci::msix;

/// Bytes of memory that a function takes, in which its registers lie.
pub const BAR_BYTES: u64 = 0x8000;
/// Offset of the notification registers, for the ioeventfds.
pub const NOTIFY: u64 = 0x3000;
/// Distance between two queues' notification registers (`notify_off_multiplier`, virtio 4.1.4.4).
pub const NOTIFY_STRIDE: u64 = 4;

/// The other parts of the region.
pub const COMMON: u64 = 0x0000;
pub const COMMON_BYTES: u64 = 0x38;
pub const ISR: u64 = 0x1000;
pub const DEVICE: u64 = 0x2000;
pub const DEVICE_BYTES: u64 = 0x100;
pub const TABLE: u64 = 0x4000;
pub const PENDING: u64 = 0x6000;
/// The most vectors that the table has room for.
pub const VECTORS_MAX: u64 = (PENDING - TABLE) / msix::ENTRY_BYTES;

/// A register of the common configuration (virtio 4.1.4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    Core(Reg),
    ConfigVector,
    QueueCount,
    QueueVector,
    NotifyOffset,
}

/// The registers in order: offset, width in bytes, field. A register of 64 bits is two of 32.
const FIELDS: [(u64, usize, Field); 19] = {
    use Half::{High, Low};
    use QueuePart::{Available, Descriptors, Used};
    [
        (0x00, 4, Field::Core(Reg::DeviceFeaturesSel)),
        (0x04, 4, Field::Core(Reg::DeviceFeatures)),
        (0x08, 4, Field::Core(Reg::DriverFeaturesSel)),
        (0x0c, 4, Field::Core(Reg::DriverFeatures)),
        (0x10, 2, Field::ConfigVector),
        (0x12, 2, Field::QueueCount),
        (0x14, 1, Field::Core(Reg::Status)),
        (0x15, 1, Field::Core(Reg::ConfigGeneration)),
        (0x16, 2, Field::Core(Reg::QueueSel)),
        (0x18, 2, Field::Core(Reg::QueueSize)),
        (0x1a, 2, Field::QueueVector),
        (0x1c, 2, Field::Core(Reg::QueueReady)),
        (0x1e, 2, Field::NotifyOffset),
        (0x20, 4, Field::Core(Reg::QueueAddr(Descriptors, Low))),
        (0x24, 4, Field::Core(Reg::QueueAddr(Descriptors, High))),
        (0x28, 4, Field::Core(Reg::QueueAddr(Available, Low))),
        (0x2c, 4, Field::Core(Reg::QueueAddr(Available, High))),
        (0x30, 4, Field::Core(Reg::QueueAddr(Used, Low))),
        (0x34, 4, Field::Core(Reg::QueueAddr(Used, High))),
    ]
};

/// Returns the register of the common configuration that begins at `offset`.
pub fn field(offset: u64) -> Option<Field> {
    FIELDS.iter().find(|(at, ..)| *at == offset).map(|(_, _, field)| *field)
}

/// Returns offset and width of the register of the common configuration that byte `offset` belongs to. A byte
/// that belongs to no register stands alone.
pub fn locate(offset: u64) -> (u64, usize) {
    FIELDS
        .iter()
        .map(|(at, width, _)| (*at, *width))
        .find(|(at, width)| (*at..*at + *width as u64).contains(&offset))
        .unwrap_or((offset, 1))
}

/// A part of the memory region, and the offset in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Common(u64),
    Isr(u64),
    Device(u64),
    Notify(u64),
    Table(u64),
    Pending(u64),
    Nothing,
}

/// Returns the part that an access of `len` bytes at `offset` begins in, and how many of its bytes lie in that
/// part: at least one if `len` is not 0.
pub fn first_part(offset: u64, len: usize) -> (Part, usize) {
    let (part, end) = match offset {
        COMMON..ISR => (Part::Common(offset - COMMON), ISR),
        ISR..DEVICE => (Part::Isr(offset - ISR), DEVICE),
        DEVICE..NOTIFY => (Part::Device(offset - DEVICE), NOTIFY),
        NOTIFY..TABLE => (Part::Notify(offset - NOTIFY), TABLE),
        TABLE..PENDING => (Part::Table(offset - TABLE), PENDING),
        PENDING..BAR_BYTES => (Part::Pending(offset - PENDING), BAR_BYTES),
        _ => return (Part::Nothing, len),
    };
    (part, usize::try_from(end - offset).map_or(len, |room| room.min(len)))
}
