//! The host's KVM: what it must be able to do, and the VM made from it.
#![expect(unsafe_code, reason = "an inherited descriptor becomes kvm-ioctls' Kvm; an ioctl without a wrapper")]

use std::ops::Range;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVMIO, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;
use vmm_control::exit;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

use crate::cpu::{CpuError, Policy};
use crate::memory::TSS;

/// Why this host cannot run the VM.
#[derive(Debug, Error)]
pub enum KvmError {
    /// Another KVM than the one there has been since 2007, or no KVM at all.
    #[error("the descriptor for kvm is not an open /dev/kvm")]
    NotKvm,
    /// Something missing.
    #[error("this host's KVM lacks {0}; it needs Linux 5.10 or later")]
    Lacks(&'static str),
    /// A call failed.
    #[error("KVM does not {0}")]
    Call(&'static str, #[source] kvm_ioctls::Error),
    /// The CPU.
    #[error(transparent)]
    Cpu(#[from] CpuError),
}

impl KvmError {
    /// The code to exit with.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Cpu(CpuError::Lacks(_)) => exit::UNSUPPORTED_CPU,
            _ => exit::NO_KVM,
        }
    }
}

const NEEDED: [(Cap, &str); 6] = [
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// `struct kvm_pre_fault_memory`.
#[repr(C)]
struct PreFault {
    address: u64,
    bytes: u64,
    flags: u64,
    padding: [u64; 5],
}

const PRE_FAULT_MEMORY: u32 = 0xd5;

/// Maps some ranges of pages into the guest, huge ones where the host has them, so that the guest's first
/// accesses do not exit. Only for memory that is filled already. A host before Linux 6.11 does not know how, and the
/// guest then exits once for each page.
pub fn map_ahead(vcpu: &VcpuFd, ranges: impl IntoIterator<Item = Range<u64>>) {
    let request = ioctl_expr(_IOC_READ | _IOC_WRITE, KVMIO, PRE_FAULT_MEMORY, size_of::<PreFault>() as u32);
    for Range { start, end } in ranges {
        let mut range = PreFault { address: start, bytes: end - start, flags: 0, padding: [0; 5] };
        // SAFETY: KVM reads and writes one such structure.
        if unsafe { ioctl_with_mut_ref(vcpu, request, &mut range) } != 0 {
            return;
        }
    }
}

/// A host's KVM with all that a machine needs.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
}

impl Host {
    /// Takes over an open `/dev/kvm` and looks at what it can do.
    pub fn new(fd: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is open and ours. If it is not KVM, its ioctls fail.
        let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
        if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
            return Err(KvmError::NotKvm);
        }
        match NEEDED.into_iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
            Some((_, name)) => Err(KvmError::Lacks(name)),
            None => Ok(Self { kvm }),
        }
    }

    /// Makes a VM with local APICs in KVM, and no other interrupt controller there.
    pub fn create_vm(&self) -> Result<Arc<VmFd>, KvmError> {
        let vm = loop {
            match self.kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => {}
                result => break result.map_err(|e| KvmError::Call("create a VM", e))?,
            }
        };
        vm.set_tss_address(TSS as usize).map_err(|e| KvmError::Call("place its task state segment", e))?;
        // No pin of an I/O APIC is known to it, so no end of interrupt exits to us.
        let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        vm.enable_cap(&split).map_err(|e| KvmError::Call("create local APICs", e))?;
        Ok(Arc::new(vm))
    }

    /// Makes the virtual CPUs, the first of them at `entry`.
    pub fn create_vcpus(
        &self,
        vm: &VmFd,
        memory: &GuestMemoryMmap,
        count: u8,
        entry: u64,
    ) -> Result<Vec<VcpuFd>, KvmError> {
        let policy = Policy::new(&self.kvm, count)?;
        let make = |id: u8| {
            let vcpu = vm.create_vcpu(id.into()).map_err(|e| KvmError::Call("create a virtual CPU", e))?;
            let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
            policy.give(&vcpu, id, tsc_khz, memory)?;
            crate::cpu::set_states(&vcpu, &policy)?;
            crate::cpu::set_registers(&vcpu, id, entry)?;
            Ok(vcpu)
        };
        (0..count).map(make).collect()
    }
}
