//! Migration streams of the sizes that tests need.

/// Where a mapped stream's pages begin, in multiples of bytes.
pub const MAPPED_ALIGNMENT: u64 = 1 << 20;
const PAGE_BYTES: usize = 4096;
const END_OF_PART: u64 = 0x10;
const PAGE: u64 = 0x08;
const CONTINUE: u64 = 0x20;
const FOOTER: u8 = 0x7e;

/// What QEMU 7.2 wrote of a q35 with 64 MiB of RAM; 0.9 MB.
pub fn golden() -> Vec<u8> {
    const PACKED: &[u8] = include_bytes!("../../../migration-stream/tests/golden/q35-7.2.bin.zst");
    zstd::decode_all(PACKED).expect("golden stream")
}

/// The golden stream after a guest that wrote `mib` mebibytes of noise, at most 64.
pub fn large(mib: usize) -> Vec<u8> {
    large_in_rounds(mib, 1)
}

/// The same memory sent several times, as QEMU does while a guest writes.
pub fn large_in_rounds(mib: usize, rounds: usize) -> Vec<u8> {
    let mut stream = golden();
    let (at, section) = behind_ram_list(&stream);
    let behind = stream.split_off(at);
    let part = part_of_noise(section, mib << 20);
    for _ in 0..rounds {
        stream.extend_from_slice(&part);
    }
    stream.extend(behind);
    stream
}

/// Where the first part of RAM ends, and the section's number.
fn behind_ram_list(stream: &[u8]) -> (usize, [u8; 4]) {
    let name = find(stream, b"\x03ram");
    let section = stream[name - 4..name].try_into().expect("four bytes");
    let end = end_of_part(section);
    (find(stream, &end) + end.len(), section)
}

fn find(stream: &[u8], wanted: &[u8]) -> usize {
    let found = stream
        .windows(wanted.len())
        .position(|bytes| bytes == wanted);
    found.expect("it is in the stream")
}

fn end_of_part(section: [u8; 4]) -> Vec<u8> {
    let mut bytes = END_OF_PART.to_be_bytes().to_vec();
    bytes.push(FOOTER);
    bytes.extend(section);
    bytes
}

fn part_of_noise(section: [u8; 4], length: usize) -> Vec<u8> {
    let mut part = vec![2];
    part.extend(section);
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    for offset in (0..length).step_by(PAGE_BYTES) {
        let follows = if offset > 0 { CONTINUE } else { 0 };
        part.extend((offset as u64 | PAGE | follows).to_be_bytes());
        if offset == 0 {
            part.extend(b"\x04ram0");
        }
        for _ in 0..PAGE_BYTES / 8 {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            part.extend(noise.to_le_bytes());
        }
    }
    part.extend(end_of_part(section));
    part
}

/// The smallest stream: RAM of a few pages, no devices.
pub fn tiny() -> Vec<u8> {
    let mut stream = beginning(&[]);
    stream.extend(ram_start(16 * PAGE_BYTES as u64));
    stream.extend(END_OF_PART.to_be_bytes());
    stream.extend(b"\x7e\0\0\0\x02");
    stream.extend(b"\x02\0\0\0\x02");
    stream.extend(PAGE.to_be_bytes());
    stream.extend(b"\x06pc.ram");
    stream.extend([7; PAGE_BYTES]);
    stream.extend(end_of_part([0, 0, 0, 2]));
    stream.extend(ending());
    stream
}

/// A stream with mapped RAM that starts at `file_offset` of its file: 300 pages, of which three are there.
pub fn mapped(file_offset: u64) -> Vec<u8> {
    let pages = 300_u64;
    let mut stream = beginning(&["mapped-ram"]);
    stream.extend(ram_start(pages * PAGE_BYTES as u64));
    let bitmap_at = file_offset + stream.len() as u64 + 28;
    let bitmap = [0b1000_0011_u64, 0, 0, 0, 0];
    let pages_at = (bitmap_at + 8 * bitmap.len() as u64).next_multiple_of(MAPPED_ALIGNMENT);
    stream.extend(1_u32.to_be_bytes());
    for number in [PAGE_BYTES as u64, bitmap_at, pages_at] {
        stream.extend(number.to_be_bytes());
    }
    stream.extend(bitmap.iter().flat_map(|word| word.to_le_bytes()));
    let pages_from = usize::try_from(pages_at - file_offset).expect("a small file");
    stream.resize(pages_from + pages as usize * PAGE_BYTES, 0);
    for page in [0, 1, 7] {
        stream[pages_from + page * PAGE_BYTES..][..PAGE_BYTES].fill(9);
    }
    stream.extend(end_of_part([0, 0, 0, 2]));
    stream.extend(ending());
    stream
}

fn beginning(capabilities: &[&str]) -> Vec<u8> {
    let mut stream = b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-9.0".to_vec();
    if !capabilities.is_empty() {
        stream.extend(b"\x05\x1aconfiguration/capabilities\0\0\0\x01");
        stream.extend((capabilities.len() as u32).to_be_bytes());
        for name in capabilities {
            stream.push(name.len() as u8);
            stream.extend(name.as_bytes());
        }
    }
    stream
}

/// The RAM section up to the length of its only block.
fn ram_start(length: u64) -> Vec<u8> {
    let mut bytes = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    bytes.extend((length | 4).to_be_bytes());
    bytes.extend(b"\x06pc.ram");
    bytes.extend(length.to_be_bytes());
    bytes
}

/// RAM's last part, and what follows.
fn ending() -> Vec<u8> {
    let mut bytes = vec![3, 0, 0, 0, 2];
    bytes.extend(end_of_part([0, 0, 0, 2]));
    bytes.push(0);
    let description = br#"{"page_size":4096,"devices":[]}"#;
    bytes.push(6);
    bytes.extend((description.len() as u32).to_be_bytes());
    bytes.extend(description);
    bytes
}
