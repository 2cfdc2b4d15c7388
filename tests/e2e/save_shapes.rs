//! Save images of domains that somebody made for libvirt, without Steadfast.
#![allow(
    clippy::disallowed_methods,
    reason = "tests write scratch files that nobody keeps"
)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use stead_tests::libvirt::Libvirt;
use stead_tests::{TEMPLATE, Worker, golden_store, until};

/// Runs instead of an init system, and says what the other disks hold, past its page cache.
const COUNT: &str = r#"cat > /root/count << 'END'
#!/bin/sh
PATH=/usr/bin:/bin
first() { dd if=$1 bs=512 count=1 iflag=direct 2> /dev/null | head -c 4; }
n=0
while :; do n=$((n + 1)); echo "tick $(first /dev/vdb) $(first /dev/vdc) $n" > /dev/ttyS0; sleep 0.3; done
END
chmod +x /root/count; sync"#;
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_domain_of_libvirt_with_several_disks_and_layers_that_only_the_images_name_goes_on_with_us() {
    let worker = Worker::on(golden_store());
    let folder = tempfile::tempdir().expect("folder");
    worker.ok(&["create", TEMPLATE, "--name", "a", "--memory", "256M"]);
    worker.shell("a", COUNT);
    let ours = folder.path().join("ours.save");
    worker.ok(&["save", "write", "a", text(&ours), "--stop"]);
    let xml = foreign_domain(&worker, folder.path(), &ours);
    let libvirt = Libvirt::start(&folder.path().join("libvirt"), "raw");
    let define = |xml: &str| {
        let path = folder.path().join("domain.xml");
        fs::write(&path, xml).expect("write");
        path
    };
    libvirt.ok(&["create", text(&define(&xml))]);
    let seen = tick(&libvirt.console_line("foreign", "tick "));
    let theirs = folder.path().join("theirs.save");
    libvirt.ok(&["save", "foreign", text(&theirs)]);
    let saved = worker.ok(&["save", "dump-xml", text(&theirs)]);
    assert!(
        !saved.contains("ours.save.vda.qcow2"),
        "libvirt leaves out what it has found itself: {saved}"
    );
    worker.ok(&["save", "restore", text(&theirs), "--name", "b"]);
    let last = || {
        let console = worker.ok(&["logs", "b"]);
        console
            .lines()
            .rev()
            .find(|line| line.contains("tick "))
            .map(tick)
    };
    until(PATIENCE, || last().is_some_and(|now| now > seen));
    assert!(last() > Some(seen), "{}", worker.ok(&["logs", "b"]));

    // A layer that is gone is a disk that is not whole, and not one of zeros.
    let hidden = folder.path().join("hidden");
    fs::rename(folder.path().join("vdc.raw"), &hidden).expect("rename");
    let error = worker.fails(&["save", "restore", text(&theirs), "--name", "c"], 5);
    assert!(error.to_string().contains("vdc"), "{error}");
    fs::rename(&hidden, folder.path().join("vdc.raw")).expect("rename");

    let card = "<interface type='user'><model type='virtio'/></interface></devices>";
    let with_card = xml.replace("</devices>", card);
    libvirt.ok(&["create", "--paused", text(&define(&with_card))]);
    let networked = folder.path().join("networked.save");
    libvirt.ok(&["save", "foreign", text(&networked)]);
    let error = worker.fails(&["save", "restore", text(&networked), "--name", "c"], 6);
    let said = error.to_string();
    assert!(
        said.contains("network card") && said.contains("virsh detach-interface"),
        "{said}"
    );
    assert_eq!(worker.qemus(), [worker.pid("b")]);
}

/// The machine of our image as a person would write it: its own name, disks of several kinds, none of our words, no
/// agent's ports, no layer named below the top ones.
fn foreign_domain(worker: &Worker, folder: &Path, ours: &Path) -> String {
    let [top, vdb, raw, vdc] =
        ["vda.qcow2", "vdb.raw", "vdc.raw", "vdc.qcow2"].map(|name| folder.join(name));
    let overlay = format!("{}.vda.qcow2", text(ours));
    make_overlay(&top, &overlay, "qcow2");
    for (path, word) in [(&vdb, "two!"), (&raw, "tri!")] {
        let mut content = word.as_bytes().to_vec();
        content.resize(1 << 20, 0);
        fs::write(path, content).expect("write");
    }
    make_overlay(&vdc, text(&raw), "raw");
    let disk = |name: &str, kind: &str, path: &Path, slot: u8| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{kind}'/><source file='{}'/>\
             <target dev='{name}' bus='virtio'/>\
             <address type='pci' domain='0x0000' bus='0x00' slot='{slot:#04x}' function='0x0'/></disk>",
            path.display()
        )
    };
    let disks = [
        disk("vda", "qcow2", &top, 4),
        disk("vdb", "raw", &vdb, 5),
        disk("vdc", "qcow2", &vdc, 6),
    ];
    let xml = worker.ok(&["save", "dump-xml", text(ours)]);
    let xml = without(&xml, "<metadata>", "</metadata>");
    let xml = without(&xml, "<uuid>", "</uuid>");
    let xml = without(&xml, "<channel", "</channel>");
    let xml = without(&xml, "<disk ", "</disk>");
    xml.replace("<name>a</name>", "<name>foreign</name>")
        .replace("</cmdline>", " init=/root/count</cmdline>")
        .replace("</emulator>", &format!("</emulator>{}", disks.concat()))
}

/// Every part from `start` to `end` cut out.
fn without(xml: &str, start: &str, end: &str) -> String {
    let mut left = xml.to_owned();
    while let Some(at) = left.find(start) {
        let length = left[at..].find(end).expect("it ends") + end.len();
        left.replace_range(at..at + length, "");
    }
    assert_ne!(left, xml, "{start}");
    left
}

fn make_overlay(path: &Path, below: &str, format: &str) {
    let made = Command::new("qemu-img")
        .args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            below,
            "-F",
            format,
            text(path),
        ])
        .status();
    assert!(made.expect("qemu-img is installed").success());
}

/// The count in a line, which must say what the disks hold.
fn tick(line: &str) -> u64 {
    let words: Vec<&str> = line.trim().split(' ').collect();
    let [.., "tick", "two!", "tri!", count] = words[..] else {
        panic!("{line:?}");
    };
    count.parse().unwrap_or_else(|_| panic!("{line:?}"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}
