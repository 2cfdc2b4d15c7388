//! What tests put into a guest and read back with cold caches: files, a counter that never stands
//! still while the guest runs, and bytes that only a process's memory holds.

use crate::Worker;

const FILL: &str = r#"
set -eu
mkdir -p /root/kept
for n in $(seq 40); do head -c $((n * 7000)) /dev/urandom > /root/kept/$n; done
cat > /root/keeper <<'PY'
import hashlib, os, socket
memory = os.urandom(4 << 20)
server = socket.socket(socket.AF_UNIX)
server.bind("/run/keeper")
server.listen()
while True:
    client, _ = server.accept()
    client.sendall(hashlib.sha256(memory).hexdigest().encode())
    client.close()
PY
setsid python3 /root/keeper > /dev/null 2>&1 < /dev/null &
setsid sh -c 'n=0; while :; do n=$((n + 1)); echo $n > /run/count.new; mv /run/count.new /run/count; sleep 0.02; done' > /dev/null 2>&1 < /dev/null &
cd /root/kept && sha256sum * > /root/sums
sync
while ! [ -S /run/keeper ] || ! [ -e /run/count ]; do sleep 0.05; done
"#;

const DISK: &str = r#"
set -eu
sync
echo 3 > /proc/sys/vm/drop_caches
cd /root/kept
echo "list $(sha256sum < /root/sums | cut -d' ' -f1)"
echo "broken $(sha256sum -c --quiet /root/sums 2>&1 | grep -c .)"
echo "ext4 $(dmesg | grep -ciE 'ext4-fs.*(error|warning|corrupt|checksum)|i/o error')"
"#;

const MEMORY: &str = r#"
echo "count $(cat /run/count)"
echo "memory $(python3 -c 'import socket; s = socket.socket(socket.AF_UNIX); s.connect("/run/keeper"); print(s.recv(99).decode())')"
"#;

/// What a guest was found to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The hash of the list of hashes of its files.
    pub files: String,
    /// The digest of what a process holds in memory only.
    pub memory: String,
    /// How far the counter is.
    pub count: u64,
}

/// Fills a guest and says what it then holds.
pub fn fill(worker: &Worker, sandbox: &str) -> Seen {
    worker.shell(sandbox, FILL);
    look(worker, sandbox)
}

/// Adds a file of so many random bytes to what is looked at.
pub fn add_file(worker: &Worker, sandbox: &str, name: &str, bytes: u64) {
    let script = format!(
        "cd /root/kept && head -c {bytes} /dev/urandom > {name} && sha256sum {name} >> /root/sums && sync"
    );
    worker.shell(sandbox, &script);
}

/// Reads everything back with cold caches; whatever is broken fails the test.
pub fn look(worker: &Worker, sandbox: &str) -> Seen {
    let text = worker.shell(sandbox, &format!("{DISK}{MEMORY}"));
    Seen {
        files: files_of(&text),
        memory: word(&text, "memory"),
        count: word(&text, "count").parse().expect("a number"),
    }
}

/// As [`look`], for a guest that was booted anew: its files only.
pub fn look_at_disk(worker: &Worker, sandbox: &str) -> String {
    files_of(&worker.shell(sandbox, DISK))
}

fn files_of(text: &str) -> String {
    assert_eq!(word(text, "broken"), "0", "{text}");
    assert_eq!(word(text, "ext4"), "0", "{text}");
    word(text, "list")
}

fn word(text: &str, name: &str) -> String {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        .unwrap_or_else(|| panic!("no {name} in {text:?}"))
        .to_owned()
}
