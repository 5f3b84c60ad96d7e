//! What becomes of the disks of an instance.

use super::*;
use collective_model::{Generation, InstanceId};

fn manifest(version: &str) -> Manifest {
    serde_json::from_value(serde_json::json!({
        "format": 1, "appliance": "demo/notes", "version": version, "created": "2026-11-22T00:00:00Z",
        "hardware": { "cpus": 1, "memory": 536870912 },
        "disks": [
            { "name": "system", "role": "system", "size": 1048576, "image": Digest::of(version.as_bytes()) },
            { "name": "data", "role": "data", "size": 1048576 },
            { "name": "tmp", "role": "scratch", "size": 1048576 }
        ]
    }))
    .unwrap()
}

pub(crate) fn record() -> Record {
    let spec = Spec {
        id: InstanceId::from_random([1; 16]),
        name: "n".parse().unwrap(),
        generation: Generation(1),
        appliance: "demo/notes".parse().unwrap(),
        version: Digest::of(b"1"),
        on: true,
        power_serial: 1,
        ports: vec![],
        settings: Default::default(),
        outbound: true,
        cpus: None,
        memory: None,
        disk_sizes: Default::default(),
        authorized_keys: vec![],
        arrival: None,
        origin: None,
        checkpoint_every: None,
    };
    let mut record = Record::new(spec, 0);
    record.adopt_version(&manifest("1"), Digest::of(b"1"));
    record.prepare_start(&|_| false);
    record
}

fn layers(record: &Record) -> Vec<Vec<u64>> {
    record.disks.iter().map(|disk| disk.layers.clone()).collect()
}

#[test]
fn a_restart_keeps_system_and_data_and_forgets_scratch() {
    let mut record = record();
    assert_eq!(layers(&record), [[1], [2], [3]]);
    record.prepare_start(&|_| false);
    assert_eq!(layers(&record), [[1], [2], [4]]);
}

#[test]
fn an_update_and_back_with_and_without_data() {
    let mut record = record();
    let before = record.checkpoint("before update to 2".into(), true, &|_| 5);
    record.adopt_version(&manifest("2"), Digest::of(b"2"));
    record.prepare_start(&|_| false);
    assert_eq!(layers(&record), [vec![4], vec![2, 5], vec![6]], "the old data layer is frozen, a new one takes writes");
    assert_eq!(record.disks[0].image.as_ref().unwrap().version, Digest::of(b"2"));

    let target = record.rollback_target(false).unwrap().clone();
    assert_eq!(target.info.id, before);
    let mut system_only = record.clone();
    system_only.checkpoint("before rollback".into(), false, &|_| 0);
    system_only.restore(&target, false);
    system_only.prepare_start(&|_| false);
    assert_eq!(layers(&system_only)[..2], [vec![1, 7], vec![2, 5, 8]]);
    assert_eq!(system_only.version, Digest::of(b"1"));
    assert!(system_only.rollback_target(false).is_none(), "there is no older version");
    assert!(system_only.rollback_target(true).is_some(), "its data can still go back");

    record.checkpoint("failed".into(), false, &|_| 0);
    record.restore(&target, true);
    record.prepare_start(&|_| false);
    assert_eq!(layers(&record)[..2], [vec![1, 7], vec![2, 8]], "data as before the update");
    assert!(record.held_layers().contains(&5), "the failed side is kept");
}

fn suspended(record: &Record) -> SuspendedRecord {
    let machine = serde_json::json!({
        "memory": [7], "digest": Digest::of(b""), "epoch": "then", "memory_mib": 1, "cpus": 1,
        "info": { "bytes": 0, "platform": { "qemu": "", "accelerator": "", "cpu": "" } }
    });
    SuspendedRecord { machine: serde_json::from_value(machine).unwrap(), disks: record.disks.clone() }
}

#[test]
fn what_is_in_the_store_is_what_it_is_now_or_nothing() {
    let mut record = record();
    let backup: BackupId = "7".repeat(32).parse().unwrap();
    record.note_stored(backup.clone());
    assert_eq!(record.in_store(), Some(&backup));
    let before = record.clone();
    record.put_data(&"data".parse().unwrap(), 1 << 20, 99);
    assert_eq!(record.in_store(), None, "a backup was restored since");
    let mut restored = before.clone();
    let target = restored.checkpoint("x".into(), true, &|_| 0);
    restored.prepare_start(&|_| false);
    let target = restored.checkpoints.iter().find(|kept| kept.info.id == target).unwrap().clone();
    assert_eq!(restored.in_store(), None);
    restored.restore(&target, true);
    assert_eq!(restored.in_store(), Some(&backup), "it is what was stored again");
    let mut resumed = before.clone();
    resumed.suspended = Some(suspended(&resumed));
    resumed.note_stored(backup.clone());
    resumed.prepare_resume();
    assert_eq!(resumed.in_store(), Some(&backup), "it has not gone on yet");
    let mut moved = before;
    let arrival: BackupId = "8".repeat(32).parse().unwrap();
    moved.spec.arrival = Some(arrival.clone());
    assert_eq!(moved.in_store(), Some(&arrival), "what is to arrive counts, and not what is left here");
}

#[test]
fn a_layer_that_another_instance_has_too_is_not_written_to() {
    let mut record = record();
    record.prepare_start(&|layer| layer == 2);
    assert_eq!(layers(&record)[..2], [vec![1], vec![2, 4]]);
}

#[test]
fn a_journaled_checkpoint_is_never_dropped() {
    let mut record = record();
    let before = record.checkpoint("before".into(), true, &|_| 0);
    record.update = Some(UpdateJournal {
        operation: OperationId::from_random([2; 16]),
        before,
        bytes_fetched: 0,
        closed: Timestamp(0),
    });
    for _ in 0..30 {
        record.checkpoint("later".into(), false, &|_| 0);
    }
    assert!(record.checkpoints.iter().any(|checkpoint| checkpoint.info.id == before));
    assert!(record.checkpoints.len() <= KEPT_CHECKPOINTS);
}

#[test]
fn what_the_clock_takes_pushes_nothing_out_that_a_person_kept() {
    let mut record = record();
    let by_hand = record.checkpoint("by hand".into(), false, &|_| 0);
    let mut scheduled = Vec::new();
    for _ in 0..100 {
        let id = record.checkpoint("schedule".into(), false, &|_| 0);
        record.checkpoints.last_mut().unwrap().info.scheduled = true;
        scheduled.push(id);
    }
    assert_eq!(record.checkpoints.len(), 101);
    assert_eq!(record.checkpoints[0].info.id, by_hand);
    for _ in 0..KEPT_CHECKPOINTS {
        record.checkpoint("by hand".into(), false, &|_| 0);
    }
    let left: Vec<_> = record.checkpoints.iter().map(|kept| kept.info.id).collect();
    assert_eq!(left.len(), 100 + KEPT_CHECKPOINTS);
    assert!(!left.contains(&by_hand) && scheduled.iter().all(|id| left.contains(id)), "the oldest by hand has gone");
}
