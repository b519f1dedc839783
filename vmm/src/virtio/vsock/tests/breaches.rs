//! A guest, or a client, that breaks the rules, and the limits of everything.

use proptest::prelude::*;

use super::*;

#[test]
fn unknown_connections_are_reset() {
    let mut rig = Rig::ready();
    for port in [0, 1, READY_PORT - 1, READY_PORT + 1, SINK, FIRST_CLIENT_PORT, u32::MAX] {
        let ports = Ports { host: port, guest: 800 };
        rig.op(ports, Op::Request);
        let reset = rig.expect(RESET);
        assert_eq!(reset.ports, ports);
    }
    for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        rig.op(Ports { host: 3000, guest: 800 }, op);
        rig.expect(RESET);
    }
    // A reset is not answered by one, or two sides would never stop.
    rig.op(Ports { host: 3000, guest: 800 }, Op::Reset);
    rig.expect_silence();
    rig.running.stop();
}

#[test]
fn packets_of_other_kinds_or_for_others_are_not_taken() {
    let mut rig = Rig::ready();
    let mut bytes = wire(&Header::new(Ports { host: 3000, guest: 800 }, Op::Request));
    bytes[28] = 2; // SEQPACKET was not offered
    rig.send_raw(&bytes, &[]);
    rig.expect(RESET);
    bytes[0] = 99; // another guest's address
    rig.send_raw(&bytes, &[]);
    rig.expect_silence();
    rig.running.stop();
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let mut rig = Rig::ready();
    let (mut client, ports) = rig.connect();
    let (mut other, other_ports) = rig.connect();
    let sent = fill(&mut rig, ports, &client);
    rig.data(ports, b"x");
    let reset = rig.expect(RESET);
    assert_eq!(reset.ports, ports);
    let received = rest(&mut client);
    assert_eq!(sent[..received.len()], received);
    // Nobody else suffers.
    rig.data(other_ports, b"fine");
    let mut bytes = [0; 4];
    other.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"fine");
    rig.running.stop();
}

#[test]
fn a_guest_that_lies_about_its_credit_is_reset() {
    for fwd_cnt in [1, 1 << 31, u32::MAX] {
        let mut rig = Rig::ready();
        let (mut client, ports) = rig.connect();
        rig.fwd_cnt = fwd_cnt;
        rig.op(ports, Op::CreditUpdate);
        rig.expect(RESET);
        assert_eq!(rest(&mut client), b"");
        rig.running.stop();
    }
}

#[test]
fn a_guest_that_breaks_the_order_is_reset() {
    let breaches: [fn(&mut Rig, Ports); 4] = [
        |rig, ports| rig.op(ports, Op::Request),
        |rig, ports| rig.op(ports, Op::Response),
        |rig, ports| {
            rig.shut_down(ports, SHUTDOWN_SEND);
            rig.data(ports, b"more");
        },
        |rig, ports| {
            // A payload that is not there.
            let mut header = Header::new(ports, Op::Data);
            (header.len, header.buf_alloc) = (5, ROOM);
            rig.send_as_is(&header, b"four");
        },
    ];
    for breach in breaches {
        let mut rig = Rig::ready();
        let (mut client, ports) = rig.connect();
        breach(&mut rig, ports);
        assert_eq!(rig.expect(RESET).ports, ports);
        assert_eq!(rest(&mut client), b"");
        rig.running.stop();
    }
    let mut rig = Rig::ready();
    let mut client = rig.client();
    writeln!(client, "CONNECT 5").unwrap();
    let request = rig.expect(REQUEST);
    rig.data(request.ports, b"too early");
    rig.expect(RESET);
    assert_eq!(rest(&mut client), b"");
    rig.running.stop();
}

#[test]
fn a_flood_without_room_for_answers_waits_in_its_queue() {
    let (rig, backend) = StoppedRig::new();
    let mut rig = rig.run(backend);
    let header = wire(&Header::new(Ports { host: 5000, guest: 1 }, Op::Request));
    let mut taken = 0;
    loop {
        while rig.tx.room() > 0 {
            rig.post_raw(&header, &[]);
        }
        match rig.tx.try_wait_used(QUIET) {
            Some(_) => taken += 1,
            None => break,
        }
    }
    assert_eq!(taken, 256);
    // With room for answers the device goes on by itself.
    rig.provide_buffers(64);
    for _ in 0..300 {
        rig.expect(RESET);
    }
    rig.running.stop();
}

#[test]
fn connections_are_limited() {
    let mut rig = Rig::ready();
    let (file, _) = rig.log("log");
    rig.handle.set_sink(SINK, file).unwrap();
    for guest in 0..u32::try_from(CONNECTIONS).unwrap() {
        rig.dial_sink(guest);
    }
    rig.op(Ports { host: SINK, guest: 5000 }, Op::Request);
    rig.expect(RESET);
    // A client waits its turn at the door.
    let mut client = rig.client();
    writeln!(client, "CONNECT 5").unwrap();
    rig.expect_silence();
    rig.shut_down(Ports { host: SINK, guest: 7 }, SHUTDOWN_BOTH);
    rig.expect(RESET);
    let request = rig.expect(REQUEST);
    assert_eq!(usize::try_from(request.buf_alloc).unwrap(), PROMISED / 4, "where there are many each gets less");
    assert_eq!(rig.handle.counters()[0], ("connections", u64::try_from(CONNECTIONS).unwrap() + 1));
    rig.running.stop();
}

#[test]
fn patience_has_an_end() {
    let (rig, mut backend) = StoppedRig::new();
    backend.patience = Duration::from_millis(100);
    let mut rig = rig.run(backend);
    rig.provide_buffers(64);
    rig.dial_ready();
    // A client that never names its port.
    let mut mute = rig.client();
    assert_eq!(rest(&mut mute), b"");
    // A guest that never answers a request.
    let mut client = rig.client();
    writeln!(client, "CONNECT 5").unwrap();
    let request = rig.expect(REQUEST);
    assert_eq!(rig.expect(RESET).ports, request.ports);
    assert_eq!(rest(&mut client), b"");
    // A guest that never confirms the end.
    let (client, ports) = rig.connect();
    drop(client);
    rig.expect(SHUTDOWN);
    assert_eq!(rig.expect(RESET).ports, ports);
    // A connection in use has no deadline.
    let (mut client, ports) = rig.connect();
    thread::sleep(Duration::from_millis(300));
    rig.data(ports, b"on time");
    assert_eq!(client.read(&mut [0; 100]).unwrap(), 7);
    rig.running.stop();
}

#[test]
fn a_ring_that_lies_ends_the_device() {
    let mut rig = Rig::new();
    rig.tx.corrupt_index();
    rig.tx.kick();
    assert!(matches!(rig.running.fail(), DeviceError::Ring(_)));

    let mut rig = Rig::new();
    rig.post_raw(&[0; 43], &[]);
    assert!(matches!(rig.running.fail(), DeviceError::Driver(_)), "no room for a header");

    let (rig, backend) = StoppedRig::new();
    let mut rig = rig.run(backend);
    rig.rx.post(&[Part::writable(RX, 44)]);
    rig.post_raw(&wire(&Header::new(Ports { host: 1, guest: 1 }, Op::Request)), &[]);
    assert!(matches!(rig.running.fail(), DeviceError::Driver(_)), "no room for data");
}

#[derive(Clone, Debug)]
struct Noise {
    host: u8,
    guest: u8,
    op: u16,
    flags: u32,
    len: Option<u32>,
    buf_alloc: u32,
    fwd_cnt: u32,
    data: Vec<u8>,
}

fn noise() -> impl Strategy<Value = Noise> {
    let data = prop::collection::vec(any::<u8>(), 0..200);
    let credit = prop_oneof![Just(0_u32), 0_u32..300, any::<u32>()];
    (0_u8..5, 0_u8..3, 0_u16..9, 0_u32..5, prop::option::weighted(0.1, any::<u32>()), (any::<u32>(), credit), data)
        .prop_map(|(host, guest, op, flags, len, (buf_alloc, fwd_cnt), data)| Noise {
            host,
            guest,
            op,
            flags,
            len,
            buf_alloc,
            fwd_cnt,
            data,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Any packets at all, about any connection, are survived; the device still serves an honest one afterwards.
    #[test]
    fn any_packets_are_survived(packets in prop::collection::vec(noise(), 1..60)) {
        let mut rig = Rig::ready();
        let (file, _) = rig.log("log");
        rig.handle.set_sink(SINK, file).unwrap();
        let (client, ports) = rig.connect();
        client.set_nonblocking(true).unwrap();
        let _count = (&client).write(&[1; 3000]).unwrap();
        for noise in packets {
            let host = [SINK, READY_PORT, ports.host, 77, ports.host + 1][usize::from(noise.host)];
            let guest = [ports.guest, 900, 901][usize::from(noise.guest)];
            let mut bytes = wire(&Header {
                ports: Ports { host, guest },
                op: Some(Op::Data),
                len: noise.len.unwrap_or(u32::try_from(noise.data.len()).unwrap()),
                flags: noise.flags,
                buf_alloc: noise.buf_alloc,
                fwd_cnt: noise.fwd_cnt,
            });
            bytes[30..32].copy_from_slice(&noise.op.to_le_bytes());
            rig.send_raw(&bytes, &noise.data);
            while rig.try_receive(Duration::ZERO).is_some() {}
        }
        while rig.try_receive(QUIET).is_some() {}
        rig.buf_alloc = ROOM;
        let (mut client, ports) = rig.connect();
        rig.data(ports, b"fine");
        let mut bytes = [0; 4];
        client.read_exact(&mut bytes).unwrap();
        prop_assert_eq!(&bytes, b"fine");
        rig.running.stop();
    }
}
