// labrun: process 1 of the lab once its root is up. It owns the two virtio-serial ports that lead to tests/lab/lab:
//   port 1 (output): the command's stdout and stderr, byte for byte;
//   port 2 (control): in comes the job, then 'p' for "are you alive"; out go the lines "up …", "pong", "exit N", "fail …".
// It also holds one KVM machine open for the lab's life, so that the kernel patches its own text at the first VM only:
// under QEMU's TCG every such patch is a risk, and it makes instruction counts steadier.
// It never reads the console and never writes to it once the job has started.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/kvm.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
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
