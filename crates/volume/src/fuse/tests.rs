//! A server that dies in the middle, and what comes after it; and what is read of the kernel's words.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::wire::Attributes;
use super::*;

/// More than the kernel reads ahead: a page that is read keeps who writes it waiting.
const SIZE: usize = 4 << 20;
const FAR: usize = SIZE - 5000;

/// One file; its server may die at a request.
struct One {
    content: Mutex<Vec<u8>>,
    /// Told of the request that is never answered.
    dies: Option<Sender<String>>,
}

impl One {
    fn dead(&self, what: String) {
        if let Some(dies) = &self.dies {
            let _ = dies.send(what);
            loop {
                thread::park();
            }
        }
    }
}

impl Serve for One {
    fn serve(&self, node: u64, ask: Ask<'_>, reply: Reply) {
        let (mode, size) = if node == 1 { (0o040_700, 0) } else { (0o100_600, SIZE as u64) };
        let found = Attributes { node, size, mode, owner: (0, 0) };
        match ask {
            Ask::Lookup(_) => {
                let file = Attributes { node: 2, size: SIZE as u64, mode: 0o100_600, owner: (0, 0) };
                reply.data(&wire::entry(&file, Duration::from_secs(60)));
            }
            Ask::Attributes => reply.data(&wire::attributes(&found, Duration::from_secs(60))),
            Ask::Open => reply.data(&wire::opened(None)),
            Ask::Read { offset, size } => {
                self.dead(format!("read {offset}"));
                let content = self.content.lock().unwrap();
                let end = SIZE.min(offset as usize + size as usize);
                reply.data(&content[offset as usize..end]);
            }
            Ask::Write { offset, data } => {
                self.dead(format!("write {offset}"));
                let at = offset as usize;
                self.content.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
                reply.data(&wire::written(data.len()));
            }
            Ask::Release => reply.done(),
            _ => reply.refuse(Errno::NOSYS),
        }
    }

    fn wants_backing(&self) -> bool {
        false
    }
}

#[test]
fn who_waits_for_a_server_that_died_is_answered_by_the_next() {
    if !Path::new("/dev/fuse").exists() {
        return println!("SKIPPED: there is no /dev/fuse here");
    }
    let folder = tempfile::tempdir().unwrap();
    let (dies, died) = channel();
    let content: Vec<u8> = (0..SIZE).map(|at| (at / 7) as u8).collect();
    let first = One { content: Mutex::new(vec![0; SIZE]), dies: Some(dies) };
    // Two threads: each takes one request with it.
    let first = Connection::mount(folder.path(), false, 2, first).unwrap();
    let descriptor = first.descriptor().unwrap();
    let path = folder.path().join("file");
    let reader = thread::spawn({
        let path = path.clone();
        move || {
            let mut bytes = vec![0; 4096];
            OpenOptions::new().read(true).open(path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
            bytes
        }
    });
    assert_eq!(died.recv().unwrap(), "read 0");
    let writer = thread::spawn({
        let path = path.clone();
        move || {
            let file = OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(b"words", FAR as u64).unwrap();
        }
    });
    assert_eq!(died.recv().unwrap(), format!("write {FAR}"));
    // This one nobody has taken yet.
    let looker = thread::spawn(move || OpenOptions::new().read(true).open(path).unwrap());
    std::mem::forget(first);

    let second = One { content: Mutex::new(content.clone()), dies: None };
    let second = Connection::adopt(descriptor, folder.path(), 2, second).unwrap();
    writer.join().unwrap();
    assert_eq!(reader.join().unwrap(), content[..4096]);
    let mut words = [0; 5];
    let file = looker.join().unwrap();
    file.read_exact_at(&mut words, FAR as u64).unwrap();
    assert_eq!(&words, b"words");
    drop(file);
    second.unmount().unwrap();
}

#[test]
fn what_was_never_answered_is_an_error_and_not_a_wait() {
    struct Forgets;
    impl Serve for Forgets {
        fn serve(&self, _: u64, _: Ask<'_>, reply: Reply) {
            drop(reply);
        }
        fn wants_backing(&self) -> bool {
            false
        }
    }
    if !Path::new("/dev/fuse").exists() {
        return println!("SKIPPED: there is no /dev/fuse here");
    }
    let folder = tempfile::tempdir().unwrap();
    let connection = Connection::mount(folder.path(), false, 1, Forgets).unwrap();
    let error = std::fs::read(folder.path().join("file")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()));
    connection.unmount().unwrap();
}

#[test]
fn a_folder_in_parts() {
    let entries = [(1, 0o040_000, "."), (2, 0o100_000, "system"), (3, 0o100_000, "a-disk-with-a-longer-name")];
    let whole = wire::folder(&entries, 0, 4096);
    let parts: Vec<Vec<u8>> = (0..4).map(|first| wire::folder(&entries, first, 64)).collect();
    // 24 bytes of header, the name, and padding to 8.
    assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [64, 32, 56, 0]);
    assert_eq!([&parts[0][..], &parts[2]].concat(), whole);
}

proptest! {
    /// A request that is cut short is none, and nothing else is read than what is there.
    #[test]
    fn requests_are_read_whole_or_not(opcode in 0u32..48, body in prop::collection::vec(any::<u8>(), 0..120)) {
        let mut bytes = vec![0; wire::HEADER];
        bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
        bytes.extend(&body);
        for end in 0..wire::HEADER {
            prop_assert!(wire::parse(&bytes[..end]).is_none());
        }
        let wanted = match opcode { 15 | 28 => 20, 16 => 40, 26 => 16, 43 => 28, _ => 0 };
        let found = wire::parse(&bytes);
        prop_assert!(body.len() >= wanted || found.is_none());
        if let Some(Request { ask: Ask::Write { data, .. }, .. }) = found {
            prop_assert!(data.len() + 40 <= body.len());
        }
    }
}
