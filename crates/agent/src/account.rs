//! Who a command runs as, looked up in `/etc/passwd` and `/etc/group`.
//!
//! A static binary has no name service; users from a directory service must be given as numbers.

use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A user as a command sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
    pub(crate) shell: String,
}

const MAX_FILE_BYTES: u64 = 4 << 20;
const MAX_GROUPS: usize = 1024;

/// The account that `spec` names: `USER` or `USER:GROUP`, each a name or a number.
pub(crate) fn resolve(spec: &str) -> Result<Account, String> {
    let passwd = read(Path::new("/etc/passwd"))?;
    let group = read(Path::new("/etc/group"))?;
    resolve_in(spec, &passwd, &group)
}

fn read(path: &Path) -> Result<String, String> {
    let bounded = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        fs::File::open(path)?
            .take(MAX_FILE_BYTES)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match bounded() {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        // A guest without the file has numbers only.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(format!(
            "{}: {error}",
            String::from_utf8_lossy(path.as_os_str().as_bytes())
        )),
    }
}

fn resolve_in(spec: &str, passwd: &str, group: &str) -> Result<Account, String> {
    let (user, group_spec) = match spec.split_once(':') {
        Some((user, group_spec)) => (user, Some(group_spec)),
        None => (spec, None),
    };
    let mut account = find_user(user, passwd)?;
    account.groups = member_of(&account.name, group);
    if let Some(group_spec) = group_spec {
        account.gid = find_group(group_spec, group)?;
    }
    if !account.groups.contains(&account.gid) {
        account.groups.push(account.gid);
    }
    account.groups.truncate(MAX_GROUPS);
    Ok(account)
}

fn find_user(user: &str, passwd: &str) -> Result<Account, String> {
    let number: Option<u32> = user.parse().ok();
    let found = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, shell] = fields[..] else {
            return None;
        };
        let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
        (name == user || number == Some(uid)).then(|| Account {
            name: name.to_owned(),
            uid,
            gid,
            groups: Vec::new(),
            home: home.to_owned(),
            shell: shell.to_owned(),
        })
    });
    match (found, number) {
        (Some(account), _) => Ok(account),
        (None, Some(uid)) => Ok(Account {
            name: uid.to_string(),
            uid,
            gid: uid,
            groups: Vec::new(),
            home: "/".to_owned(),
            shell: "/bin/sh".to_owned(),
        }),
        (None, None) => Err(format!("/etc/passwd has no user {user:?}")),
    }
}

fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, gid, members] = fields[..] else {
            return None;
        };
        Some((name, gid.parse().ok()?, members))
    })
}

fn member_of(user: &str, group: &str) -> Vec<u32> {
    groups(group)
        .filter(|(_, _, members)| members.split(',').any(|member| member == user))
        .map(|(_, gid, _)| gid)
        .collect()
}

fn find_group(spec: &str, group: &str) -> Result<u32, String> {
    if let Ok(number) = spec.parse() {
        return Ok(number);
    }
    groups(group)
        .find(|(name, _, _)| *name == spec)
        .map(|(_, gid, _)| gid)
        .ok_or_else(|| format!("/etc/group has no group {spec:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nbroken line\nann:x:1000:1000:Ann:/home/ann:/bin/zsh\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:bob,ann\nann:x:1000:\nweb:x:33:\n";

    #[test]
    fn a_user_is_found_by_name_and_number_with_all_groups() {
        let ann = resolve_in("ann", PASSWD, GROUP).expect("known");
        assert_eq!(
            (ann.uid, ann.gid, &ann.groups[..]),
            (1000, 1000, &[27, 1000][..])
        );
        assert_eq!(resolve_in("1000", PASSWD, GROUP), Ok(ann));
        let as_web = resolve_in("ann:web", PASSWD, GROUP).expect("known");
        assert_eq!((as_web.gid, &as_web.groups[..]), (33, &[27, 33][..]));
    }

    #[test]
    fn a_number_without_an_account_is_taken_and_a_name_is_not() {
        let nobody = resolve_in("4242", PASSWD, GROUP).expect("a number");
        assert_eq!(
            (nobody.uid, nobody.gid, nobody.home.as_str()),
            (4242, 4242, "/")
        );
        assert!(resolve_in("eve", PASSWD, GROUP).is_err());
        assert!(resolve_in("ann:eve", PASSWD, GROUP).is_err());
        assert!(resolve_in("", PASSWD, GROUP).is_err());
    }
}
