//! Sound and short examples of every format, made by what makes the real ones.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::Path;
use std::process::Command;

use collective_keys::{ChannelPointer, KeyChange, Kind, Signed, SigningKey};
use collective_model::{Digest, Manifest, Timestamp};
use collective_store::pack::{self, Directory, EntryKind, Pack, PackBuilder};
use collective_store::publish::{BaseReader, KnownBlocks, PackHashes, PackSink, Publisher};
use collective_store::sparse::{write_end, write_part};
use collective_store::trace::Trace;
use collective_store::{Encoding, encode};
use collective_testkit::Dice;
use collective_volume::Layer;

use super::targets::shortened;

/// Format, name, bytes.
pub type Example = (&'static str, String, Vec<u8>);

/// All of them.
pub fn examples() -> Vec<Example> {
    [packs(), indexes(), streams(), texts(), disks()].into_iter().flatten().collect()
}

#[derive(Default)]
struct Sink(Vec<Pack>);

impl PackSink for Sink {
    fn put(&mut self, pack: Pack, _: PackHashes) -> io::Result<()> {
        self.0.push(pack);
        Ok(())
    }
}

struct Contents(HashMap<Digest, Vec<u8>>);

impl BaseReader for Contents {
    fn read(&self, frames: &[Digest]) -> io::Result<Vec<Vec<u8>>> {
        Ok(frames.iter().map(|frame| self.0[frame].clone()).collect())
    }
}

/// The packs of a small disk, and those of its successor: plain frames and pages, and differences.
fn published() -> (Vec<Pack>, Vec<Pack>, HashMap<Digest, Vec<u8>>) {
    let old: Vec<u8> = (0..2).flat_map(|block| Dice::new(block).bytes(4096)).chain([0; 8192]).collect();
    let mut new = old.clone();
    new[200..210].copy_from_slice(b"difference");
    new[9000..9100].fill(7);
    let mut first = Sink::default();
    let mut publisher = Publisher::new(KnownBlocks::default(), &mut first);
    publisher.add(&old, &[], &Trace::default(), &|_| {}).unwrap();
    publisher.finish().unwrap();
    let mut contents = HashMap::new();
    for pack in &first.0 {
        let found =
            pack.directory.entries.iter().map(|entry| (entry.digest, pack::contents(&pack.bytes, entry).unwrap()));
        contents.extend(found);
    }
    let mut known = KnownBlocks::new(contents.keys().copied().collect::<HashSet<_>>());
    first.0.iter().for_each(|pack| known.learn(&pack.digest, &PackHashes::of(&pack.bytes).unwrap()));
    let (mut second, contents) = (Sink::default(), Contents(contents));
    let mut publisher = Publisher::new(known, &mut second).with_bases(&contents);
    publisher.add(&new, &[], &Trace::default(), &|_| {}).unwrap();
    publisher.finish().unwrap();
    (first.0, second.0, contents.0)
}

fn packs() -> Vec<Example> {
    let (first, second, contents) = published();
    let mut builder = PackBuilder::default();
    let content = b"some content of a frame ".repeat(171)[..4096].to_vec();
    let (encoding, stored) = encode(&content);
    builder.add(EntryKind::Data, Digest::of(&content), encoding, &stored, 4096);
    builder.add(EntryKind::Page, Digest::of(b"page"), Encoding::Plain, b"page", 4);
    let small = builder.finish();

    let mut examples = vec![
        ("frame", "zstd".to_owned(), [&[1], &4096u32.to_le_bytes()[..], &stored].concat()),
        ("frame", "plain".to_owned(), [&[0], &4u32.to_le_bytes()[..], b"page"].concat()),
        ("delta", "alone".to_owned(), [&4096u32.to_le_bytes()[..], &[0, 0], &stored].concat()),
        ("pack", "small".to_owned(), small.bytes.clone()),
    ];
    for (name, pack) in [("small", &small)].into_iter().chain(second.iter().map(|pack| ("second", pack))) {
        let Directory { entries, deltas } = &pack.directory;
        let kind = if deltas.is_empty() { "plain" } else { "deltas" };
        let range =
            pack::directory_range(&pack.bytes[pack.bytes.len() - pack::TRAILER as usize..], pack.bytes.len() as u64);
        let size = (pack.bytes.len() as u32).to_le_bytes();
        let tail = [&size[..], &pack.bytes[range.unwrap().start as usize..]].concat();
        examples.push(("tail", format!("{name}-{kind}"), tail));
        let hashes = PackHashes::of(&pack.bytes).unwrap().encode();
        examples.push(("hashes", format!("{name}-{kind}"), hashes[..hashes.len() - 32].to_vec()));
        if entries.is_empty() {
            examples.push(("pack", format!("{name}-{kind}"), pack.bytes.clone()));
        }
        for delta in deltas {
            let bases: Vec<u8> = delta.bases.iter().flat_map(|base| base.of(&contents[&base.frame])).copied().collect();
            let stored = &pack.bytes[delta.entry.range().start as usize..delta.entry.range().end as usize];
            let head = [&delta.entry.length.to_le_bytes()[..], &(bases.len() as u16).to_le_bytes()].concat();
            examples.push(("delta", format!("{:?}", delta.entry.kind), [&head[..], &bases, stored].concat()));
        }
    }
    assert!(!first.is_empty());
    examples
}

fn indexes() -> Vec<Example> {
    use collective_store::page::{Leaf, LeafExtent, Node, Root};
    let frames = vec![(Digest::of(b"a"), 32), (Digest::of(b"b"), 3)];
    let extents = vec![
        LeafExtent { first: 0, blocks: 32, frame: 0, offset: 0 },
        LeafExtent { first: 40, blocks: 2, frame: 1, offset: 1 },
        LeafExtent { first: 2047, blocks: 1, frame: 1, offset: 0 },
    ];
    let leaf = Leaf { frames, extents }.encode();
    let node = Node { level: 1, children: vec![(0, Digest::of(b"x")), (255, Digest::of(b"y"))] }.encode();
    let root = Root { size: 2 << 30, height: 2, top: Some(Digest([9; 32])) }.encode();
    // Its size in sectors, its height, slots, lengths.
    let image = |sectors: u64, slots: [u16; 4], leaves: &[&[u8]]| {
        let mut out = [&sectors.to_le_bytes()[..5], &[0]].concat();
        slots.iter().for_each(|slot| out.extend(slot.to_le_bytes()));
        (0..4).for_each(|at| out.extend((leaves.get(at).map_or(0, |leaf| leaf.len()) as u16).to_le_bytes()));
        leaves.iter().for_each(|leaf| out.extend(*leaf));
        out
    };
    let empty = Leaf::default().encode();
    let named = |name: &str, bytes: Vec<u8>| ("page", name.to_owned(), bytes);
    vec![
        named("leaf", leaf.clone()),
        named("node", node),
        named("root", root),
        ("image", "one-leaf".to_owned(), image(16384, [0; 4], &[&leaf])),
        ("image", "three-leaves".to_owned(), image(200_000, [0, 1, 9, 0], &[&leaf, &empty, &leaf])),
        ("image", "three-levels".to_owned(), image(8 << 20, [0, 3, 255, 0], &[&leaf, &leaf, &leaf])),
        ("trace", "some".to_owned(), Trace(vec![(5, 1), (900, 200), (0, u32::MAX), (7, 3)]).encode()),
        ("trace", "none".to_owned(), Trace::default().encode()),
    ]
}

fn streams() -> Vec<Example> {
    let mut disk = vec![0; 20_000];
    disk[5000..5010].fill(1);
    disk[16_000..].fill(2);
    let mut stream = (disk.len() as u32).to_le_bytes()[..3].to_vec();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        write_part(&mut stream, 0, &disk).await.unwrap();
        write_end(&mut stream, disk.len() as u64).await.unwrap();
    });
    // What no program here writes, and is right: a record that is shorter than a block.
    let short = [&8192u32.to_le_bytes()[..3], &4096u64.to_le_bytes(), &3u32.to_le_bytes(), b"abc"].concat();
    let short = [&short[..], &8192u64.to_le_bytes(), &[0; 4]].concat();
    let mut examples = vec![("sparse", "records".to_owned(), stream), ("sparse", "short".to_owned(), short)];
    for (name, header, rest) in [
        (
            "two",
            r#"{"blocks":[{"length":3,"name":"pc.bios"},{"length":0,"name":"pc.rom"}],"devices":5}"#,
            &b"QEVM-abc"[..],
        ),
        ("none", r#"{"blocks":[],"devices":0}"#, b""),
    ] {
        let head = [&b"CLMS\x01\0\0\0"[..], &(header.len() as u32).to_le_bytes()].concat();
        examples.push(("machine", name.to_owned(), [&head[..], header.as_bytes(), rest].concat()));
    }
    // The first flush of the odd one is too large for a record.
    for (name, size, hole) in [("small", 1u64 << 20, 30), ("odd", (40 << 20) + 512, 300)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("layer");
        Layer::create(&path, size).unwrap();
        let layer = Layer::open(&path, size, true).unwrap();
        layer.discard(20, hole).unwrap();
        layer.flush().unwrap();
        // The data is zeros in this test, so only of such blocks the newest record counts.
        layer.write(4096 * 3, &[0; 8192]).unwrap();
        layer.flush().unwrap();
        let (data, map) = (std::fs::read(&path).unwrap(), std::fs::read(folder.path().join("layer.map")).unwrap());
        let log = data[size.next_multiple_of(4096) as usize..].chunks(4096).take(2);
        let log: Vec<u8> =
            log.filter(|slot| slot.starts_with(b"CLLR")).flat_map(|slot| &slot[..4064]).copied().collect();
        let head = [(size as u32).to_le_bytes(), (data.len() as u32).to_le_bytes()].concat();
        examples.push(("layer", name.to_owned(), [&head, &(log.len() as u16).to_le_bytes()[..], &log, &map].concat()));
        // A version 1 has no log.
        let old = [&b"CLLM\x01"[..], &map[5..]].concat();
        examples.push(("layer", format!("{name}-1"), [&head, &[0; 2][..], &old].concat()));
    }
    examples
}

const MANIFEST: &str = r#"{"format":1,"appliance":"demo/notes","version":"1","created":"2026-11-22T00:00:00Z","summary":"s",
"hardware":{"cpus":2,"memory":268435456},"disks":[{"name":"system","role":"system","size":1048576,
"image":"50ccf830685e86f9517c653b1d871550ef409c069756ad39fe44ecda27026cb0"},{"name":"data","role":"data","size":2097152}],
"ports":[{"name":"http","guest":80}],"settings":{"password":{"secret":true},"title":{"default":"x"}}}"#;

const OVF: &str = r#"<?xml version="1.0"?><Envelope xmlns:ovf="o" xmlns:rasd="r" xmlns:vmw="v">
<References><File ovf:id="f1" ovf:href="a.vmdk" ovf:size="70000"/></References><DiskSection><Info>d</Info>
<Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="2" ovf:capacityAllocationUnits="byte * 2^20"/></DiskSection>
<VirtualSystem ovf:id="vm"><Name>A &amp; &#66;</Name><AnnotationSection><Annotation><![CDATA[why]]></Annotation>
</AnnotationSection><VirtualHardwareSection>
<Item><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
<Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:ResourceType>4</rasd:ResourceType>
<rasd:VirtualQuantity>768</rasd:VirtualQuantity></Item>
<Item><rasd:HostResource>ovf:/disk/d1</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>
<vmw:Config vmw:key="firmware" vmw:value="efi"/></VirtualHardwareSection></VirtualSystem></Envelope>"#;

fn texts() -> Vec<Example> {
    let key = SigningKey::generate().unwrap();
    let manifest = Manifest::parse(MANIFEST.as_bytes()).unwrap();
    let pointer = ChannelPointer {
        appliance: "demo/notes".parse().unwrap(),
        channel: "stable".parse().unwrap(),
        serial: 3,
        version: Digest::of(b"v"),
        created: Timestamp(1_700_000_000_000),
    };
    let change = KeyChange { publisher: "demo".parse().unwrap(), old: key.public(), new: key.public() };
    let recipe = |path: &str| std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)).unwrap();
    let signed = |kind, payload: String| serde_json::to_vec(&Signed::sign(kind, payload, &key)).unwrap();
    vec![
        ("manifest", "short".to_owned(), MANIFEST.as_bytes().to_vec()),
        ("manifest", "written".to_owned(), serde_json::to_vec(&manifest).unwrap()),
        ("recipe", "notes".to_owned(), recipe("appliances/notes/appliance.toml")),
        (
            "recipe",
            "short".to_owned(),
            b"publisher = \"p\"\nname = \"n\"\n[[disks]]\nname = \"d\"\nsize = \"1 GiB\"\n".to_vec(),
        ),
        ("signed", "manifest".to_owned(), signed(Kind::Manifest, MANIFEST.into())),
        ("signed", "channel".to_owned(), signed(Kind::Channel, serde_json::to_string(&pointer).unwrap())),
        ("signed", "key-change".to_owned(), signed(Kind::KeyChange, serde_json::to_string(&change).unwrap())),
        ("signed", "pointer".to_owned(), serde_json::to_vec(&pointer).unwrap()),
        ("signed", "change".to_owned(), serde_json::to_vec(&change).unwrap()),
        ("ovf", "machine".to_owned(), OVF.as_bytes().to_vec()),
        ("ovf", "empty".to_owned(), b"<Envelope><VirtualSystem/></Envelope>".to_vec()),
    ]
}

/// The same seed for what these programs would choose by chance, as far as they let one.
const UUID: &str = "01234567-89ab-cdef-0123-456789abcdef";

fn disks() -> Vec<Example> {
    let make = |size: u64, program: &str, arguments: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(size).unwrap();
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new(program);
        let made = command.args(arguments).arg(&image).env("PATH", path).output().unwrap();
        assert!(made.status.success(), "{program}: {}", String::from_utf8_lossy(&made.stderr));
        std::fs::read(image).unwrap()
    };
    let ext = |kind: &str, more: &[&str]| {
        make(1 << 20, "mke2fs", &[&["-q", "-F", "-b", "1024", "-N", "16", "-U", UUID, "-t", kind], more].concat())
    };
    let ext2 = ext("ext2", &[]);
    let ext4 = make(4 << 20, "mke2fs", &["-q", "-F", "-b", "1024", "-N", "16", "-U", UUID, "-t", "ext4"]);
    let fat12 = make(512 << 10, "mkfs.vfat", &["-F", "12", "-i", "01234567"]);
    let fat32 = make(34 << 20, "mkfs.vfat", &["-F", "32", "-s", "1", "-i", "01234567"]);
    let swap = make(128 << 10, "mkswap", &["-U", UUID]);
    let xfs = ["--unsupported", "-q", "-f", "-K", "-d", "agcount=1", "-l", "size=6m", "-m"];
    let xfs = make(16 << 20, "mkfs.xfs", &[&xfs[..], &[&format!("uuid={UUID}")]].concat());
    let mut all = vec![("swap", swap.clone()), ("fat32", fat32), ("xfs", xfs), ("ext4", ext4), ("ext2", ext2.clone())];
    all.push(("mbr", mbr(&[&fat12, &swap])));
    all.push(("gpt", gpt(&ext2)));
    all.push(("fat12", fat12));
    all.into_iter().map(|(name, disk)| ("disk", name.to_owned(), shortened(&disk))).collect()
}

/// Partitions one after the other, from sector 8 on.
fn mbr(parts: &[&[u8]]) -> Vec<u8> {
    let mut disk = vec![0; 4096];
    for (slot, part) in parts.iter().enumerate() {
        let entry = 446 + 16 * slot;
        let (first, count) = ((disk.len() / 512) as u32, (part.len() / 512) as u32);
        disk[entry + 4] = 0x83;
        disk[entry + 8..entry + 12].copy_from_slice(&first.to_le_bytes());
        disk[entry + 12..entry + 16].copy_from_slice(&count.to_le_bytes());
        disk.extend(*part);
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// One partition from sector 64 on, between two tables.
fn gpt(part: &[u8]) -> Vec<u8> {
    let sectors = 64 + part.len() / 512 + 34;
    let mut disk = vec![0; 512 * sectors];
    disk[512 * 64..512 * 64 + part.len()].copy_from_slice(part);
    disk[450] = 0xee;
    disk[454..458].copy_from_slice(&1u32.to_le_bytes());
    disk[458..462].copy_from_slice(&(sectors as u32 - 1).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut entries = vec![0; 128 * 128];
    entries[..32].copy_from_slice(&[7; 32]);
    entries[32..40].copy_from_slice(&64u64.to_le_bytes());
    entries[40..48].copy_from_slice(&(64 + part.len() as u64 / 512 - 1).to_le_bytes());
    let last = sectors as u64 - 1;
    for (own, other, table) in [(1, last, 2), (last, 1, last - 32)] {
        let mut header = vec![0; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
        for (at, value) in [(24, own), (32, other), (40, 34), (48, last - 33), (72, table)] {
            header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        header[80..84].copy_from_slice(&128u32.to_le_bytes());
        header[84..88].copy_from_slice(&128u32.to_le_bytes());
        header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        let sum = crc32(&header);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        disk[512 * own as usize..512 * own as usize + 92].copy_from_slice(&header);
        disk[512 * table as usize..512 * table as usize + entries.len()].copy_from_slice(&entries);
    }
    disk
}
