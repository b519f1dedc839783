//! How much each side of a connection may still send (virtio 1.2 §5.10.6.3). Pure arithmetic modulo 2³².

use super::packet::Header;

/// Receive buffer that the guest is promised for a connection, in bytes: as much as Linux promises, so that the guest seldom waits.
/// It is the most that a slow client makes the VMM hold.
pub(super) const BUFFER_BYTES: u32 = 256 << 10;

/// The guest broke the rules of credit; its connection is reset.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CreditError;

/// Both directions of one connection.
#[derive(Debug)]
pub(super) struct Credit {
    /// Receive buffer that the guest is promised, in bytes.
    promised: u32,
    /// Bytes that the guest has sent.
    received: u32,
    /// Of these, how many have gone on to the client: our `fwd_cnt`.
    forwarded: u32,
    /// The last `fwd_cnt` that the guest has been told.
    told: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// Of these, how many the guest's program has read: its `fwd_cnt`.
    consumed: u32,
    /// Size of the guest's buffer.
    buffer: u32,
}

impl Credit {
    /// Nothing sent yet in either direction.
    pub(super) fn new(promised: u32) -> Self {
        Self { promised, received: 0, forwarded: 0, told: 0, sent: 0, consumed: 0, buffer: 0 }
    }

    /// Counts `len` bytes from the guest, if they fit what it was promised.
    pub(super) fn receive(&mut self, len: u32) -> Result<(), CreditError> {
        if len > self.promised.saturating_sub(self.held()) {
            return Err(CreditError);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Bytes received and not yet passed on.
    pub(super) fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Counts bytes passed on.
    pub(super) fn forward(&mut self, len: usize) {
        let len = u32::try_from(len).unwrap_or(u32::MAX).min(self.held());
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// Whether the guest believes that less than half of the buffer is free while more is.
    pub(super) fn update_due(&self) -> bool {
        self.told != self.forwarded && self.received.wrapping_sub(self.told) > self.promised / 2
    }

    /// Puts our credit into a packet for the guest.
    pub(super) fn stamp(&mut self, header: &mut Header) {
        header.buf_alloc = self.promised;
        header.fwd_cnt = self.forwarded;
        self.told = self.forwarded;
    }

    /// Takes the guest's credit from any of its packets.
    pub(super) fn note(&mut self, header: &Header) -> Result<(), CreditError> {
        // It cannot have read what was never sent, nor unread anything.
        if self.sent.wrapping_sub(header.fwd_cnt) > self.sent.wrapping_sub(self.consumed) {
            return Err(CreditError);
        }
        self.consumed = header.fwd_cnt;
        self.buffer = header.buf_alloc;
        Ok(())
    }

    /// Bytes that may be sent to the guest now. A guest may shrink its buffer below what is under way.
    pub(super) fn sendable(&self) -> u32 {
        self.buffer.saturating_sub(self.sent.wrapping_sub(self.consumed))
    }

    /// Counts bytes sent to the guest.
    pub(super) fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::vsock::packet::{Op, Ports};

    fn header(buf_alloc: u32, fwd_cnt: u32) -> Header {
        let mut header = Header::new(Ports { host: 1, guest: 2 }, Op::CreditUpdate);
        (header.buf_alloc, header.fwd_cnt) = (buf_alloc, fwd_cnt);
        header
    }

    #[test]
    fn the_guest_is_told_when_half_of_its_credit_is_used_up() {
        let mut credit = Credit::new(BUFFER_BYTES);
        credit.receive(BUFFER_BYTES / 2).unwrap();
        credit.forward(1000);
        assert!(!credit.update_due());
        credit.receive(1).unwrap();
        assert!(credit.update_due());
        let mut update = header(0, 0);
        credit.stamp(&mut update);
        assert_eq!((update.buf_alloc, update.fwd_cnt), (BUFFER_BYTES, 1000));
        assert!(!credit.update_due());
    }

    #[test]
    fn a_guest_that_sends_more_than_it_may_is_caught() {
        let mut credit = Credit::new(BUFFER_BYTES);
        credit.receive(BUFFER_BYTES).unwrap();
        assert_eq!(credit.receive(1), Err(CreditError));
        assert_eq!(credit.receive(u32::MAX), Err(CreditError));
        credit.forward(5);
        credit.receive(5).unwrap();
        assert_eq!(credit.held(), BUFFER_BYTES);
    }

    #[test]
    fn a_guest_that_lies_about_what_it_read_is_caught() {
        let mut credit = Credit::new(BUFFER_BYTES);
        credit.note(&header(4096, 0)).unwrap();
        credit.send(100);
        assert_eq!(credit.note(&header(4096, 101)), Err(CreditError));
        credit.note(&header(4096, 60)).unwrap();
        assert_eq!(credit.note(&header(4096, 59)), Err(CreditError), "counts do not go back");
        assert_eq!(credit.note(&header(4096, u32::MAX)), Err(CreditError));
        assert_eq!(credit.sendable(), 4096 - 40);
        credit.note(&header(10, 60)).unwrap();
        assert_eq!(credit.sendable(), 0, "a shrunken buffer stops us, no more");
    }

    proptest! {
        /// Two honest sides never wait for ever and never overrun, also where counts wrap.
        #[test]
        fn honest_sides_agree(start: u32, steps in prop::collection::vec((0_u32..70_000, 0_u32..70_000), 1..200)) {
            let mut credit = Credit { received: start, forwarded: start, told: start, ..Credit::new(BUFFER_BYTES) };
            let (mut guest_sent, mut guest_knows) = (start, start);
            for (send, forward) in steps {
                let free = BUFFER_BYTES - guest_sent.wrapping_sub(guest_knows);
                let len = send.min(free);
                prop_assert_eq!(credit.receive(len), Ok(()));
                guest_sent = guest_sent.wrapping_add(len);
                credit.forward(usize::try_from(forward).unwrap());
                if credit.update_due() {
                    let mut update = header(0, 0);
                    credit.stamp(&mut update);
                    guest_knows = update.fwd_cnt;
                }
                // With all passed on, the guest always has at least half of the buffer.
                if credit.held() == 0 {
                    prop_assert!(guest_sent.wrapping_sub(guest_knows) <= BUFFER_BYTES / 2);
                }
            }
        }

        /// Whatever the guest says, what we send stays within its buffer.
        #[test]
        fn never_more_than_the_guest_has_room_for(start: u32,
            steps in prop::collection::vec((any::<u32>(), any::<u32>(), 0_u32..70_000), 1..100)) {
            let mut credit = Credit { sent: start, consumed: start, ..Credit::new(BUFFER_BYTES) };
            for (buf_alloc, fwd_cnt, want) in steps {
                if credit.note(&header(buf_alloc, fwd_cnt)).is_ok() {
                    prop_assert_eq!(credit.buffer, buf_alloc);
                }
                let len = want.min(credit.sendable());
                credit.send(len);
                prop_assert!(len == 0 || credit.sent.wrapping_sub(credit.consumed) <= credit.buffer);
            }
        }
    }
}
