//! What keeps the promise of a flush, and of whoever takes over. Tests break these rules one by one, to see that the loss is noticed.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    FixedBlocksStay,
    DoubtIsResolved,
    DroppedIsErased,
    DataBeforeMap,
    FullLogIsFolded,
    HeldIsNoted,
    NotesAreOfThisBoot,
}

#[cfg(not(test))]
pub(crate) const fn keeps(_: Rule) -> bool {
    true
}

#[cfg(test)]
thread_local! {
    /// The rule that this thread breaks.
    pub(crate) static BROKEN: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
pub(crate) fn keeps(rule: Rule) -> bool {
    BROKEN.get() != Some(rule)
}
