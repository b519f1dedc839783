//! What this process gives up before the guest's first message: capabilities, every file outside of the one
//! directory, and every system call that it has no use for.
#![expect(unsafe_code, reason = "a signal handler")]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use landlock::{ABI, Access, AccessFs, BitFlags, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use thiserror::Error;

use crate::credentials;

/// Why the process cannot be confined.
#[derive(Debug, Error)]
pub(crate) enum JailError {
    /// A system call.
    #[error("cannot set {0}")]
    System(&'static str, #[source] io::Error),
    /// Landlock.
    #[error("the host refuses to confine file access")]
    Landlock(#[from] RulesetError),
    /// The filter.
    #[error("the host refuses the system call filter")]
    Filter(#[from] seccompiler::Error),
    /// The filter's own rules.
    #[error("the system call filter is not valid")]
    Rules(#[from] seccompiler::BackendError),
}

/// Descriptors for as many nodes and open files as there may be.
const OPEN_FILES: u64 = 1 << 20;

/// Exit code after a call outside the filter, as the VMM's.
const FORBIDDEN: i32 = 31;

/// Calls allowed whatever their arguments.
const ALLOWED: [i64; 63] = [
    // Messages.
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_write,
    // Nodes and names.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_readlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat2,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_fgetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fremovexattr,
    // Open files.
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_lseek,
    libc::SYS_getdents64,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_flock,
    // Acting for a user.
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_capset,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Threads and signals.
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_futex,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_prctl,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Confines this thread and every one that it starts from now on to what is beneath `shared`.
pub(crate) fn enter(shared: &OwnedFd) -> Result<(), JailError> {
    let system = |what| move |error: rustix::io::Errno| JailError::System(what, error.into());
    let most = getrlimit(Resource::Nofile).maximum;
    let wide = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    // A host with a lower limit lends what it allows; the guest then hears of too many open files earlier.
    if setrlimit(Resource::Nofile, wide).is_err() {
        setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })
            .map_err(system("the limit of open files"))?;
    }
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(system("the size of core dumps"))?;
    credentials::keep_few().map_err(system("its capabilities"))?;
    confine_files(shared)?;
    catch_forbidden().map_err(|error| JailError::System("a handler of SIGSYS", error))?;
    seccompiler::apply_filter(&filter()?)?;
    Ok(())
}

/// As far as the host's kernel knows how. Nothing is executed, and no device is made or opened.
fn confine_files(shared: &OwnedFd) -> Result<(), RulesetError> {
    let all = AccessFs::from_all(ABI::V5);
    let none: BitFlags<AccessFs> = AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev;
    // Sets no_new_privs as well.
    let ruleset = Ruleset::default().handle_access(all)?.create()?;
    ruleset.add_rule(PathBeneath::new(shared, all & !none))?.restrict_self()?;
    Ok(())
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.into_iter().map(|call| (call, Vec::new())).collect();
    // No memory ever becomes executable.
    let executable = u64::from(libc::PROT_EXEC.cast_unsigned());
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let plain = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(executable), 0)?;
        rules.insert(call, vec![SeccompRule::new(vec![plain])?]);
    }
    SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

fn catch_forbidden() -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = forbidden as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the structure is valid and the handler has the signature that SA_SIGINFO asks for.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
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
    let mut text = *b"pericarp-fs: its filter forbids system call     \n";
    let last = text.len() - 2;
    let mut rest = syscall.unsigned_abs();
    for place in (last - 3..=last).rev() {
        text[place] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
    }
    // SAFETY: the bytes are initialized; a descriptor that is not open gives an error and nothing else.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(FORBIDDEN) };
}
