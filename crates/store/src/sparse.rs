//! A disk as a stream that leaves its zeros out: what a host sends when somebody takes an instance's disk away.
//!
//! Records of `offset` (u64), `length` (u32), both little-endian, and `length` bytes; offsets only grow. The last record
//! has the disk's size as its offset and no bytes, so that a stream that broke off is not taken for a whole disk.

use std::io;
use std::os::unix::fs::FileExt;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::BLOCK;

/// No record holds more bytes than this.
pub const MAX_RECORD_BYTES: usize = 1 << 20;

/// Writes the part of a disk at `offset` without its zero blocks. Not more than [`MAX_RECORD_BYTES`], from a whole block.
pub async fn write_part(out: &mut (impl AsyncWrite + Unpin), offset: u64, part: &[u8]) -> io::Result<()> {
    let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
    let mut at = 0;
    for run in part.chunks(BLOCK as usize).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let length: usize = run.iter().map(|block| block.len()).sum();
        if !is_zero(run[0]) {
            out.write_u64_le(offset + at as u64).await?;
            out.write_u32_le(length as u32).await?;
            out.write_all(&part[at..at + length]).await?;
        }
        at += length;
    }
    Ok(())
}

/// Says that the disk is whole.
pub async fn write_end(out: &mut (impl AsyncWrite + Unpin), size: u64) -> io::Result<()> {
    out.write_u64_le(size).await?;
    out.write_u32_le(0).await?;
    out.flush().await
}

/// Reads a disk of `size` bytes into a file that is as long already and holds nothing yet.
pub async fn read_into(
    from: &mut (impl AsyncRead + Unpin),
    file: &std::fs::File,
    size: u64,
    progress: &dyn Fn(u64),
) -> io::Result<()> {
    let wrong = |why: &str| io::Error::new(io::ErrorKind::InvalidData, format!("the disk's stream is damaged: {why}"));
    let mut buffer = vec![0; MAX_RECORD_BYTES];
    let mut next = 0;
    loop {
        let offset = from.read_u64_le().await.map_err(broken_off)?;
        let length = from.read_u32_le().await.map_err(broken_off)? as usize;
        if length == 0 {
            return if offset == size { Ok(()) } else { Err(wrong("it ends at another size")) };
        }
        let end = offset.checked_add(length as u64).filter(|end| *end <= size);
        let end = end.ok_or_else(|| wrong("a record lies beyond the disk"))?;
        if offset < next || length > MAX_RECORD_BYTES {
            return Err(wrong("its records overlap or are too long"));
        }
        from.read_exact(&mut buffer[..length]).await.map_err(broken_off)?;
        file.write_all_at(&buffer[..length], offset)?;
        progress(length as u64);
        next = end;
    }
}

fn broken_off(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "the host broke off in the middle of the disk"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn stream(parts: &[(u64, &[u8])], size: u64) -> Vec<u8> {
        let mut stream = Vec::new();
        for (offset, part) in parts {
            write_part(&mut stream, *offset, part).await.unwrap();
        }
        write_end(&mut stream, size).await.unwrap();
        stream
    }

    async fn read(stream: &[u8], size: u64) -> io::Result<Vec<u8>> {
        let file = tempfile::tempfile()?;
        file.set_len(size)?;
        read_into(&mut &*stream, &file, size, &|_| {}).await?;
        let mut content = vec![0; size as usize];
        file.read_exact_at(&mut content, 0)?;
        Ok(content)
    }

    #[tokio::test]
    async fn zeros_are_left_out_and_come_back() {
        let mut disk = vec![0; 10 * BLOCK as usize + 100];
        disk[5000] = 1;
        disk[9 * 4096..].fill(7);
        let stream = stream(&[(0, &disk)], disk.len() as u64).await;
        assert_eq!(stream.len(), 3 * 12 + 2 * 4096 + 100);
        assert_eq!(read(&stream, disk.len() as u64).await.unwrap(), disk);
    }

    #[tokio::test]
    async fn damaged_streams_are_refused() {
        let disk = vec![1; 8192];
        let whole = stream(&[(0, &disk)], 8192).await;
        for cut in [0, 5, 12, 4000, whole.len() - 12, whole.len() - 1] {
            let error = read(&whole[..cut], 8192).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{cut}");
        }
        assert!(read(&whole, 4096).await.is_err(), "longer than the disk");
        assert!(read(&whole, 12288).await.is_err(), "ends at another size");
        let twice = stream(&[(4096, &disk[..4096]), (0, &disk[..4096])], 8192).await;
        assert!(read(&twice, 8192).await.is_err(), "offsets fall");
        let mut huge = u64::MAX.to_le_bytes().to_vec();
        huge.extend(u32::MAX.to_le_bytes());
        assert!(read(&huge, 8192).await.is_err(), "overflow");
    }
}
