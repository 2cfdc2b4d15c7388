//! What a kernel module says of itself: the `.modinfo` section of its ELF file.
//!
//! A kernel package carries no `modules.dep` (its installation makes that), so the order in which
//! modules must be loaded is taken from the modules.
//!
//! # Source
//! System V ABI, "Object Files" (ELF-64); Linux `include/linux/moduleparam.h` (`key=value`, NUL-terminated).

/// Offsets in the ELF header and in a section header, in bytes (ELF-64, little-endian).
const SECTION_TABLE_OFFSET_AT: usize = 0x28;
const SECTION_ENTRY_SIZE_AT: usize = 0x3a;
const SECTION_COUNT_AT: usize = 0x3c;
const NAMES_INDEX_AT: usize = 0x3e;
const SECTION_HEADER_BYTES: usize = 64;
const HEADER_OFFSET_AT: usize = 0x18;
const HEADER_SIZE_AT: usize = 0x20;
/// ELF magic, 64 bit, little-endian.
const ELF64_LE: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];

/// What one module needs and is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ModuleInfo {
    /// The name as the kernel uses it, with underscores.
    pub(crate) name: String,
    /// The modules it needs, likewise.
    pub(crate) depends: Vec<String>,
}

impl ModuleInfo {
    /// Reads the section, or says what is wrong with the file.
    pub(crate) fn decode(module: &[u8]) -> Result<Self, &'static str> {
        let section = modinfo_section(module).ok_or("no ELF-64 file with a .modinfo section")?;
        let value = |key: &str| {
            section.split(|byte| *byte == 0).find_map(|entry| {
                std::str::from_utf8(entry)
                    .ok()?
                    .strip_prefix(key)?
                    .strip_prefix('=')
            })
        };
        let name = value("name").ok_or("no module name in .modinfo")?;
        let depends = value("depends").unwrap_or_default();
        Ok(Self {
            name: canonical(name),
            depends: depends
                .split(',')
                .filter(|name| !name.is_empty())
                .map(canonical)
                .collect(),
        })
    }
}

/// The name as the kernel compares it: `-` and `_` are the same.
pub(crate) fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn modinfo_section(elf: &[u8]) -> Option<&[u8]> {
    if !elf.starts_with(&ELF64_LE)
        || usize::from(u16_at(elf, SECTION_ENTRY_SIZE_AT)?) != SECTION_HEADER_BYTES
    {
        return None;
    }
    let table = usize::try_from(u64_at(elf, SECTION_TABLE_OFFSET_AT)?).ok()?;
    let header = |index: u16| {
        let start = table.checked_add(usize::from(index).checked_mul(SECTION_HEADER_BYTES)?)?;
        elf.get(start..start.checked_add(SECTION_HEADER_BYTES)?)
    };
    let names = content(elf, header(u16_at(elf, NAMES_INDEX_AT)?)?)?;
    (0..u16_at(elf, SECTION_COUNT_AT)?).find_map(|index| {
        let header = header(index)?;
        let name = names.get(usize::try_from(u32_at(header, 0)?).ok()?..)?;
        if name.starts_with(b".modinfo\0") {
            content(elf, header)
        } else {
            None
        }
    })
}

fn content<'a>(elf: &'a [u8], header: &[u8]) -> Option<&'a [u8]> {
    let start = usize::try_from(u64_at(header, HEADER_OFFSET_AT)?).ok()?;
    let length = usize::try_from(u64_at(header, HEADER_SIZE_AT)?).ok()?;
    elf.get(start..start.checked_add(length)?)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A module file with the given `.modinfo` section and nothing else.
    pub(crate) fn module_file(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.shstrtab\0.modinfo\0";
        let (names_at, info_at) = (64, 64 + names.len());
        let table_at = info_at + modinfo.len();
        let mut file = vec![0; 64];
        file[..6].copy_from_slice(&ELF64_LE);
        file[SECTION_TABLE_OFFSET_AT..][..8].copy_from_slice(&(table_at as u64).to_le_bytes());
        file[SECTION_ENTRY_SIZE_AT..][..2].copy_from_slice(&64_u16.to_le_bytes());
        file[SECTION_COUNT_AT..][..2].copy_from_slice(&3_u16.to_le_bytes());
        file[NAMES_INDEX_AT..][..2].copy_from_slice(&1_u16.to_le_bytes());
        file.extend_from_slice(names);
        file.extend_from_slice(modinfo);
        for (name, start, length) in [
            (0_u32, 0, 0),
            (1, names_at, names.len()),
            (11, info_at, modinfo.len()),
        ] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[HEADER_OFFSET_AT..][..8].copy_from_slice(&(start as u64).to_le_bytes());
            header[HEADER_SIZE_AT..][..8].copy_from_slice(&(length as u64).to_le_bytes());
            file.extend_from_slice(&header);
        }
        file
    }

    #[test]
    fn name_and_dependencies_are_read_with_underscores() {
        let file = module_file(b"license=GPL\0depends=rng-core,virtio\0name=virtio_rng\0");
        let read = ModuleInfo::decode(&file).expect("a module");
        assert_eq!(read.name, "virtio_rng");
        assert_eq!(read.depends, ["rng_core", "virtio"]);
    }

    #[test]
    fn every_truncation_is_an_error() {
        let file = module_file(b"depends=\0name=virtio\0");
        assert!(ModuleInfo::decode(&file).is_ok());
        for length in 0..file.len() {
            assert!(
                ModuleInfo::decode(&file[..length]).is_err(),
                "cut to {length}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_damage_gives_an_answer(at in 0_usize..400, byte: u8) {
            let mut file = module_file(b"depends=a,b\0name=virtio\0");
            let at = at % file.len();
            file[at] = byte;
            // Either answer is fine; a panic is not.
            drop(ModuleInfo::decode(&file));
        }
    }
}
