//! Layers between which nothing that is kept ends become one, whatever the instance does meanwhile.
//!
//! ```text
//! one write of the record: a journal with the new layer's number
//! the runner of the machine, or a process of its own for what no machine runs on, writes the new layer, durable
//! one write of the record: the new layer in place of the old ones, everywhere; the journal is gone
//! the old files go
//! ```
//! The content of every chain is the same before and after, and the old layers are only read. So whoever dies, whenever:
//! either the record names the old ones, which are there, or the new one, which is whole. A runner that has finished says
//! so until it is heard, since it goes on with the new layer; any other merge that was broken off is simply forgotten.

pub(crate) mod plan;

use std::collections::{BTreeSet, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use collective_model::State;
use collective_model::run::{Phase, Request};
use collective_model::run_merge::{MergeOrder, MergeStatus};
use tokio::io::AsyncWriteExt;
use tokio::process::Child;
use tokio::time::{Instant, sleep};

use crate::instance::Instance;
use crate::link::{self, LinkError};
use crate::record::{MergeJournal, layer_path, screen_path, state_path};
use plan::Merge;

/// How often it is looked whether there is something to merge. Others come first, such as whoever suspends and resumes.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// What could not be merged is tried again after this time.
const AGAIN: Duration = Duration::from_secs(600);
/// No machine is started while more layers in a row wait to become one: somebody who suspends and resumes all the time leaves
/// no other time for it.
const TOO_MANY_WAIT: usize = 24;
/// Nor with so many layers in a chain, if some can go: a disk cannot be opened with more than 255.
const TOO_MANY: usize = 128;
/// In a longer chain, layers that a clone has too are merged all the same, which takes space for what was shared.
const MANY_SHARED: usize = 128;
/// How often a merge that somebody waits for is looked at.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// What a task remembers of merges; nothing of it has to outlive the daemon.
#[derive(Default)]
pub(crate) struct Merging {
    /// At work on layers on which no machine runs; it is killed with its handle.
    process: Option<Child>,
    looked: Option<Instant>,
    /// What could not be merged, and when.
    failed: HashMap<Vec<u64>, Instant>,
}

impl Instance {
    /// Begins to merge what can be, and follows what was begun. Called all the time.
    pub(crate) async fn merge_on(&mut self) {
        match self.record.merge.clone() {
            Some(journal) => self.follow_merge(journal).await,
            None if self.may_merge() => {
                self.merging.looked = Some(Instant::now());
                self.begin_merge(false).await;
            }
            None => {}
        }
    }

    fn may_merge(&self) -> bool {
        let record = &self.record;
        let running = self.status.as_ref().is_some_and(|status| status.phase == Phase::Running);
        let settled = match record.state {
            State::Running | State::Paused => running,
            State::Stopped | State::Suspended | State::Failed => record.runner_pid.is_none(),
            _ => false,
        };
        let idle = record.save.is_none() && record.update.is_none() && record.arrived == record.spec.arrival;
        settled && idle && self.merging.looked.is_none_or(|looked| looked.elapsed() >= LOOK_EVERY)
    }

    /// Begins the first merge that is worth it, if there is one.
    async fn begin_merge(&mut self, hurry: bool) {
        if self.record.runner_pid.is_none() {
            // No machine can be saved over these any more.
            self.record.forget_memory();
        }
        let Some(merge) = self.next_merge() else { return };
        let live = self.record.runner_pid.is_some() && self.record.are_in_use(&merge.layers);
        let number = self.record.reserve_layer();
        let Merge { layers, keep_zeros } = merge;
        let journal = MergeJournal { number, layers, keep_zeros, live };
        self.record.merge = Some(journal.clone());
        if let Err(error) = self.save() {
            return self.merge_failed(&journal, &format!("its record cannot be kept: {error}"));
        }
        if !live && let Err(error) = self.start_process(&self.order(&journal, hurry)).await {
            self.merge_failed(&journal, &format!("its process cannot be started: {error}"));
        }
    }

    fn has_too_many(&self) -> bool {
        let waiting = self.next_merge().map_or(0, |merge| merge.layers.len());
        waiting > TOO_MANY_WAIT || waiting > 0 && plan::longest(&self.record.chains()) > TOO_MANY
    }

    fn next_merge(&self) -> Option<Merge> {
        if self.record.arriving.is_some() {
            // The lowest of them are not there yet.
            return None;
        }
        let chains = self.record.chains();
        let mut alone = self.record.unmergeable();
        if plan::longest(&chains) <= MANY_SHARED {
            alone.extend(self.shared_layers());
        }
        let all = plan::choose(&chains, &alone, &|layer| self.layer_bytes(layer));
        let is_fine = |merge: &Merge| {
            let failed = self.merging.failed.get(&merge.layers);
            failed.is_none_or(|at| at.elapsed() >= AGAIN) && self.has_space_for(merge)
        };
        all.into_iter().find(is_fine)
    }

    /// Layers that a clone has too: a merged one would take their space once more.
    fn shared_layers(&self) -> BTreeSet<u64> {
        let is_shared =
            |layer: &u64| std::fs::metadata(layer_path(&self.folder, *layer)).is_ok_and(|found| found.nlink() > 1);
        self.record.held_layers().into_iter().filter(is_shared).collect()
    }

    /// At most half of what is free is taken for a while: guests that write come first.
    fn has_space_for(&self, merge: &Merge) -> bool {
        let needed: u64 = merge.layers.iter().map(|layer| self.layer_bytes(*layer)).sum();
        let free = rustix::fs::statvfs(&self.folder).map_or(u64::MAX, |found| found.f_bavail * found.f_frsize);
        needed <= free / 2
    }

    fn order(&self, journal: &MergeJournal, hurry: bool) -> MergeOrder {
        MergeOrder {
            number: journal.number,
            layers: journal.layers.iter().map(|layer| layer_path(&self.folder, *layer)).collect(),
            target: layer_path(&self.folder, journal.number),
            keep_zeros: journal.keep_zeros,
            hurry,
        }
    }

    async fn start_process(&mut self, order: &MergeOrder) -> std::io::Result<()> {
        let mut child = link::spawn_merger(&self.context.config.runner, &self.run_dir)?;
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        // It ends when this is closed, which our death does too.
        if let Some(input) = &mut child.stdin {
            input.write_all(&line).await?;
        }
        self.merging.process = Some(child);
        Ok(())
    }

    async fn follow_merge(&mut self, journal: MergeJournal) {
        let outcome =
            if journal.live { self.outcome_of_runner(&journal).await } else { self.outcome_of_process().await };
        match outcome {
            None => {}
            Some(Ok(())) => self.merged(&journal),
            Some(Err(why)) => self.merge_failed(&journal, &why),
        }
    }

    /// Asks the runner again if it has not heard of it.
    async fn outcome_of_runner(&mut self, journal: &MergeJournal) -> Option<Result<(), String>> {
        if self.record.runner_pid.is_none() {
            self.end_merge();
            return None;
        }
        let known = self.status.as_ref()?.merge.clone().filter(|merge| merge.number == journal.number);
        match known {
            Some(merge) => merge.outcome,
            None => match link::ask(&self.run_dir, &Request::Merge(self.order(journal, false))).await {
                Err(LinkError::Refused(why)) => Some(Err(why)),
                _ => None,
            },
        }
    }

    async fn outcome_of_process(&mut self) -> Option<Result<(), String>> {
        let Some(process) = &mut self.merging.process else {
            // It ended with the daemon that began it.
            self.end_merge();
            return None;
        };
        if process.try_wait().is_ok_and(|ended| ended.is_none()) {
            return None;
        }
        let output = self.merging.process.take()?.wait_with_output().await;
        let status = output.ok().and_then(|output| serde_json::from_slice::<MergeStatus>(&output.stdout).ok());
        let silent = || "its process ended without an answer; its log, runner.log, says more".to_owned();
        Some(status.and_then(|status| status.outcome).unwrap_or_else(|| Err(silent())))
    }

    /// The new layer is there.
    fn merged(&mut self, journal: &MergeJournal) {
        let MergeJournal { number, layers, .. } = journal;
        if let Err(why) = self.bring_along(layers, *number) {
            return self.merge_failed(journal, &why);
        }
        if !self.record.put_merged(layers, *number) {
            return self.merge_failed(journal, "some of them are used apart from the others now");
        }
        self.record.merge = None;
        tracing::info!(instance = %self.record.spec.name, ?layers, number, "layers became one");
        // The old ones go only when nothing on the disk names them.
        match self.save() {
            Ok(()) => self.tidy(),
            Err(error) => tracing::error!(%error, "the instance's record cannot be kept; the old layers stay for now"),
        }
        // There may be more to do.
        self.merging.looked = None;
    }

    /// The rest of a machine is known by its last layer of memory: it gets the new one's number as well.
    fn bring_along(&self, layers: &[u64], number: u64) -> Result<(), String> {
        let Some(last) = layers.last() else { return Ok(()) };
        let machines = self.record.machines().filter(|machine| machine.memory.last() == Some(last));
        let mut any = false;
        for machine in machines {
            any = true;
            self.link(&state_path(&self.folder, *last), &state_path(&self.folder, number))?;
            if machine.info.screen {
                self.link(&screen_path(&self.folder, *last), &screen_path(&self.folder, number))?;
            }
        }
        let sync = |folder: &Path| std::fs::File::open(folder).and_then(|folder| folder.sync_all());
        match any {
            true => sync(&self.folder.join("layers")).map_err(|e| format!("its folder cannot be synced: {e}")),
            false => Ok(()),
        }
    }

    fn merge_failed(&mut self, journal: &MergeJournal, why: &str) {
        tracing::warn!(why, layers = ?journal.layers, "layers stay as they are for now");
        self.merging.failed.insert(journal.layers.clone(), Instant::now());
        self.end_merge();
    }

    /// Ends whatever is being merged; what it wrote goes.
    pub(crate) fn end_merge(&mut self) {
        self.merging.process = None;
        if self.record.merge.take().is_some() {
            self.save_or_log();
            self.tidy();
        }
    }

    fn tidy(&self) {
        if let Err(error) = self.drop_unheld_layers() {
            tracing::warn!(%error, "layers that nobody needs are there still; they go with the next start");
        }
    }

    /// Before a machine is started: its disks and its memory have to be opened.
    pub(crate) async fn make_room(&mut self) {
        if self.has_too_many() {
            let count = plan::longest(&self.record.chains());
            self.event("merging", format!("{count} layers lie on each other; some become one before it starts"));
        }
        while self.has_too_many() {
            self.begin_merge(true).await;
            if self.record.merge.is_none() {
                return;
            }
            while let Some(journal) = self.record.merge.clone() {
                self.follow_merge(journal).await;
                sleep(ASK_EVERY).await;
            }
        }
    }
}
