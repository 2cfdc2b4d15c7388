//! What the guests do, the same in ours and in the peer's.

/// Fills the guest: about 100 MB of its files in the page cache, and a process that holds 24 MiB of random bytes.
pub const FILL: &str = "find /usr -xdev -type f -size +3k | sort | xargs -d '\\n' cat 2>/dev/null \
    | head -c 100000000 > /dev/null; \
    systemd-run --quiet --unit=holder python3 -c \
    'import os, time; held = os.urandom(24 << 20); open(\"/run/held\", \"w\").close(); time.sleep(1 << 30)' \
    && while [ ! -e /run/held ]; do sleep 0.1; done; sync";

/// Writes 10 MB of random data.
pub const TEN_MEGABYTES: &str = "head -c 10000000 /dev/urandom > /root/ten-megabytes; sync";

/// A piece of ordinary work: files copied, compiled and committed, and 2 MB that were not there before.
pub fn work(number: u32) -> String {
    format!(
        "set -e; mkdir -p /root/work-{number}; cd /root/work-{number}; \
         cp -r /usr/lib/python3*/json /usr/lib/python3*/email .; \
         head -c 2000000 /dev/urandom > data; \
         python3 -m compileall -q .; git init -q .; git add .; \
         git -c user.name=bench -c user.email=bench@localhost commit -q -m {number}; sync"
    )
}

/// A little work, so that each pause has something new to capture.
pub fn touch(number: u32) -> String {
    format!("head -c 4000000 /dev/urandom > /root/touch-{number}")
}
