//! Chains of any shape in both queues of an interface, and packets from the tap in between.
#![no_main]

use std::os::fd::AsRawFd;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use pericarp_vmm::virtio::net;
use pericarp_vmm::virtio::testing::{Guest, Part, SEAM, run_once};

#[derive(Arbitrary, Debug)]
struct Input {
    merge: bool,
    memory: Vec<u8>,
    packets: Vec<u16>,
    receive: Vec<Vec<(u16, u16, bool)>>,
    transmit: Vec<Vec<(u16, u16, bool)>>,
}

const VIRTIO_NET_F_MRG_RXBUF: u64 = 1 << 15;
const ZEROS: [u8; 65_535] = [0; 65_535];

fn part((at, len, writable): &(u16, u16, bool)) -> Part {
    Part { address: SEAM - 0x8000 + u64::from(*at), len: u32::from(*len), writable: *writable }
}

fuzz_target!(|input: Input| {
    let guest = Guest::new();
    let (tap, network) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_NONBLOCK).unwrap();
    let (_, mut interface, _) = net::on_socket(tap.into());
    guest.write(SEAM - 0x8000, &input.memory[..input.memory.len().min(0x1_0000)]);
    for len in input.packets.iter().take(8) {
        let _sent = send(network.as_raw_fd(), &ZEROS[..usize::from(*len)], MsgFlags::MSG_NOSIGNAL);
    }
    let mut queues = Vec::new();
    for chains in [&input.receive, &input.transmit] {
        let (mut driver, queue) = guest.queue(64);
        for chain in chains {
            let chain: Vec<_> = chain.iter().take(8).map(part).collect();
            if chain.is_empty() || driver.room() < chain.len() {
                break;
            }
            driver.post(&chain);
        }
        queues.push(queue);
    }
    let features = if input.merge { VIRTIO_NET_F_MRG_RXBUF } else { 0 };
    let _outcome = run_once(&mut interface, &guest, features, queues);
});
