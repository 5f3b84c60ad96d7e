//! The three checksums of the structures read here. Bit by bit where little is summed, by table where bitmaps are.

/// CRC-32 of GPT (ISO 3309, reflected 0x04C11DB7), complete.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    !update(&TABLE_CRC32, !0, bytes)
}

/// CRC-32C (reflected 0x1EDC6F41) as ext4 uses it: continued from a seed, and not inverted at the end.
pub(crate) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    update(&TABLE_CRC32C, seed, bytes)
}

/// CRC-16 (reflected 0x8005) of ext4's older group descriptors.
pub(crate) fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(seed, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xa001 } else { crc >> 1 })
    })
}

static TABLE_CRC32: [u32; 256] = table(0xedb8_8320);
static TABLE_CRC32C: [u32; 256] = table(0x82f6_3b78);

const fn table(polynomial: u32) -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ polynomial } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
}

fn update(table: &[u32; 256], seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |crc, byte| table[usize::from(crc as u8 ^ *byte)] ^ crc >> 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_values_of_the_catalogue() {
        // "123456789" is the check input of every catalogue of CRCs.
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
    }
}
