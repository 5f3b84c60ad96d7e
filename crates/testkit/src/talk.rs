//! A command of the program that a test speaks with, such as a console.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::eventually;

/// It runs until it ends by itself or this is dropped.
pub struct Talk {
    child: Child,
    stdin: Option<ChildStdin>,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Talk {
    pub(crate) fn new(mut child: Child) -> Self {
        let heard = Arc::<Mutex<Vec<u8>>>::default();
        for mut stream in [
            child.stdout.take().map(|out| Box::new(out) as Box<dyn Read + Send>),
            child.stderr.take().map(|out| Box::new(out) as Box<dyn Read + Send>),
        ]
        .into_iter()
        .flatten()
        {
            let heard = heard.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut buffer) {
                    heard.lock().unwrap_or_else(PoisonError::into_inner).extend(&buffer[..read]);
                }
            });
        }
        Self { stdin: child.stdin.take(), child, heard }
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

    /// All it said so far, on both outputs.
    pub fn heard(&self) -> String {
        String::from_utf8_lossy(&self.heard.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Waits until it has said something.
    #[track_caller]
    pub fn hear(&self, text: &str) {
        let limit = Duration::from_secs(60);
        eventually(&format!("{text:?} is heard"), limit, || self.heard().contains(text).then_some(()));
    }

    /// Waits for its end; its code.
    #[track_caller]
    pub fn end(mut self) -> Option<i32> {
        let ended = || self.child.try_wait().expect("a child of ours");
        eventually("the command ends", Duration::from_secs(60), ended).code()
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
