//! Whatever is done to a machine in whatever order, by whom and to whom deaths happen: its memory and its disks are always of
//! one instant, and of the right one. `SEED=17` repeats one sequence, `SEEDS=100` makes so many, longer ones.

use std::time::Duration;

use collective_testkit::{Dice, Fleet, Guest};

use crate::{PROGRAM, seeds, tiny};

/// What is expected of the guest: the generation of its pages, and a note.
#[derive(Clone, PartialEq, Debug)]
struct Expected {
    generation: String,
    note: String,
}

#[test]
fn any_sequence() {
    seeds(1).for_each(|seed| sequence(seed, 14));
}

#[test]
#[ignore = "takes minutes for each seed; run by make soak"]
fn many_sequences() {
    seeds(100).for_each(|seed| sequence(seed, 30));
}

fn sequence(seed: u64, steps: u32) {
    let mut dice = Dice::new(seed);
    let mut fleet = Fleet::start(PROGRAM);
    // Through a link, so that it finds a plane that was killed at the same place again.
    fleet.join_over_link("b");
    fleet.publish(&tiny("1"));
    let guest = Guest::launch(&fleet, "n", &[]);
    let mut now = Expected { generation: guest.get("/fill?20"), note: "none".into() };
    guest.put("/notes/now", &now.note);
    // On the present host, by number.
    let mut kept: Vec<(u64, Expected)> = Vec::new();
    for step in 0..steps {
        guest.get("/count?on");
        let what = dice.roll(8);
        eprintln!("seed {seed}, step {step}: {what}");
        match what {
            0 | 1 => {
                now = Expected { generation: guest.get("/fill?20"), note: format!("step {step}") };
                guest.put("/notes/now", &now.note);
            }
            2 | 3 => {
                let id = fleet.json(&["checkpoint", "n"])["id"].as_u64().unwrap();
                kept.push((id, now.clone()));
            }
            4 => {
                fleet.ok(&["suspend", "n"]);
                if dice.roll(2) == 0 {
                    fleet.kill_up();
                    fleet.up();
                }
                fleet.ok(&["resume", "n"]);
            }
            5 if !kept.is_empty() => {
                let (to, then) = kept[dice.roll(kept.len() as u64) as usize].clone();
                let back = fleet.json(&["restore", "n", &to.to_string()]);
                kept.push((back["kept_as_checkpoint"].as_u64().unwrap(), now));
                now = then;
            }
            // What lies between the others becomes one layer.
            6 if !kept.is_empty() => {
                let (id, _) = kept.remove(dice.roll(kept.len() as u64) as usize);
                fleet.ok(&["checkpoint", "n", "--forget", &id.to_string()]);
            }
            _ if dice.roll(2) == 0 => {
                let to = if fleet.info("n")["host"] == "a" { "b" } else { "a" };
                fleet.ok(&["move", "n", "--to", to, "--no-live"]);
                kept.clear();
            }
            _ => {
                // In the middle of a checkpoint.
                let mut command = fleet.spawn(&["checkpoint", "n"]);
                std::thread::park_timeout(Duration::from_millis(dice.roll(200)));
                fleet.kill_up();
                let _ = command.wait();
                fleet.up();
                fleet.wait_until_settled("n");
                let listed = fleet.json(&["timeline", "n"]);
                let new = listed.as_array().unwrap().iter().filter_map(|kept| kept["id"].as_u64());
                let new: Vec<u64> = new.filter(|id| kept.iter().all(|(known, _)| known != id)).collect();
                kept.extend(new.into_iter().map(|id| (id, now.clone())));
            }
        }
        guest.sound(&now.generation);
        assert_eq!(guest.get("/notes/now"), now.note, "seed {seed}, step {step}");
    }
}
