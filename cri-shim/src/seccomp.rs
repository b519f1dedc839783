//! The default seccomp profile of containers: what is not listed is refused with EPERM (seccomp(2)).
//!
//! It keeps a container from those parts of its own guest kernel that programs do not need, as the profiles of other
//! runtimes do; the wall between pods is the virtual machine, not this. It runs inside the guest, so it knows
//! x86_64 only, as the guest does. Profiles of the node are in [`profile`].

mod profile;

use std::collections::BTreeMap;

use libc::*;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use crate::error::{Error, Result};

pub use profile::{json_filter, local_filter};

/// Not in the libc crate yet.
const SYS_IO_PGETEVENTS: c_long = 333;

/// Files, memory, processes, signals, time, sockets and IPC: what every program may do.
#[rustfmt::skip]
const ALLOWED: &[c_long] = &[
    // Files and directories.
    SYS_access, SYS_chdir, SYS_chmod, SYS_chown, SYS_close, SYS_close_range, SYS_copy_file_range, SYS_creat, SYS_dup,
    SYS_dup2, SYS_dup3, SYS_faccessat, SYS_faccessat2, SYS_fadvise64, SYS_fallocate, SYS_fchdir, SYS_fchmod,
    SYS_fchmodat, SYS_fchmodat2, SYS_fchown, SYS_fchownat, SYS_fcntl, SYS_fdatasync, SYS_fgetxattr, SYS_flistxattr,
    SYS_flock, SYS_fremovexattr, SYS_fsetxattr, SYS_fstat, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_futimesat,
    SYS_getcwd, SYS_getdents, SYS_getdents64, SYS_getxattr, SYS_ioctl, SYS_lchown, SYS_lgetxattr, SYS_link, SYS_linkat,
    SYS_listxattr, SYS_llistxattr, SYS_lremovexattr, SYS_lseek, SYS_lsetxattr, SYS_lstat, SYS_mkdir, SYS_mkdirat,
    SYS_mknod, SYS_mknodat, SYS_name_to_handle_at, SYS_newfstatat, SYS_open, SYS_openat, SYS_openat2, SYS_pread64,
    SYS_preadv, SYS_preadv2, SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read, SYS_readahead, SYS_readlink,
    SYS_readlinkat, SYS_readv, SYS_removexattr, SYS_rename, SYS_renameat, SYS_renameat2, SYS_rmdir, SYS_sendfile,
    SYS_setxattr, SYS_splice, SYS_stat, SYS_statfs, SYS_statx, SYS_symlink, SYS_symlinkat, SYS_sync,
    SYS_sync_file_range, SYS_syncfs, SYS_tee, SYS_truncate, SYS_umask, SYS_unlink, SYS_unlinkat, SYS_utime,
    SYS_utimensat, SYS_utimes, SYS_vmsplice, SYS_write, SYS_writev,
    // Waiting and watching.
    SYS_epoll_create, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_epoll_wait,
    SYS_eventfd, SYS_eventfd2, SYS_fanotify_mark, SYS_inotify_add_watch, SYS_inotify_init, SYS_inotify_init1,
    SYS_inotify_rm_watch, SYS_io_cancel, SYS_io_destroy, SYS_io_getevents, SYS_IO_PGETEVENTS, SYS_io_setup,
    SYS_io_submit, SYS_pause, SYS_pipe, SYS_pipe2, SYS_poll, SYS_ppoll, SYS_pselect6, SYS_select, SYS_signalfd,
    SYS_signalfd4,
    // Memory.
    SYS_brk, SYS_madvise, SYS_membarrier, SYS_memfd_create, SYS_memfd_secret, SYS_mincore, SYS_mlock, SYS_mlock2,
    SYS_mlockall, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_msync, SYS_munlock, SYS_munlockall, SYS_munmap,
    SYS_pkey_alloc, SYS_pkey_free, SYS_pkey_mprotect, SYS_remap_file_pages,
    // Processes and threads.
    SYS_arch_prctl, SYS_execve, SYS_execveat, SYS_exit, SYS_exit_group, SYS_fork, SYS_futex, SYS_futex_waitv,
    SYS_get_robust_list, SYS_get_thread_area, SYS_getcpu, SYS_getpgid, SYS_getpgrp, SYS_getpid, SYS_getppid,
    SYS_getpriority, SYS_getrandom, SYS_getrlimit, SYS_getrusage, SYS_getsid, SYS_gettid, SYS_ioprio_get,
    SYS_ioprio_set, SYS_landlock_add_rule, SYS_landlock_create_ruleset, SYS_landlock_restrict_self, SYS_modify_ldt,
    SYS_pidfd_open, SYS_pidfd_send_signal, SYS_prctl, SYS_prlimit64, SYS_process_mrelease, SYS_process_vm_readv,
    SYS_process_vm_writev, SYS_ptrace, SYS_rseq, SYS_sched_get_priority_max, SYS_sched_get_priority_min,
    SYS_sched_getaffinity, SYS_sched_getattr, SYS_sched_getparam, SYS_sched_getscheduler, SYS_sched_rr_get_interval,
    SYS_sched_setaffinity, SYS_sched_setattr, SYS_sched_setparam, SYS_sched_setscheduler, SYS_sched_yield, SYS_seccomp,
    SYS_set_robust_list, SYS_set_thread_area, SYS_set_tid_address, SYS_setpgid, SYS_setpriority, SYS_setrlimit,
    SYS_setsid, SYS_sysinfo, SYS_times, SYS_uname, SYS_vfork, SYS_wait4, SYS_waitid,
    // Users and capabilities.
    SYS_capget, SYS_capset, SYS_getegid, SYS_geteuid, SYS_getgid, SYS_getgroups, SYS_getresgid, SYS_getresuid,
    SYS_getuid, SYS_setfsgid, SYS_setfsuid, SYS_setgid, SYS_setgroups, SYS_setregid, SYS_setresgid, SYS_setresuid,
    SYS_setreuid, SYS_setuid,
    // Signals.
    SYS_kill, SYS_restart_syscall, SYS_rt_sigaction, SYS_rt_sigpending, SYS_rt_sigprocmask, SYS_rt_sigqueueinfo,
    SYS_rt_sigreturn, SYS_rt_sigsuspend, SYS_rt_sigtimedwait, SYS_rt_tgsigqueueinfo, SYS_sigaltstack, SYS_tgkill,
    SYS_tkill,
    // Time; changing the clock needs a capability besides.
    SYS_adjtimex, SYS_alarm, SYS_clock_adjtime, SYS_clock_getres, SYS_clock_gettime, SYS_clock_nanosleep,
    SYS_getitimer, SYS_gettimeofday, SYS_nanosleep, SYS_setitimer, SYS_time, SYS_timer_create, SYS_timer_delete,
    SYS_timer_getoverrun, SYS_timer_gettime, SYS_timer_settime, SYS_timerfd_create, SYS_timerfd_gettime,
    SYS_timerfd_settime,
    // Sockets.
    SYS_accept, SYS_accept4, SYS_bind, SYS_connect, SYS_getpeername, SYS_getsockname, SYS_getsockopt, SYS_listen,
    SYS_recvfrom, SYS_recvmmsg, SYS_recvmsg, SYS_sendmmsg, SYS_sendmsg, SYS_sendto, SYS_setsockopt, SYS_shutdown,
    SYS_socketpair,
    // Messages, semaphores and shared memory.
    SYS_mq_getsetattr, SYS_mq_notify, SYS_mq_open, SYS_mq_timedreceive, SYS_mq_timedsend, SYS_mq_unlink, SYS_msgctl,
    SYS_msgget, SYS_msgrcv, SYS_msgsnd, SYS_semctl, SYS_semget, SYS_semop, SYS_semtimedop, SYS_shmat, SYS_shmctl,
    SYS_shmdt, SYS_shmget,
];

/// What a capability is of no use without.
#[rustfmt::skip]
const WITH_CAPABILITY: &[(&str, &[c_long])] = &[
    ("CAP_BPF", &[SYS_bpf]),
    ("CAP_DAC_READ_SEARCH", &[SYS_open_by_handle_at]),
    ("CAP_PERFMON", &[SYS_perf_event_open]),
    ("CAP_SYSLOG", &[SYS_syslog]),
    ("CAP_SYS_ADMIN", &[
        SYS_bpf, SYS_clone, SYS_clone3, SYS_fanotify_init, SYS_fsconfig, SYS_fsmount, SYS_fsopen, SYS_fspick, SYS_mount,
        SYS_mount_setattr, SYS_move_mount, SYS_open_tree, SYS_perf_event_open, SYS_pivot_root, SYS_quotactl,
        SYS_quotactl_fd, SYS_setdomainname, SYS_sethostname, SYS_setns, SYS_syslog, SYS_umount2, SYS_unshare,
    ]),
    ("CAP_SYS_BOOT", &[SYS_reboot]),
    ("CAP_SYS_CHROOT", &[SYS_chroot]),
    ("CAP_SYS_MODULE", &[SYS_delete_module, SYS_finit_module, SYS_init_module]),
    ("CAP_SYS_NICE", &[SYS_get_mempolicy, SYS_mbind, SYS_set_mempolicy, SYS_set_mempolicy_home_node]),
    ("CAP_SYS_PACCT", &[SYS_acct]),
    ("CAP_SYS_PTRACE", &[SYS_kcmp, SYS_pidfd_getfd, SYS_process_madvise]),
    ("CAP_SYS_RAWIO", &[SYS_ioperm, SYS_iopl]),
    ("CAP_SYS_TIME", &[SYS_clock_settime, SYS_settimeofday]),
    ("CAP_SYS_TTY_CONFIG", &[SYS_vhangup]),
];

/// clone(2) flags that make namespaces; unshare(2) and setns(2) are not allowed either.
const NEW_NAMESPACES: c_int =
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET;

/// Personalities that do no harm (personality(2)): the usual one, 32-bit, both with the old `uname`, and the query.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// The filter for a container with these capabilities, as bytes: `struct sock_filter` after `struct sock_filter`.
pub fn default_filter(capabilities: &[String]) -> Result<Vec<u8>> {
    let program = compile(capabilities)
        .map_err(|error| Error::Internal(format!("the default seccomp profile cannot be compiled: {error}")))?;
    Ok(bytes(&program))
}

fn bytes(program: &[sock_filter]) -> Vec<u8> {
    let step = |step: &sock_filter| {
        let [c0, c1] = step.code.to_le_bytes();
        let [k0, k1, k2, k3] = step.k.to_le_bytes();
        [c0, c1, step.jt, step.jf, k0, k1, k2, k3]
    };
    program.iter().flat_map(step).collect()
}

fn compile(capabilities: &[String]) -> Result<BpfProgram, seccompiler::BackendError> {
    let argument = |number, length, operator, value| SeccompCondition::new(number, length, operator, value);
    let when = |condition| SeccompRule::new(vec![condition]);
    // No rule for a listed call allows it with any arguments.
    let mut calls: BTreeMap<c_long, Vec<SeccompRule>> = ALLOWED.iter().map(|&call| (call, Vec::new())).collect();

    let flags = u64::from(NEW_NAMESPACES.cast_unsigned());
    let same = when(argument(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(flags), 0)?)?;
    calls.insert(SYS_clone, vec![same]);
    // vsock leads to the agent and the host; programs have no business there.
    let family = u64::from(AF_VSOCK.cast_unsigned());
    calls.insert(SYS_socket, vec![when(argument(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family)?)?]);
    let harmless = |value| when(argument(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?);
    calls.insert(SYS_personality, PERSONALITIES.into_iter().map(harmless).collect::<Result<_, _>>()?);

    for (capability, more) in WITH_CAPABILITY {
        if capabilities.iter().any(|name| name == capability) {
            calls.extend(more.iter().map(|&call| (call, Vec::new())));
        }
    }
    let clone3 = calls.contains_key(&SYS_clone3);
    let refuse = SeccompAction::Errno(EPERM.cast_unsigned());
    let filter = SeccompFilter::new(calls, refuse, SeccompAction::Allow, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(if clone3 { program } else { without_clone3().into_iter().chain(program).collect() })
}

/// clone3(2) hides its flags from a filter. The C library falls back to clone(2) if there seems to be no such call.
fn without_clone3() -> [sock_filter; 3] {
    let step = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    // Offset 0 of `struct seccomp_data` is the call's number, the same on every architecture for so new a call.
    const CLONE3: u32 = 435;
    [
        step(0x20, 0, 0, 0),                                          // ld [0]
        step(0x15, 0, 1, CLONE3),                                     // jeq CLONE3, next, skip
        step(0x06, 0, 0, SECCOMP_RET_ERRNO | ENOSYS.cast_unsigned()), // ret ENOSYS
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

    /// Runs `work` in a thread under the filter.
    fn confined<T: Send + 'static>(capabilities: &[&str], work: impl FnOnce() -> T + Send + 'static) -> T {
        let capabilities: Vec<String> = capabilities.iter().map(|&name| name.to_owned()).collect();
        let program = compile(&capabilities).expect("compiles");
        let thread = std::thread::spawn(move || {
            seccompiler::apply_filter(&program).expect("the kernel takes it");
            work()
        });
        thread.join().expect("it ends")
    }

    #[test]
    fn ordinary_programs_run() {
        let output = confined(&[], || {
            let inner = std::thread::spawn(|| std::fs::read_to_string("/proc/self/status"));
            inner.join().expect("threads can be made").expect("files can be read");
            std::process::Command::new("/bin/sh").args(["-c", "ls / | sort | head -1"]).output().expect("sh runs")
        });
        assert!(output.status.success() && !output.stdout.is_empty());
    }

    #[test]
    fn namespaces_need_a_capability() {
        assert_eq!(confined(&[], || unshare(CloneFlags::CLONE_NEWUTS)), Err(Errno::EPERM));
        // With the capability the filter lets it pass to the kernel, whose answer depends on who runs the test.
        let kernel = |result| if nix::unistd::geteuid().is_root() { result == Ok(()) } else { true };
        assert!(kernel(confined(&["CAP_SYS_ADMIN"], || unshare(CloneFlags::CLONE_NEWUTS))));
        let sockets =
            |family| confined(&[], move || socket(family, SockType::Stream, SockFlag::empty(), None).map(drop));
        assert_eq!(sockets(AddressFamily::Vsock), Err(Errno::EPERM));
        assert_eq!(sockets(AddressFamily::Inet), Ok(()));
    }

    #[test]
    fn it_fits_into_what_the_kernel_takes() {
        // BPF_MAXINSNS instructions of 8 bytes.
        let bytes = default_filter(&[]).expect("compiles");
        assert!(bytes.len().is_multiple_of(8) && bytes.len() <= 4096 * 8, "{}", bytes.len());
        assert_eq!(default_filter(&["CAP_SYS_ADMIN".to_owned()]).map(|b| b.is_empty()), Ok(false));
    }
}
