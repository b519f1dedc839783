//! Who a container's process runs as, from its own `/etc/passwd` and `/etc/group`.
//!
//! Both files are the image's or the workload's: they are parsed leniently, and read only if they are ordinary files.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use agent_protocol::v1;
use thiserror::Error;

/// Most bytes read of either file.
const FILE_BYTES: u64 = 4 << 20;

/// Why a user cannot be found.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum UserError {
    /// A name without an entry.
    #[error("unable to find user {0}: no matching entry in the container's /etc/passwd")]
    NoUser(String),
    /// A name without an entry.
    #[error("unable to find group {0}: no matching entry in the container's /etc/group")]
    NoGroup(String),
}

/// Numbers to run as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary ones.
    pub(crate) groups: Vec<u32>,
    /// `None` if the user has no entry.
    pub(crate) home: Option<String>,
}

/// The two files of the root filesystem that this process sees.
pub(crate) struct Databases {
    passwd: String,
    group: String,
}

impl Databases {
    /// Reads both; a file that is missing or odd is as good as empty.
    pub(crate) fn read() -> Self {
        Self { passwd: read_plain(Path::new("/etc/passwd")), group: read_plain(Path::new("/etc/group")) }
    }

    /// Looks `user` up.
    pub(crate) fn identify(&self, user: &v1::User) -> Result<Identity, UserError> {
        let (name, group) = match user.name.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (user.name.as_str(), None),
        };
        let name = if name.is_empty() { "0" } else { name };
        let entry = self.users().find(|entry| entry.name == name);
        let number = name.parse::<u32>().ok();
        let entry = entry.or_else(|| self.users().find(|entry| Some(entry.uid) == number));
        let uid = match &entry {
            Some(entry) => entry.uid,
            None => number.ok_or_else(|| UserError::NoUser(name.to_owned()))?,
        };
        let mut gid = entry.as_ref().map_or(0, |entry| entry.gid);
        if let Some(group) = group.filter(|group| !group.is_empty()) {
            gid = self.group_number(group)?;
        }
        let gid = user.gid.unwrap_or(gid);
        let mut groups = user.supplemental_groups.clone();
        if user.merge_image_groups
            && let Some(entry) = &entry
        {
            groups.extend(self.groups().filter(|group| group.has(entry.name)).map(|group| group.gid));
        }
        groups.sort_unstable();
        groups.dedup();
        Ok(Identity { uid, gid, groups, home: entry.map(|entry| entry.home.to_owned()) })
    }

    fn group_number(&self, name: &str) -> Result<u32, UserError> {
        let found = self.groups().find(|group| group.name == name).map(|group| group.gid);
        found.or_else(|| name.parse().ok()).ok_or_else(|| UserError::NoGroup(name.to_owned()))
    }

    fn users(&self) -> impl Iterator<Item = User<'_>> {
        self.passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _password) = (fields.next()?, fields.next()?);
            let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            let home = fields.nth(1).unwrap_or_default();
            Some(User { name, uid, gid, home })
        })
    }

    fn groups(&self) -> impl Iterator<Item = Group<'_>> {
        self.group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _password) = (fields.next()?, fields.next()?);
            Some(Group { name, gid: fields.next()?.parse().ok()?, members: fields.next().unwrap_or_default() })
        })
    }
}

struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl Group<'_> {
    fn has(&self, user: &str) -> bool {
        self.members.split(',').any(|member| member.trim() == user)
    }
}

/// `O_NONBLOCK`, so that a FIFO placed there does not hold this process up.
fn read_plain(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
        && file.metadata().is_ok_and(|metadata| metadata.is_file())
        && file.take(FILE_BYTES).read_to_end(&mut bytes).is_err()
    {
        bytes.clear();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn databases() -> Databases {
        Databases {
            passwd: "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34:,,,:/var/www:/bin/false\n1000:x:7:8::/odd:\n"
                .to_owned(),
            group: "root:x:0:\nstaff:x:50:web,other\nweb:x:34:\nlog:x:60: web\nbad:x:nan:web\n".to_owned(),
        }
    }

    fn identify(name: &str) -> Result<Identity, UserError> {
        databases().identify(&v1::User { name: name.to_owned(), ..v1::User::default() })
    }

    #[test]
    fn names_and_numbers_are_found() {
        let root = identify("").expect("root");
        assert_eq!((root.uid, root.gid, root.home.as_deref()), (0, 0, Some("/root")));
        for text in ["web", "33"] {
            let web = identify(text).expect("web");
            assert_eq!((web.uid, web.gid, web.home.as_deref()), (33, 34, Some("/var/www")), "{text}");
        }
        let stranger = identify("4242").expect("a number needs no entry");
        assert_eq!((stranger.uid, stranger.gid, stranger.home), (4242, 0, None));
        assert_eq!(identify("33:staff").map(|web| web.gid), Ok(50));
        assert_eq!(identify("web:77").map(|web| web.gid), Ok(77));
        assert_eq!(identify("1000").map(|named| named.uid), Ok(7), "a name goes before a number");
    }

    #[test]
    fn unknown_names_are_refused_by_name() {
        assert_eq!(identify("nobody"), Err(UserError::NoUser("nobody".into())));
        assert_eq!(identify("web:nogroup"), Err(UserError::NoGroup("nogroup".into())));
    }

    #[test]
    fn groups_of_the_image_join_only_when_asked() {
        let mut user = v1::User { name: "web".into(), supplemental_groups: vec![9, 50], ..v1::User::default() };
        assert_eq!(databases().identify(&user).map(|found| found.groups), Ok(vec![9, 50]));
        user.merge_image_groups = true;
        user.gid = Some(1);
        let found = databases().identify(&user).expect("found");
        assert_eq!((found.gid, found.groups), (1, vec![9, 50, 60]));
    }
}
