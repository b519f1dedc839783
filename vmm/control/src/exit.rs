//! Exit codes of `pericarp-vmm`, distinct so that a script can tell them apart.

/// The guest powered off or the VM was asked to end.
pub const ENDED: i32 = 0;
/// The VMM failed in a way that is not the configuration's, host's or guest's doing.
pub const INTERNAL: i32 = 1;
/// The configuration is not valid.
pub const BAD_CONFIG: i32 = 2;
/// A descriptor named in the configuration is not open or not of the right kind.
pub const BAD_FD: i32 = 3;
/// The host's CPU lacks something that the machine needs.
pub const UNSUPPORTED_CPU: i32 = 4;
/// The host's KVM lacks a capability or does not answer.
pub const NO_KVM: i32 = 5;
/// The kernel or initrd cannot be loaded.
pub const BAD_KERNEL: i32 = 6;
/// The guest kernel panicked.
pub const GUEST_PANIC: i32 = 10;
/// The guest reset itself.
pub const GUEST_RESET: i32 = 11;
/// KVM could not run the guest any further.
pub const GUEST_FAULT: i32 = 12;
/// A system call outside the filter.
pub const FORBIDDEN_SYSCALL: i32 = 31;
