//! Chains of any shape as FUSE requests, and any packets from the server that answers them.
#![no_main]

use std::os::fd::AsRawFd;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use pericarp_vmm::virtio::fs;
use pericarp_vmm::virtio::testing::{Guest, Part, SEAM, run_once};

/// Requests are built in this much memory, where two regions meet.
const AREA: u64 = 4096;

/// Longer than a fuzzer's packets.
const PACKET: usize = 4096;

#[derive(Arbitrary, Debug)]
struct Input {
    /// What the memory holds, from its middle on.
    memory: Vec<u8>,
    /// For each queue, whether it is a request with a right header, and its parts.
    chains: [Vec<(bool, Vec<(u16, u16, bool)>)>; 2],
    /// What the server says.
    answers: Vec<Vec<u8>>,
    /// How many of its answers get the number that a request had.
    right: u8,
}

fuzz_target!(|input: Input| {
    let guest = Guest::new();
    let kind = SockType::SeqPacket;
    let (ours, server) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_NONBLOCK).unwrap();
    let (info, mut device, _) = fs::device("fs0".into(), "shared", ours).unwrap();
    guest.write(SEAM - AREA / 2, &input.memory[..input.memory.len().min(4096)]);
    let (mut first, mut second) = (guest.queue(64), guest.queue(64));
    for (number, (driver, chains)) in [&mut first.0, &mut second.0].into_iter().zip(&input.chains).enumerate() {
        for (n, (headed, parts)) in chains.iter().enumerate() {
            let mut chain = Vec::new();
            if *headed {
                let address = 0x10_0000 + 0x1_0000 * number as u64 + 64 * n as u64;
                let readable = parts.iter().take(8).filter(|part| !part.2).map(|part| u32::from(part.1)).sum::<u32>();
                guest.write(address, &(40 + readable).to_le_bytes());
                chain.push(Part::readable(address, 40));
            }
            chain.extend(parts.iter().take(8).map(|(at, len, writable)| Part {
                address: SEAM - AREA / 2 + u64::from(*at),
                len: u32::from(*len),
                writable: *writable,
            }));
            if chain.is_empty() || driver.room() < chain.len() {
                break;
            }
            driver.post(&chain);
        }
    }
    for (n, answer) in input.answers.iter().take(8).enumerate() {
        let mut packet = answer[..answer.len().min(PACKET)].to_vec();
        if n < usize::from(input.right) && packet.len() >= 16 {
            let length = (packet.len() as u32).to_le_bytes();
            packet[..4].copy_from_slice(&length);
            packet[8..16].copy_from_slice(&(n as u64).to_le_bytes());
        }
        let _full = send(server.as_raw_fd(), &packet, MsgFlags::empty());
    }
    let _outcome = run_once(&mut device, &guest, info.features, vec![first.1, second.1]);
    while recv(server.as_raw_fd(), &mut [0; PACKET], MsgFlags::MSG_DONTWAIT).is_ok_and(|length| length > 0) {}
});
