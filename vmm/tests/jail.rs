//! The filter of system calls, from inside: a process that makes a call which is not allowed is ended, and says which.

#![expect(unsafe_code, reason = "system calls that no library makes")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use pericarp_vmm::jail::{self, ALLOWED, ARGUED};
use vmm_control::{EventKind, ShutdownReason, exit, last_event};

/// x86-64 had no call beyond this one in Linux 6.12, and a few more do no harm.
const CALLS: i64 = 480;

/// Most calls that a VMM may make, in all of its threads together.
const MOST: usize = 40;

/// Names the call that a child process makes.
const CALL: &str = "PERICARP_TEST_CALL";

/// Names the file for its events.
const EVENTS: &str = "PERICARP_TEST_EVENTS";

/// Calls that are allowed, made as they are not.
const WRONGLY: [(i64, [i64; 4]); 5] = [
    (libc::SYS_ioctl, [0, 0x5413, 0, 0]),
    (libc::SYS_mmap, [0, 4096, 4, 0x22]),
    (libc::SYS_mprotect, [0, 4096, 7, 0]),
    (libc::SYS_mprotect, [0, 4096, 5, 0]),
    (libc::SYS_madvise, [0, 4096, 9, 0]),
];

/// Numbers of uretprobe(2) and uprobe(2), which libc does not have yet.
const UNFILTERED: [i64; 2] = [335, 336];

/// Not a test of its own: what a child process does.
#[test]
fn child() {
    let Ok(call) = std::env::var(CALL) else { return };
    let events = File::options().append(true).open(std::env::var(EVENTS).unwrap()).unwrap();
    let numbers: Vec<i64> = call.split(',').map(|number| number.parse().unwrap()).collect();
    let &[call, first, second, third, fourth] = &*numbers else { panic!("a call and four arguments") };
    jail::enter(Some(events.as_raw_fd())).unwrap();
    if call < 0 {
        panic!("as a bug would");
    }
    // SAFETY: the filter refuses the call, so the kernel never looks at its arguments.
    unsafe { libc::syscall(call, first, second, third, fourth) };
    // SAFETY: ends the process; what ran is reported by the code.
    unsafe { libc::_exit(99) };
}

/// Exit code and last event of a child that makes a call.
fn of_child(call: i64, arguments: [i64; 4]) -> (Option<i32>, EventKind) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let [first, second, third, fourth] = arguments;
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--test-threads", "1", "--nocapture"])
        .env(CALL, format!("{call},{first},{second},{third},{fourth}"))
        .env(EVENTS, file.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    let event = last_event(File::open(file.path()).unwrap()).unwrap().map(|event| event.kind);
    (status.code(), event.unwrap_or(EventKind::Started))
}

fn assert_forbidden(call: i64, arguments: [i64; 4]) {
    let (code, event) = of_child(call, arguments);
    assert_eq!(code, Some(exit::FORBIDDEN_SYSCALL), "call {call} {arguments:?} left {event:?}");
    let EventKind::Shutdown { reason: ShutdownReason::ForbiddenSyscall { syscall, thread } } = event else {
        panic!("call {call}: {event:?}")
    };
    assert_eq!((syscall, thread.is_empty()), (call, false));
}

#[test]
fn each_call_that_is_not_allowed_ends_the_process_and_is_named() {
    let refused: Vec<i64> = (0..CALLS).filter(|call| !ALLOWED.contains(call) && !ARGUED.contains(call)).collect();
    assert_eq!(refused.len(), usize::try_from(CALLS).unwrap() - ALLOWED.len() - ARGUED.len());
    for call in refused {
        // Newer kernels let these past every filter, and refuse them to whoever is not in a trampoline of theirs.
        if UNFILTERED.contains(&call) && of_child(call, [0; 4]).0 != Some(exit::FORBIDDEN_SYSCALL) {
            continue;
        }
        assert_forbidden(call, [0; 4]);
    }
}

#[test]
fn calls_that_are_allowed_are_not_with_any_arguments() {
    for (call, arguments) in WRONGLY {
        assert_forbidden(call, arguments);
    }
}

#[test]
fn few_calls_are_allowed() {
    assert!(ALLOWED.len() + ARGUED.len() <= MOST, "{} and {}", ALLOWED.len(), ARGUED.len());
}

#[test]
fn a_panic_is_a_fault_that_says_where() {
    let (code, event) = of_child(-1, [0; 4]);
    let EventKind::Shutdown { reason: ShutdownReason::Fault { message } } = event else { panic!("{event:?}") };
    assert_eq!(code, Some(exit::INTERNAL));
    assert!(message.contains("as a bug would") && message.contains("jail.rs"), "{message}");
}
