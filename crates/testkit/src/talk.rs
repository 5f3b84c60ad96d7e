//! A command of the program that a test speaks with, such as a console.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::eventually;

/// It runs until it ends by itself or this is dropped.
pub struct Talk {
    child: Child,
    stdin: Option<ChildStdin>,
    heard: Arc<Mutex<Vec<u8>>>,
    /// How much of it was waited for already.
    passed: AtomicUsize,
}

impl Talk {
    pub(crate) fn new(mut child: Child) -> Self {
        let heard = Arc::<Mutex<Vec<u8>>>::default();
        child.stdout.take().into_iter().for_each(|stdout| listen(stdout, heard.clone()));
        child.stderr.take().into_iter().for_each(|stderr| listen(stderr, heard.clone()));
        Self { stdin: child.stdin.take(), child, heard, passed: AtomicUsize::new(0) }
    }

    /// Writes to its standard input.
    pub fn say(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("it listens");
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).expect("it listens");
    }

    /// Ends its standard input.
    pub fn hang_up(&mut self) {
        self.stdin = None;
    }

    /// Waits until it says something, on either output, after what was waited for before.
    #[track_caller]
    pub fn hear(&self, text: &str) {
        eventually(&format!("{text:?} is heard"), Duration::from_secs(60), || {
            let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
            let passed = self.passed.load(Relaxed);
            let found = heard[passed..].windows(text.len()).position(|part| part == text.as_bytes())?;
            self.passed.store(passed + found + text.len(), Relaxed);
            Some(())
        });
    }

    /// Waits for its end; its code.
    #[track_caller]
    pub fn end(mut self) -> Option<i32> {
        let ended = || self.child.try_wait().expect("a child of ours");
        eventually("the command ends", Duration::from_secs(60), ended).code()
    }
}

fn listen(mut stream: impl Read + Send + 'static, heard: Arc<Mutex<Vec<u8>>>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = stream.read(&mut buffer) {
            heard.lock().unwrap_or_else(PoisonError::into_inner).extend(&buffer[..read]);
        }
    });
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
