//! One ring, as the front end has described it so far.
//!
//! Owns what is known of a ring between messages, and when that is enough to serve it. Whoever serves it is
//! [`crate::backend`].

use std::os::fd::OwnedFd;
use std::sync::Arc;

use minivmm_block::virtio::queue::QueueConfig;

use crate::notify::Notify;
use crate::table::MemoryTable;

/// Where a ring's parts are, in the front end's own addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

/// A ring of the connection.
#[derive(Debug, Default)]
pub struct RingSetup {
    /// Number of descriptors; 0 until it is set.
    pub size: u32,
    /// Where its parts are; `None` until they are set.
    pub addresses: Option<Addresses>,
    /// The next entry of the available ring, as the front end says or as the ring was stopped.
    pub base: u16,
    /// What the driver writes when it has made chains available. A ring is started when it is set, and stopped by
    /// GET_VRING_BASE.
    pub kick: Option<Arc<OwnedFd>>,
    /// SET_VRING_ENABLE.
    pub is_enabled: bool,
    /// `true` while a worker serves the ring.
    pub is_running: bool,
    /// What the device writes.
    pub notify: Arc<Notify>,
}

impl RingSetup {
    /// Returns `true` if the ring is to be served and is not. `needs_enable`: the front end uses SET_VRING_ENABLE.
    pub fn is_due(&self, needs_enable: bool) -> bool {
        let is_known = self.size != 0 && self.addresses.is_some() && self.kick.is_some();
        is_known && !self.is_running && (self.is_enabled || !needs_enable)
    }

    /// Returns the ring's configuration in guest addresses; `None` if the table does not have all of its addresses.
    pub fn config(&self, table: &MemoryTable) -> Option<QueueConfig> {
        let Addresses { descriptors, available, used } = self.addresses?;
        Some(QueueConfig {
            size: self.size,
            descriptors: table.guest_address(descriptors)?,
            available: table.guest_address(available)?,
            used: table.guest_address(used)?,
        })
    }
}
