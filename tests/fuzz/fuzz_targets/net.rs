//! Chains of any shape in the queues of an interface, one of which gives commands, and packets from the tap in between.
#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use pericarp_vmm::virtio::net;
use pericarp_vmm::virtio::testing::{Guest, Part, SEAM, run_once};
use vmm_control::Limits;

#[derive(Arbitrary, Debug)]
struct Input {
    merge: bool,
    memory: Vec<u8>,
    packets: Vec<u16>,
    receive: Vec<Vec<(u16, u16, bool)>>,
    transmit: Vec<Vec<(u16, u16, bool)>>,
    /// A second pair of queues has the same chains, and this is asked of the control queue.
    commands: Option<Vec<[u8; 4]>>,
}

const VIRTIO_NET_F_MRG_RXBUF: u64 = 1 << 15;
const VIRTIO_NET_F_CTRL_VQ: u64 = 1 << 17;
const VIRTIO_NET_F_MQ: u64 = 1 << 22;
/// Where commands are, and where each answer goes.
const COMMANDS: u64 = 0x20_0000;
const ANSWER: u64 = 0x21_0000;
const ZEROS: [u8; 65_535] = [0; 65_535];

fn part((at, len, writable): &(u16, u16, bool)) -> Part {
    Part { address: SEAM - 0x8000 + u64::from(*at), len: u32::from(*len), writable: *writable }
}

fuzz_target!(|input: Input| {
    let guest = Guest::new();
    let pairs = if input.commands.is_some() { 2 } else { 1 };
    let sockets = || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_NONBLOCK).unwrap();
    let (taps, networks): (Vec<File>, Vec<_>) =
        (0..pairs).map(|_| sockets()).map(|(tap, far)| (tap.into(), far)).unzip();
    let (_, mut interface, _) = net::on_sockets(taps, Limits::default());
    guest.write(SEAM - 0x8000, &input.memory[..input.memory.len().min(0x1_0000)]);
    for len in input.packets.iter().take(8) {
        for network in &networks {
            let _sent = send(network.as_raw_fd(), &ZEROS[..usize::from(*len)], MsgFlags::MSG_NOSIGNAL);
        }
    }
    let mut queues = Vec::new();
    for chains in [&input.receive, &input.transmit].repeat(pairs) {
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
    let mut features = if input.merge { VIRTIO_NET_F_MRG_RXBUF } else { 0 };
    if let Some(commands) = &input.commands {
        features |= VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_MQ;
        let (mut driver, queue) = guest.queue(16);
        for (at, command) in (COMMANDS..).step_by(4).zip(commands.iter().take(8)) {
            guest.write(at, command);
            driver.post(&[Part::readable(at, 4), Part::writable(ANSWER, 1)]);
        }
        queues.push(queue);
    }
    let _outcome = run_once(&mut interface, &guest, features, queues);
});
