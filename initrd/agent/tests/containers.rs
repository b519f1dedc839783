//! The agent's containers, as the host and as their own processes see them. See [`common`] for what this stands on.

mod common;

use std::time::Instant;

use agent_protocol::v1::error::Kind;
use agent_protocol::v1::{self, mount, request};
use common::{Pod, container, default_capabilities, image, sh};

/// Lines of a container that is expected to end well.
fn lines(pod: &mut Pod, container: v1::CreateContainer) -> Vec<String> {
    let (exit, lines) = pod.run(container);
    assert_eq!(exit.code, 0, "{lines:?}");
    lines
}

fn with_user(mut container: v1::CreateContainer, user: v1::User) -> v1::CreateContainer {
    container.process.as_mut().expect("process").user = Some(user);
    container
}

fn user(name: &str) -> v1::User {
    v1::User { name: name.into(), ..v1::User::default() }
}

#[test]
fn a_container_runs_and_its_log_and_exit_are_told() {
    let mut pod = Pod::start();
    let (exit, lines) = pod.run(container("a", "echo out; echo err >&2; hostname; exit 3"));
    assert_eq!((exit.code, exit.signal, exit.oom_killed), (3, 0, false));
    assert_eq!(lines.len(), 3, "{lines:?}");
    for text in ["out", "err", "pod-a"] {
        assert!(lines.iter().any(|line| line == text), "{text} in {lines:?}");
    }
    assert_eq!(pod.state("a"), None);
}

#[test]
fn phases_are_told_and_calls_that_do_not_fit_are_refused() {
    let mut pod = Pod::start();
    let start = || request::Call::StartContainer(v1::StartContainer { id: "a".into() });
    assert_eq!(pod.refused(start()).0, Kind::NotFound);
    let log = pod.create(container("a", "trap 'exit 7' TERM; echo up; while :; do sleep 0.1; done")).expect("created");
    let phase = |pod: &mut Pod| pod.state("a").expect("there").phase();
    assert_eq!(phase(&mut pod), v1::container_state::Phase::Created);
    assert_eq!(pod.create(container("a", "true")).map(drop).expect_err("twice").0, Kind::AlreadyExists);
    assert_eq!(pod.exec("a", sh("true"), false).map(drop).expect_err("not started").0, Kind::WrongState);
    pod.start_container("a");
    assert_eq!(phase(&mut pod), v1::container_state::Phase::Running);
    assert_eq!(pod.refused(start()).0, Kind::WrongState);
    log.wait_for("up");
    pod.signal("a", libc::SIGTERM, false);
    assert_eq!(pod.exit_of("a").code, 7);
    let state = pod.state("a").expect("there");
    assert_eq!(state.phase(), v1::container_state::Phase::Exited);
    assert!(state.started_at_ns > 0 && state.exited.expect("exited").finished_at_ns > state.started_at_ns);
    assert_eq!(pod.refused(start()).0, Kind::WrongState);
    let kill = v1::SignalContainer { id: "a".into(), signal: libc::SIGKILL, all: true };
    assert_eq!(pod.refused(request::Call::SignalContainer(kill)).0, Kind::WrongState);
    pod.remove("a");
    let removal = request::Call::RemoveContainer(v1::RemoveContainer { id: "a".into() });
    assert_eq!(pod.refused(removal).0, Kind::NotFound);
}

#[test]
fn killed_processes_and_created_containers_end_with_their_signal() {
    let mut pod = Pod::start();
    pod.launch(container("a", "sleep 1000"));
    pod.signal("a", libc::SIGKILL, false);
    let exit = pod.exit_of("a");
    assert_eq!((exit.code, exit.signal), (137, libc::SIGKILL));
    pod.create(container("b", "true")).expect("created");
    pod.signal("b", libc::SIGKILL, true);
    assert_eq!(pod.exit_of("b").signal, libc::SIGKILL);
    pod.launch(container("c", "sleep 1000 & sleep 1000"));
    pod.remove("c");
    assert_eq!(pod.state("c"), None);
    assert!(pod.has_no_cgroup("c"));
}

#[test]
fn a_command_that_cannot_run_is_told_with_its_name() {
    let mut pod = Pod::start();
    let mut create = |id: &str, process: v1::Process| {
        pod.create(v1::CreateContainer { process: Some(process), ..container(id, "") }).map(drop).expect_err("refused")
    };
    let args = |command: &str| v1::Process { args: vec![command.into()], ..v1::Process::default() };
    let missing = create("a", args("no-such-program"));
    assert_eq!(missing, (Kind::CannotExec, r#"exec: "no-such-program": executable file not found in $PATH"#.into()));
    let missing = create("b", args("/no/such"));
    assert_eq!(missing, (Kind::CannotExec, r#"exec: "/no/such": stat /no/such: no such file or directory"#.into()));
    assert_eq!(create("c", args("/etc/not-a-program")).0, Kind::CannotExec);
    let stranger = create("d", v1::Process { user: Some(user("stranger")), ..sh("true") });
    assert!(stranger.0 == Kind::CannotExec && stranger.1.contains("stranger"), "{stranger:?}");
    let inside_file = create("e", v1::Process { cwd: "/etc/passwd/x".into(), ..sh("true") });
    assert!(inside_file.1.contains("/etc/passwd/x"), "{inside_file:?}");
    assert_eq!(create("f", v1::Process::default()).0, Kind::Invalid);
    // None of them has left anything.
    assert!(pod.has_partitions(1, 1));
    for id in ["a", "b", "c", "d", "e", "f"] {
        assert!(pod.state(id).is_none() && pod.has_no_cgroup(id), "{id}");
    }
    pod.run(container("a", "true"));
}

#[test]
fn a_container_sees_every_cpu() {
    let mut pod = Pod::start();
    let cpus = pod.cpus();
    assert_eq!(lines(&mut pod, container("a", "nproc")), [cpus.to_string()]);
}

#[test]
fn a_container_sees_itself_alone() {
    let mut pod = Pod::start();
    let script = "echo pid $$; ls -d /proc/[0-9]* | wc -l; cat /proc/self/cgroup; ls /; cat /proc/self/mountinfo";
    let lines = lines(&mut pod, container("a", script));
    assert_eq!(lines.first().map(String::as_str), Some("pid 1"));
    assert!(lines.get(1).is_some_and(|count| count.parse::<u32>().is_ok_and(|count| count <= 3)), "{lines:?}");
    assert!(lines.iter().any(|line| line == "0::/"), "{lines:?}");
    let mounts: Vec<_> = lines.iter().filter(|line| line.contains(" - ")).collect();
    assert!(
        mounts.len() > 8 && mounts.iter().all(|mount| !mount.split(" - ").next().unwrap_or("").contains("/run")),
        "{mounts:?}"
    );
    assert!(mounts.iter().any(|mount| mount.contains(" / / ") && mount.contains("overlay")), "{mounts:?}");
    let old_root = ["init", "work", "s"];
    assert!(lines.iter().all(|line| !old_root.contains(&line.as_str())), "{lines:?}");
}

#[test]
fn standard_files_are_there_and_system_ones_cannot_be_written() {
    let mut pod = Pod::start();
    let script = "
        for node in null zero full random urandom tty; do [ -c /dev/$node ] || echo no $node; done
        for link in fd stdin stdout stderr ptmx; do [ -e /dev/$link ] || echo no $link; done
        echo x > /dev/null && echo x > /dev/shm/x && ls /dev/mqueue && [ -d /dev/pts ] || echo no dev
        (echo 1 > /proc/sys/kernel/panic) 2>/dev/null && echo wrote proc
        (mkdir /sys/fs/cgroup/x) 2>/dev/null && echo wrote cgroup
        (echo b > /proc/sysrq-trigger) 2>/dev/null && echo wrote sysrq
        [ -s /proc/kcore ] && echo kcore; [ -z \"$(ls -A /sys/firmware)\" ] || echo firmware
        echo done";
    assert_eq!(lines(&mut pod, container("a", script)), ["done"]);
}

#[test]
fn no_device_beyond_the_standard_ones_can_be_opened() {
    let mut pod = Pod::start();
    // 7 is the loop device's number here; the pod disk is one.
    let script = "mknod /tmp/disk b 7 0 && mknod /dev/mem2 c 1 1 && echo made
        (head -c1 /tmp/disk; head -c1 /dev/mem2) 2>&1 | sed 's/.*: //'; mknod /tmp/null c 1 3 && echo x > /tmp/null && echo null";
    let expected = ["made", "Operation not permitted", "Operation not permitted", "null"];
    assert_eq!(lines(&mut pod, container("a", script)), expected);
    let device = |access: &str| v1::Device {
        path: "/dev/mine".into(),
        guest_path: "/dev/fuse".into(),
        access: access.into(),
        disk: None,
    };
    let script = "[ -c /dev/mine ] && (exec 3<>/dev/mine) 2>/dev/null && echo opened || echo refused";
    let with = |id: &str, access: &str| v1::CreateContainer { devices: vec![device(access)], ..container(id, script) };
    assert_eq!(lines(&mut pod, with("b", "rwm")), ["opened"]);
    assert_eq!(lines(&mut pod, with("c", "r")), ["refused"]);
}

#[test]
fn a_process_runs_as_who_was_asked_for() {
    let mut pod = Pod::start();
    let script = "id -u; id -g; id -G; echo $HOME; echo hi > /dev/stdout";
    let root = lines(&mut pod, container("a", script));
    assert_eq!(root, ["0", "0", "0", "/root", "hi"]);
    let web = lines(&mut pod, with_user(container("b", script), user("web")));
    assert_eq!(web, ["33", "34", "34", "/var/www", "hi"]);
    let merged = v1::User { gid: Some(7), supplemental_groups: vec![9], merge_image_groups: true, ..user("web") };
    let merged = lines(&mut pod, with_user(container("c", script), merged));
    assert_eq!(merged[..3], ["33", "7", "7 9 60"]);
    assert_eq!(lines(&mut pod, with_user(container("d", script), user("4242:34")))[..4], ["4242", "34", "34", "/"]);
}

#[test]
fn privileges_are_what_was_asked_for_and_no_more() {
    let mut pod = Pod::start();
    let script =
        "grep -E 'Cap(Eff|Prm|Bnd|Amb|Inh)|NoNewPrivs|Seccomp:' /proc/self/status; grep 'open files' /proc/self/limits";
    let words =
        |lines: Vec<String>| lines.join(" ").split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    let default = "00000000a80425fb";
    let found = words(lines(&mut pod, container("a", script)));
    let expected = format!(
        "CapInh: 0000000000000000 CapPrm: {default} CapEff: {default} CapBnd: {default} CapAmb: 0000000000000000"
    );
    assert!(found.starts_with(&expected) && found.contains("NoNewPrivs: 0 Seccomp: 0"), "{found}");
    let found = words(lines(&mut pod, with_user(container("b", script), user("web"))));
    let expected = format!("CapPrm: 0000000000000000 CapEff: 0000000000000000 CapBnd: {default}");
    assert!(found.contains(&expected), "{found}");
    let mut ambient = with_user(container("c", script), user("web"));
    let bind = vec!["CAP_NET_BIND_SERVICE".to_owned()];
    let process = ambient.process.as_mut().expect("process");
    process.capabilities =
        Some(v1::Capabilities { ambient: bind.clone(), inheritable: bind, ..default_capabilities() });
    process.no_new_privileges = true;
    process.rlimits = vec![v1::Rlimit { name: "RLIMIT_NOFILE".into(), soft: 77, hard: 99 }];
    let found = words(lines(&mut pod, ambient));
    assert!(found.contains("CapEff: 0000000000000400") && found.contains("CapAmb: 0000000000000400"), "{found}");
    assert!(found.contains("NoNewPrivs: 1") && found.contains("Max open files 77 99"), "{found}");
}

/// Refuses mkdir(2) and mkdirat(2), allows the rest.
fn no_mkdir() -> Vec<u8> {
    let instruction = |code: u16, jump: (u8, u8), k: u32| {
        [code.to_le_bytes().as_slice(), &[jump.0, jump.1], &k.to_le_bytes()].concat()
    };
    let refuse = 0x0005_0000 | 1;
    [
        instruction(0x20, (0, 0), 0),
        instruction(0x15, (1, 0), 83),
        instruction(0x15, (0, 1), 258),
        instruction(0x06, (0, 0), refuse),
        instruction(0x06, (0, 0), 0x7fff_0000),
    ]
    .concat()
}

#[test]
fn a_seccomp_filter_holds_with_and_without_no_new_privs() {
    let mut pod = Pod::start();
    for (id, no_new_privileges) in [("a", false), ("b", true)] {
        let mut filtered = with_user(container(id, "mkdir /tmp/x 2>&1; grep Seccomp: /proc/self/status"), user("web"));
        let process = filtered.process.as_mut().expect("process");
        process.seccomp = no_mkdir();
        process.no_new_privileges = no_new_privileges;
        let lines = lines(&mut pod, filtered);
        assert!(lines[0].ends_with("Operation not permitted") && lines[1].ends_with('2'), "{lines:?}");
    }
}

#[test]
fn mounts_show_what_they_should() {
    let mut pod = Pod::start();
    let entry = |path: &str, mode: u32, content: &str| v1::FileEntry {
        path: path.into(),
        mode,
        content: content.into(),
        ..v1::FileEntry::default()
    };
    let files = |entries: Vec<v1::FileEntry>| Some(mount::Source::Files(v1::FileTree { entries }));
    let mount = |destination: &str, source, read_only| v1::Mount {
        destination: destination.into(),
        source,
        read_only,
        mapped: false,
        image_sub_path: String::new(),
    };
    let script = "cat /etc/hosts /config/sub/key; cat /var/escape/deep; ls /second/bin/busybox; stat -c %a /scratch
        touch /scratch/x && echo rw; touch /config/x 2>/dev/null || echo ro; pwd; stat -c '%a %u' /";
    let mut mounted = container("a", script);
    mounted.process.as_mut().expect("process").cwd = "/made/for/it".into();
    mounted.mounts = vec![
        mount("/config", files(vec![entry("sub/key", libc::S_IFREG | 0o644, "value\n")]), true),
        mount("/etc/hosts", files(vec![entry("", libc::S_IFREG | 0o644, "hosts\n")]), false),
        // /var/escape is a link to /etc/linked, which must be the container's.
        mount("/var/escape/deep", files(vec![entry("", libc::S_IFREG | 0o644, "linked\n")]), false),
        mount("/second", Some(mount::Source::Image(image())), true),
        mount("/scratch", Some(mount::Source::Tmpfs(v1::Tmpfs { size_bytes: 1 << 20, mode: 0o770 })), false),
    ];
    let expected = ["hosts", "value", "linked", "/second/bin/busybox", "770", "rw", "ro", "/made/for/it", "755 0"];
    assert_eq!(lines(&mut pod, mounted), expected);
    assert!(!std::path::Path::new("/etc/linked/deep").exists());
}

#[test]
fn a_read_only_root_refuses_writes_and_another_keeps_them_to_itself() {
    let mut pod = Pod::start();
    let mut read_only = container("a", "touch /x 2>&1; touch /dev/shm/x && echo shm");
    read_only.rootfs.as_mut().expect("rootfs").read_only = true;
    let found = lines(&mut pod, read_only);
    assert!(found[0].ends_with("Read-only file system") && found[1] == "shm", "{found:?}");
    assert_eq!(
        lines(&mut pod, container("b", "echo 1 > /bin/mine; echo 2 > /etc/passwd; ls /dev/shm/x")),
        ["/dev/shm/x"]
    );
    assert_eq!(lines(&mut pod, container("c", "ls /bin/mine 2>/dev/null; wc -l < /etc/passwd")), ["2"]);
}

#[test]
fn a_pod_without_a_disk_has_writable_roots_all_the_same() {
    let mut pod = Pod::configured(common::configuration());
    assert_eq!(lines(&mut pod, container("a", "echo 1 > /x; cat /x")), ["1"]);
}

#[test]
fn containers_of_one_image_share_its_mount() {
    let mut pod = Pod::start();
    assert!(pod.has_partitions(1, 1));
    for id in ["a", "b", "c"] {
        pod.launch(container(id, "sleep 1000"));
        assert!(pod.has_partitions(2, 2));
    }
    for id in ["a", "b"] {
        pod.remove(id);
        assert!(pod.has_partitions(2, 2));
    }
    pod.remove("c");
    pod.run(container("d", "true"));
    assert!(pod.has_partitions(1, 2));
}

#[test]
fn long_lines_are_cut_and_much_output_arrives_whole() {
    let mut pod = Pod::start();
    let log = pod.launch(container("a", "head -c 40000 /dev/zero | tr '\\0' x; echo; printf rest; seq 1 200000 >&2"));
    pod.exit_of("a");
    log.settle();
    let lines = log.lines();
    let out: Vec<_> =
        lines.iter().filter(|line| line.starts_with("stdout")).map(|line| (&line[..8], line.len() - 9)).collect();
    assert_eq!(out, [("stdout P", 16384), ("stdout P", 16384), ("stdout F", 7232), ("stdout P", 4)]);
    let err: Vec<_> = lines.iter().filter_map(|line| line.strip_prefix("stderr F ")).collect();
    assert_eq!(err.len(), 200_000);
    assert_eq!((err[0], err[199_999]), ("1", "200000"));
}

#[test]
fn a_shared_pid_namespace_has_a_first_process_that_is_no_workload() {
    let mut pod = Pod::configured(v1::Configure { share_pid_namespace: true, ..common::configuration() });
    let shared = |id: &str, script: &str| v1::CreateContainer {
        pid_namespace: v1::PidNamespace::Pod.into(),
        ..container(id, script)
    };
    let log = pod.launch(shared("a", "echo pid $$; exec sleep 4321"));
    assert_ne!(log.wait_for("pid"), "stdout F pid 1");
    let found = lines(
        &mut pod,
        shared("b", "ps -o args | grep -c '[s]leep 4321'; (sleep 0.01 &); sleep 0.2; ps -o stat | grep -c ^Z; true"),
    );
    assert_eq!(found, ["1", "0"], "seen by its neighbour, and orphans are reaped");
    // A process that outlives its container's first one, and holds its output open.
    let log = pod.launch(shared("c", "(sleep 4322; echo late) & echo early"));
    assert_eq!(pod.exit_of("c").code, 0);
    assert_eq!(log.texts(), ["early"]);
    assert_eq!(lines(&mut pod, shared("d", "ps -o args | grep -c '[s]leep 4322'; true")), ["0"]);
    assert_eq!(pod.exec_sh("a", "echo $PPID; ps -o args | grep -c '[s]leep 4321'"), (0, "0\n1\n".into()));
}

#[test]
fn a_container_can_look_at_anothers_processes() {
    let mut pod = Pod::start();
    pod.launch(container("a", "exec sleep 4323"));
    let with = |id: &str, space: v1::PidNamespace, target: &str| v1::CreateContainer {
        pid_namespace: space.into(),
        pid_target: target.into(),
        ..container(id, "ps -o pid,args | grep '[s]leep 4323' | awk '{print $1}'")
    };
    assert_eq!(lines(&mut pod, with("b", v1::PidNamespace::Target, "a")), ["1"]);
    let seen = lines(&mut pod, with("c", v1::PidNamespace::Node, ""));
    let pid = pod.state("a").expect("there").pid;
    assert_eq!(seen, [pid.to_string()]);
    assert_eq!(
        pod.create(with("d", v1::PidNamespace::Target, "gone")).map(drop).expect_err("refused").0,
        Kind::NotFound
    );
}

#[test]
fn privileged_has_everything_of_the_guest() {
    let mut pod = Pod::start();
    let script =
        "grep CapEff /proc/self/status; mkdir /sys/fs/cgroup/mine && echo cgroup; [ -c /dev/kmsg ] && echo kmsg
        mkdir /tmp/m && mount -t tmpfs none /tmp/m && echo mounted";
    let privileged = v1::CreateContainer { privileged: true, ..container("a", script) };
    let found = lines(&mut pod, privileged);
    assert!(found[0].ends_with("ffffff"), "{found:?}");
    assert_eq!(found[1..], ["cgroup", "kmsg", "mounted"]);
    assert!(pod.has_no_cgroup("a"));
}

#[test]
fn a_container_over_its_memory_is_killed_and_told_so() {
    let mut pod = Pod::start();
    pod.assert_controller("memory");
    let mut hungry = container("a", "cat /sys/fs/cgroup/memory.max; exec tail -c 100m /dev/zero");
    hungry.resources = Some(v1::Resources { memory_limit: 32 << 20, ..v1::Resources::default() });
    let (exit, found) = pod.run(hungry);
    assert_eq!((exit.code, exit.signal, exit.oom_killed), (137, libc::SIGKILL, true));
    assert_eq!(found, ["33554432"]);
    let log = pod.launch(container("b", "echo up; exec sleep 1000"));
    log.wait_for("up");
    let update = |memory_limit| {
        let resources = Some(v1::Resources { memory_limit, ..v1::Resources::default() });
        request::Call::UpdateContainer(v1::UpdateContainer { id: "b".into(), resources })
    };
    pod.done(update(48 << 20));
    assert_eq!(pod.exec_sh("b", "cat /sys/fs/cgroup/memory.max"), (0, "50331648\n".into()));
}

#[test]
fn a_fork_bomb_stays_in_its_container() {
    let mut pod = Pod::start();
    pod.assert_controller("pids");
    let mut bomb = container("a", "echo go; f() { f | f & wait; }; f");
    bomb.resources = Some(v1::Resources { pids_limit: 64, ..v1::Resources::default() });
    let log = pod.launch(bomb);
    log.wait_for("go");
    assert_eq!(lines(&mut pod, container("b", "echo fine")), ["fine"]);
    let start = Instant::now();
    pod.remove("a");
    assert!(start.elapsed().as_secs() < 20);
}
