//! Execs, attaches, terminals, and the connections themselves. See [`common`] for what this stands on.

mod common;

use agent_protocol::v1::error::Kind;
use agent_protocol::v1::{self, from_session, open, to_session};
use agent_protocol::{OLDEST_VERSION, VERSION};
use common::{Pod, container, eventually, sh};

fn terminal(process: v1::Process) -> v1::Process {
    v1::Process { terminal: true, ..process }
}

fn attach(id: &str) -> open::Kind {
    open::Kind::Attach(v1::Attach { container_id: id.into(), stdin: true })
}

fn stdin(text: &str) -> to_session::Message {
    to_session::Message::Stdin(text.into())
}

#[test]
fn an_exec_has_the_containers_surroundings_and_its_own_exit() {
    let mut pod = Pod::start();
    let mut web = container("a", "export INNER=1; exec sleep 1000");
    let process = web.process.as_mut().expect("process");
    process.user = Some(v1::User { name: "web".into(), ..v1::User::default() });
    process.env = vec!["GIVEN=yes".into()];
    pod.launch(web);
    let script = "id -u; echo $GIVEN; ps -o pid,args | grep '[s]leep' | awk '{print $1}'; grep ^0:: /proc/self/cgroup | cut -c1-9; echo oops >&2; exit 5";
    let (exit, out, err) = pod.exec("a", sh(script), false).expect("opened").finish();
    assert_eq!((exit.code, exit.signal), (5, 0));
    assert_eq!((out.as_str(), err.as_str()), ("33\nyes\n1\n0::/exec-\n", "oops\n"));
    let (exit, ..) = pod.exec("a", sh("kill -9 $$"), false).expect("opened").finish();
    assert_eq!((exit.code, exit.signal), (137, 9));
    assert!(pod.has_no_execs("a"));
}

#[test]
fn an_exec_that_cannot_be_is_refused_with_a_reason() {
    let mut pod = Pod::start();
    pod.launch(container("a", "exec sleep 1000"));
    let refused = |id: &str, process| pod.exec(id, process, false).map(drop).expect_err("refused");
    let missing = v1::Process { args: vec!["nope".into()], ..v1::Process::default() };
    let expected = (Kind::CannotExec, r#"exec: "nope": executable file not found in $PATH"#.to_owned());
    assert_eq!(refused("a", missing), expected);
    let nowhere = refused("a", v1::Process { cwd: "/nowhere".into(), ..sh("true") });
    assert!(nowhere.0 == Kind::CannotExec && nowhere.1.contains("/nowhere"), "{nowhere:?}");
    assert_eq!(refused("b", sh("true")).0, Kind::NotFound);
    pod.exec_sh("a", "true");
    assert!(pod.has_no_execs("a"));
}

#[test]
fn standard_input_goes_in_and_ends() {
    let mut pod = Pod::start();
    pod.launch(container("a", "exec sleep 1000"));
    let session = pod.exec("a", sh("wc -c"), true).expect("opened");
    let megabyte = "x".repeat(1 << 16);
    for _ in 0..32 {
        session.send(stdin(&megabyte));
    }
    session.send(to_session::Message::CloseStdin(v1::Done {}));
    let (exit, out, _) = session.finish();
    assert_eq!((exit.code, out.trim()), (0, "2097152"));
    let (exit, out, _) = pod.exec("a", sh("cat; echo end"), false).expect("opened").finish();
    assert_eq!((exit.code, out.as_str()), (0, "end\n"), "without stdin there is nothing to read");
}

#[test]
fn a_session_that_closes_early_takes_its_processes_along() {
    let mut pod = Pod::start();
    pod.launch(container("a", "exec sleep 1000"));
    let session = pod.exec("a", sh("setsid sleep 4331 & echo up; sleep 4331"), false).expect("opened");
    session.wait_for("up");
    assert_eq!(pod.exec_sh("a", "ps -o args | grep -c '^[s]leep 4331'").1, "2\n");
    drop(session);
    eventually("the end of both", || {
        (pod.exec_sh("a", "ps -o args | grep -c '^[s]leep 4331'").1 == "0\n").then_some(())
    });
}

#[test]
fn what_an_exec_leaves_in_the_background_neither_holds_it_up_nor_dies() {
    let mut pod = Pod::start();
    pod.launch(container("a", "exec sleep 1000"));
    for process in [sh("sleep 4332 & echo done"), terminal(sh("trap '' HUP; sleep 4332 & echo done"))] {
        let (exit, out, _) = pod.exec("a", process, false).expect("opened").finish();
        assert!(exit.code == 0 && out.contains("done"), "{exit:?} {out:?}");
        let kill =
            "kill -9 $(ps -o pid,args | grep '[s]leep 4332' | awk '{print $1}') && echo killed || ps -o pid,args";
        assert_eq!(pod.exec_sh("a", kill).1, "killed\n", "it lives");
    }
    // With its last process goes the cgroup.
    eventually("the end of its cgroups", || {
        pod.exec_sh("a", "true");
        pod.has_no_execs("a").then_some(())
    });
}

#[test]
fn much_output_waits_for_its_reader() {
    let mut pod = Pod::start();
    pod.launch(container("a", "exec sleep 1000"));
    let slow = pod.exec("a", sh("seq 1 500000"), false).expect("opened");
    // Meanwhile nobody else has to wait.
    assert_eq!(pod.exec_sh("a", "echo quick"), (0, "quick\n".into()));
    let (exit, out, _) = slow.finish();
    assert_eq!((exit.code, out.lines().count(), out.lines().last()), (0, 500_000, Some("500000")));
}

#[test]
fn a_terminal_has_a_size_and_sends_what_is_typed() {
    let mut pod = Pod::start();
    pod.launch(container("a", "exec sleep 1000"));
    let session = pod
        .exec("a", terminal(sh("tty; echo $TERM; read line; stty size; echo got $line; exec cat")), true)
        .expect("opened");
    session.send(to_session::Message::Resize(v1::WindowSize { columns: 132, rows: 43 }));
    let start = session.wait_for("xterm");
    assert!(start.starts_with("/dev/pts/"), "{start:?}");
    session.send(stdin("hello\n"));
    let text = session.wait_for("got hello");
    assert!(text.contains("43 132"), "{text:?}");
    // Ctrl-C ends what is in the foreground.
    session.send(stdin("\x03"));
    assert_eq!(session.finish().0.signal, libc::SIGINT);
    let session =
        pod.exec("a", terminal(sh("trap 'exit 9' USR1; echo up; while :; do sleep 0.1; done")), true).expect("opened");
    session.wait_for("up");
    session.send(to_session::Message::Signal(libc::SIGUSR1));
    assert_eq!(session.finish().0.code, 9);
}

#[test]
fn the_last_words_on_a_terminal_are_not_lost() {
    let mut pod = Pod::start();
    pod.launch(container("a", "exec sleep 1000"));
    for number in 0..50 {
        let word = format!("word-{number}");
        let (exit, out, _) = pod.exec("a", terminal(sh(&format!("echo {word}"))), false).expect("opened").finish();
        assert_eq!((exit.code, out.trim()), (0, word.as_str()));
    }
}

#[test]
fn a_container_with_a_terminal_is_attached_to_before_it_starts() {
    let mut pod = Pod::start();
    let mut shell = container("a", "tty; ls -l /dev/console | cut -c1; read line; echo got $line; exit 4");
    shell.process.as_mut().expect("process").terminal = true;
    shell.stdio = Some(v1::Stdio { stdin: true, ..v1::Stdio::default() });
    let log = pod.create(shell).expect("created");
    let (first, second) = (pod.open(attach("a")).expect("opened"), pod.open(attach("a")).expect("opened"));
    pod.start_container("a");
    first.wait_for("/dev/pts/0");
    first.send(stdin("over\n"));
    let (exit, out, _) = second.finish();
    assert!(exit.code == 4 && out.contains("got over"), "{exit:?} {out:?}");
    assert_eq!(first.finish().0.code, 4);
    assert_eq!(pod.exit_of("a").code, 4);
    let log = log.texts().join("\n");
    assert!(log.contains("/dev/pts/0") && log.contains("got over"), "{log:?}");
    assert_eq!(pod.open(attach("a")).map(drop).expect_err("refused").0, Kind::WrongState);
}

#[test]
fn input_that_may_be_given_once_ends_with_the_first_that_gives_it() {
    let mut pod = Pod::start();
    for (id, stdin_once) in [("once", true), ("often", false)] {
        let mut reader = container(id, "cat; echo end");
        reader.stdio = Some(v1::Stdio { stdin: true, stdin_once, ..v1::Stdio::default() });
        let log = pod.launch(reader);
        let first = pod.open(attach(id)).expect("opened");
        first.send(stdin("one\n"));
        first.wait_for("one");
        drop(first);
        if stdin_once {
            assert_eq!(pod.exit_of(id).code, 0);
            assert_eq!(log.texts(), ["one", "end"]);
        } else {
            let second = pod.open(attach(id)).expect("opened");
            second.send(stdin("two\n"));
            second.wait_for("two");
            assert_eq!(log.texts(), ["one", "two"]);
        }
    }
}

#[test]
fn an_attached_client_that_leaves_changes_nothing() {
    let mut pod = Pod::start();
    let log = pod.launch(container("a", "while :; do echo tick; sleep 0.01; done"));
    let session = pod.open(attach("a")).expect("opened");
    assert!(matches!(session.next(), Some(from_session::Message::Stdout(_))));
    drop(session);
    let seen = log.lines().len();
    eventually("more output", || (log.lines().len() > seen + 20).then_some(()));
    assert_eq!(pod.state("a").expect("there").phase(), v1::container_state::Phase::Running);
}

#[test]
fn versions_are_agreed_or_refused_with_both_named() {
    let pod = Pod::boot();
    let hello = |port: u32, version: u32| {
        let stream = pod.dial(port);
        agent_protocol::write(&stream, &v1::Hello { version, kernel: String::new() }).expect("hello");
        let theirs = agent_protocol::read::<v1::Hello>(&stream).expect("hello").expect("hello");
        assert_eq!(theirs.version, VERSION, "the refused one learns it too");
        stream
    };
    for port in [agent_protocol::CONTROL_PORT, agent_protocol::SESSION_PORT] {
        let refused = hello(port, OLDEST_VERSION - 1);
        assert!(matches!(agent_protocol::read::<v1::FromAgent>(&refused), Ok(None) | Err(_)), "closed");
    }
    let previous = hello(agent_protocol::CONTROL_PORT, OLDEST_VERSION);
    let ping = v1::Request { id: 9, call: Some(v1::request::Call::Ping(v1::Ping {})) };
    agent_protocol::write(&previous, &ping).expect("request");
    let reply = agent_protocol::read::<v1::FromAgent>(&previous).expect("reply").expect("reply");
    assert!(matches!(reply.message, Some(v1::from_agent::Message::Reply(v1::Reply { id: 9, .. }))));
}

#[test]
fn a_pod_is_configured_once_and_before_its_containers() {
    let mut pod = Pod::boot();
    assert_eq!(pod.create(container("a", "true")).map(drop).expect_err("too early").0, Kind::WrongState);
    let bad =
        v1::Configure { sysctls: [("kernel.no_such".to_owned(), "1".to_owned())].into(), ..common::configuration() };
    let refused = pod.refused(v1::request::Call::Configure(bad));
    assert!(refused.0 == Kind::Invalid && refused.1.contains("kernel.no_such"), "{refused:?}");
    let sysctls = [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into();
    let good = v1::Configure { sysctls, shm_bytes: 1 << 20, ..common::configuration() };
    pod.done(v1::request::Call::Configure(good.clone()));
    assert_eq!(pod.refused(v1::request::Call::Configure(good)).0, Kind::WrongState);
    let script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start; df -k /dev/shm | awk 'END {print $2}'; ifconfig lo | grep -c UP";
    let (exit, lines) = pod.run(container("a", script));
    assert_eq!((exit.code, lines), (0, vec!["0".to_owned(), "1024".into(), "1".into()]));
}

fn forward(port: u16) -> open::Kind {
    open::Kind::PortForward(v1::PortForward { port: port.into() })
}

#[test]
fn a_forwarded_port_carries_both_ways_and_ends_half_by_half() {
    let mut pod = Pod::start();
    // It answers once it has heard all, so its answer needs the end of what it is sent.
    pod.launch(container("a", "while :; do nc -l -p 4000 -e wc -c; done"));
    eventually("a server", || {
        let probe = pod.exec_sh("a", "netstat -lnt | grep -q :4000");
        (probe.0 == 0).then_some(())
    });
    let session = pod.open(forward(4000)).expect("opened");
    let piece = "x".repeat(1 << 16);
    for _ in 0..32 {
        session.send(stdin(&piece));
    }
    session.send(to_session::Message::CloseStdin(v1::Done {}));
    let (exit, out, err) = session.finish();
    assert_eq!((exit.code, out.trim(), err.as_str()), (0, "2097152", ""));
}

#[test]
fn a_port_on_which_nobody_listens_is_refused() {
    let pod = Pod::start();
    let (kind, text) = pod.open(forward(4001)).map(drop).expect_err("refused");
    assert!(kind == Kind::WrongState && text.contains("refused"), "{text}");
    let (kind, _) = pod.open(open::Kind::PortForward(v1::PortForward { port: 70000 })).map(drop).expect_err("refused");
    assert_eq!(kind, Kind::Invalid);
}
