//! From the crate `vhost`'s messages to the [`Backend`].
//!
//! Owns the translation and nothing else. `vhost` has received the message, and checked its length, its flags and the
//! number of its descriptors. A message that is refused ends the connection, after its reply if the front end wants
//! one. What is not offered in the protocol features is refused.

use std::fs::File;
use std::io;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use crate::backend::{Backend, Refused};
use crate::inflight::Description;
use crate::ring::Addresses;
use crate::table::{REGIONS_MAX, Region};

/// The protocol features that are offered. `vhost` adds REPLY_ACK, which it implements itself.
const OFFERED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);

fn refused(why: Refused) -> Error {
    Error::ReqHandlerError(io::Error::other(why))
}

fn not_offered<T>() -> Result<T> {
    Err(Error::InvalidOperation("it was not offered"))
}

fn region(of: &VhostUserMemoryRegion, file: File) -> Region {
    let &VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, mmap_offset } = of;
    Region { guest: guest_phys_addr, bytes: memory_size, user: user_addr, offset: mmap_offset, file }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.disable_all();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        Backend::set_features(self, features).map_err(refused)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions = regions.iter().zip(files).map(|(of, file)| region(of, file)).collect();
        self.set_table(regions).map_err(refused)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        self.set_size(index, size).map_err(refused)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.set_addresses(index, Addresses { descriptors, available, used }).map_err(refused)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.set_base(index, base).map_err(refused)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.stop_ring(index).map_err(refused)?;
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.set_kick(u32::from(index), file).map_err(refused)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.set_call(u32::from(index), file).map_err(refused)
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.set_err(u32::from(index), file).map_err(refused)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(OFFERED)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = OFFERED.union(VhostUserProtocolFeatures::REPLY_ACK).bits();
        if features & !offered == 0 { Ok(()) } else { not_offered() }
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.queues()))
    }

    fn set_vring_enable(&mut self, index: u32, on: bool) -> Result<()> {
        self.enable(index, on).map_err(refused)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(self.read_config(offset, size))
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.write_config(offset, data).map_err(refused)
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _object: VhostUserSharedMsg) -> Result<File> {
        not_offered()
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (made, file) = self.make_inflight(asked.num_queues, asked.queue_size).map_err(refused)?;
        let Description { bytes, offset, queues, queue_size } = made;
        Ok((VhostUserInflight::new(bytes, offset, queues, queue_size), file))
    }

    fn set_inflight_fd(&mut self, kept: &VhostUserInflight, file: File) -> Result<()> {
        let description = Description {
            bytes: kept.mmap_size,
            offset: kept.mmap_offset,
            queues: kept.num_queues,
            queue_size: kept.queue_size,
        };
        self.take_inflight(description, &file).map_err(refused)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        added: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.add_region(region(added, file)).map_err(refused)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, removed: &VhostUserSingleMemoryRegion) -> Result<()> {
        let &VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, .. } = &**removed;
        self.remove_region(guest_phys_addr, memory_size, user_addr).map_err(refused)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        not_offered()
    }
}
