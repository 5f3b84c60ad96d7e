//! A disk on its way, the map and the log of a layer, and the rest of a machine at rest.

use std::os::unix::fs::FileExt;

use collective_model::Digest;
use collective_store::sparse::{read_into, write_end, write_part};
use collective_vmm::MachineState;
use collective_volume::Layer;

use super::{block_on, folder, number};

/// What a machine is beside memory and disks.
pub fn machine(data: &[u8]) {
    if let Ok(state) = MachineState::decode(data) {
        assert_eq!(MachineState::decode(&state.encode()), Ok(state), "what was read is what is written");
    }
}

/// A disk as a stream, after its size.
pub fn sparse(data: &[u8]) {
    let rest = &mut { data };
    let size = number(rest, 3);
    let file = tempfile::tempfile_in(folder().path()).expect("a file");
    file.set_len(size).expect("a length");
    if block_on(read_into(rest, &file, size, &|_| {})).is_err() {
        return;
    }
    assert_eq!(file.metadata().expect("a file").len(), size, "it wrote beyond the disk");
    let mut disk = vec![0; size as usize];
    file.read_exact_at(&mut disk, 0).expect("all of it");
    let mut again = Vec::new();
    block_on(async {
        write_part(&mut again, 0, &disk).await.expect("memory");
        write_end(&mut again, size).await.expect("memory");
    });
    assert!(again.len() <= disk.len() + 12 * (disk.len() / 4096 + 2));
}

/// The map of a layer, after the disk's size, the length of the data file, and records of the log. These come without
/// their checksums, which chance would never find.
pub fn layer(data: &[u8]) {
    let rest = &mut { data };
    let (size, length, records) = (number(rest, 4), number(rest, 4), number(rest, 2) as usize);
    let (records, map) = rest.split_at(records.min(rest.len()));
    let folder = folder();
    let path = folder.path().join("layer");
    let file = std::fs::File::create(&path).expect("a data file");
    for (slot, record) in (0..).zip(records.chunks(4064)) {
        let mut record = record.to_vec();
        record.resize(4064, 0);
        record.extend(Digest::of(&record).0);
        file.write_all_at(&record, size.next_multiple_of(4096) + slot * 4096).expect("a log");
    }
    file.set_len(length).expect("a length");
    std::fs::write(folder.path().join("layer.map"), map).expect("a map");
    for writable in [false, true] {
        let Ok(layer) = Layer::open(&path, size, writable) else { return };
        let held = layer.held();
        assert!(held.is_sorted() && held.last().is_none_or(|last| last * 4096 < size));
        for block in held.iter().take(3).chain(held.last()) {
            layer.read(block * 4096, &mut [0; 4096]).expect("what it holds");
        }
    }
}
