# Pericarp. `make demo` shows it, `make test` proves it, `make bench` measures it, `make install` puts it on a machine.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PREFIX ?= /usr
TARGET := x86_64-unknown-linux-gnu
HOST_BIN := target/release
STATIC_BIN := target/$(TARGET)/release
# An installed tree, which demo, tests and benchmarks use.
ROOT := target/root
LAB := tests/lab/lab

.PHONY: demo test test-all test-host test-lab test-containerd test-kubernetes lab-containerd-debian lab-containerd-new lab-containerd-short lab-conformance lab-a lab-b lab-boot fuzz-smoke conformance bench build install lint setup programs static-programs kernel initrd clean lab-kubernetes

## What is built

build: programs static-programs kernel initrd

setup:
	tests/lab/prepare

programs:
	cargo build --release --locked -p cri-shim -p pericarp-benches

# What starts once per pod is static: no dynamic loader on the path of a pod's start, no library to find in a jail.
static-programs:
	RUSTFLAGS='-C target-feature=+crt-static' CARGO_PROFILE_RELEASE_LTO=thin cargo build --release --locked --target $(TARGET) -p pericarp-vmm -p pericarp-fs -p pericarp-init -p pericarp-load

kernel:
	guest-kernel/build

initrd: static-programs
	initrd/build $(STATIC_BIN)/pericarp-init target/initrd

install: build
	install -Dt $(DESTDIR)$(PREFIX)/bin $(HOST_BIN)/pericarpd $(HOST_BIN)/pericarp $(HOST_BIN)/containerd-shim-pericarp-v2
	install -Dt $(DESTDIR)$(PREFIX)/lib/pericarp $(STATIC_BIN)/pericarp-vmm $(STATIC_BIN)/pericarp-fs
	kernel=$$(guest-kernel/build --print-dir); install -Dm644 -t $(DESTDIR)$(PREFIX)/lib/pericarp $$kernel/vmlinux $$kernel/version target/initrd
	install -Dm644 -t $(DESTDIR)/etc/pericarp deploy/pericarp.toml
	install -Dm644 -t $(DESTDIR)/etc/cni/net.d deploy/10-pericarp.conflist
	install -Dm644 -t $(DESTDIR)$(PREFIX)/lib/systemd/system deploy/pericarpd.service

$(ROOT): setup
	$(MAKE) --no-print-directory install DESTDIR=$(CURDIR)/$(ROOT) PREFIX=/usr

.PHONY: $(ROOT)

## What is shown, proven and measured

demo: $(ROOT)
	tests/lab/images >/dev/null
	tests/lab/go-tools crictl >/dev/null
	$(LAB) --timeout 600 -- tests/demo

test: lint test-host test-lab

# What takes longer.
test-all: test
	tests/lab/selftest
	tests/lab/previous >/dev/null
	tests/lab/go-tools all-in-one >/dev/null
	PERICARP_KILL_ROUNDS=20 PERICARP_BULK=whole $(call in_lab,pericarp-tests,$(LAB_TESTS_SLOW))

lint:
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo_deny=$$(tests/cargo-tool cargo-deny 0.20.2) && $$cargo_deny --offline check --hide-inclusion-graph bans licenses sources

# The agent's own integration tests want every cgroup controller, which only the lab is sure to have.
test-host: setup
	cargo test --locked --workspace --exclude pericarp-tests --exclude pericarp-init
	cargo test --locked -p pericarp-init --bins
	cargo test --locked -p pericarp-tests --test architecture

# Two labs side by side use both cores; the longest comes first.
LAB_TESTS_A := pod cli kill volumes block images resize
LAB_TESTS_B := bad_input streaming at_once calls observe kill_points
LAB_TESTS_SLOW := in_turn kill_points bulk upgrade spans faults flush hostile jail

# $(call in_lab,PACKAGE,TESTS): cargo runs each test binary through the lab.
in_lab = CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='$(CURDIR)/$(LAB) --timeout 2400 --' cargo test --locked -p $(1) \
	$(addprefix --test ,$(2)) -- --test-threads 1 --nocapture
LIB := $(CURDIR)/$(ROOT)/usr/lib/pericarp
IN_GUEST := PERICARP_VMM=$(LIB)/pericarp-vmm PERICARP_KERNEL=$(LIB)/vmlinux PERICARP_INITRD=$(LIB)/initrd

test-lab: $(ROOT)
	tests/lab/images >/dev/null
	tests/lab/go-tools crictl critest ginkgo containerd ctr >/dev/null
	tests/lab/go-tools $(KUBERNETES) >/dev/null
	cargo test --locked -p pericarp-tests -p pericarp-init --no-run
	cargo test --locked -p pericarp-tests --test panics
	cargo build --release --locked -p cri-shim --features kill-points --bin pericarpd
	install -Dt target/kill-points $(HOST_BIN)/pericarpd
	$(MAKE) --no-print-directory --keep-going --jobs 2 lab-conformance lab-a lab-b lab-kubernetes lab-containerd-short lab-boot

lab-conformance:
	tests/conformance/run

lab-a:
	$(call in_lab,pericarp-tests,$(LAB_TESTS_A))

# The agent runs in namespaces of the lab, whose cgroups and disks can be looked at, and in a guest, which is the real thing.
lab-b:
	$(call in_lab,pericarp-tests,$(LAB_TESTS_B))
	$(call in_lab,pericarp-init,containers sessions)
	$(IN_GUEST) $(call in_lab,pericarp-init,containers sessions)

# What a boot costs, and that it costs no more than it did.
lab-boot:
	benches/run boot

# containerd with our shim, Debian's release and a newer one, side by side.
test-containerd: $(ROOT)
	tests/lab/images >/dev/null
	tests/lab/go-tools crictl containerd ctr >/dev/null
	cargo test --locked -p pericarp-tests --test containerd --no-run
	$(MAKE) --no-print-directory --keep-going --jobs 2 lab-containerd-debian lab-containerd-new

lab-containerd-debian lab-containerd-new:
	$(call in_lab,pericarp-tests,containerd) $(@:lab-containerd-%=%)::

# Of the newer one the promises that tell most in less than four minutes.
CONTAINERD_SHORT := a_single_container_runs a_pod_runs_by_its_runtime_handler a_container_out_of_memory ports_are_forwarded a_program_takes_the_output \
	a_killed_shim_leaves_nothing containerd_may_be_killed a_block_snapshot a_pod_has_users what_no_guest_can_have

lab-containerd-short:
	tests/lab/go-tools crictl containerd ctr >/dev/null
	$(call in_lab,pericarp-tests,containerd) $(addprefix new::,$(CONTAINERD_SHORT))

# A whole Kubernetes 1.36.1 of one node whose only runtime is pericarpd; its programs are built the first time, for ten minutes.
KUBERNETES := kubelet kube-apiserver kube-scheduler kube-controller-manager kube-proxy kubectl kubeadm coredns

# $(call in_cluster,LAB-OPTIONS,TEST,FILTER)
in_cluster = CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='$(CURDIR)/$(LAB) --memory 8192 --timeout 5400 $(1) --' \
	cargo test --locked -p pericarp-tests --test $(2) -- --test-threads 1 $(3)

# Of it what tells most in less than ten minutes.
KUBERNETES_FIRST := node_is_ready deployment_is_ready both_at_once services_of_both names_are_found config_maps limits_change events_say \
	probes_by_exec exec_gives

lab-kubernetes:
	$(call in_cluster,,kubernetes,$(KUBERNETES_FIRST))

test-kubernetes: $(ROOT)
	tests/lab/images >/dev/null
	tests/lab/go-tools crictl >/dev/null
	tests/lab/go-tools $(KUBERNETES) >/dev/null
	$(call in_cluster,,kubelet,)
	$(call in_cluster,,kubernetes,)
	truncate --size 0 target/node.img; truncate --size 8G target/node.img; mkfs.ext4 -q target/node.img
	for boot in first_boot second_boot; do $(call in_cluster,--disk $(CURDIR)/target/node.img,reboot,$$boot); done
	rm target/node.img

# Each fuzz target for a minute, from what was found before; FUZZ_SECONDS=3600 for longer.
FUZZ_TARGETS := balloon blk fs loader mem net protocol registers ring vsock
FUZZ_SECONDS := 60

fuzz-smoke:
	mkdir -p tests/fuzz/corpus
	tar -C tests/fuzz/corpus --skip-old-files -xf tests/fuzz/corpus.tar.xz
	cargo_fuzz=$$(tests/cargo-tool cargo-fuzz 0.13.1); PATH=$${cargo_fuzz%/*}:$$PATH; for target in $(FUZZ_TARGETS); do \
	    cargo fuzz run --fuzz-dir tests/fuzz --sanitizer none $$target -- -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=2048; done

# Kubernetes' own suite for container runtimes, all of it: twenty minutes in the lab. FLAGS go to tests/conformance/run.
conformance: $(ROOT)
	tests/conformance/run $(FLAGS)

# PARTS="plain boot" measures only that.
bench: $(ROOT)
	benches/run $(PARTS)

clean:
	cargo clean
