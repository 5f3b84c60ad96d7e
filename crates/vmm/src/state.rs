//! What a machine is beside its memory and disks: its devices as QEMU writes them, and the small memories of devices and
//! firmware, which QEMU leaves to whoever saves the machine's memory.
//!
//! As bytes: `"CLMS"`, `u16` version 1, `u16` 0, `u32` length of a JSON header, the header, and then what it lists, in its
//! order. Numbers are little-endian.

use serde_json::{Value, json};

const MAGIC: &[u8; 8] = b"CLMS\x01\0\0\0";
/// A header is at most this long, in bytes.
const MAX_HEADER: usize = 1 << 20;

/// The state of a machine that stands still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineState {
    /// In QEMU's own format, for the same version of QEMU and the same machine.
    pub(crate) devices: Vec<u8>,
    /// Memories beside the guest's, by QEMU's names: video memory, firmware.
    pub(crate) blocks: Vec<(String, Vec<u8>)>,
    /// For each read-only disk, the length in bytes that the guest was told of last.
    pub(crate) lengths: Vec<(String, u64)>,
}

/// Why bytes are not the state of a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is not the state of a machine: {0}")]
pub struct StateError(&'static str);

impl MachineState {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let blocks = self.blocks.iter().map(|(name, content)| json!({ "name": name, "length": content.len() }));
        let lengths = self.lengths.iter().map(|(drive, length)| (drive.clone(), json!(length)));
        let header = json!({
            "devices": self.devices.len(), "blocks": blocks.collect::<Vec<_>>(),
            "lengths": lengths.collect::<serde_json::Map<_, _>>(),
        });
        let header = header.to_string();
        let mut out = MAGIC.to_vec();
        out.extend((header.len() as u32).to_le_bytes());
        out.extend(header.as_bytes());
        out.extend(&self.devices);
        self.blocks.iter().for_each(|(_, content)| out.extend(content));
        out
    }

    /// From bytes that may be anybody's.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(StateError("it begins with something else"))?;
        let (length, rest) = rest.split_first_chunk().ok_or(StateError("it is cut short"))?;
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_HEADER {
            return Err(StateError("its header is too long"));
        }
        let (header, mut rest) = rest.split_at_checked(length).ok_or(StateError("it is cut short"))?;
        let header: Value = serde_json::from_slice(header).map_err(|_| StateError("its header cannot be read"))?;
        let mut take = |length: &Value| {
            let length = length.as_u64().and_then(|length| usize::try_from(length).ok());
            let (part, left) = rest.split_at_checked(length?)?;
            rest = left;
            Some(part.to_vec())
        };
        let devices = take(&header["devices"]).ok_or(StateError("it is cut short"))?;
        let mut blocks = Vec::new();
        for block in header["blocks"].as_array().ok_or(StateError("its header lacks the blocks"))? {
            let name = block["name"].as_str().ok_or(StateError("a block has no name"))?;
            blocks.push((name.to_owned(), take(&block["length"]).ok_or(StateError("it is cut short"))?));
        }
        // Earlier programs wrote none.
        let lengths = header["lengths"].as_object().into_iter().flatten();
        let lengths = lengths.filter_map(|(drive, length)| Some((drive.clone(), length.as_u64()?))).collect();
        if rest.is_empty() {
            Ok(Self { devices, blocks, lengths })
        } else {
            Err(StateError("something follows its end"))
        }
    }
}

/// A memory of the machine, as `info ramblock` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RamBlock {
    pub name: String,
    pub used: u64,
    /// Where it is in QEMU.
    pub address: u64,
}

/// Reads the table of `info ramblock`: name, page size (two words), offset, used, total, address, rights.
pub(crate) fn parse_blocks(text: &str) -> Vec<RamBlock> {
    let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let parse = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [.., _, used, _, address, _] = words[..] else { return None };
        Some(RamBlock { name: words[0].to_owned(), used: number(used)?, address: number(address)? })
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_table_of_memories() {
        let text = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                     ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007fc4cbe00000  rw
    /rom@etc/acpi/tables    4 KiB  0x00000000050c0000 0x0000000000020000 0x0000000000200000 0x00007fc514400000  ro\n";
        let blocks = parse_blocks(text);
        assert_eq!(blocks.len(), 2);
        assert_eq!(blocks[0], RamBlock { name: "ram".into(), used: 64 << 20, address: 0x7fc4_cbe0_0000 });
        assert_eq!((&*blocks[1].name, blocks[1].used), ("/rom@etc/acpi/tables", 128 << 10));
    }

    fn example() -> MachineState {
        MachineState {
            devices: vec![1; 1000],
            blocks: vec![("pc.bios".into(), vec![2; 500]), ("v".into(), vec![])],
            lengths: vec![("seed".into(), 1 << 20)],
        }
    }

    #[test]
    fn there_and_back() {
        assert_eq!(MachineState::decode(&example().encode()), Ok(example()));
    }

    proptest! {
        #[test]
        fn what_is_cut_or_longer_is_refused(cut in 0usize..1500, more in 1usize..9) {
            let bytes = example().encode();
            prop_assert!(MachineState::decode(&bytes[..cut.min(bytes.len() - 1)]).is_err());
            prop_assert!(MachineState::decode(&[bytes, vec![0; more]].concat()).is_err());
        }

        #[test]
        fn any_bytes(bytes: Vec<u8>) {
            let _ = MachineState::decode(&[MAGIC.to_vec(), bytes].concat());
        }
    }
}
