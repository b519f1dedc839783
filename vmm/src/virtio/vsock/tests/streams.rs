//! Connections between clients and a guest that keeps the rules.

use super::*;

#[test]
fn clients_wait_for_the_agent() {
    let mut rig = Rig::new();
    let mut early = rig.client();
    writeln!(early, "CONNECT 5").unwrap();
    rig.expect_silence();
    rig.dial_ready();
    let request = rig.expect(REQUEST);
    assert_eq!(request.ports.guest, 5);
    assert!(request.ports.host >= FIRST_CLIENT_PORT);
    assert_eq!((request.buf_alloc, request.fwd_cnt), (u32::try_from(PROMISED).unwrap(), 0));
    rig.op(request.ports, Op::Response);
    assert_eq!(line(&mut early), format!("OK {}\n", request.ports.host));
    // Dialling again is answered the same way and reported no more.
    rig.op(Ports { host: READY_PORT, guest: 701 }, Op::Request);
    rig.expect(RESET);
    assert!(rig.ready.try_recv().is_err());
    rig.running.stop();
}

#[test]
fn a_refused_connection_is_closed_without_a_word() {
    let mut rig = Rig::ready();
    let mut client = rig.client();
    writeln!(client, "CONNECT 5").unwrap();
    let request = rig.expect(REQUEST);
    rig.op(request.ports, Op::Reset);
    assert_eq!(rest(&mut client), b"");
    let mut client = rig.client();
    writeln!(client, "GET / HTTP/1.1").unwrap();
    assert_eq!(rest(&mut client), b"");
    rig.expect_silence();
    rig.running.stop();
}

#[test]
fn bytes_flow_both_ways_bit_for_bit() {
    let mut rig = Rig::ready();
    let (client, ports) = rig.connect();
    let bytes = pattern(1 << 20);
    let (mut to_guest, mut to_client) = (client.try_clone().unwrap(), client);
    let sent = bytes.clone();
    let writer = thread::spawn(move || to_guest.write_all(&sent).unwrap());
    let mut received = Vec::new();
    while received.len() < bytes.len() {
        let packet = rig.receive();
        assert_eq!((packet.op, packet.ports), (DATA, ports));
        received.extend(packet.data);
        rig.fwd_cnt = u32::try_from(received.len()).unwrap();
        if received.len() % (64 << 10) < 4096 {
            rig.op(ports, Op::CreditUpdate);
        }
    }
    writer.join().unwrap();
    assert_eq!(received, bytes);

    let expected = bytes.len();
    let reader = thread::spawn(move || {
        let mut bytes = vec![0; expected];
        to_client.read_exact(&mut bytes).unwrap();
        (bytes, to_client)
    });
    let (mut sent, mut taken) = (0_usize, 0_usize);
    while sent < bytes.len() {
        let free = PROMISED - (sent - taken);
        let len = free.min(bytes.len() - sent).min(60_000);
        if len > 0 {
            rig.data(ports, &bytes[sent..sent + len]);
            sent += len;
        }
        while let Some(packet) = rig.try_receive(if free < 60_000 { HANG } else { Duration::ZERO }) {
            assert_eq!(packet.op, CREDIT_UPDATE);
            taken = usize::try_from(packet.fwd_cnt).unwrap();
            if sent - taken < 60_000 {
                break;
            }
        }
    }
    let (received, _client) = reader.join().unwrap();
    assert_eq!(received, bytes);
    rig.running.stop();
}

#[test]
fn a_client_may_speak_before_it_is_answered() {
    let mut rig = Rig::ready();
    let mut client = rig.client();
    write!(client, "CONNECT 9\nhello").unwrap();
    let request = rig.expect(REQUEST);
    rig.expect_silence();
    rig.op(request.ports, Op::Response);
    assert_eq!(rig.expect(DATA).data, b"hello");
    rig.running.stop();
}

#[test]
fn a_client_that_ends_its_stream_still_receives() {
    let mut rig = Rig::ready();
    let (mut client, ports) = rig.connect();
    client.write_all(b"last words").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(rig.expect(DATA).data, b"last words");
    assert_eq!(rig.expect(SHUTDOWN).flags, SHUTDOWN_SEND);
    rig.data(ports, b"an answer");
    rig.shut_down(ports, SHUTDOWN_BOTH);
    rig.expect(RESET);
    assert_eq!(rest(&mut client), b"an answer");
    rig.running.stop();
}

#[test]
fn a_guest_that_ends_its_stream_still_receives() {
    let mut rig = Rig::ready();
    let (mut client, ports) = rig.connect();
    rig.data(ports, b"last words");
    rig.shut_down(ports, SHUTDOWN_SEND);
    assert_eq!(rest(&mut client), b"last words");
    client.write_all(b"an answer").unwrap();
    assert_eq!(rig.expect(DATA).data, b"an answer");
    drop(client);
    let shutdown = rig.expect(SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_BOTH);
    rig.op(ports, Op::Reset);
    rig.expect_silence();
    rig.running.stop();
}

#[test]
fn a_guest_that_does_not_want_to_receive_is_spared() {
    let mut rig = Rig::ready();
    let (mut client, ports) = rig.connect();
    rig.shut_down(ports, SHUTDOWN_RECEIVE);
    assert_eq!(client.write_all(b"unwanted").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    rig.data(ports, b"still here");
    let mut bytes = [0; 10];
    client.read_exact(&mut bytes).unwrap();
    drop(client);
    assert_eq!(rig.expect(SHUTDOWN).flags, SHUTDOWN_BOTH);
    rig.running.stop();
}

#[test]
fn what_a_client_sent_before_it_left_arrives() {
    let mut rig = Rig::ready();
    rig.buf_alloc = 1000;
    let (mut client, ports) = rig.connect();
    let bytes = pattern(5000);
    client.write_all(&bytes).unwrap();
    drop(client);
    let (mut received, mut flags) = (Vec::new(), 0);
    while flags != SHUTDOWN_BOTH {
        let packet = rig.receive();
        match packet.op {
            DATA => {
                received.extend(packet.data);
                rig.fwd_cnt = u32::try_from(received.len()).unwrap();
            }
            CREDIT_REQUEST => rig.op(ports, Op::CreditUpdate),
            SHUTDOWN => flags |= packet.flags,
            other => panic!("op {other}"),
        }
    }
    assert_eq!(received, bytes);
    rig.running.stop();
}

#[test]
fn what_the_guest_sent_before_it_left_arrives() {
    let mut rig = Rig::ready();
    let (mut client, ports) = rig.connect();
    // More than the socket takes, so the rest is kept; then the guest is through, and says so twice.
    let bytes = fill(&mut rig, ports, &client);
    rig.shut_down(ports, SHUTDOWN_BOTH);
    rig.expect(RESET);
    rig.op(ports, Op::Reset);
    assert_eq!(rest(&mut client), bytes);
    rig.running.stop();
}

#[test]
fn a_slow_client_holds_the_guest_back_and_then_lets_it_go_on() {
    let mut rig = Rig::ready();
    let (mut client, ports) = rig.connect();
    let sent = fill(&mut rig, ports, &client);
    assert!(sent.len() < 1 << 20, "{} bytes are somewhere", sent.len());
    let mut bytes = vec![0; sent.len()];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, sent);
    let update = rig.expect(CREDIT_UPDATE);
    assert!(usize::try_from(update.fwd_cnt).unwrap() > sent.len() - PROMISED);
    rig.running.stop();
}

#[test]
fn a_guest_that_never_reads_gets_no_more_than_its_room() {
    let mut rig = Rig::ready();
    rig.buf_alloc = 10_000;
    let (client, ports) = rig.connect();
    client.set_nonblocking(true).unwrap();
    let mut written = 0;
    while let Ok(count) = (&client).write(&[7; 65536]) {
        written += count;
    }
    assert!(written > 10_000);
    let mut received = 0;
    while received < 10_000 {
        received += rig.expect(DATA).data.len();
    }
    assert_eq!(received, 10_000);
    rig.expect(CREDIT_REQUEST);
    rig.expect_silence();
    // Asked once per drought, and answered with no news it does not ask again.
    rig.op(ports, Op::CreditUpdate);
    rig.expect_silence();
    rig.fwd_cnt = 500;
    rig.op(ports, Op::CreditUpdate);
    assert_eq!(rig.expect(DATA).data.len(), 500);
    rig.expect(CREDIT_REQUEST);
    rig.running.stop();
}

#[test]
fn a_driver_that_leaves_takes_its_connections_along() {
    let mut rig = Rig::ready();
    let (mut client, _) = rig.connect();
    let (backend, _) = rig.running.stop();
    assert_eq!(rest(&mut client), b"");
    let Rig { handle, ready, dir, .. } = rig;
    let mut rig = StoppedRig { handle, ready, dir }.run(backend);
    rig.provide_buffers(8);
    rig.dial_ready();
    let (_client, _) = rig.connect();
    rig.running.stop();
}
