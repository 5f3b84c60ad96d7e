//! Real file systems for tests, made by e2fsprogs in a directory of their own.

#[allow(dead_code)] // Not every test needs it.
pub mod mount;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What lies in space that was never written by the file system: it must be seen to vanish, or not.
pub const OLD_BYTE: u8 = 0xa5;

/// Runs a program of those that make and check file systems, which may be outside of a user's PATH.
pub fn run(program: &str, arguments: &[&str]) -> String {
    run_with(program, arguments, "")
}

/// Runs it with something to read.
pub fn run_with(program: &str, arguments: &[&str], input: &str) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let child = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child =
        child.unwrap_or_else(|error| panic!("{program} can not be run ({error}); run deploy/install-deps test"));
    // It may end before it has read all.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?} failed: {text} {errors}");
    text
}

/// A tree with large, small, sparse and many files.
#[allow(dead_code)] // Not every test needs it.
pub fn make_tree(directory: &Path) -> PathBuf {
    let tree = directory.join("tree");
    fs::create_dir_all(tree.join("sub/deeper")).unwrap();
    for (index, length) in [0usize, 1, 1023, 4096, 70_000, 300_000].into_iter().enumerate() {
        let content: Vec<u8> = (0..length).map(|at| (at * 7 + at / 251 + index) as u8).collect();
        fs::write(tree.join(format!("file{index}")), &content).unwrap();
        fs::write(tree.join(format!("sub/doomed{index}")), &content).unwrap();
    }
    for index in 0..60 {
        fs::write(tree.join(format!("sub/deeper/small{index}")), format!("content of {index}").repeat(index * 9))
            .unwrap();
    }
    tree
}

/// An image with a file system whose free space holds old bytes, and from which some files were deleted.
#[allow(dead_code)] // Not every test needs it.
pub fn make_image(directory: &Path, mebibytes: usize, options: &[&str]) -> PathBuf {
    let image = directory.join("image");
    let tree = make_tree(directory);
    fs::write(&image, vec![OLD_BYTE; mebibytes << 20]).unwrap();
    let paths = [tree.to_str().unwrap(), image.to_str().unwrap()];
    let fixed = ["-q", "-F", "-E", "nodiscard,lazy_itable_init=0", "-L", "label", "-d", paths[0]];
    run("mke2fs", &[&fixed[..], options, &[paths[1]]].concat());
    for index in 0..6 {
        run("debugfs", &["-w", "-R", &format!("rm /sub/doomed{index}"), paths[1]]);
        fs::remove_file(tree.join(format!("sub/doomed{index}"))).unwrap();
    }
    image
}
