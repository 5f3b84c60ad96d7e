//! A machine comes to this host while it runs elsewhere: this is the end that gets it.
//!
//! ```text
//! the record: somebody who is not ours visits; a runner is started and waits
//! what comes is opened and passed on to the runner, which writes it into layers
//! all is here and durable. One write of the record: the machine that came, as one that is suspended here
//! POINT OF NO RETURN, one transaction of the plane: it is ours
//! the runner lets it go on; one write of the record: it runs
//! ```
//! Whoever dies before the point of no return, it stays where it was, and what came is thrown away. After it, it goes on here:
//! at once, or from its layers when this daemon is back. A daemon that does not know asks the plane again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use collective_api::{ClientError, PrivateGrant, Tunnel};
use collective_model::run::Request;
use collective_model::run_live::{Piece, Receiving, Word};
use collective_model::{ByteSize, CheckpointMachine, OperationId, OperationState, Spec, State, Timestamp};
use collective_store::seal::Seal;
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Mutex;
use tokio::time::sleep;

use crate::instance::Instance;
use crate::leaving::{Hello, next_piece, words_in};
use crate::link;
use crate::record::{DiskRecord, MachineRecord, Record, SuspendedRecord, Visiting, layer_path, state_path};
use crate::sealed::{Receiver, Sender, Side};
use crate::travel::{SSH_KEY, UEFI_VARS};
use crate::tunnel::Dial;

/// How often it is looked whether a runner listens.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// A runner that cannot be found so often in a row has ended; one that is only just being started has no arguments yet.
const LOOKS: u32 = 10;
/// A plane that is away is asked again after this time.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// The plane says that it is not ours. Whatever else it says, it may be.
const CONFLICT: u16 = 409;
/// Files of an instance are far below it, in bytes.
const MAX_FILE: u64 = 64 << 20;

type To = Sender<WriteHalf<Tunnel>>;
type From = Receiver<BufReader<ReadHalf<Tunnel>>>;

/// What came, as it is here.
struct Came {
    hello: Hello,
    memory: u64,
    disks: Vec<DiskRecord>,
    tops: Vec<u64>,
}

impl Instance {
    /// What was here has gone, and comes back.
    pub(crate) fn begin_anew(&mut self, spec: Spec, operation: &OperationId) {
        let visiting = Some(Visiting { operation: operation.clone(), whole: None });
        self.record = Record { visiting, ..Record::new(spec, self.record.user_index) };
        (self.expects, self.gone, self.status) = (true, false, None);
        let created = crate::files::create_folder(&self.folder.join("layers"), 0o700);
        if let Err(error) = created.and_then(|()| crate::files::create_folder(&self.run_dir, 0o711)) {
            tracing::warn!(%error, "there is no place for an instance that comes");
        }
        self.save_or_log();
    }

    /// Takes the machine that comes through this tunnel.
    pub(crate) async fn visit(&mut self, operation: OperationId, dial: Dial) {
        if !std::mem::take(&mut self.expects) {
            return dial.refuse("there is such an instance on that host already".into()).await;
        }
        let came = self.try_visit(&operation, dial).await;
        let whole = self.record.visiting.as_ref().and_then(|visiting| visiting.whole.clone());
        match (came, whole) {
            (Ok(()), _) => {}
            (Err(why), None) => {
                tracing::info!(why, instance = %self.record.spec.name, "a machine that was to come stays where it is");
                self.not_ours().await;
            }
            (Err(why), Some(_)) => {
                tracing::warn!(why, instance = %self.record.spec.name, "a machine came, and does not go on by itself");
                self.finish_visit().await;
            }
        }
    }

    async fn try_visit(&mut self, operation: &OperationId, dial: Dial) -> Result<(), String> {
        let granted = self.grant(operation).await;
        let seal = match granted.map(|PrivateGrant { key, .. }| Arc::new(Seal::new(key.bytes()))) {
            Ok(seal) => seal,
            Err(why) => {
                dial.refuse(why.clone()).await;
                return Err(why);
            }
        };
        let tunnel = dial.connect().await.map_err(|e| e.to_string())?;
        let (from, to) = tokio::io::split(tunnel);
        let mut from = Receiver::new(BufReader::new(from), seal.clone(), operation.clone(), Side::Source);
        let mut to = Sender::new(to, seal, operation.clone(), Side::Target);
        let prepared = self.prepare(&mut from).await;
        let begun = match prepared {
            Ok(came) => self.listen().await.map(|line| (came, line)),
            Err(why) => Err(why),
        };
        match begun {
            Ok((came, line)) => self.take_in(operation, came, line, to, from).await,
            Err(why) => {
                let _ = to.send(&Piece::Word(Word::Failed { why: why.clone() }).encode()).await;
                Err(why)
            }
        }
    }

    /// Makes everything ready for what the other host has announced, and starts the runner.
    async fn prepare(&mut self, from: &mut From) -> Result<Came, String> {
        let hello = from.receive().await?;
        let hello: Hello = serde_json::from_slice(&hello)
            .map_err(|e| format!("the other host cannot be understood: {e}; are both of the same version?"))?;
        hello.platform.goes_on_at(self.context.config.platform.as_ref())?;
        crate::start::check_memory(hello.memory_mib << 20)?;
        crate::files::create_folder(&self.run_dir.join("v"), 0o700).map_err(|e| format!("cannot prepare it: {e}"))?;
        for (name, length) in &hello.files {
            let mut bytes = Vec::new();
            while (bytes.len() as u64) < *length && *length <= MAX_FILE {
                bytes.extend(from.receive().await?);
            }
            let path = match name.as_str() {
                SSH_KEY => self.folder.join("ssh_host_key.json"),
                UEFI_VARS => self.uefi_vars_path(),
                _ => continue,
            };
            crate::files::write(&path, &bytes).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        }
        let manifest = self.manifest(&hello.version).await?;
        let record = &mut self.record;
        record.version = hello.version;
        record.version_name.clone_from(&hello.version_name);
        // As it is once it is ours; until then nobody hears of it.
        record.spec.arrival = None;
        record.spec.generation.0 += 1;
        record.next_event = record.next_event.max(hello.next_event);
        record.power_serial = hello.power_serial;
        let memory = record.reserve_layer();
        let mut disks = hello.disks.clone();
        for disk in &mut disks {
            disk.layers = vec![record.reserve_layer()];
        }
        let tops: Vec<u64> = disks.iter().map(|_| record.reserve_layer()).collect();
        record.disks.clone_from(&disks);
        self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
        let config = self.run_config(&manifest, Timestamp::now(), false);
        let mut config = config.map_err(|e| format!("cannot prepare it: {e}"))?;
        (config.memory_mib, config.cpus) = (hello.memory_mib, hello.cpus);
        config.processor = self.context.config.platform.as_ref().and_then(|here| here.to_go_on(&hello.platform));
        config.disks.iter_mut().for_each(|disk| disk.create_top = true);
        config.receiving = Some(Receiving {
            memory: layer_path(&self.folder, memory),
            state: state_path(&self.folder, memory),
            epoch: hello.epoch.clone(),
            tops: tops.iter().map(|layer| layer_path(&self.folder, *layer)).collect(),
            kept: self.kept_for(&hello),
        });
        self.note_images();
        self.hand_out(&config, &manifest, None).await?;
        Ok(Came { hello, memory, disks, tops })
    }

    /// The connection with the runner, once it listens.
    async fn listen(&self) -> Result<(BufReader<OwnedReadHalf>, OwnedWriteHalf), String> {
        let mut looks = 0;
        loop {
            match link::hand_over(&self.run_dir, &Request::Arrive).await {
                Ok(line) => return Ok(line),
                Err(link::LinkError::Refused(why)) => return Err(why),
                Err(link::LinkError::Silent(error)) => {
                    looks = if self.has_runner() { 0 } else { looks + 1 };
                    if looks > LOOKS {
                        let end = link::end(&self.run_dir).map(|end| end.message);
                        return Err(end.unwrap_or_else(|| format!("its runner ended: {error}")));
                    }
                }
            }
            sleep(ASK_EVERY).await;
        }
    }

    /// Passes on what comes, until it goes on here.
    async fn take_in(
        &mut self,
        operation: &OperationId,
        came: Came,
        (mut reader, writer): (BufReader<OwnedReadHalf>, OwnedWriteHalf),
        mut to: To,
        mut from: From,
    ) -> Result<(), String> {
        let writer = Mutex::new(writer);
        let is_whole = AtomicBool::new(false);
        let inwards = async {
            loop {
                let batch = from.receive().await?;
                let fails = words_in(&batch).into_iter().find_map(|word| match word {
                    Word::Failed { why } | Word::Better { why } => Some(why),
                    Word::Measured(_) => Some("only a measurement was wanted".into()),
                    _ => None,
                });
                if let Some(why) = fails {
                    return Err::<(), String>(why);
                }
                let written = writer.lock().await.write_all(&batch).await;
                written.map_err(|e| format!("its runner takes no more: {e}"))?;
            }
        };
        let outwards = async {
            loop {
                let piece = match next_piece(&mut reader).await {
                    Ok(piece) => piece,
                    Err(why) => {
                        let why = self.last_words(why).await;
                        let _ = to.send(&Piece::Word(Word::Failed { why: why.clone() }).encode()).await;
                        return Err(why);
                    }
                };
                match Piece::word(&piece[4..]) {
                    Some(Word::Kept { digest, memory_bytes, bytes, rounds, kept }) => {
                        is_whole.store(true, Relaxed);
                        let machine = came.machine(digest, memory_bytes);
                        let told = json!({ "bytes": bytes, "rounds": rounds, "kept_bytes": kept });
                        self.make_ours(operation, &came, machine, told).await?;
                        let word = Piece::Word(Word::GoOn).encode();
                        let told = writer.lock().await.write_all(&word).await;
                        told.map_err(|e| format!("its runner is not told to go on: {e}"))?;
                    }
                    Some(Word::Gone { pause_us }) => {
                        // It is here, whether that is heard or not.
                        let _ = to.send(&piece).await;
                        self.goes_on_here(operation, pause_us).await;
                        return Ok(());
                    }
                    Some(Word::Failed { why }) => {
                        let _ = to.send(&piece).await;
                        return Err(why);
                    }
                    _ => to.send(&piece).await.map_err(|e| format!("the connection with the other host broke: {e}"))?,
                }
            }
        };
        tokio::pin!(outwards, inwards);
        let ended = tokio::select! {
            done = &mut outwards => return done,
            ended = &mut inwards => ended,
        };
        match is_whole.load(Relaxed) {
            // The other host has gone; it is ours, or the plane will say that it is not.
            true => outwards.await,
            false => ended,
        }
    }

    fn has_runner(&self) -> bool {
        self.record.runner_pid.is_some_and(|pid| link::is_alive(pid, &self.run_dir.to_string_lossy()))
    }

    /// Why the runner ended, if it says so.
    async fn last_words(&self, otherwise: String) -> String {
        while self.has_runner() {
            sleep(ASK_EVERY).await;
        }
        link::end(&self.run_dir).map_or(otherwise, |end| end.message)
    }

    /// All of it is here: has the plane make it ours.
    async fn make_ours(
        &mut self,
        operation: &OperationId,
        came: &Came,
        machine: MachineRecord,
        told: Value,
    ) -> Result<(), String> {
        let record = &mut self.record;
        record.disks = came.disks.clone();
        record.disks.iter_mut().zip(&came.tops).for_each(|(disk, top)| disk.layers.push(*top));
        record.suspended = Some(SuspendedRecord { machine, disks: came.disks.clone() });
        record.state = State::Resuming;
        record.visiting = Some(Visiting { operation: operation.clone(), whole: Some(told) });
        if let Err(error) = self.save() {
            // Then it must not become ours.
            self.record.visiting = Some(Visiting { operation: operation.clone(), whole: None });
            return Err(format!("cannot keep its record: {error}"));
        }
        self.record.spec = self.ask_for_it(operation).await?;
        Ok(())
    }

    /// What it is once it is ours; the error says that it is not, and will not be.
    async fn ask_for_it(&self, operation: &OperationId) -> Result<Spec, String> {
        loop {
            let path = format!("/v1/hosts/self/operations/{operation}/take");
            let asked: Result<Spec, ClientError> = self.context.client.post(&path, &()).await;
            match asked {
                Ok(spec) => return Ok(spec),
                Err(ClientError::Refused { status: CONFLICT, message }) => return Err(message),
                Err(error) => tracing::warn!(%error, "the plane does not say yet whose the machine is that came"),
            }
            sleep(ASK_AGAIN).await;
        }
    }

    async fn goes_on_here(&mut self, operation: &OperationId, pause_us: u64) {
        let visiting = self.record.visiting.take();
        self.record.moved_pause_us = Some(pause_us);
        let told = visiting.and_then(|visiting| visiting.whole).unwrap_or_default();
        self.went_on();
        self.started = tokio::time::Instant::now();
        let result = json!({
            "live": true, "pause_us": pause_us, "bytes": told["bytes"], "kept_bytes": told["kept_bytes"],
            "rounds": told["rounds"], "state": self.record.state,
        });
        self.forget_left();
        let ms = pause_us as f64 / 1000.0;
        let kept = ByteSize(told["kept_bytes"].as_u64().unwrap_or_default());
        self.event(
            "arrived",
            format!("it came while it ran, and stood still for {ms:.1} ms; {kept} were here already"),
        );
        self.conclude(operation.clone(), OperationState::Done { result });
        self.observe().await;
        if let Err(why) = self.let_users_in().await {
            tracing::warn!(why, "the ports of a machine that came stay closed for now");
        }
    }

    /// All of it is here, and it is not known whether it is ours: after a restart of the daemon, or when the runner died.
    pub(crate) async fn finish_visit(&mut self) {
        let Some(Visiting { operation, whole }) = self.record.visiting.clone() else { return };
        if whole.is_none() {
            return self.not_ours().await;
        }
        match self.ask_for_it(&operation).await {
            Ok(spec) => self.record.spec = spec,
            Err(why) => {
                tracing::info!(why, instance = %self.record.spec.name, "what came stays where it was");
                return self.not_ours().await;
            }
        }
        self.observe().await;
        self.forget_left();
        self.record.visiting = None;
        if self.record.suspended.is_some() {
            // The runner ended before it went on: what came is as it was.
            self.clear_leftovers().await;
            self.set_state(State::Suspended);
            self.event("arrived", "all of it is here, and the other host has none of it any more".into());
        }
        let gone_on =
            if self.record.suspended.is_some() && self.record.spec.on { self.go_on().await } else { Ok(Value::Null) };
        let state = match gone_on {
            Ok(_) => OperationState::Done { result: json!({ "live": true, "state": self.record.state }) },
            Err(error) => OperationState::Failed { error },
        };
        self.conclude(operation, state);
    }

    /// It stays where it was: what came goes.
    async fn not_ours(&mut self) {
        self.clear_leftovers().await;
        let removed = std::fs::remove_dir_all(&self.folder).and_then(|()| std::fs::remove_dir_all(&self.run_dir));
        if let Err(error) = removed {
            tracing::warn!(%error, "what came of a machine that stays elsewhere cannot be removed");
        }
        self.forget_here();
    }
}

impl Came {
    fn machine(&self, digest: collective_model::Digest, memory_bytes: u64) -> MachineRecord {
        MachineRecord {
            image: None,
            memory: vec![self.memory],
            digest,
            epoch: self.hello.epoch.clone(),
            memory_mib: self.hello.memory_mib,
            cpus: self.hello.cpus,
            info: CheckpointMachine {
                bytes: memory_bytes,
                pause_us: None,
                platform: self.hello.platform.clone(),
                screen: false,
            },
        }
    }
}
