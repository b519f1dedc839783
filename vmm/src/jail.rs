//! What this process gives up before the guest's first instruction: privileges, capabilities, core dumps, and every
//! system call that it has no use for.
//!
//! A call outside the filter ends the process; the handler writes thread and number into the events, so that the
//! pod's status can name them.
#![expect(unsafe_code, reason = "a signal handler, and system calls without a wrapper")]

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::sys::prctl::set_no_new_privs;
use nix::sys::resource::{Resource, setrlimit};
use seccompiler::BpfProgram;
use thiserror::Error;
use vmm_control::{Event, EventKind, ShutdownReason, exit};
use vmm_sys_util::signal::register_signal_handler;

use crate::filter::{self, Argument, Rule};

/// Why the process cannot be confined.
#[derive(Debug, Error)]
pub enum JailError {
    /// A system call.
    #[error("cannot give up {0}")]
    System(&'static str, #[source] io::Error),
    /// The filter.
    #[error("the host refuses the system call filter")]
    Filter(#[from] seccompiler::Error),
}

/// Calls allowed whatever their arguments; beside them are those of [`ARGUED`]. The tests see that each is made by some pod, but for those
/// that they name with when it is.
pub const ALLOWED: [i64; 35] = [
    // Devices: files, taps, sockets, rings.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_io_uring_enter,
    libc::SYS_newfstatat,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    // Threads and signals; the C library takes a signal of its own when the first thread starts.
    libc::SYS_rt_sigaction,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_tgkill,
    libc::SYS_getpid,
    libc::SYS_prctl,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Type of every KVM ioctl, in the second byte of its number.
const KVM_IOCTLS: u32 = kvm_bindings::KVMIO << 8;
const IOCTL_TYPE: u32 = 0xff00;
/// Calls allowed with some arguments.
pub const ARGUED: [i64; 4] = [libc::SYS_ioctl, libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_madvise];
/// What a tap is asked for and told, and non-blocking mode.
const OTHER_IOCTLS: [u32; 5] = [
    libc::TUNGETIFF as u32,
    libc::TUNGETVNETHDRSZ as u32,
    libc::TUNSETOFFLOAD as u32,
    libc::TUNSETQUEUE as u32,
    libc::FIONBIO as u32,
];

/// Where the handler writes the last event; -1 for nowhere.
static EVENTS: AtomicI32 = AtomicI32::new(-1);

/// Confines this thread and every one that it starts from now on. `events` stays open as long as the process lives.
pub fn enter(events: Option<RawFd>) -> Result<(), JailError> {
    let system = |what| move |error: nix::Error| JailError::System(what, error.into());
    one_heap();
    set_no_new_privs().map_err(system("new privileges"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(system("core dumps"))?;
    drop_capabilities().map_err(|error| JailError::System("capabilities", error))?;
    EVENTS.store(events.unwrap_or(-1), Ordering::Relaxed);
    std::panic::set_hook(Box::new(|panic| panicked(&panic.to_string())));
    register_signal_handler(libc::SIGSYS, forbidden)
        .map_err(|error| JailError::System("control of SIGSYS", error.into()))?;
    seccompiler::apply_filter(&filter())?;
    Ok(())
}

/// Has the C library's allocator make no heap per thread: they cost each VM some system calls and page tables, and before the
/// ninth it would open a file to count the host's CPUs. No thread allocates where it matters. Nor a mapping for what is large,
/// which it would have to grow by a call of its own.
fn one_heap() {
    // SAFETY: sets numbers of the allocator's; no thread but this one runs yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
    }
}

/// Ends the process at once, by a fault that says so in the events; the C library's abort(3) would need calls that the filter
/// refuses.
fn panicked(message: &str) {
    let kind = EventKind::Shutdown { reason: ShutdownReason::Fault { message: message.to_owned() } };
    let event = Event { at_ns: crate::notes::now(), exits: None, kind };
    let mut line = serde_json::to_vec(&event).unwrap_or_default();
    line.push(b'\n');
    for fd in [EVENTS.load(Ordering::Relaxed), libc::STDERR_FILENO] {
        // SAFETY: the bytes are initialized; a descriptor that is not open gives an error and nothing else.
        unsafe { libc::write(fd, line.as_ptr().cast(), line.len()) };
    }
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(exit::INTERNAL) };
}

fn filter() -> BpfProgram {
    let argument = |index, mask, value| Argument { index, mask, value };
    let mut ioctls = vec![argument(1, IOCTL_TYPE, KVM_IOCTLS)];
    ioctls.extend(OTHER_IOCTLS.map(|request| argument(1, u32::MAX, request)));
    // No memory ever becomes executable.
    let not_executable = [argument(2, libc::PROT_EXEC as u32, 0)];
    // The guest's memory, and the allocator's, goes back to the host and is not otherwise advised on.
    let given_back = [argument(2, u32::MAX, libc::MADV_DONTNEED as u32)];
    let mut rules: Vec<Rule<'_>> = ALLOWED.into_iter().map(|call| (call as u32, [].as_slice())).collect();
    rules.push((libc::SYS_ioctl as u32, &ioctls));
    rules.extend([libc::SYS_mmap, libc::SYS_mprotect].map(|call| (call as u32, not_executable.as_slice())));
    rules.push((libc::SYS_madvise as u32, &given_back));
    filter::program(&rules)
}

fn drop_capabilities() -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`.
    const VERSION: u32 = 0x2008_0522;
    let header = [VERSION, 0];
    let none = [0_u32; 6];
    // SAFETY: both structures are as capset(2) describes them: version and pid; effective, permitted and inheritable
    // sets, twice.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `si_call_addr`, `si_syscall` and `si_arch` of a SIGSYS (sigaction(2)) lie behind the first 16 bytes.
#[repr(C)]
struct SigsysInfo {
    head: [u64; 2],
    call_address: u64,
    syscall: i32,
    arch: u32,
}

/// Runs in place of a forbidden call. It allocates nothing, takes no lock and calls only what the filter allows.
extern "C" fn forbidden(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo_t, at least 128 bytes long, which for SIGSYS has these fields.
    let syscall = unsafe { (*info.cast::<SigsysInfo>()).syscall };
    let mut name = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let mut line = Line { bytes: [0; 256], length: 0 };
    line.add(b"{\"at_ns\":");
    line.number(crate::notes::now());
    line.add(b",\"event\":\"shutdown\",\"reason\":\"forbidden_syscall\",\"thread\":\"");
    line.add(name.split(|byte| *byte == 0).next().unwrap_or_default());
    line.add(b"\",\"syscall\":");
    line.number(u64::try_from(syscall).unwrap_or(0));
    line.add(b"}\n");
    for fd in [EVENTS.load(Ordering::Relaxed), libc::STDERR_FILENO] {
        // SAFETY: the bytes are initialized; a descriptor that is not open gives an error and nothing else.
        unsafe { libc::write(fd, line.bytes.as_ptr().cast(), line.length) };
    }
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(exit::FORBIDDEN_SYSCALL) };
}

/// A line of text on the stack.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Line {
    fn add(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(free) = self.bytes.get_mut(self.length) {
                *free = *byte;
                self.length += 1;
            }
        }
    }

    fn number(&mut self, mut value: u64) {
        let mut digits = [b'0'; 20];
        let mut first = digits.len();
        while value > 0 || first == digits.len() {
            first -= 1;
            digits[first] = b'0' + u8::try_from(value % 10).unwrap_or(0);
            value /= 10;
        }
        self.add(&digits[first..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handlers_line_is_an_event() {
        let mut line = Line { bytes: [0; 256], length: 0 };
        for (number, text) in [(0, "0"), (9, "9"), (10, "10"), (u64::MAX, "18446744073709551615")] {
            line.length = 0;
            line.number(number);
            assert_eq!(&line.bytes[..line.length], text.as_bytes());
        }
    }

    #[test]
    fn the_filter_lets_no_call_open_or_execute() {
        let program = filter();
        let verdict = |call: i64, arguments| {
            filter::tests::verdict(&program, 0xc000_003e, u32::try_from(call).unwrap(), arguments)
        };
        for call in ALLOWED {
            assert_eq!(verdict(call, [u64::MAX; 6]), libc::SECCOMP_RET_ALLOW, "{call}");
        }
        for call in [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_connect,
            libc::SYS_execve,
            libc::SYS_socket,
            libc::SYS_ptrace,
        ] {
            assert_eq!(verdict(call, [0; 6]), libc::SECCOMP_RET_TRAP, "{call}");
        }
        for (call, value, allowed) in [
            (libc::SYS_mmap, libc::PROT_READ | libc::PROT_WRITE, true),
            (libc::SYS_mprotect, libc::PROT_READ | libc::PROT_EXEC, false),
            (libc::SYS_madvise, libc::MADV_DONTNEED, true),
            (libc::SYS_madvise, libc::MADV_MERGEABLE, false),
        ] {
            let verdict = verdict(call, [0, 0, u64::try_from(value).unwrap(), 0, 0, 0]);
            assert_eq!(verdict == libc::SECCOMP_RET_ALLOW, allowed, "{call} {value}");
        }
    }
}
