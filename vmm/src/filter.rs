//! A system call filter as the kernel takes it: classic BPF (Documentation/userspace-api/seccomp_filter.rst).
//!
//! It only builds the program. A call's number is looked up by halving the list of those allowed and not by comparing with one
//! after the other: when a filter is installed the kernel runs it for every number it knows, at each start of a VM.

use seccompiler::sock_filter;

/// `struct seccomp_data`: number, architecture; then arguments of eight bytes, the low half first.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// AUDIT_ARCH_X86_64.
const X86_64: u32 = 0xc000_003e;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// The low half of an argument, some bits of which must be as said.
#[derive(Clone, Copy, Debug)]
pub struct Argument {
    /// From 0.
    pub index: u32,
    /// The bits.
    pub mask: u32,
    /// What they must be.
    pub value: u32,
}

/// A system call, and what one of its arguments must be like: one condition of these holds, or there are none.
pub type Rule<'a> = (u32, &'a [Argument]);

/// The program that lets these calls pass, each named once, and traps any other.
pub fn program(rules: &[Rule<'_>]) -> Vec<sock_filter> {
    let mut rules = rules.to_vec();
    rules.sort_unstable_by_key(|(call, _)| *call);
    let mut program = vec![
        instruction(LOAD, ARCHITECTURE),
        jump(EQUAL, X86_64, 1, 0),
        instruction(RETURN, libc::SECCOMP_RET_KILL_PROCESS),
        instruction(LOAD, NUMBER),
    ];
    look_up(&rules, &mut program);
    program
}

/// Appends what finds the rule of a number among these.
fn look_up(rules: &[Rule<'_>], program: &mut Vec<sock_filter>) {
    let at = program.len();
    match rules {
        [] => {}
        [(call, arguments)] => {
            program.push(instruction(EQUAL, *call));
            allow(arguments, program);
            program[at].jf = distance(at, program.len());
        }
        rules => {
            let (low, high) = rules.split_at(rules.len() / 2);
            program.push(instruction(AT_LEAST, high.first().map_or(u32::MAX, |(call, _)| *call)));
            look_up(low, program);
            program[at].jt = distance(at, program.len());
            return look_up(high, program);
        }
    }
    program.push(instruction(RETURN, libc::SECCOMP_RET_TRAP));
}

/// How far an instruction jumps to get to another. The kernel refuses a program that is too long for it, and the jail's tests build
/// the one there is.
fn distance(from: usize, to: usize) -> u8 {
    u8::try_from(to - from - 1).unwrap_or(u8::MAX)
}

/// Appends what allows if one of the conditions holds, or if there is none, and goes on behind itself otherwise.
fn allow(arguments: &[Argument], program: &mut Vec<sock_filter>) {
    let allow = || instruction(RETURN, libc::SECCOMP_RET_ALLOW);
    if arguments.is_empty() {
        program.push(allow());
    }
    for argument in arguments {
        let load = instruction(LOAD, ARGUMENTS + 8 * argument.index);
        program.extend([load, instruction(AND, argument.mask), jump(EQUAL, argument.value, 0, 1), allow()]);
    }
}

fn instruction(code: u16, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What the kernel would do of a call; the program may jump forward only, so it ends.
    pub(crate) fn verdict(program: &[sock_filter], architecture: u32, call: u32, arguments: [u64; 6]) -> u32 {
        let mut data = [0_u8; 64];
        data[..4].copy_from_slice(&call.to_le_bytes());
        data[4..8].copy_from_slice(&architecture.to_le_bytes());
        for (at, argument) in arguments.iter().enumerate() {
            data[16 + 8 * at..24 + 8 * at].copy_from_slice(&argument.to_le_bytes());
        }
        let (mut at, mut accumulator) = (0, 0_u32);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let taken = |yes: bool| usize::from(if yes { jt } else { jf });
            match code {
                LOAD => accumulator = u32::from_le_bytes(data[k as usize..k as usize + 4].try_into().unwrap()),
                AND => accumulator &= k,
                EQUAL => at += taken(accumulator == k),
                AT_LEAST => at += taken(accumulator >= k),
                RETURN => return k,
                _ => panic!("instruction {code:#x}"),
            }
        }
    }

    #[test]
    fn only_what_a_rule_names_passes() {
        let kvm = [Argument { index: 1, mask: 0xff00, value: 0xae00 }, Argument { index: 1, mask: !0, value: 0x5421 }];
        let rules: Vec<Rule<'_>> = vec![(231, &[]), (16, &kvm), (0, &[]), (3, &[]), (230, &[])];
        let program = program(&rules);
        for call in 0..500 {
            for (request, is_ioctl) in [(0xae80, true), (0x5421, true), (0x5422, false), (0, false)] {
                let allowed = matches!(call, 231 | 0 | 3 | 230) || call == 16 && is_ioctl;
                let expected = if allowed { libc::SECCOMP_RET_ALLOW } else { libc::SECCOMP_RET_TRAP };
                assert_eq!(verdict(&program, X86_64, call, [0, request, 0, 0, 0, 0]), expected, "{call} {request:#x}");
            }
        }
        let x32 = 0x4000_0000;
        assert_eq!(verdict(&program, X86_64, x32, [0; 6]), libc::SECCOMP_RET_TRAP);
        // AUDIT_ARCH_I386.
        assert_eq!(verdict(&program, 0x4000_0003, 0, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS);
    }
}
