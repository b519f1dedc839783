// kvmprobe: does this machine's /dev/kvm run guest kernels as a processor would, and fast enough to test on?
// Runs a few instructions of long-mode guest code, among them those that emulated KVMs get wrong (int3 through an IDT,
// cmpxchg16b, xsave and xrstor), checks what they did, and times 1,000 exits. Prints one line; exit code 0 only if all is right.
// A KVM that hangs is given up after TIME_LIMIT_MS, without waiting for its process to end.
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    TIME_LIMIT_MS = 2000,
    EXITS = 1000,
    MAX_EXIT_NS = 20000, // metal takes 1,000 to 2,000; an emulated SVM 40,000
    MEMORY = 2 << 20,    // one 2 MiB page, mapped to itself
    PML4 = 0x1000,
    PDPT = 0x2000,
    PD = 0x3000,
    GDT = 0x4000,
    IDT = 0x5000,
    DATA = 0x6000, // zeroed: cmpxchg16b's operand, then from +0x40 the xsave area
    STACK = 0x9000,
    CODE = 0x10000,
    PORT_RESULT = 0x10,
    PORT_EXIT = 0x11,
    PORT_END = 0x12,
    CODE_SELECTOR = 8,
    DATA_SELECTOR = 16,
    MAX_CPUID = 256,
};

#define CR0_LONG_MODE 0x80000033u // PG, NE, ET, MP, PE
#define CR4_GUEST 0x40620u        // OSXSAVE, OSXMMEXCPT, OSFXSR, PAE
#define EFER_LONG_MODE 0x500u     // LMA, LME
#define LEAF_FEATURES 1u
#define FEATURES_CX16 (1u << 13)
#define FEATURES_XSAVE (1u << 26)

// Guest code. r15 gathers a bit per thing that went right; it is sent to PORT_RESULT.
__asm__(".pushsection .rodata\n"
        ".globl guest_code, guest_int3, guest_end\n"
        "guest_code:\n"
        "  xor %r15d, %r15d\n"
        // int3: the handler sets bit 0 and comes back to the next instruction
        "  int3\n"
        // cmpxchg16b of 16 zero bytes: sets them to r14:r13, and ZF
        "  mov $0x6000, %esi\n"
        "  xor %eax, %eax\n"
        "  xor %edx, %edx\n"
        "  mov $0x1122334455667788, %rbx\n"
        "  mov $0x99aabbccddeeff00, %rcx\n"
        "  lock cmpxchg16b (%rsi)\n"
        "  jne 1f\n"
        "  cmp %rbx, (%rsi)\n"
        "  jne 1f\n"
        "  cmp %rcx, 8(%rsi)\n"
        "  jne 1f\n"
        "  or $2, %r15d\n"
        // xsave, spoil, xrstor: xmm0 is what it was
        "1: xor %ecx, %ecx\n"
        "  xor %edx, %edx\n"
        "  mov $3, %eax\n"
        "  xsetbv\n"
        "  movq %rbx, %xmm0\n"
        "  xsave64 0x40(%rsi)\n"
        "  pxor %xmm0, %xmm0\n"
        "  mov $3, %eax\n"
        "  xor %edx, %edx\n"
        "  xrstor64 0x40(%rsi)\n"
        "  movq %xmm0, %rdx\n"
        "  cmp %rbx, %rdx\n"
        "  jne 2f\n"
        "  or $4, %r15d\n"
        "2: mov %r15d, %eax\n"
        "  out %al, $0x10\n"
        "  mov $1000, %ecx\n"
        "3: out %al, $0x11\n"
        "  dec %ecx\n"
        "  jnz 3b\n"
        "  out %al, $0x12\n"
        "4: hlt\n"
        "  jmp 4b\n"
        "guest_int3:\n"
        "  or $1, %r15d\n"
        "  iretq\n"
        "guest_end:\n"
        ".popsection\n");
extern const uint8_t guest_code[], guest_int3[], guest_end[];

static void verdict(int usable, const char *format, ...) __attribute__((noreturn, format(printf, 2, 3)));
static void verdict(int usable, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s: ", usable ? "usable" : "not usable");
    vprintf(format, args);
    putchar('\n');
    va_end(args);
    fflush(stdout);
    _exit(usable ? 0 : 1);
}

static int must(int result, const char *what) {
    if (result < 0)
        verdict(0, "%s: %s", what, strerror(errno));
    return result;
}

static void fill_memory(uint8_t *memory) {
    uint64_t *at = (uint64_t *)(memory + PML4);
    at[0] = PDPT | 3; // present, writable
    at = (uint64_t *)(memory + PDPT);
    at[0] = PD | 3;
    at = (uint64_t *)(memory + PD);
    at[0] = 0x83; // a 2 MiB page at 0
    at = (uint64_t *)(memory + GDT);
    at[CODE_SELECTOR / 8] = 0x00af9b000000ffff; // 64-bit code
    at[DATA_SELECTOR / 8] = 0x00cf93000000ffff;
    uint64_t handler = CODE + (uint64_t)(guest_int3 - guest_code);
    at = (uint64_t *)(memory + IDT + 3 * 16); // an interrupt gate; the handler lies below 4 GiB
    at[0] = (handler & 0xffff) | (uint64_t)CODE_SELECTOR << 16 | 0x8e0000000000 | (handler >> 16 & 0xffff) << 48;
    memcpy(memory + CODE, guest_code, (size_t)(guest_end - guest_code));
}

static void set_cpuid(int kvm, int vcpu) {
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + MAX_CPUID * sizeof cpuid->entries[0]);
    if (!cpuid)
        verdict(0, "no memory");
    cpuid->nent = MAX_CPUID;
    must(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
    for (uint32_t i = 0; i < cpuid->nent; i++)
        if (cpuid->entries[i].function == LEAF_FEATURES && ~cpuid->entries[i].ecx & (FEATURES_CX16 | FEATURES_XSAVE))
            verdict(0, "the processor offered to guests lacks cmpxchg16b or xsave");
    must(ioctl(vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
    free(cpuid);
}

static void set_registers(int vcpu) {
    struct kvm_sregs sregs;
    must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    struct kvm_segment code = {.limit = ~0u, .selector = CODE_SELECTOR, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    struct kvm_segment data = {.limit = ~0u, .selector = DATA_SELECTOR, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.gdt = (struct kvm_dtable){.base = GDT, .limit = 23};
    sregs.idt = (struct kvm_dtable){.base = IDT, .limit = 4095};
    sregs.cr0 = CR0_LONG_MODE;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_GUEST;
    sregs.efer = EFER_LONG_MODE;
    must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = {.rip = CODE, .rsp = STACK, .rflags = 2};
    must(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// Runs to the next write to a port; returns the port and sets *value.
static int next_port(int vcpu, struct kvm_run *run, uint8_t *value) {
    while (ioctl(vcpu, KVM_RUN, 0) < 0)
        if (errno != EINTR)
            verdict(0, "KVM_RUN: %s", strerror(errno));
    if (run->exit_reason != KVM_EXIT_IO)
        verdict(0, "the guest ended with exit reason %u where it should have written to a port", run->exit_reason);
    *value = *((uint8_t *)run + run->io.data_offset);
    return run->io.port;
}

static void probe(void) {
    int kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    int vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    uint8_t *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        verdict(0, "no memory");
    fill_memory(memory);
    struct kvm_userspace_memory_region region = {.memory_size = MEMORY, .userspace_addr = (uintptr_t)memory};
    must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    int vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    int size = must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        verdict(0, "mapping the vCPU: %s", strerror(errno));
    set_cpuid(kvm, vcpu);
    set_registers(vcpu);

    uint8_t value;
    if (next_port(vcpu, run, &value) != PORT_RESULT)
        verdict(0, "the guest wrote to the wrong port");
    if (value != 7)
        verdict(0, "wrong result of%s%s%s", value & 1 ? "" : " int3", value & 2 ? "" : " cmpxchg16b", value & 4 ? "" : " xsave/xrstor");
    uint64_t begun = now_ns();
    for (int i = 0; i < EXITS; i++)
        if (next_port(vcpu, run, &value) != PORT_EXIT)
            verdict(0, "the guest wrote to the wrong port");
    uint64_t each = (now_ns() - begun) / EXITS;
    if (next_port(vcpu, run, &value) != PORT_END)
        verdict(0, "the guest wrote to the wrong port");
    if (each >= MAX_EXIT_NS)
        verdict(0, "an exit takes %llu ns (limit %d)", (unsigned long long)each, MAX_EXIT_NS);
    verdict(1, "int3, cmpxchg16b, xsave and xrstor are right, an exit takes %llu ns", (unsigned long long)each);
}

int main(void) {
    int ends[2];
    if (pipe(ends) < 0)
        verdict(0, "pipe: %s", strerror(errno));
    pid_t child = fork();
    if (child < 0)
        verdict(0, "fork: %s", strerror(errno));
    if (child == 0) {
        dup2(ends[1], STDOUT_FILENO);
        close(ends[0]);
        close(ends[1]);
        probe();
    }
    close(ends[1]);
    struct pollfd end = {.fd = ends[0], .events = POLLIN};
    char line[512];
    ssize_t len = poll(&end, 1, TIME_LIMIT_MS) > 0 ? read(ends[0], line, sizeof line - 1) : -1;
    if (len < 0) {
        kill(child, SIGKILL); // it may sit in the kernel for good
        verdict(0, "no answer within %d ms", TIME_LIMIT_MS);
    }
    int status;
    if (len == 0 || waitpid(child, &status, 0) < 0)
        verdict(0, "the probe died");
    line[len] = 0;
    fputs(line, stdout);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
