//! What the guest sends to files.

use super::*;

#[test]
fn a_sink_takes_lines_and_changes_files_between_them() {
    let mut rig = Rig::ready();
    let (first, read_first) = rig.log("first");
    let (second, read_second) = rig.log("second");
    rig.handle.set_sink(SINK, first).unwrap();
    let ports = rig.dial_sink(900);
    rig.data(ports, b"one\ntw");
    rig.handle.set_sink(SINK, second).unwrap();
    assert_eq!(read_first(), "one\ntw");
    rig.data(ports, b"o, still two");
    rig.data(ports, b"\nthree\n");
    rig.data(ports, b"four\n");
    assert_eq!(read_first(), "one\ntwo, still two\n");
    assert_eq!(read_second(), "three\nfour\n");
    // Between lines the change is at once.
    let (third, read_third) = rig.log("third");
    rig.handle.set_sink(SINK, third).unwrap();
    rig.data(ports, b"five\n");
    assert_eq!(read_third(), "five\n");
    rig.running.stop();
}

#[test]
fn a_line_that_nobody_finishes_does_not_hold_up_the_change() {
    let mut rig = Rig::ready();
    let (first, read_first) = rig.log("first");
    let (second, read_second) = rig.log("second");
    rig.handle.set_sink(SINK, first).unwrap();
    let ports = rig.dial_sink(900);
    rig.data(ports, b"half");
    rig.handle.set_sink(SINK, second).unwrap();
    rig.shut_down(ports, SHUTDOWN_BOTH);
    rig.expect(RESET);
    let ports = rig.dial_sink(901);
    rig.data(ports, b"whole\n");
    assert_eq!((read_first(), read_second()), ("half".into(), "whole\n".into()));
    rig.running.stop();
}

#[test]
fn a_sink_gives_its_credit_back() {
    let mut rig = Rig::ready();
    let (file, read) = rig.log("log");
    rig.handle.set_sink(SINK, file).unwrap();
    let ports = rig.dial_sink(900);
    let line = [&[b'x'; 16_383][..], b"\n"].concat();
    let (mut sent, mut taken) = (0_u32, 0_u32);
    while sent < 1 << 20 {
        assert!(sent - taken <= 240 << 10, "the guest is stuck");
        rig.data(ports, &line);
        sent += 16 << 10;
        while let Some(packet) = rig.try_receive(Duration::ZERO) {
            assert_eq!(packet.op, CREDIT_UPDATE);
            taken = packet.fwd_cnt;
        }
    }
    assert_eq!(read().len(), 1 << 20);
    rig.running.stop();
}

#[test]
fn a_removed_sink_resets_its_connections() {
    let mut rig = Rig::ready();
    let (file, read) = rig.log("log");
    rig.handle.set_sink(SINK, file).unwrap();
    let ports = rig.dial_sink(900);
    rig.data(ports, b"line\n");
    rig.handle.remove_sink(SINK).unwrap();
    assert_eq!(rig.expect(RESET).ports, ports);
    assert_eq!(read(), "line\n");
    rig.op(Ports { host: SINK, guest: 901 }, Op::Request);
    rig.expect(RESET);
    assert!(rig.handle.remove_sink(SINK).unwrap_err().to_string().contains("no sink on port 2000"));
    rig.running.stop();
}

#[test]
fn a_full_disk_costs_lines_and_nothing_else() {
    let mut rig = Rig::ready();
    let full = File::options().append(true).open("/dev/full").unwrap();
    rig.handle.set_sink(SINK, full).unwrap();
    let ports = rig.dial_sink(900);
    rig.data(ports, b"lost\nlost too, and not yet en");
    let (file, read) = rig.log("log");
    rig.handle.set_sink(SINK, file).unwrap();
    rig.data(ports, b"ded\nkept\n");
    assert_eq!(read(), "kept\n");
    assert_eq!(rig.handle.counters()[5], ("sink_dropped_bytes", 33));
    rig.running.stop();
}

#[test]
fn sinks_are_set_while_there_is_no_driver_and_stay() {
    let (rig, backend) = StoppedRig::new();
    let idling = Idling::start(backend);
    let path = rig.dir.path().join("log");
    rig.handle.set_sink(SINK, File::options().append(true).create(true).open(&path).unwrap()).unwrap();
    let mut rig = rig.run(idling.stop());
    rig.provide_buffers(8);
    let ports = rig.dial_sink(900);
    rig.data(ports, b"half a li");
    // The driver starts anew; its connections are gone, the sink is not.
    let (backend, _) = rig.running.stop();
    let Rig { handle, ready, dir, .. } = rig;
    let mut rig = StoppedRig { handle, ready, dir }.run(backend);
    rig.provide_buffers(8);
    let ports = rig.dial_sink(900);
    rig.data(ports, b"line\n");
    assert_eq!(std::fs::read_to_string(path).unwrap(), "half a li\nline\n");
    rig.running.stop();
}

#[test]
fn bad_sinks_are_refused_with_a_reason() {
    let rig = Rig::new();
    let good = || rig.log("log").0;
    for port in [0, READY_PORT, FIRST_CLIENT_PORT, u32::MAX] {
        let refusal = rig.handle.set_sink(port, good()).unwrap_err().to_string();
        assert!(refusal.contains("cannot be a sink"), "{refusal}");
    }
    let reader = File::open("/dev/null").unwrap();
    assert!(rig.handle.set_sink(SINK, reader).unwrap_err().to_string().contains("for appending"));
    let writer = tempfile::tempfile().unwrap();
    assert!(rig.handle.set_sink(SINK, writer).unwrap_err().to_string().contains("for appending"));
    let (_reader, pipe) = io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
    assert!(rig.handle.set_sink(SINK, pipe).unwrap_err().to_string().contains("not a pipe"));
    rig.running.stop();
}
