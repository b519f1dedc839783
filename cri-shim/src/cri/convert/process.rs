//! What a container runs: an image's defaults under what was asked for.

use super::invalid;
use super::security::{capabilities, seccomp};
use crate::cri::proto::{ContainerConfig, LinuxContainerSecurityContext, SupplementalGroupsPolicy};
use crate::defaults;
use crate::error::Result;
use crate::image::ImageConfig;
use crate::spec::ProcessSpec;

pub(super) fn process(
    config: &ContainerConfig,
    context: &LinuxContainerSecurityContext,
    image: &ImageConfig,
    hostname: &str,
) -> Result<ProcessSpec> {
    let group = |gid: &i64| u32::try_from(*gid).map_err(|_| invalid(format_args!("{gid} is not a group id")));
    let (user, gid) = user(context, image)?;
    let resources = config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    Ok(ProcessSpec {
        args: args(config, image)?,
        env: env(config, image, hostname),
        cwd: [config.working_dir.as_str(), &image.cwd, "/"]
            .into_iter()
            .find(|dir| !dir.is_empty())
            .map(str::to_owned)
            .unwrap_or_default(),
        user,
        gid,
        supplemental_groups: context.supplemental_groups.iter().map(group).collect::<Result<_>>()?,
        merge_image_groups: context.supplemental_groups_policy() == SupplementalGroupsPolicy::Merge,
        terminal: config.tty,
        capabilities: capabilities(context)?,
        no_new_privileges: context.no_new_privs,
        rlimits: Vec::new(),
        oom_score_adj: resources.and_then(|resources| i32::try_from(resources.oom_score_adj).ok()).unwrap_or(0),
        seccomp: seccomp(context)?,
    })
}

/// Kubernetes' rule: a command replaces entrypoint and arguments of the image, arguments alone replace its arguments.
fn args(config: &ContainerConfig, image: &ImageConfig) -> Result<Vec<String>> {
    let args = match (config.command.as_slice(), config.args.as_slice()) {
        ([], []) => [image.entrypoint.as_slice(), &image.cmd].concat(),
        ([], args) => [&image.entrypoint, args].concat(),
        (command, args) => [command, args].concat(),
    };
    if args.is_empty() {
        return Err(invalid("neither the container nor its image says what to run: give it a command"));
    }
    Ok(args)
}

fn env(config: &ContainerConfig, image: &ImageConfig, hostname: &str) -> Vec<String> {
    let asked: Vec<String> = config.envs.iter().map(|pair| format!("{}={}", pair.key, pair.value)).collect();
    defaults::env(&image.env, &asked, hostname, config.tty)
}

/// User and, where it is asked for by number, group. A name goes before a number, and both before the image's.
fn user(context: &LinuxContainerSecurityContext, image: &ImageConfig) -> Result<(String, Option<u32>)> {
    let id =
        |what: &str, value: i64| u32::try_from(value).map_err(|_| invalid(format_args!("{what} {value} is not an id")));
    let uid = context.run_as_user.as_ref().map(|uid| id("run_as_user", uid.value)).transpose()?;
    let gid = context.run_as_group.as_ref().map(|gid| id("run_as_group", gid.value)).transpose()?;
    let asked = match (context.run_as_username.as_str(), uid) {
        ("", None) => None,
        ("", Some(uid)) => Some(uid.to_string()),
        (name, _) => Some(name.to_owned()),
    };
    match (asked, gid) {
        (None, Some(gid)) => {
            Err(invalid(format_args!("run_as_group {gid} needs run_as_user or run_as_username beside it")))
        }
        (None, None) => Ok((image.user.clone(), None)),
        (Some(user), gid) => Ok((user, gid)),
    }
}

/// The number or name of an image's user, without its group: the kubelet checks runAsNonRoot by it.
pub(in crate::cri) fn numeric_user(user: &str) -> (Option<i64>, String) {
    let user = user.split(':').next().unwrap_or_default();
    match user.parse::<u32>() {
        Ok(uid) => (Some(uid.into()), String::new()),
        Err(_) => (None, user.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::proto::{Int64Value, KeyValue};

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|&text| text.to_owned()).collect()
    }

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: strings(&["/entry"]),
            cmd: strings(&["a", "b"]),
            env: strings(&["PATH=/image", "A=1"]),
            user: "app:staff".into(),
            cwd: "/srv".into(),
            ..ImageConfig::default()
        }
    }

    #[test]
    fn command_and_args_follow_kubernetes() {
        let run = |command: &[&str], arguments: &[&str]| {
            let config = ContainerConfig { command: strings(command), args: strings(arguments), ..Default::default() };
            args(&config, &image()).expect("valid")
        };
        assert_eq!(run(&[], &[]), ["/entry", "a", "b"]);
        assert_eq!(run(&[], &["c"]), ["/entry", "c"]);
        assert_eq!(run(&["/bin/sh"], &[]), ["/bin/sh"]);
        assert_eq!(run(&["/bin/sh"], &["-c"]), ["/bin/sh", "-c"]);
        assert!(args(&ContainerConfig::default(), &ImageConfig::default()).is_err());
    }

    #[test]
    fn later_environment_wins() {
        let pair = |key: &str, value: &str| KeyValue { key: key.into(), value: value.into() };
        let config =
            ContainerConfig { envs: vec![pair("A", "2"), pair("B", "x=y"), pair("B", "")], ..Default::default() };
        assert_eq!(env(&config, &image(), "h"), ["PATH=/image", "HOSTNAME=h", "A=2", "B="]);
        let terminal = ContainerConfig { tty: true, ..Default::default() };
        assert_eq!(env(&terminal, &ImageConfig::default(), "h"), [defaults::PATH, "HOSTNAME=h", "TERM=xterm"]);
    }

    #[test]
    fn users() {
        let context = |uid: Option<i64>, gid: Option<i64>, name: &str| LinuxContainerSecurityContext {
            run_as_user: uid.map(|value| Int64Value { value }),
            run_as_group: gid.map(|value| Int64Value { value }),
            run_as_username: name.into(),
            ..Default::default()
        };
        let ask = |uid, gid, name| user(&context(uid, gid, name), &image());
        assert_eq!(ask(None, None, ""), Ok(("app:staff".into(), None)));
        assert_eq!(ask(Some(1000), None, ""), Ok(("1000".into(), None)));
        assert_eq!(ask(Some(1000), Some(5), ""), Ok(("1000".into(), Some(5))));
        assert_eq!(ask(Some(1000), Some(5), "www"), Ok(("www".into(), Some(5))));
        assert!(ask(None, Some(5), "").is_err());
        assert!(ask(Some(-1), None, "").is_err());
        assert_eq!(numeric_user("1000:5"), (Some(1000), String::new()));
        assert_eq!(numeric_user("www:5"), (None, "www".into()));
        assert_eq!(numeric_user(""), (None, String::new()));
    }

    #[test]
    fn a_whole_process() {
        let config = ContainerConfig { working_dir: "/tmp".into(), ..Default::default() };
        let context = LinuxContainerSecurityContext { supplemental_groups: vec![7], ..Default::default() };
        let whole = process(&config, &context, &image(), "h").expect("valid");
        assert_eq!((whole.cwd.as_str(), whole.supplemental_groups.as_slice()), ("/tmp", [7].as_slice()));
        assert!(whole.merge_image_groups, "Merge is the policy's zero value");
        let default = process(&ContainerConfig::default(), &context, &image(), "h").expect("valid");
        assert_eq!(default.cwd, "/srv");
    }
}
