//! The host's side of the region: the room of a VM's memory, of which KVM maps what the guest has plugged.
#![expect(unsafe_code, reason = "KVM is told where memory lies")]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::memory::{CHUNK, GuestRam, SLOT_ROOM, discard};
use crate::virtio::mem::Backing;

/// The room of a VM, as its memory device uses it.
pub struct Room {
    vm: Arc<VmFd>,
    memory: Arc<GuestMemoryMmap>,
    start: u64,
}

impl Room {
    /// That of `ram`.
    pub fn new(vm: Arc<VmFd>, ram: &GuestRam) -> Self {
        Self { vm, memory: Arc::clone(&ram.memory), start: ram.room.0 }
    }

    fn set_slot(&self, chunk: u64, bytes: u64) -> io::Result<()> {
        let slice = self.memory.get_slice(GuestAddress(chunk), CHUNK as usize).map_err(io::Error::other)?;
        let region = kvm_userspace_memory_region {
            slot: SLOT_ROOM + ((chunk - self.start) / CHUNK) as u32,
            flags: 0,
            guest_phys_addr: chunk,
            memory_size: bytes,
            userspace_addr: slice.ptr_guard_mut().as_ptr() as u64,
        };
        // SAFETY: the mapping is never unmapped, so KVM may use it as long as this process lives; the guest can reach
        // nothing beyond the chunk, all of which is guest memory.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(io::Error::from)
    }
}

impl Backing for Room {
    fn open(&mut self, chunk: u64) -> io::Result<()> {
        self.set_slot(chunk, CHUNK)
    }

    fn close(&mut self, chunk: u64) -> io::Result<()> {
        // A slot of no length is no slot (Documentation/virt/kvm/api.rst, 4.35).
        self.set_slot(chunk, 0)
    }

    fn discard(&mut self, range: Range<u64>) -> io::Result<()> {
        let slice = self.memory.get_slice(GuestAddress(range.start), (range.end - range.start) as usize);
        discard(&slice.map_err(io::Error::other)?).map(drop)
    }
}
