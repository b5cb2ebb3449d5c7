//! virtio-blk's features and configuration space (virtio 5.2.3, 5.2.4).
//!
//! Owns the bits and the layout. Pure: what is offered follows from the image and the number of queues.

use crate::disk::Image;
use crate::virtio::feature;

/// VIRTIO_BLK_F_SEG_MAX.
pub const SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO.
pub const RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE.
pub const BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH.
pub const FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_TOPOLOGY.
pub const TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_MQ.
pub const MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD.
pub const DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub const WRITE_ZEROES: u64 = 1 << 14;

/// Offset of the `writeback` byte.
pub const WRITEBACK: usize = 32;
/// Offset of `num_queues`.
const NUM_QUEUES: usize = 34;
/// Length of struct virtio_blk_config up to write_zeroes_may_unmap and its padding.
const CONFIG_BYTES: usize = 60;

/// The most segments that one DISCARD or WRITE_ZEROES may have.
pub const ERASE_SEGMENTS_MAX: u32 = 32;
/// The most sectors that one segment may have: 2 GiB, so that one request cannot occupy a worker for long.
pub const ERASE_SECTORS_MAX: u32 = 1 << 22;

/// Returns the features that are offered for `image` with `queues` queues.
///
/// FLUSH is always offered, so CONFIG_WCE may be (virtio 5.2.5.2). The mode `unsafe` offers it too: it breaks
/// the promise on purpose, but leaves the guest's behaviour as in writeback.
pub fn offered(image: &Image, queues: u16) -> u64 {
    let always = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;
    let block = SEG_MAX | BLK_SIZE | TOPOLOGY | FLUSH | CONFIG_WCE;
    let writing = if image.config().readonly { RO } else { WRITE_ZEROES };
    let discard = if image.config().offers_discard() { DISCARD } else { 0 };
    let many = if queues > 1 { MQ } else { 0 };
    always | block | writing | discard | many
}

/// The names of all features that may be offered, in the order of their bits.
const NAMES: [(u64, &str); 12] = [
    (SEG_MAX, "SEG_MAX"),
    (RO, "RO"),
    (BLK_SIZE, "BLK_SIZE"),
    (FLUSH, "FLUSH"),
    (TOPOLOGY, "TOPOLOGY"),
    (CONFIG_WCE, "CONFIG_WCE"),
    (MQ, "MQ"),
    (DISCARD, "DISCARD"),
    (WRITE_ZEROES, "WRITE_ZEROES"),
    (feature::INDIRECT_DESC, "INDIRECT_DESC"),
    (feature::EVENT_IDX, "EVENT_IDX"),
    (feature::VERSION_1, "VERSION_1"),
];

/// Returns the names of `features`.
pub fn names(features: u64) -> Vec<&'static str> {
    NAMES.iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| *name).collect()
}

/// Returns the configuration space, with the present value of `writeback`. Fields whose feature is not offered
/// read 0.
pub fn space(image: &Image, queues: u16, writeback: bool) -> [u8; CONFIG_BYTES] {
    let geometry = image.geometry();
    let offered = offered(image, queues);
    let block_sectors = geometry.logical_block / 512;
    let mut space = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &geometry.capacity_sectors.to_le_bytes());
    // The header and the status take two descriptors; the rest is for data.
    put(12, &u32::from(image.config().queue_size.saturating_sub(2)).to_le_bytes());
    put(20, &geometry.logical_block.to_le_bytes());
    put(24, &[physical_block_exp(geometry.physical_block, geometry.logical_block)]);
    // alignment_offset stays 0; min_io_size is in logical blocks; opt_io_size stays 0, unknown.
    put(26, &1u16.to_le_bytes());
    put(WRITEBACK, &[u8::from(writeback)]);
    if offered & MQ != 0 {
        put(NUM_QUEUES, &queues.to_le_bytes());
    }
    if offered & DISCARD != 0 {
        put(36, &ERASE_SECTORS_MAX.to_le_bytes());
        put(40, &ERASE_SEGMENTS_MAX.to_le_bytes());
        put(44, &block_sectors.to_le_bytes());
    }
    if offered & WRITE_ZEROES != 0 {
        put(48, &ERASE_SECTORS_MAX.to_le_bytes());
        put(52, &ERASE_SEGMENTS_MAX.to_le_bytes());
        put(56, &[u8::from(image.config().offers_discard())]);
    }
    space
}

/// Returns log2 of the physical over the logical block size. Both are powers of two.
fn physical_block_exp(physical: u32, logical: u32) -> u8 {
    let exponent = physical.max(1).ilog2().saturating_sub(logical.max(1).ilog2());
    u8::try_from(exponent).unwrap_or(0)
}
