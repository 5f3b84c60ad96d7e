//! The manifest (`.mf`) of an OVF package: what its files must be, so that a damaged or changed one is noticed.
//!
//! OVF 1 knows SHA1, OVF 2 SHA256 and SHA512. A manifest is no signature: it guards against accidents, and who can
//! change a file can change the manifest, so SHA1 is accepted where it is all there is.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use aws_lc_rs::digest::{Algorithm, Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256, SHA512};

/// No manifest is longer than this, in bytes.
pub(crate) const MAX_MF_BYTES: u64 = 1 << 20;
const ALGORITHMS: [(&str, &Algorithm); 3] =
    [("SHA1", &SHA1_FOR_LEGACY_USE_ONLY), ("SHA256", &SHA256), ("SHA512", &SHA512)];

struct Line {
    file: String,
    name: &'static str,
    algorithm: &'static Algorithm,
    digest: String,
}

/// A manifest that was read.
pub(crate) struct Checksums(Vec<Line>);

impl Checksums {
    /// Reads lines such as `SHA256(disk.vmdk)= 0123…`; the error is a sentence without its subject.
    pub fn parse(text: &str) -> Result<Self, String> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let parsed = lines.map(|line| {
            parse_line(line).ok_or_else(|| {
                format!(
                    "has a line {:?} that is no checksum; it may be cut off",
                    line.chars().take(80).collect::<String>()
                )
            })
        });
        Ok(Self(parsed.collect::<Result<_, _>>()?))
    }

    /// Whether the file that the package calls `name` is as it should be; the error is a sentence without its subject.
    pub fn check(&self, name: &str, content: &mut dyn Read) -> Result<(), String> {
        let lines: Vec<_> = self.0.iter().filter(|line| line.file == name).collect();
        let mut contexts: Vec<_> = lines.iter().map(|line| Context::new(line.algorithm)).collect();
        if lines.is_empty() {
            return Err(format!("has no checksum of {name:?}; it may be cut off"));
        }
        read_through(content, &mut |part| contexts.iter_mut().for_each(|context| context.update(part)))
            .map_err(|e| format!("cannot be compared with {name:?}: {e}"))?;
        for (line, context) in lines.iter().zip(contexts) {
            if hexadecimal(context.finish().as_ref()) != line.digest {
                return Err(format!("has another {} for {name:?} than the file has", line.name));
            }
        }
        Ok(())
    }
}

fn parse_line(line: &str) -> Option<Line> {
    let (left, digest) = line.rsplit_once('=')?;
    let (name, file) = left.trim_end().strip_suffix(')')?.split_once('(')?;
    let (name, algorithm) = ALGORITHMS.into_iter().find(|(known, _)| known.eq_ignore_ascii_case(name.trim()))?;
    let digest = digest.trim().to_ascii_lowercase();
    let whole = digest.len() == 2 * algorithm.output_len && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
    whole.then(|| Line { file: file.to_owned(), name, algorithm, digest })
}

/// The line of a manifest for a file, and its SHA256.
pub(crate) fn line(name: &str, path: &Path) -> io::Result<(String, [u8; 32])> {
    let mut context = Context::new(&SHA256);
    read_through(&mut File::open(path)?, &mut |part| context.update(part))?;
    let mut sum = [0; 32];
    sum.copy_from_slice(context.finish().as_ref());
    Ok((format!("SHA256({name})= {}\n", hexadecimal(&sum)), sum))
}

fn read_through(content: &mut dyn Read, take: &mut dyn FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match content.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => take(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
