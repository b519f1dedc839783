//! Headers of vsock packets (virtio 1.2 §5.10.6). Pure: bytes in, bytes out.
//!
//! Written by hand because the payload of a packet may be spread over any number of descriptors, which the packet
//! type of the virtio-vsock crate does not take.

use vmm_control::GUEST_CID;

/// Context identifier of the host (virtio 1.2 §5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// The port that stands for any (`VMADDR_PORT_ANY`); nothing listens on it.
pub(super) const PORT_ANY: u32 = u32::MAX;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const STREAM: u16 = 1;

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 44;

/// In a SHUTDOWN: the sender will receive no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;

/// In a SHUTDOWN: the sender will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// Both of the above.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// A connection, by its two ports: each side has one address only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

impl Op {
    fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// A header from the guest, or one for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) ports: Ports,
    /// `None` for an operation that the specification does not know.
    pub(super) op: Option<Op>,
    /// Bytes of payload.
    pub(super) len: u32,
    pub(super) flags: u32,
    /// Size of the sender's receive buffer, in bytes.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender has taken out of that buffer so far, modulo 2³².
    pub(super) fwd_cnt: u32,
}

/// Why a packet from the guest is not looked at any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadHeader {
    /// Not from the guest or not for the host: dropped.
    Address,
    /// Not a stream packet: answered by a reset, unless it is one.
    Type(Ports, Option<Op>),
}

impl Header {
    /// A packet for the guest, without payload or credit.
    pub(super) fn new(ports: Ports, op: Op) -> Self {
        Self { ports, op: Some(op), len: 0, flags: 0, buf_alloc: 0, fwd_cnt: 0 }
    }

    /// Reads a header that the guest sent.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, BadHeader> {
        if (u64_at(bytes, 0), u64_at(bytes, 8)) != (GUEST_CID, HOST_CID) {
            return Err(BadHeader::Address);
        }
        let ports = Ports { guest: u32_at(bytes, 16), host: u32_at(bytes, 20) };
        let op = Op::from_wire(u16_at(bytes, 30));
        if u16_at(bytes, 28) != STREAM {
            return Err(BadHeader::Type(ports, op));
        }
        let (len, flags) = (u32_at(bytes, 24), u32_at(bytes, 32));
        Ok(Self { ports, op, len, flags, buf_alloc: u32_at(bytes, 36), fwd_cnt: u32_at(bytes, 40) })
    }

    /// The bytes for the guest: 32-bit words, the two addresses of two words each.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let [host, guest] = [HOST_CID, GUEST_CID].map(|cid| [cid, cid >> 32].map(low_half));
        let op = self.op.map_or(0, Op::to_wire);
        let Ports { host: from, guest: to } = self.ports;
        let kind = u32::from(STREAM) | u32::from(op) << 16;
        let words =
            [host[0], host[1], guest[0], guest[1], from, to, self.len, kind, self.flags, self.buf_alloc, self.fwd_cnt];
        let mut bytes = [0; HEADER_BYTES];
        for (slot, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
            *slot = word.to_le_bytes();
        }
        bytes
    }
}

/// The 32 bits of least value.
pub(super) fn low_half(value: u64) -> u32 {
    u32::try_from(value & u64::from(u32::MAX)).unwrap_or_default()
}

fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], offset: usize) -> [u8; N] {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u16_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u16 {
    u16::from_le_bytes(field(bytes, offset))
}

fn u32_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u32 {
    u32::from_le_bytes(field(bytes, offset))
}

fn u64_at(bytes: &[u8; HEADER_BYTES], offset: usize) -> u64 {
    u64::from_le_bytes(field(bytes, offset))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The header as the other side reads it: source and destination change places.
    fn mirrored(mut bytes: [u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
        bytes[0..16].rotate_left(8);
        bytes[16..24].rotate_left(4);
        bytes
    }

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let ports = Ports { host: 0x0102_0304, guest: 0x0506_0708 };
        let mut header = Header::new(ports, Op::Shutdown);
        (header.len, header.flags, header.buf_alloc, header.fwd_cnt) = (0x11, 0x22, 0x33, 0x44);
        let bytes = header.encode();
        assert_eq!(bytes[..20], [2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1]);
        assert_eq!(bytes[20..32], [8, 7, 6, 5, 0x11, 0, 0, 0, 1, 0, 4, 0]);
        assert_eq!(bytes[32..], [0x22, 0, 0, 0, 0x33, 0, 0, 0, 0x44, 0, 0, 0]);
    }

    #[test]
    fn strangers_and_datagrams_are_told_apart() {
        let header = Header::new(Ports { host: 5, guest: 6 }, Op::Request);
        let bytes = mirrored(header.encode());
        for (offset, value) in [(0, 4), (8, 1), (8, 3)] {
            let mut bad = bytes;
            bad[offset] = value;
            assert_eq!(Header::decode(&bad), Err(BadHeader::Address));
        }
        let mut datagram = bytes;
        datagram[28] = 3;
        assert_eq!(Header::decode(&datagram), Err(BadHeader::Type(header.ports, Some(Op::Request))));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(host: u32, guest: u32, op in 1_u16..8, rest: (u32, u32, u32, u32)) {
            let (len, flags, buf_alloc, fwd_cnt) = rest;
            let header = Header { ports: Ports { host, guest }, op: Op::from_wire(op), len, flags, buf_alloc, fwd_cnt };
            prop_assert_eq!(Header::decode(&mirrored(header.encode())), Ok(header));
        }

        #[test]
        fn any_bytes_are_survived(bytes: [u8; 32], tail: [u8; 12]) {
            let mut whole = [0; HEADER_BYTES];
            whole[..32].copy_from_slice(&bytes);
            whole[32..].copy_from_slice(&tail);
            let _outcome = Header::decode(&whole);
        }
    }
}
