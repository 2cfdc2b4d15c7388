//! The header extensions decoded. Types that are not known are kept as they are.

use crate::error::Result;
use crate::units::HostOffset;

use super::decode::Decoder;
use super::{
    BitmapsExtension, Encryption, FeatureName, UnknownExtension, be_u32, be_u64, extension, to_u64,
    to_usize,
};

#[derive(Default)]
pub(super) struct Extensions {
    pub backing_format: Option<Vec<u8>>,
    pub external_data: Option<Vec<u8>>,
    pub feature_names: Option<Vec<FeatureName>>,
    pub bitmaps: Option<BitmapsExtension>,
    pub encryption: Option<Encryption>,
    pub unknown: Vec<UnknownExtension>,
}

impl Decoder<'_> {
    pub fn extensions(&self) -> Result<Extensions> {
        let mut found = Extensions::default();
        let area = match self.raw.backing_offset.get() {
            0 => self.cluster_size.bytes(),
            offset => offset.min(self.cluster_size.bytes()),
        };
        let mut at = u64::from(self.raw.header_length.get());
        while area.saturating_sub(at) >= 8 {
            self.in_first_cluster("a header extension", at, 8)?;
            let start = to_usize(at);
            let kind = be_u32(&self.first[start..]);
            let length = be_u32(&self.first[start + 4..]);
            if kind == extension::END {
                break;
            }
            self.require(
                u64::from(length) <= area - at - 8,
                "header extension length",
                u64::from(length),
                format!("at most {} at offset {at}", area - at - 8),
            )?;
            self.in_first_cluster("a header extension", at + 8, u64::from(length))?;
            let data = &self.first[start + 8..start + 8 + to_usize(u64::from(length))];
            self.extension(&mut found, kind, data)?;
            at += 8 + u64::from(length).next_multiple_of(8);
        }
        Ok(found)
    }

    fn extension(&self, found: &mut Extensions, kind: u32, data: &[u8]) -> Result<()> {
        let repeated = match kind {
            extension::BACKING_FORMAT => found.backing_format.replace(data.to_vec()).is_some(),
            extension::EXTERNAL_DATA => found.external_data.replace(data.to_vec()).is_some(),
            extension::FEATURE_NAMES => found.feature_names.replace(feature_names(data)).is_some(),
            extension::BITMAPS => found.bitmaps.replace(self.bitmaps(data)?).is_some(),
            extension::ENCRYPTION => found.encryption.replace(self.luks(data)?).is_some(),
            _ => {
                let data = data.to_vec();
                found.unknown.push(UnknownExtension { kind, data });
                false
            }
        };
        self.require(
            !repeated,
            "header extension type",
            u64::from(kind),
            "each known type at most once",
        )
    }

    fn luks(&self, data: &[u8]) -> Result<Encryption> {
        self.require(
            data.len() == 16,
            "encryption extension length",
            to_u64(data.len()),
            "16",
        )?;
        Ok(Encryption::Luks {
            header: HostOffset(be_u64(data)),
            header_bytes: be_u64(&data[8..]),
        })
    }

    fn bitmaps(&self, data: &[u8]) -> Result<BitmapsExtension> {
        self.require(
            data.len() == 24,
            "bitmaps extension length",
            to_u64(data.len()),
            "24",
        )?;
        Ok(BitmapsExtension {
            count: be_u32(data),
            directory_length: be_u64(&data[8..]),
            directory: HostOffset(be_u64(&data[16..])),
        })
    }
}

fn feature_names(data: &[u8]) -> Vec<FeatureName> {
    let (rows, _cut_off) = data.as_chunks::<48>();
    rows.iter()
        .map(|row| {
            let name = &row[2..];
            let end = name.iter().position(|byte| *byte == 0);
            FeatureName {
                kind: row[0],
                bit: row[1],
                name: String::from_utf8_lossy(&name[..end.unwrap_or(name.len())]).into_owned(),
            }
        })
        .collect()
}
