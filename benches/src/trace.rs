//! What the lab's kernel saw of a boot, through its tracepoints: each exit of the guest with its reason, each system
//! call of the VMM. Tracing costs instructions, so a traced boot is never one that is counted.

use std::collections::BTreeMap;
use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::{Context, Result};

const TRACEFS: &str = "/sys/kernel/tracing";

/// KiB of records kept per CPU; a boot leaves less than one MiB.
const BUFFER_KIB: u32 = 16 << 10;

/// Exits, and what tells more about one.
const EVENTS: [&str; 6] =
    ["kvm/kvm_exit", "kvm/kvm_cpuid", "kvm/kvm_msr", "kvm/kvm_pio", "kvm/kvm_mmio", "raw_syscalls/sys_enter"];

/// Guest addresses from here on are device memory on every machine that is measured.
const DEVICES: u64 = 0xc000_0000;

/// Tracing, on until [`Trace::stop`].
pub(crate) struct Trace;

impl Trace {
    /// Begins to trace `processes` and all that they start from now on.
    pub(crate) fn start(processes: &[u32]) -> Result<Self> {
        set("tracing_on", "0")?;
        set("trace", "")?;
        set("trace_clock", "boot")?;
        set("buffer_size_kb", &BUFFER_KIB.to_string())?;
        set("options/event-fork", "1")?;
        let pids: Vec<_> = processes.iter().map(u32::to_string).collect();
        set("set_event_pid", &pids.join(" "))?;
        for event in EVENTS {
            set(&format!("events/{event}/enable"), "1")?;
        }
        set("tracing_on", "1")?;
        Ok(Self)
    }

    /// Ends it and counts what was recorded in these moments by all but `processes`.
    pub(crate) fn stop(self, processes: &[u32], moments: RangeInclusive<u64>) -> Result<Counts> {
        set("tracing_on", "0")?;
        let text = fs::read_to_string(Path::new(TRACEFS).join("trace")).context("reading the trace")?;
        for event in EVENTS {
            set(&format!("events/{event}/enable"), "0")?;
        }
        set("trace", "")?;
        Ok(Counts::of(&text, processes, &moments))
    }
}

fn set(name: &str, value: &str) -> Result<()> {
    let path = Path::new(TRACEFS).join(name);
    fs::write(&path, value).with_context(|| format!("writing {}", path.display()))
}

/// How often each thing happened.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Exits by KVM's name of the reason.
    pub(crate) exits: BTreeMap<String, u64>,
    /// What those that KVM tells more about were for.
    pub(crate) details: BTreeMap<String, u64>,
    /// System calls by number.
    pub(crate) syscalls: BTreeMap<u64, u64>,
}

impl Counts {
    fn of(trace: &str, without: &[u32], moments: &RangeInclusive<u64>) -> Self {
        let mut counts = Self::default();
        for record in trace.lines().filter_map(Record::parse) {
            if moments.contains(&record.at_ns) && !without.contains(&record.pid) {
                counts.count(&record);
            }
        }
        counts
    }

    fn count(&mut self, record: &Record<'_>) {
        let detail = match record.event {
            "kvm_exit" => {
                let Some(reason) = record.after("reason") else { return };
                *self.exits.entry(reason.to_owned()).or_default() += 1;
                fault(record, reason)
            }
            "sys_enter" => {
                let number = record.fields.strip_prefix("NR ").and_then(|rest| rest.split(' ').next()?.parse().ok());
                if let Some(number) = number {
                    *self.syscalls.entry(number).or_default() += 1;
                }
                None
            }
            "kvm_cpuid" => record.after("func").map(|leaf| format!("cpuid {leaf}")),
            "kvm_msr" => record.fields.split(" = ").next().map(|access| access.replace("msr_", "msr ")),
            "kvm_pio" => record.fields.split(" size").next().map(|access| access.replace("pio_", "io ")),
            "kvm_mmio" => memory(record),
            _ => None,
        };
        if let Some(detail) = detail {
            *self.details.entry(detail).or_default() += 1;
        }
    }
}

/// A fault of nested paging in memory; those in device memory are told by their access.
fn fault(record: &Record<'_>, reason: &str) -> Option<String> {
    let address = u64::from_str_radix(record.after("info2")?.strip_prefix("0x")?, 16).ok()?;
    (reason == "npf" && address < DEVICES).then(|| format!("npf memory at {} MiB", address >> 20))
}

fn memory(record: &Record<'_>) -> Option<String> {
    let kind = record.fields.split(' ').nth(1)?;
    // A read is recorded once more, when it is still without its value.
    if kind == "unsatisfied-read" {
        return None;
    }
    let address = u64::from_str_radix(record.after("gpa")?.strip_prefix("0x")?, 16).ok()?;
    Some(format!("mmio {kind} page {:#x}", address >> 12 << 12))
}

/// One line of the trace: `vcpu0-812 [000] ..... 12.345678: kvm_exit: vcpu 0 reason npf rip …`.
struct Record<'t> {
    pid: u32,
    at_ns: u64,
    event: &'t str,
    fields: &'t str,
}

impl<'t> Record<'t> {
    fn parse(line: &'t str) -> Option<Self> {
        let (head, rest) = line.split_once(": ")?;
        let (event, fields) = rest.split_once(": ").or_else(|| Some((rest.strip_suffix(':')?, "")))?;
        // The name of a thread may hold blanks and dashes.
        let (thread, after) = head.split_once(" [")?;
        let pid = thread.trim_end().rsplit_once('-')?.1.parse().ok()?;
        let (seconds, micros) = after.rsplit_once(' ')?.1.split_once('.')?;
        let at_ns = (seconds.parse::<u64>().ok()? * 1_000_000 + micros.parse::<u64>().ok()?) * 1000;
        // Calls are written as `sys_enter: NR 0 (…)`.
        Some(Self { pid, at_ns, event, fields })
    }

    /// The word behind a word.
    fn after(&self, word: &str) -> Option<&'t str> {
        let mut words = self.fields.split_whitespace();
        words.find(|found| *found == word)?;
        words.next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
           vcpu0-812     [000] .....    12.345678: kvm_exit: vcpu 0 reason npf rip 0xffffffff81000000 info1 0x0000000100000004 info2 0x0000000000200000 intr_info 0x00000000 error_code 0x00000000
           vcpu0-812     [000] .....    12.345679: kvm_exit: vcpu 0 reason npf rip 0xffffffff81000000 info1 0x0000000100000004 info2 0x00000000e0000010 intr_info 0x00000000 error_code 0x00000000
           vcpu0-812     [000] .....    12.345679: kvm_mmio: mmio unsatisfied-read len 4 gpa 0xe0000010 val 0x0
           vcpu0-812     [000] .....    12.345680: kvm_mmio: mmio read len 4 gpa 0xe0000010 val 0x1
           vcpu0-812     [000] .....    12.345681: kvm_cpuid: func 40000001 idx 0 rax 1 rbx 0 rcx 0 rdx 0, cpuid entry found
           vcpu0-812     [000] .....    12.345682: kvm_msr: msr_write 6e0 = 0x1234
           vcpu0-812     [000] .....    12.345683: kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x48
 pericarp-vmm m-800     [000] .....    12.345684: sys_enter: NR 16 (3, ae80, 0, 0, 0, 0)
         spawner-700     [000] .....    12.345685: sys_enter: NR 16 (3, ae80, 0, 0, 0, 0)
           vcpu0-812     [000] .....    99.000000: kvm_exit: vcpu 0 reason hlt rip 0x0 info1 0x0 info2 0x0
";

    #[test]
    fn each_record_is_counted_once_up_to_the_moment() {
        let counts = Counts::of(TRACE, &[700], &(0..=20_000_000_000));
        assert_eq!(counts.exits, BTreeMap::from([("npf".to_owned(), 2)]));
        assert_eq!(counts.syscalls, BTreeMap::from([(16, 1)]));
        let details: Vec<_> = counts.details.into_iter().map(|(detail, count)| format!("{detail}: {count}")).collect();
        let expected = [
            "cpuid 40000001: 1",
            "io write at 0x3f8: 1",
            "mmio read page 0xe0000000: 1",
            "msr write 6e0: 1",
            "npf memory at 2 MiB: 1",
        ];
        assert_eq!(details, expected);
    }
}
