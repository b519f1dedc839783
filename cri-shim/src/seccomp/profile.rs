//! Profiles of the node: the JSON of the OCI runtime specification (config-linux.md, Seccomp), made into a filter.
//!
//! A profile is an administrator's: what it asks for and cannot be had is refused by name, and a call that the guest
//! does not know is left out, as other runtimes do. Rules are tried in their order, and the first that fits decides.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use libc::{
    EPERM, SECCOMP_RET_ALLOW, SECCOMP_RET_DATA, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_KILL_THREAD,
    SECCOMP_RET_LOG, SECCOMP_RET_TRACE, SECCOMP_RET_TRAP,
};
use seccompiler::sock_filter;
use serde::Deserialize;
use syscalls::Sysno;

use crate::error::{Error, IoContext, Result};

/// Longest profile in bytes.
const PROFILE_BYTES: u64 = 1 << 20;

/// Most instructions of a filter (the kernel's BPF_MAXINSNS).
const INSTRUCTIONS: usize = 4096;

/// Offsets in `struct seccomp_data`: number, architecture, and six arguments of 64 bits, low half first.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
const ARGUMENT_BYTES: u32 = 8;
const HALF_BYTES: u32 = 4;

/// Arguments of a call.
const MOST_ARGUMENTS: u32 = 6;

/// The one architecture of guests (linux/audit.h).
const X86_64: u32 = 0xc000_003e;

/// Numbers from here on are of the x32 ABI, which the guest kernel does not have.
const X32: u32 = 0x4000_0000;

// Instructions (linux/bpf_common.h).
const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: Action,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    names: Vec<String>,
    action: Action,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Vec<Condition>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Action {
    #[serde(rename = "SCMP_ACT_KILL", alias = "SCMP_ACT_KILL_THREAD")]
    KillThread,
    #[serde(rename = "SCMP_ACT_KILL_PROCESS")]
    KillProcess,
    #[serde(rename = "SCMP_ACT_TRAP")]
    Trap,
    #[serde(rename = "SCMP_ACT_ERRNO")]
    Errno,
    #[serde(rename = "SCMP_ACT_TRACE")]
    Trace,
    #[serde(rename = "SCMP_ACT_ALLOW")]
    Allow,
    #[serde(rename = "SCMP_ACT_LOG")]
    Log,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: Operator,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Operator {
    #[serde(rename = "SCMP_CMP_NE")]
    NotEqual,
    #[serde(rename = "SCMP_CMP_LT")]
    Less,
    #[serde(rename = "SCMP_CMP_LE")]
    LessOrEqual,
    #[serde(rename = "SCMP_CMP_EQ")]
    Equal,
    #[serde(rename = "SCMP_CMP_GE")]
    GreaterOrEqual,
    #[serde(rename = "SCMP_CMP_GT")]
    Greater,
    #[serde(rename = "SCMP_CMP_MASKED_EQ")]
    MaskedEqual,
}

/// The filter of a profile in a file of the node, as bytes: `struct sock_filter` after `struct sock_filter`.
pub fn local_filter(path: &Path) -> Result<Vec<u8>> {
    let what = || format!("seccomp profile {}", path.display());
    if !path.is_absolute() {
        return Err(Error::InvalidArgument(format!("{} is not an absolute path of the node", what())));
    }
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(PROFILE_BYTES).read_to_string(&mut text));
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::InvalidArgument(format!("{} does not exist", what())));
        }
        read => read.doing(what)?,
    };
    let profile = serde_json::from_str(&text);
    let program = profile.map_err(|error| error.to_string()).and_then(|profile| compile(&profile));
    let program = program.map_err(|why| Error::InvalidArgument(format!("{}: {why}", what())))?;
    Ok(super::bytes(&program))
}

/// The filter of a profile as JSON (OCI runtime specification, config-linux, seccomp), as bytes.
pub fn json_filter(profile: &serde_json::Value) -> Result<Vec<u8>> {
    let profile = Profile::deserialize(profile);
    let program = profile.map_err(|error| error.to_string()).and_then(|profile| compile(&profile));
    let program = program.map_err(|why| Error::InvalidArgument(format!("the container's seccomp profile: {why}")))?;
    Ok(super::bytes(&program))
}

fn step(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

/// Goes on by one of two numbers of instructions past the next.
fn jump(code: u16, k: u32, when: u8, otherwise: u8) -> sock_filter {
    sock_filter { code, jt: when, jf: otherwise, k }
}

fn compile(profile: &Profile) -> Result<Vec<sock_filter>, String> {
    let mut program = vec![
        step(LOAD, ARCHITECTURE),
        jump(JUMP_EQUAL, X86_64, 1, 0),
        step(RETURN, SECCOMP_RET_KILL_PROCESS),
        step(LOAD, NUMBER),
        jump(JUMP_GREATER_OR_EQUAL, X32, 0, 1),
        step(RETURN, SECCOMP_RET_KILL_PROCESS),
    ];
    for rule in &profile.syscalls {
        let answer = answer(rule.action, rule.errno_ret.or(profile.default_errno_ret));
        for number in rule.names.iter().filter_map(|name| number(name)) {
            for conditions in alternatives(&rule.args) {
                program.extend(when(number, conditions, answer)?);
            }
        }
    }
    program.push(step(RETURN, answer(profile.default_action, profile.default_errno_ret)));
    if program.len() > INSTRUCTIONS {
        return Err(format!("it is too long: {} instructions of at most {INSTRUCTIONS}", program.len()));
    }
    Ok(program)
}

fn number(name: &str) -> Option<u32> {
    name.parse::<Sysno>().ok().and_then(|call| u32::try_from(call.id()).ok())
}

/// Conditions of a rule are to be met all at once; but where two are about one argument, each stands for itself (as
/// runc has it, since libseccomp knows one condition per argument).
fn alternatives(conditions: &[Condition]) -> Vec<&[Condition]> {
    let distinct: BTreeSet<u32> = conditions.iter().map(|condition| condition.index).collect();
    if distinct.len() < conditions.len() { conditions.chunks(1).collect() } else { vec![conditions] }
}

fn answer(action: Action, errno: Option<u32>) -> u32 {
    let data = errno.unwrap_or(EPERM.cast_unsigned()) & SECCOMP_RET_DATA;
    match action {
        Action::KillThread => SECCOMP_RET_KILL_THREAD,
        Action::KillProcess => SECCOMP_RET_KILL_PROCESS,
        Action::Trap => SECCOMP_RET_TRAP,
        Action::Errno => SECCOMP_RET_ERRNO | data,
        Action::Trace => SECCOMP_RET_TRACE | data,
        Action::Allow => SECCOMP_RET_ALLOW,
        Action::Log => SECCOMP_RET_LOG,
    }
}

/// The answer for one call under conditions. Begins and ends with the call's number loaded.
fn when(number: u32, conditions: &[Condition], answer: u32) -> Result<Vec<sock_filter>, String> {
    // From back to front, since a condition that is not met goes to the end.
    let mut body = vec![step(RETURN, answer)];
    for condition in conditions.iter().rev() {
        let past = body.len();
        let mut check = check(condition, past)?;
        check.append(&mut body);
        body = check;
    }
    let past = u8::try_from(body.len()).map_err(|_| "a rule has too many conditions")?;
    let mut steps = vec![jump(JUMP_EQUAL, number, 0, past)];
    steps.append(&mut body);
    if !conditions.is_empty() {
        steps.push(step(LOAD, NUMBER));
    }
    Ok(steps)
}

/// Falls through if the condition is met, else jumps over `past` more instructions.
fn check(condition: &Condition, past: usize) -> Result<Vec<sock_filter>, String> {
    let Condition { index, value, value_two, op } = *condition;
    if index >= MOST_ARGUMENTS {
        return Err(format!("a call has no argument {index}"));
    }
    let low = ARGUMENTS.saturating_add(index.saturating_mul(ARGUMENT_BYTES));
    let high = low.saturating_add(HALF_BYTES);
    let past = |after: u8| {
        u8::try_from(past).ok().and_then(|past| past.checked_add(after)).ok_or("a rule has too many conditions")
    };
    let halves = |value: u64| {
        let [l, h] = [value, value >> 32].map(|half| u32::try_from(half & u64::from(u32::MAX)).unwrap_or(0));
        (l, h)
    };
    let (value_low, value_high) = halves(value);
    Ok(match op {
        Operator::Equal => vec![
            step(LOAD, high),
            jump(JUMP_EQUAL, value_high, 0, past(2)?),
            step(LOAD, low),
            jump(JUMP_EQUAL, value_low, 0, past(0)?),
        ],
        Operator::NotEqual => vec![
            step(LOAD, high),
            jump(JUMP_EQUAL, value_high, 0, 2),
            step(LOAD, low),
            jump(JUMP_EQUAL, value_low, past(0)?, 0),
        ],
        // What is masked is compared with the second value.
        Operator::MaskedEqual => {
            let (wanted_low, wanted_high) = halves(value_two);
            vec![
                step(LOAD, high),
                step(AND, value_high),
                jump(JUMP_EQUAL, wanted_high, 0, past(3)?),
                step(LOAD, low),
                step(AND, value_low),
                jump(JUMP_EQUAL, wanted_low, 0, past(0)?),
            ]
        }
        Operator::Greater | Operator::GreaterOrEqual => {
            let code = if op == Operator::Greater { JUMP_GREATER } else { JUMP_GREATER_OR_EQUAL };
            vec![
                step(LOAD, high),
                // More: it is. Less: it is not. The same: the low halves decide.
                jump(JUMP_GREATER, value_high, 3, 0),
                jump(JUMP_EQUAL, value_high, 0, past(2)?),
                step(LOAD, low),
                jump(code, value_low, 0, past(0)?),
            ]
        }
        Operator::Less | Operator::LessOrEqual => {
            let code = if op == Operator::Less { JUMP_GREATER_OR_EQUAL } else { JUMP_GREATER };
            vec![
                step(LOAD, high),
                jump(JUMP_GREATER, value_high, past(3)?, 0),
                jump(JUMP_EQUAL, value_high, 0, 2),
                step(LOAD, low),
                jump(code, value_low, past(0)?, 0),
            ]
        }
    })
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects, reason = "a test may panic")]
mod tests {
    use super::*;

    /// Runs a filter as the kernel does (Documentation/userspace-api/seccomp_filter).
    fn run(program: &[sock_filter], number: u32, arguments: &[u64]) -> u32 {
        let mut data = [0_u8; 64];
        data[..4].copy_from_slice(&number.to_le_bytes());
        data[4..8].copy_from_slice(&X86_64.to_le_bytes());
        for (at, argument) in arguments.iter().enumerate() {
            data[16 + at * 8..24 + at * 8].copy_from_slice(&argument.to_le_bytes());
        }
        let (mut at, mut word) = (0, 0_u32);
        loop {
            let step = &program[at];
            at += 1;
            let fits = match step.code {
                LOAD => {
                    let from = step.k as usize;
                    word = u32::from_le_bytes(data[from..from + 4].try_into().expect("four"));
                    continue;
                }
                AND => {
                    word &= step.k;
                    continue;
                }
                RETURN => return step.k,
                JUMP_EQUAL => word == step.k,
                JUMP_GREATER => word > step.k,
                JUMP_GREATER_OR_EQUAL => word >= step.k,
                other => panic!("instruction {other:#x}"),
            };
            at += usize::from(if fits { step.jt } else { step.jf });
        }
    }

    fn program(text: &str) -> Result<Vec<sock_filter>, String> {
        serde_json::from_str(text).map_err(|error| error.to_string()).and_then(|profile| compile(&profile))
    }

    const REFUSED: u32 = SECCOMP_RET_ERRNO | 1;
    const SOCKET: u32 = 41;

    #[test]
    fn calls_are_refused_by_name_and_unknown_ones_left_out() {
        let text = r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [
            {"names": ["chmod", "fchmodat", "no_such_call"], "action": "SCMP_ACT_ERRNO"},
            {"names": ["uname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}"#;
        let program = program(text).expect("valid");
        assert_eq!(run(&program, 90, &[]), REFUSED);
        assert_eq!(run(&program, 268, &[]), REFUSED);
        assert_eq!(run(&program, 63, &[]), SECCOMP_RET_ERRNO | 38);
        assert_eq!(run(&program, 0, &[]), SECCOMP_RET_ALLOW);
        assert_eq!(run(&program, X32 | 90, &[]), SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn conditions_compare_all_64_bits() {
        let big = 0x1_0000_0005_u64;
        for (op, meets) in [
            ("NE", (|a, b| a != b) as fn(u64, u64) -> bool),
            ("LT", |a, b| a < b),
            ("LE", |a, b| a <= b),
            ("EQ", |a, b| a == b),
            ("GE", |a, b| a >= b),
            ("GT", |a, b| a > b),
        ] {
            let text = format!(
                r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{{"names": ["socket"], "action": "SCMP_ACT_ALLOW",
                    "args": [{{"index": 1, "value": 7, "op": "SCMP_CMP_EQ"}},
                             {{"index": 0, "value": {big}, "op": "SCMP_CMP_{op}"}}]}}]}}"#
            );
            let program = program(&text).expect("valid");
            for argument in [0, 4, 5, 6, big - 1, big, big + 1, 0x2_0000_0000, 0xffff_ffff, u64::MAX] {
                let expected = if meets(argument, big) { SECCOMP_RET_ALLOW } else { REFUSED };
                assert_eq!(run(&program, SOCKET, &[argument, 7]), expected, "{argument:#x} {op}");
                assert_eq!(run(&program, SOCKET, &[argument, 8]), REFUSED, "both are to be met");
                assert_eq!(run(&program, SOCKET + 1, &[argument, 7]), REFUSED, "another call");
            }
        }
    }

    #[test]
    fn masks_and_alternatives() {
        let text = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}]}"#;
        let program = program(text).expect("valid");
        let personality = |value| run(&program, 135, &[value]);
        assert_eq!((run(&program, 56, &[0x11]), run(&program, 56, &[0x1000_0011])), (SECCOMP_RET_ALLOW, REFUSED));
        assert_eq!((personality(0), personality(8), personality(1)), (SECCOMP_RET_ALLOW, SECCOMP_RET_ALLOW, REFUSED));
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        for (text, word) in [
            (r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#, "SCMP_ACT_NOTIFY"),
            (r#"{"syscalls": []}"#, "defaultAction"),
            ("nonsense", "line 1"),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_LOG",
                    "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#,
                "argument 6",
            ),
        ] {
            let error = program(text).map(drop).expect_err(word);
            assert!(error.contains(word), "{error}");
        }
        let missing = local_filter(Path::new("/nonexistent/profile.json")).expect_err("missing");
        assert!(matches!(missing, Error::InvalidArgument(_)) && missing.to_string().contains("/nonexistent"));
        assert!(local_filter(Path::new("profile.json")).is_err());
    }
}
