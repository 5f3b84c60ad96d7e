//! A running machine goes to another host: this is the end that has it.
//!
//! ```text
//! one write of the record: an order to leave is open
//! the runner sends; this daemon seals what it sends, and passes it on through the plane
//! all was sent: the guest stands still until it is known who has it
//!     it goes on there         what is left here is cache from then on (`left.rs`)
//!     anything else            the plane is asked: if it is ours, nobody else can get it any more, and it goes on here
//! one write of the record: nothing is open
//! ```
//! Only the plane knows whose it is. While it is away, a guest that was sent stands still: it may run elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use collective_api::{PrivateGrant, StayAnswer, StayRequest, Tunnel};
use collective_model::run::{Leave, Platform, Request, RunConfig, RunImage};
use collective_model::run_live::{MAX_PIECE, Piece, Word};
use collective_model::{Digest, Generation, OperationId, OperationState, State, VersionName};
use collective_store::seal::Seal;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{sleep, timeout};

use crate::instance::Instance;
use crate::link;
use crate::record::{DiskRecord, layer_path};
use crate::sealed::{MOST, Receiver, Sender, Side};

/// The other host has said nothing for so long: it is given up.
const SILENCE: Duration = Duration::from_secs(180);
/// The same once all was sent, and the guest stands still.
const SILENCE_AT_THE_END: Duration = Duration::from_secs(20);
/// A runner writes down so quickly what is kept of a memory, or it is ended.
const KEEP_LIMIT: Duration = Duration::from_secs(15);
/// How often runner and plane are asked how it is.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// A plane that is away is asked again after this time.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// The plane is told how far it is after so many bytes.
const TELL_EVERY: u64 = 8 << 20;

/// What the other host has to know before anything comes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub version: Digest,
    pub version_name: Option<VersionName>,
    /// Without layers; an image only where the version has it.
    pub disks: Vec<DiskRecord>,
    pub memory_mib: u64,
    pub cpus: u32,
    /// The version's memory with which the machine began.
    #[serde(default)]
    pub memory_image: Option<RunImage>,
    pub platform: Platform,
    pub epoch: String,
    pub next_event: u64,
    pub power_serial: u64,
    /// Files that follow, by name, and their lengths.
    pub files: Vec<(String, u64)>,
}

/// How sending it came out.
#[derive(Debug)]
enum Outcome {
    /// It goes on there.
    Gone {
        /// How much memory it has.
        memory_bytes: u64,
    },
    /// It stays, and this is for whoever wanted it.
    Stays(Value),
    /// It did not work, or nobody knows.
    Unknown(String),
}

impl Instance {
    /// Brings the running machine to another host.
    pub(crate) async fn leave(&mut self, id: &OperationId, only_measure: bool) -> Result<Value, String> {
        if self.record.state != State::Running {
            return Err(format!("only a running machine is moved while it runs, and it is {}", self.record.state));
        }
        self.bring_rest(Some(id)).await?;
        self.record.leaving = Some(id.clone());
        // Its runner creates it only once the machine goes on there.
        let memory = self.record.reserve_layer();
        self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
        let left = self.try_leave(id, only_measure, memory).await;
        let outcome = left.unwrap_or_else(Outcome::Unknown);
        match outcome {
            Outcome::Gone { memory_bytes } => {
                let next = Generation(self.record.spec.generation.0 + 1);
                self.went_away(next, Some((memory, memory_bytes))).await;
                Ok(Value::Null)
            }
            Outcome::Stays(value) => {
                self.settle("it stays where it is").await;
                Ok(value)
            }
            Outcome::Unknown(why) => {
                self.settle(&why).await;
                Err(format!("it did not move, and goes on where it was: {why}"))
            }
        }
    }

    async fn try_leave(&mut self, id: &OperationId, only_measure: bool, memory: u64) -> Result<Outcome, String> {
        let config: Option<RunConfig> = crate::files::read_json(&self.run_dir.join("run.json")).ok().flatten();
        let config = config.ok_or("what the machine is made of is not known any more")?;
        let here = self.context.config.platform.clone().ok_or("it is not known what it runs on")?;
        let cpu = self.status.as_ref().and_then(|status| status.processor.clone()).unwrap_or_else(|| here.cpu.clone());
        let platform = Platform { cpu, portable: Vec::new(), ..here };
        let PrivateGrant { key, .. } = self.grant(id).await?;
        let seal = Arc::new(Seal::new(key.bytes()));
        let path = format!("/v1/hosts/self/operations/{id}/tunnel");
        let tunnel = self.context.client.tunnel(&path, &()).await.map_err(|e| e.to_string())?;
        let (from, to) = tokio::io::split(tunnel);
        let mut to = Sender::new(to, seal.clone(), id.clone(), Side::Source);
        let from = Receiver::new(BufReader::new(from), seal, id.clone(), Side::Target);
        let epoch = format!("{id}-live");
        let whole = self.say_hello(&config, platform, &epoch, &mut to).await?;
        let keep = (self.context.config.cache_budget > 0).then(|| layer_path(&self.folder, memory));
        let request = Request::Leave { epoch, whole, only_measure, keep };
        let line = link::hand_over(&self.run_dir, &request).await.map_err(|e| e.to_string())?;
        Ok(self.pass_on(id, line, to, from, config.memory_mib << 20).await)
    }

    /// Gives the numbers of disks that are sent whole.
    async fn say_hello(
        &self,
        config: &RunConfig,
        platform: Platform,
        epoch: &str,
        to: &mut Sender<WriteHalf<Tunnel>>,
    ) -> Result<Vec<u16>, String> {
        let lost = |e: std::io::Error| format!("the connection with the other host broke: {e}");
        let version = self.record.version;
        // A data disk may have begun with an image of an older version, which the other host may not get any more.
        let of_version = |disk: &DiskRecord| disk.image.clone().filter(|image| image.version == version);
        let disks = self.record.disks.iter();
        let disks = disks.map(|disk| DiskRecord { layers: Vec::new(), image: of_version(disk), ..disk.clone() });
        let is_whole = |disk: &DiskRecord| disk.image.is_some() && of_version(disk).is_none();
        let whole = (0u16..).zip(&self.record.disks).filter(|(_, disk)| is_whole(disk)).map(|(number, _)| number);
        let mut files = Vec::new();
        for (name, path) in self.files(None) {
            files.push((name, std::fs::read(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?));
        }
        let hello = Hello {
            version,
            version_name: self.record.version_name.clone(),
            disks: disks.collect(),
            memory_mib: config.memory_mib,
            cpus: config.cpus,
            memory_image: self.record.memory_image.clone(),
            platform,
            epoch: epoch.to_owned(),
            next_event: self.record.next_event + 8,
            power_serial: self.record.power_serial,
            files: files.iter().map(|(name, bytes)| (name.clone(), bytes.len() as u64)).collect(),
        };
        to.send(&serde_json::to_vec(&hello).map_err(|e| e.to_string())?).await.map_err(lost)?;
        for part in files.iter().flat_map(|(_, bytes)| bytes.chunks(MOST)) {
            to.send(part).await.map_err(lost)?;
        }
        Ok(whole.collect())
    }

    /// Passes everything on, in both directions, until it is known how it came out, or nobody says anything.
    async fn pass_on(
        &self,
        id: &OperationId,
        (mut reader, mut writer): (BufReader<OwnedReadHalf>, OwnedWriteHalf),
        mut to: Sender<WriteHalf<Tunnel>>,
        mut from: Receiver<BufReader<ReadHalf<Tunnel>>>,
        memory_bytes: u64,
    ) -> Outcome {
        let is_final = AtomicBool::new(false);
        let moved = AtomicU64::new(0);
        let there = async {
            let mut told = 0;
            loop {
                let (batch, words) = match next_batch(&mut reader).await {
                    Ok(next) => next,
                    Err(why) => return Outcome::Unknown(why),
                };
                let bytes = moved.fetch_add(batch.len() as u64, Relaxed) + batch.len() as u64;
                if bytes >= told + TELL_EVERY {
                    told = bytes;
                    let doing = "bringing memory and disks over while it runs".to_owned();
                    self.context.tell(id, OperationState::Running { doing, done: told, total: told });
                }
                is_final.fetch_or(words.iter().any(|word| matches!(word, Word::Final { .. })), Relaxed);
                if let Err(error) = to.send(&batch).await {
                    return Outcome::Unknown(format!("the connection with the other host broke: {error}"));
                }
                for word in words {
                    match word {
                        Word::Better { why } => return Outcome::Stays(json!({ "live": false, "why": why })),
                        Word::Measured(estimate) => {
                            return Outcome::Stays(json!({ "live": false, "estimate": estimate }));
                        }
                        Word::Failed { why } => return Outcome::Unknown(why),
                        _ => {}
                    }
                }
            }
        };
        let back = async {
            loop {
                let limit = if is_final.load(Relaxed) { SILENCE_AT_THE_END } else { SILENCE };
                let before = (moved.load(Relaxed), is_final.load(Relaxed));
                let batch = match timeout(limit, from.receive()).await {
                    Ok(Ok(batch)) => batch,
                    Ok(Err(why)) => return Outcome::Unknown(why),
                    Err(_) if before != (moved.load(Relaxed), is_final.load(Relaxed)) => continue,
                    Err(_) => return Outcome::Unknown("the other host does not answer".into()),
                };
                for word in words_in(&batch) {
                    match word {
                        Word::Gone { .. } => return Outcome::Gone { memory_bytes },
                        Word::Failed { why } => return Outcome::Unknown(why),
                        _ => {}
                    }
                }
                if let Err(error) = writer.write_all(&batch).await {
                    return Outcome::Unknown(format!("its runner does not take answers: {error}"));
                }
            }
        };
        // The connection with the runner ends with these, and so does what it does, unless all was sent.
        let outcome = tokio::select! {
            outcome = there => outcome,
            outcome = back => outcome,
        };
        if matches!(outcome, Outcome::Gone { .. }) && self.context.config.cache_budget > 0 {
            let keep = async {
                writer.write_all(&Piece::Word(Word::Keep).encode()).await.map_err(|e| e.to_string())?;
                next_batch(&mut reader).await
            };
            // It has gone, whatever is kept of it.
            if let Ok(Err(why)) = timeout(KEEP_LIMIT, keep).await {
                tracing::info!(why, "nothing is kept of the memory of a machine that left");
            }
        }
        outcome
    }

    /// It runs elsewhere since this ownership.
    async fn went_away(&mut self, generation: Generation, memory: Option<(u64, u64)>) {
        self.clear_leftovers().await;
        self.moved_away(generation, memory).await;
    }

    /// Finds out whose it is, and lets it go on if it is ours.
    async fn settle(&mut self, why: &str) {
        let Some(id) = self.record.leaving.clone() else { return };
        let sent = loop {
            self.observe().await;
            match self.status.as_ref().map(|status| status.leave) {
                // The runner knows that all of it was never sent.
                Some(Leave::No) => break false,
                Some(Leave::Busy) => {}
                Some(Leave::Sent) => break true,
                None if self.record.runner_pid.is_none() => break true,
                None => {}
            }
            sleep(ASK_EVERY).await;
        };
        if sent {
            let request =
                StayRequest { generation: self.record.spec.generation, why: format!("it did not move: {why}") };
            if let Some(generation) = self.ask_whose(&id, &request).await.moved {
                return self.went_away(generation, None).await;
            }
            while self.record.runner_pid.is_some()
                && let Err(link::LinkError::Silent(error)) = link::ask(&self.run_dir, &Request::Stay).await
            {
                tracing::warn!(%error, "the runner is not told yet that its machine goes on here");
                self.observe().await;
                sleep(ASK_EVERY).await;
            }
        }
        self.record.leaving = None;
        self.save_or_log();
    }

    async fn ask_whose(&self, id: &OperationId, request: &StayRequest) -> StayAnswer {
        let mut said = false;
        loop {
            let path = format!("/v1/hosts/self/operations/{id}/stay");
            match self.context.client.post(&path, request).await {
                Ok(answer) => return answer,
                Err(error) if !std::mem::replace(&mut said, true) => {
                    tracing::warn!(%error, instance = %self.record.spec.name, "it stands still until the plane says whose it is");
                }
                Err(_) => {}
            }
            sleep(ASK_AGAIN).await;
        }
    }

    /// After a restart of the daemon while it was leaving.
    pub(crate) async fn finish_leaving(&mut self) {
        let Some(id) = self.record.leaving.clone() else { return };
        let why = "the host's daemon ended meanwhile";
        self.settle(why).await;
        if !self.gone {
            self.conclude(id, OperationState::Failed { error: format!("it did not move, and is where it was: {why}") });
        }
    }
}

/// The next piece that the runner sends, with its length.
pub(crate) async fn next_piece(reader: &mut BufReader<OwnedReadHalf>) -> Result<Vec<u8>, String> {
    let ended = |e: std::io::Error| format!("its runner says nothing more: {e}");
    let length = reader.read_u32_le().await.map_err(ended)?;
    if length as usize > MAX_PIECE {
        return Err("its runner sent a piece that is too long".into());
    }
    let mut piece = length.to_le_bytes().to_vec();
    piece.resize(4 + length as usize, 0);
    reader.read_exact(&mut piece[4..]).await.map_err(ended)?;
    Ok(piece)
}

/// Whole pieces that the runner sent, as many as are there, and the words among them.
async fn next_batch(reader: &mut BufReader<OwnedReadHalf>) -> Result<(Vec<u8>, Vec<Word>), String> {
    let broken = |e: std::io::Error| format!("its runner says nothing more: {e}");
    let (mut batch, mut words) = (Vec::new(), Vec::new());
    loop {
        let length = reader.read_u32_le().await.map_err(broken)?;
        if length as usize > MAX_PIECE {
            return Err("its runner sent a piece that is too long".into());
        }
        let start = batch.len() + 4;
        batch.extend(length.to_le_bytes());
        batch.resize(start + length as usize, 0);
        reader.read_exact(&mut batch[start..]).await.map_err(broken)?;
        if let Some(word) = Piece::word(&batch[start..]) {
            words.push(word);
            return Ok((batch, words));
        }
        if batch.len() + MAX_PIECE + 4 > MOST || !has_piece(reader) {
            return Ok((batch, words));
        }
    }
}

/// Whether a whole piece is in the buffer.
fn has_piece(reader: &BufReader<OwnedReadHalf>) -> bool {
    let length = reader.buffer().first_chunk().map(|length| u32::from_le_bytes(*length) as usize);
    length.is_some_and(|length| reader.buffer().len() >= length + 4)
}

/// The words among whole pieces.
pub(crate) fn words_in(mut batch: &[u8]) -> Vec<Word> {
    let mut words = Vec::new();
    while let Some((length, rest)) = batch.split_first_chunk() {
        let Some((piece, rest)) = rest.split_at_checked(u32::from_le_bytes(*length) as usize) else { break };
        words.extend(Piece::word(piece));
        batch = rest;
    }
    words
}
