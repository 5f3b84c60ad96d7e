//! Linux swap space: a page that describes it, and pages whose content means nothing after a shutdown.
//! Layout: Linux, `union swap_header` in include/linux/swap.h, read by mm/swapfile.c; what a suspended machine leaves
//! there: kernel/power/swap.c, and uswsusp.

use std::ops::Range;

use crate::read::{Fields, Part, Stop, doubt};

/// Of the machines that images are for. Others end their first page, and thus have the mark, elsewhere.
const PAGE: u64 = 4096;
const LARGER_PAGES: [u64; 4] = [8 << 10, 16 << 10, 32 << 10, 64 << 10];
/// Where the mark is, from the end of the first page.
const MARK: u64 = 10;
const MARK_IN_USE: &[u8] = b"SWAPSPACE2";
/// Version 0, which had a bitmap in place of a header.
const MARK_OLD: &[u8] = b"SWAP-SPACE";
/// The kernel's own, two of uswsusp, TuxOnIce's.
const MARKS_SUSPENDED: [&[u8]; 5] =
    [b"S1SUSPEND\0", b"S2SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001", b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c"];

/// What the end of the first page says.
enum Mark {
    InUse,
    Old,
    Suspended,
    OtherPages,
}

/// The swap space of a part whose first page bears one of the marks.
pub(crate) struct Swap<'a> {
    part: Part<'a>,
    mark: Mark,
}

/// Looks for swap space of any kind.
pub(crate) fn find<'a>(part: &Part<'a>) -> Result<Option<Swap<'a>>, Stop> {
    let at = |page: u64| match part.len() >= page {
        true => part.read(page - MARK, MARK as usize, "looking for swap space"),
        false => Ok(Vec::new()),
    };
    let own = at(PAGE)?;
    let is_suspended = |found: &[u8]| MARKS_SUSPENDED.iter().any(|mark| found.starts_with(mark));
    let mut mark = match () {
        () if own == MARK_IN_USE => Some(Mark::InUse),
        () if own == MARK_OLD => Some(Mark::Old),
        () if is_suspended(&own) => Some(Mark::Suspended),
        () => None,
    };
    for page in LARGER_PAGES {
        let found = at(page)?;
        if mark.is_none() && (found == MARK_IN_USE || found == MARK_OLD || is_suspended(&found)) {
            mark = Some(Mark::OtherPages);
        }
    }
    Ok(mark.map(|mark| Swap { part: part.clone(), mark }))
}

impl Swap<'_> {
    pub(crate) fn label(&self) -> Option<String> {
        let raw = self.part.read(1052, 16, "reading a swap header").ok()?;
        let end = raw.iter().position(|byte| *byte == 0).unwrap_or(raw.len());
        Some(String::from_utf8_lossy(&raw[..end]).into_owned()).filter(|label| !label.is_empty())
    }

    /// Bytes of the part that nobody needs. The first page (identity, label) stays, and so does what lies behind the
    /// last page, which is not the swap space's.
    pub(crate) fn unused(&self) -> Result<Vec<Range<u64>>, Stop> {
        match self.mark {
            Mark::InUse => {}
            Mark::Old => return doubt("it is swap space of version 0, which is not looked into"),
            Mark::Suspended => {
                return doubt(
                    "it holds the memory of a suspended machine; start the machine once and shut it down, or make the swap space anew",
                );
            }
            Mark::OtherPages => return doubt(format!("it is swap space with pages of more than {PAGE} bytes")),
        }
        let header = self.part.read(1024, 12, "reading a swap header")?;
        let (version, last, damaged) = (header.u32_at(0), u64::from(header.u32_at(4)), header.u32_at(8));
        if version != 1 {
            return doubt("it is swap space of another version or byte order than is known here");
        }
        if damaged != 0 {
            return doubt("its swap space has pages marked as damaged");
        }
        if last == 0 || (last + 1) * PAGE > self.part.len() {
            return doubt("its swap space has an impossible length (was the disk cut off?)");
        }
        Ok(vec![PAGE..(last + 1) * PAGE])
    }
}
