//! Which file systems can be frozen, and where control groups are, from the kernel's list of mounts.
//!
//! # Source
//! proc(5), `/proc/pid/mountinfo`.

use std::collections::HashSet;

/// File systems that implement freezing.
const FREEZABLE: [&str; 11] = [
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "gfs2", "jfs", "nilfs2", "reiserfs", "xfs",
];

/// Where writable file systems on block devices are mounted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Writable {
    /// Those that can be frozen, one mount point for each, in the order in which they were mounted.
    pub(crate) freezable: Vec<Vec<u8>>,
    /// Those that cannot.
    pub(crate) unsupported: Vec<Vec<u8>>,
}

struct Mount<'a> {
    device: &'a [u8],
    is_root_of_its_device: bool,
    point: Vec<u8>,
    writable: bool,
    kind: &'a [u8],
    source: &'a [u8],
}

/// Finds them in the text of `mountinfo`.
pub(crate) fn writable(mountinfo: &[u8]) -> Writable {
    let mounts: Vec<Mount<'_>> = mountinfo
        .split(|&byte| byte == b'\n')
        .filter_map(parse)
        .collect();
    // A mount that another covers is not reached by its path.
    let visible = |at: usize| {
        mounts[at + 1..]
            .iter()
            .all(|later| later.point != mounts[at].point)
    };
    let mut seen = HashSet::new();
    let mut found = Writable::default();
    // Whole file systems before bind mounts of a part of one, which may be a file.
    for whole in [true, false] {
        for (at, mount) in mounts.iter().enumerate() {
            let wanted = mount.is_root_of_its_device == whole
                && mount.writable
                && mount.source.starts_with(b"/dev/")
                && visible(at);
            if !wanted || !seen.insert(mount.device) {
                continue;
            }
            let freezable = FREEZABLE.iter().any(|kind| kind.as_bytes() == mount.kind);
            let list = if freezable {
                &mut found.freezable
            } else {
                &mut found.unsupported
            };
            list.push(mount.point.clone());
        }
    }
    found
}

/// Where the unified hierarchy of control groups is mounted, found in the text of `mountinfo`.
pub(crate) fn cgroup2(mountinfo: &[u8]) -> Option<Vec<u8>> {
    let mut mounts = mountinfo.split(|&byte| byte == b'\n').filter_map(parse);
    mounts
        .find(|mount| mount.kind == b"cgroup2" && mount.writable)
        .map(|mount| mount.point)
}

fn parse(line: &[u8]) -> Option<Mount<'_>> {
    let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let separator = fields.iter().position(|field| *field == b"-")?;
    let [kind, source, super_options] = fields.get(separator + 1..separator + 4)? else {
        return None;
    };
    let is_writable = |options: &[u8]| {
        options
            .split(|&byte| byte == b',')
            .any(|option| option == b"rw")
    };
    Some(Mount {
        device: fields.get(2)?,
        is_root_of_its_device: *fields.get(3)? == b"/",
        point: unescape(fields.get(4)?),
        writable: is_writable(fields.get(5)?) && is_writable(super_options),
        kind,
        source,
    })
}

/// Spaces, tabs, newlines and backslashes are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail
            .first_chunk::<3>()
            .filter(|digits| digits.iter().all(|digit| (b'0'..b'8').contains(digit)));
        match octal {
            Some(digits) if first == b'\\' && digits[0] < b'4' => {
                plain.push(
                    digits
                        .iter()
                        .fold(0, |value, digit| value * 8 + (digit - b'0')),
                );
                rest = &tail[3..];
            }
            Some(_) | None => {
                plain.push(first);
                rest = tail;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_writable_block_file_system_is_found_once_and_covered_ones_are_not() {
        let text = b"\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro\n\
23 22 0:20 / /proc rw - proc proc rw\n\
24 22 254:2 / /boot/efi rw - vfat /dev/vda2 rw\n\
25 22 254:3 / /covered rw - xfs /dev/vda3 rw\n\
26 22 0:30 / /covered rw - tmpfs tmpfs rw\n\
27 22 254:1 /etc/hosts /x/hosts rw - ext4 /dev/vda1 rw\n\
28 22 254:4 / /read-only ro - ext4 /dev/vdb rw\n\
29 22 254:5 / /with\\040space\\134 rw - ext4 /dev/vdc rw\n\
broken\n";
        let found = writable(text);
        assert_eq!(found.freezable, [b"/".to_vec(), b"/with space\\".to_vec()]);
        assert_eq!(found.unsupported, [b"/boot/efi".to_vec()]);
    }

    #[test]
    fn control_groups_are_found_beside_those_of_the_first_version() {
        let both = b"\
31 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs rw\n\
32 31 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
33 31 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(cgroup2(both), Some(b"/sys/fs/cgroup/unified".to_vec()));
        assert_eq!(cgroup2(&both[..100]), None);
    }

    #[test]
    fn any_text_is_survived() {
        for text in [
            &b""[..],
            b" - ",
            b"1 2 3 4 5 6 -",
            b"\\",
            b"a b c d \\777 f - ext4 /dev/x rw",
        ] {
            writable(text);
        }
    }
}
