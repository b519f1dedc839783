//! Security contexts: what they say, in the words of [`crate::defaults`]; and profiles that no guest can have.

use std::path::Path;

use super::invalid;
use crate::cri::proto::security_profile::ProfileType;
use crate::cri::proto::{Capability, LinuxContainerSecurityContext, SeLinuxOption, SecurityProfile};
use crate::defaults::{self, Changes};
use crate::error::Result;
use crate::spec::Capabilities;

pub(super) fn capabilities(context: &LinuxContainerSecurityContext) -> Result<Capabilities> {
    if context.privileged {
        return Ok(defaults::all_capabilities());
    }
    let Capability { add_capabilities, drop_capabilities, add_ambient_capabilities } =
        context.capabilities.clone().unwrap_or_default();
    let changes = Changes { add: add_capabilities, drop: drop_capabilities, ambient: add_ambient_capabilities };
    defaults::capabilities(&changes)
}

/// What older clients write before the name of a profile.
const LOCALHOST: &str = "localhost/";

/// A profile in the words of a field that newer clients leave empty.
fn legacy_profile(text: &str) -> Option<SecurityProfile> {
    let profile_type = match text {
        "" => return None,
        "runtime/default" | "docker/default" => ProfileType::RuntimeDefault,
        "unconfined" => ProfileType::Unconfined,
        _ => ProfileType::Localhost,
    };
    Some(SecurityProfile { profile_type: profile_type.into(), localhost_ref: text.to_owned() })
}

/// A compiled filter; empty is unconfined.
pub(super) fn seccomp(context: &LinuxContainerSecurityContext) -> Result<Vec<u8>> {
    let legacy = || legacy_profile(&context.seccomp_profile_path);
    let Some(profile) = context.seccomp.clone().or_else(legacy) else { return Ok(Vec::new()) };
    match profile.profile_type() {
        ProfileType::Unconfined => Ok(Vec::new()),
        // A privileged container is confined by its kernel alone.
        _ if context.privileged => Ok(Vec::new()),
        ProfileType::RuntimeDefault => Ok(crate::seccomp::default_filter(&capabilities(context)?.permitted)?),
        ProfileType::Localhost => {
            let reference = profile.localhost_ref.as_str();
            crate::seccomp::local_filter(Path::new(reference.strip_prefix(LOCALHOST).unwrap_or(reference)))
        }
    }
}

/// The guest kernel has no AppArmor, so a profile of the node cannot be honoured; the default one is none.
pub(super) fn check_apparmor(context: &LinuxContainerSecurityContext) -> Result<()> {
    let local = |profile: &SecurityProfile| profile.profile_type() == ProfileType::Localhost;
    let legacy = || legacy_profile(&context.apparmor_profile);
    match context.apparmor.clone().or_else(legacy).filter(local) {
        Some(profile) => Err(invalid(format_args!(
            "AppArmor profile {:?}: the guest kernel has no AppArmor; remove the profile",
            profile.localhost_ref
        ))),
        None => Ok(()),
    }
}

/// The guest kernel has no SELinux either.
pub(super) fn check_selinux(options: Option<&SeLinuxOption>) -> Result<()> {
    match options {
        Some(SeLinuxOption { user, role, r#type, level })
            if [user, role, r#type, level].iter().any(|part| !part.is_empty()) =>
        {
            Err(invalid(format_args!(
                "SELinux label {user}:{role}:{type}:{level}: the guest kernel has no SELinux; remove seLinuxOptions"
            )))
        }
        _ => Ok(()),
    }
}

/// Paths masked and paths read-only. An empty list is one that was not given.
pub(super) fn paths(context: &LinuxContainerSecurityContext) -> (Vec<String>, Vec<String>) {
    let or = |given: &[String], default: fn() -> Vec<String>| if given.is_empty() { default() } else { given.to_vec() };
    if context.privileged {
        return (Vec::new(), Vec::new());
    }
    let masked = or(&context.masked_paths, defaults::masked_paths);
    (masked, or(&context.readonly_paths, defaults::readonly_paths))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_context_adds_and_drops_is_obeyed() {
        let named = |name: &str| vec![name.to_owned()];
        let asked =
            Capability { drop_capabilities: named("ALL"), add_capabilities: named("SYS_PTRACE"), ..Default::default() };
        let context = LinuxContainerSecurityContext { capabilities: Some(asked), ..Default::default() };
        assert_eq!(capabilities(&context).expect("valid").permitted, ["CAP_SYS_PTRACE"]);
        let context = LinuxContainerSecurityContext { privileged: true, ..context };
        assert_eq!(capabilities(&context).expect("valid"), defaults::all_capabilities());
    }

    #[test]
    fn paths_given_replace_the_default_ones() {
        let context = LinuxContainerSecurityContext { masked_paths: vec!["/proc/x".into()], ..Default::default() };
        assert_eq!(paths(&context), (vec!["/proc/x".into()], defaults::readonly_paths()));
        let context = LinuxContainerSecurityContext { privileged: true, ..context };
        assert_eq!(paths(&context), (Vec::new(), Vec::new()));
    }

    #[test]
    fn a_profile_that_cannot_be_had_is_refused() {
        let local = || SecurityProfile { profile_type: ProfileType::Localhost.into(), localhost_ref: "mine".into() };
        let seccomp_local = LinuxContainerSecurityContext { seccomp: Some(local()), ..Default::default() };
        assert!(seccomp(&seccomp_local).expect_err("refused").to_string().contains("mine"));
        let apparmor = LinuxContainerSecurityContext { apparmor: Some(local()), ..Default::default() };
        assert!(check_apparmor(&apparmor).is_err());
        assert!(check_apparmor(&LinuxContainerSecurityContext::default()).is_ok());
    }

    #[test]
    fn older_fields_mean_the_same() {
        let seccomp_of = |path: &str| {
            let context = LinuxContainerSecurityContext { seccomp_profile_path: path.into(), ..Default::default() };
            seccomp(&context)
        };
        assert_eq!(seccomp_of("unconfined"), Ok(Vec::new()));
        assert!(!seccomp_of("runtime/default").expect("valid").is_empty());
        assert!(seccomp_of("localhost//nonexistent").expect_err("refused").to_string().contains("/nonexistent"));
        let apparmor_of = |name: &str| {
            check_apparmor(&LinuxContainerSecurityContext { apparmor_profile: name.into(), ..Default::default() })
        };
        assert!(apparmor_of("localhost/mine").is_err());
        assert!(apparmor_of("runtime/default").is_ok());
    }

    #[test]
    fn a_label_that_nobody_would_enforce_is_refused() {
        let label = SeLinuxOption { level: "s0:c1".into(), ..Default::default() };
        assert!(check_selinux(Some(&label)).expect_err("refused").to_string().contains("s0:c1"));
        assert!(check_selinux(Some(&SeLinuxOption::default())).is_ok());
        assert!(check_selinux(None).is_ok());
    }

    #[test]
    fn the_default_profile_is_a_filter_and_none_is_none() {
        let default = SecurityProfile { profile_type: ProfileType::RuntimeDefault.into(), ..Default::default() };
        let context = LinuxContainerSecurityContext { seccomp: Some(default), ..Default::default() };
        assert!(!seccomp(&context).expect("valid").is_empty());
        assert!(seccomp(&LinuxContainerSecurityContext::default()).expect("valid").is_empty());
    }
}
