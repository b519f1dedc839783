// labrun: process 1 of the lab once its root is up. It owns the two virtio-serial ports that lead to tests/lab/lab:
//   port 1 (output): the command's stdout and stderr, byte for byte;
//   port 2 (control): in comes the job, then 'p' for "are you alive"; out go the lines "up …", "pong", "exit N", "fail …".
// It also holds one KVM machine open for the lab's life, so that the kernel patches its own text at the first VM only:
// under QEMU's TCG every such patch is a risk, and it makes instruction counts steadier.
// And it works round a fault of QEMU's TCG (see exit_after_injections).
// It never reads the console and never writes to it once the job has started.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/bpf.h>
#include <linux/kvm.h>
#include <linux/perf_event.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define OUTPUT_PORT "/dev/vport*p1" // the first number counts virtio devices
#define CONTROL_PORT "/dev/vport*p2"
#define PORT_WAIT_TRIES 3000 // × 10 ms: the ports appear a little after the driver
#define MAX_JOB (4 << 20)    // bytes; the launcher refuses more
#define EXIT_NOT_EXECUTABLE 126
#define EXIT_NOT_FOUND 127

static int control = -1;
static int output = -1;

static void write_all(int fd, const char *data, size_t len) {
    while (len > 0) {
        ssize_t n = write(fd, data, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return; // the launcher is gone, and the lab with it in a moment
        data += n;
        len -= (size_t)n;
    }
}

static void say(const char *format, ...) {
    char line[512];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (n > 0)
        write_all(control, line, (size_t)n < sizeof line ? (size_t)n : sizeof line - 1);
}

static void fail(const char *what) {
    if (control >= 0)
        say("fail %s: %s\n", what, strerror(errno));
    fprintf(stderr, "labrun: %s: %s\n", what, strerror(errno));
    exit(1); // process 1 ends: the kernel panics, and the launcher shows the console
}

static int open_port(const char *pattern) {
    for (int i = 0; i < PORT_WAIT_TRIES; i++) {
        glob_t found;
        int fd = -1;
        if (glob(pattern, 0, NULL, &found) == 0)
            fd = open(found.gl_pathv[0], O_RDWR | O_CLOEXEC);
        globfree(&found);
        if (fd >= 0)
            return fd;
        usleep(10000);
    }
    fail(pattern);
    return -1;
}

static void hold_kvm(void) {
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        fail("/dev/kvm");
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0 || ioctl(vm, KVM_CREATE_IRQCHIP, 0) < 0 || ioctl(vm, KVM_CREATE_VCPU, 0) < 0)
        fail("holding a KVM machine");
    fcntl(vm, F_SETFD, FD_CLOEXEC); // KVM's descriptors are close-on-exec already; this says so
}

// One BPF instruction.
#define INSN(op, to, from, offset, value) {.code = (op), .dst_reg = (to), .src_reg = (from), .off = (offset), .imm = (value)}
#define CALL(helper) INSN(BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_##helper)
#define SLOTS 1024 // threads that are told apart; two that share one only cost an exit more
#define TO_U64(pointer) ((__u64)(unsigned long)(pointer))

// Leaves in r0 the slot of the running thread, or NULL.
#define FIND_SLOT(map)                                                                    \
    CALL(get_current_pid_tgid), INSN(BPF_ALU64 | BPF_AND | BPF_K, 0, 0, 0, SLOTS - 1),    \
        INSN(BPF_STX | BPF_MEM | BPF_W, BPF_REG_10, 0, -4, 0),                            \
        INSN(BPF_ALU64 | BPF_MOV | BPF_X, BPF_REG_2, BPF_REG_10, 0, 0),                   \
        INSN(BPF_ALU64 | BPF_ADD | BPF_K, BPF_REG_2, 0, 0, -4),                           \
        INSN(BPF_LD | BPF_DW | BPF_IMM, BPF_REG_1, BPF_PSEUDO_MAP_FD, 0, map), INSN(0, 0, 0, 0, 0), CALL(map_lookup_elem)

static void on_tracepoint(const char *name, const struct bpf_insn *program, size_t count) {
    char path[128], number[32] = {0};
    snprintf(path, sizeof path, "/sys/kernel/tracing/events/kvm/%s/id", name);
    int id = open(path, O_RDONLY | O_CLOEXEC);
    if (id < 0 || read(id, number, sizeof number - 1) <= 0)
        fail(path);
    close(id);
    union bpf_attr load = {.prog_type = BPF_PROG_TYPE_TRACEPOINT, .insns = TO_U64(program), .insn_cnt = (__u32)count,
                           .license = TO_U64("Apache-2.0")};
    struct perf_event_attr attr = {.type = PERF_TYPE_TRACEPOINT, .size = sizeof attr, .config = strtoul(number, NULL, 10),
                                   .sample_period = 1};
    long loaded = syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof load);
    long event = syscall(SYS_perf_event_open, &attr, -1, 0, -1, PERF_FLAG_FD_CLOEXEC); // CPU 0 is the only one
    if (loaded < 0 || event < 0 || ioctl((int)event, PERF_EVENT_IOC_SET_BPF, (int)loaded) < 0)
        fail(name);
    close((int)loaded);
    // The event stays open, and with it the program, as long as this process lives.
}

// QEMU's TCG (7.2) delivers an interrupt that VMRUN injects at once, but forgets to forget it: if the emulator leaves its loop
// before the guest's next exit, as it does when a timer is due, the guest gets the same interrupt again, even where it has
// interrupts disabled, and can deadlock on a lock that it holds. An exit forgets it. So each entry that injects an interrupt
// is made to exit at once: bpf_send_signal with interrupts disabled raises an interrupt of the lab's own, which waits
// for the entry; signal 0 is none. An entry with an injection therefore counts one exit more in the lab than elsewhere.
static void exit_after_injections(void) {
    union bpf_attr create = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = SLOTS};
    int injected = (int)syscall(SYS_bpf, BPF_MAP_CREATE, &create, sizeof create);
    if (injected < 0)
        fail("a BPF map");
    const struct bpf_insn on_injection[] = {
        FIND_SLOT(injected),
        INSN(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 1, 0),
        INSN(BPF_ST | BPF_MEM | BPF_W, 0, 0, 0, 1),
        INSN(BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, 0),
        INSN(BPF_JMP | BPF_EXIT, 0, 0, 0, 0),
    };
    const struct bpf_insn on_entry[] = {
        FIND_SLOT(injected),
        INSN(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 5, 0),
        INSN(BPF_LDX | BPF_MEM | BPF_W, BPF_REG_1, 0, 0, 0),
        INSN(BPF_JMP | BPF_JEQ | BPF_K, BPF_REG_1, 0, 3, 0),
        INSN(BPF_ST | BPF_MEM | BPF_W, 0, 0, 0, 0),
        INSN(BPF_ALU64 | BPF_MOV | BPF_K, BPF_REG_1, 0, 0, 0),
        CALL(send_signal),
        INSN(BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, 0),
        INSN(BPF_JMP | BPF_EXIT, 0, 0, 0, 0),
    };
    on_tracepoint("kvm_inj_virq", on_injection, sizeof on_injection / sizeof *on_injection);
    on_tracepoint("kvm_entry", on_entry, sizeof on_entry / sizeof *on_entry);
    close(injected); // the programs hold it
}

static void read_exactly(int fd, char *into, size_t len) {
    while (len > 0) {
        ssize_t n = read(fd, into, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            fail("reading the job");
        into += n;
        len -= (size_t)n;
    }
}

// The job: a decimal length in 16 bytes, then NUL-terminated strings: directory, environment…, "", argument….
struct job {
    char *dir;
    char **env;
    char **argv;
};

static struct job read_job(void) {
    char head[17] = {0};
    read_exactly(control, head, 16);
    size_t len = strtoul(head, NULL, 10);
    if (len == 0 || len > MAX_JOB) {
        errno = EMSGSIZE;
        fail("the job's length");
    }
    char *text = malloc(len + 1);
    char **words = calloc(len + 2, sizeof *words); // no more words than bytes
    if (!text || !words)
        fail("memory for the job");
    read_exactly(control, text, len);
    text[len] = 0;
    size_t count = 0;
    for (size_t at = 0; at < len; at += strlen(text + at) + 1)
        words[count++] = text + at;
    struct job job = {.dir = words[0], .env = words + 1, .argv = words + 1};
    while (*job.argv && **job.argv)
        job.argv++;
    if (!*job.argv || !job.argv[1]) {
        errno = EINVAL;
        fail("the job has no command");
    }
    *job.argv++ = NULL; // ends env
    return job;
}

static pid_t start(const struct job *job, int out) {
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    int null = open("/dev/null", O_RDONLY);
    dup2(null, 0);
    dup2(out, 1);
    dup2(out, 2);
    close(null);
    environ = job->env;
    if (chdir(job->dir) < 0) {
        dprintf(2, "lab: %s: %s\n", job->dir, strerror(errno));
        _exit(EXIT_NOT_EXECUTABLE);
    }
    execvp(job->argv[0], job->argv);
    dprintf(2, "lab: %s: %s\n", job->argv[0], strerror(errno));
    _exit(errno == ENOENT ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE);
}

// Copies up to max bytes; returns what was copied, 0 at the end of the pipe.
static size_t pump(int pipe, size_t max) {
    char buffer[16384];
    ssize_t n = read(pipe, buffer, max < sizeof buffer ? max : sizeof buffer);
    if (n <= 0)
        return 0;
    write_all(output, buffer, (size_t)n);
    return (size_t)n;
}

// Reaps whatever has ended; returns the exit code if the job's own process is among them, else -1.
static int reap(pid_t job) {
    int code = -1, status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == job)
            code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    return code;
}

static void finish(int pipe, int code) {
    // What the command wrote is in the pipe by now; what its leftovers still write is not waited for.
    int left = 0;
    if (pipe >= 0 && ioctl(pipe, FIONREAD, &left) == 0)
        while (left > 0) {
            size_t n = pump(pipe, (size_t)left);
            if (n == 0)
                break;
            left -= (int)n;
        }
    say("exit %d\n", code);
}

static void serve(pid_t job, int pipe, int signals) {
    struct pollfd fds[] = {{.fd = signals, .events = POLLIN}, {.fd = control, .events = POLLIN}, {.fd = pipe, .events = POLLIN}};
    for (;;) {
        if (poll(fds, 3, -1) < 0 && errno != EINTR)
            fail("poll");
        if (fds[2].revents && pump(pipe, SIZE_MAX) == 0)
            fds[2].fd = -1;
        if (fds[1].revents & POLLIN) {
            char ping;
            if (read(control, &ping, 1) == 1)
                say("pong\n");
        }
        if (fds[0].revents & POLLIN) {
            struct signalfd_siginfo info;
            if (read(signals, &info, sizeof info) < 0 && errno != EAGAIN)
                fail("signalfd");
            int code = reap(job);
            if (code >= 0)
                finish(fds[2].fd, code);
        }
    }
}

int main(void) {
    control = open_port(CONTROL_PORT);
    output = open_port(OUTPUT_PORT);
    hold_kvm();
    exit_after_injections();
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    int signals = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    int out[2];
    if (signals < 0 || pipe2(out, O_CLOEXEC) < 0)
        fail("pipe");
    struct job job = read_job();
    struct utsname name;
    struct timespec now;
    uname(&name);
    clock_gettime(CLOCK_BOOTTIME, &now);
    say("up %ld.%02ld %s\n", (long)now.tv_sec, now.tv_nsec / 10000000, name.release);
    pid_t pid = start(&job, out[1]);
    if (pid < 0)
        fail("fork");
    close(out[1]);
    serve(pid, out[0], signals);
}
