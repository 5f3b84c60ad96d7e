//! Linux swap space, made by mkswap.

// Lists of ranges, and some have one element.
#![allow(clippy::single_range_in_vec_init)]

mod common;

use std::fs;

use collective_disk::{Survey, unused};
use common::{OLD_BYTE, run};

const SIZE: u64 = 8 << 20;

fn make_swap(options: &[&str]) -> Vec<u8> {
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("image");
    // Some bytes behind the last page are not the swap space's.
    fs::write(&image, vec![OLD_BYTE; SIZE as usize + 512]).unwrap();
    run("mkswap", &[&["-L", "label"], options, &[image.to_str().unwrap()]].concat());
    fs::read(&image).unwrap()
}

fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Survey {
    let mut image = make_swap(&[]);
    change(&mut image);
    unused(&image).unwrap()
}

#[track_caller]
fn nothing_after(reason: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let survey = changed(change);
    assert!(survey.unused.is_empty(), "{survey:?}");
    assert!(survey.notes.len() == 1 && survey.notes[0].contains(reason), "{reason}: {:?}", survey.notes);
}

#[test]
fn all_but_the_first_page_is_unused() {
    let survey = changed(|_| {});
    assert_eq!((survey.found[0].what, survey.found[0].label.as_deref()), ("swap", Some("label")));
    assert_eq!(survey.unused, [4096..SIZE]);
    assert!(survey.notes.is_empty());
}

#[test]
fn what_is_behind_the_last_page_is_used() {
    let survey = changed(|image| image[1028..1032].copy_from_slice(&99u32.to_le_bytes()));
    assert_eq!(survey.unused, [4096..100 * 4096]);
}

#[test]
fn a_suspended_machine_is_kept() {
    for mark in
        [&b"S1SUSPEND\0"[..], b"S2SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001", b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c"]
    {
        nothing_after("memory of a suspended machine", |image| image[4086..4086 + mark.len()].copy_from_slice(mark));
    }
}

#[test]
fn swap_space_in_doubt_is_kept() {
    nothing_after("version 0", |image| image[4086..4096].copy_from_slice(b"SWAP-SPACE"));
    nothing_after("another version or byte order", |image| image[1024..1028].copy_from_slice(&1u32.to_be_bytes()));
    nothing_after("marked as damaged", |image| image[1032] = 1);
    nothing_after("impossible length", |image| image[1028..1032].fill(0));
    nothing_after("impossible length", |image| image[1028..1032].fill(0xff));
    nothing_after("impossible length", |image| image.truncate(1 << 20));
    nothing_after("marks of both luks and swap", |image| image[..6].copy_from_slice(b"LUKS\xba\xbe"));
    nothing_after("marks of both btrfs and swap", |image| image[0x1_0040..0x1_0048].copy_from_slice(b"_BHRfS_M"));
    nothing_after("marks of both", |image| image[1080..1082].copy_from_slice(&[0x53, 0xef]));
    nothing_after("no known", |image| image.truncate(2048));
}

#[test]
fn other_sizes_of_pages_are_left_alone() {
    let image = make_swap(&["-p", "65536"]);
    let survey = unused(&image).unwrap();
    assert_eq!(survey.found[0].what, "swap");
    assert!(survey.unused.is_empty() && survey.notes[0].contains("more than 4096"), "{survey:?}");
}
