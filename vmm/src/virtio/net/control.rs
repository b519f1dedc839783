//! The control queue, by which a driver says how many pairs of queues it uses (virtio 1.2 §5.1.6.5.5).
//!
//! It understands that one command and refuses any other. Whoever serves the device changes the pairs; the driver waits until then.

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::buffers::{Buffers, gather};
use crate::virtio::device::{ActiveQueue, DeviceError};

pub(super) struct Control<'m> {
    memory: &'m GuestMemoryMmap,
    queue: &'m mut ActiveQueue,
    /// Pairs of queues that there are.
    most: usize,
}

/// A command that has yet to be carried out.
pub(super) struct Change<'m> {
    head: u16,
    /// Where the answer goes.
    answer: Buffers<'m>,
    /// How many pairs are to be used.
    pub(super) pairs: usize,
}

impl<'m> Control<'m> {
    pub(super) fn new(memory: &'m GuestMemoryMmap, queue: &'m mut ActiveQueue, most: usize) -> Self {
        Self { memory, queue, most }
    }

    pub(super) fn kick(&self) -> &EventFd {
        &self.queue.kick
    }

    /// Takes commands until there is none, or one that changes something.
    pub(super) fn serve(&mut self) -> Result<Option<Change<'m>>, DeviceError> {
        drop(self.queue.kick.read());
        loop {
            let Some(chain) = self.queue.pop(self.memory)? else {
                if self.queue.queue.enable_notification(self.memory)? {
                    continue;
                }
                return Ok(None);
            };
            let head = chain.head_index();
            let (mut command, mut answer) = (Buffers::new(self.memory), Buffers::new(self.memory));
            gather(chain, &mut command, &mut answer)?;
            if answer.is_empty() {
                return Err(DeviceError::Driver("a command of the network's control queue has no room for an answer"));
            }
            match self.pairs(&command) {
                Some(pairs) => return Ok(Some(Change { head, answer, pairs })),
                None => self.answer(head, &mut answer, VIRTIO_NET_ERR)?,
            }
        }
    }

    /// Tells the driver that its change is made.
    pub(super) fn done(&mut self, change: Change<'m>) -> Result<(), DeviceError> {
        let Change { head, mut answer, .. } = change;
        self.answer(head, &mut answer, VIRTIO_NET_OK)
    }

    /// How many pairs a command asks for: `struct virtio_net_ctrl_hdr` and `struct virtio_net_ctrl_mq`.
    fn pairs(&self, command: &Buffers<'_>) -> Option<usize> {
        let mut bytes = [0; 4];
        if !command.read_at(0, &mut bytes) {
            return None;
        }
        let [class, kind, low, high] = bytes;
        let wanted = usize::from(u16::from_le_bytes([low, high]));
        let known = u32::from(class) == VIRTIO_NET_CTRL_MQ && u32::from(kind) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
        (known && (1..=self.most).contains(&wanted)).then_some(wanted)
    }

    fn answer(&mut self, head: u16, room: &mut Buffers<'_>, word: u32) -> Result<(), DeviceError> {
        room.write_at(0, &[u8::try_from(word).unwrap_or(u8::MAX)]);
        self.queue.complete(self.memory, head, 1)?;
        self.queue.signal_used(self.memory)
    }
}
