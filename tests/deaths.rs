//! A running machine is data, whoever dies while it is made that: plane, host daemon, runner, whole hosts, and the store that is away, at
//! any instant of any operation. What was acknowledged is there afterwards, memory and disks are of one instant, there is never a second
//! machine, and what did not come to its end is repeated to its end. `SEED=17` repeats one story, `make soak` has longer ones.

use std::collections::HashMap;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use collective_testkit::{Dice, Fleet, Guest, Link, Seaweed, eventually, free_port};

use crate::{PROGRAM, seeds, tiny};

const LONG: Duration = Duration::from_secs(240);
/// Whoever died comes back after this time, whether the command has ended or not.
const AWAY: Duration = Duration::from_secs(2);

/// What a host says that owns a machine, and could not bring it.
const NEVER_CAME: &str = "has not arrived";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Operation {
    Suspend,
    Resume,
    Checkpoint,
    Restore,
    Clone,
    Move,
    ResumeThere,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    /// The plane; hosts stay up.
    Plane,
    /// The daemon of the host that has the machine.
    Daemon,
    /// What keeps the machine alive there, if something does just then.
    Runner,
    /// All of that host.
    Host,
    /// All of the other one, where it may be going.
    OtherHost,
    /// Nobody dies, and the bucket with all packs cannot be reached.
    Store,
    /// The host that has the machine reaches neither plane nor store.
    Network,
}

const OPERATIONS: [Operation; 7] = [
    Operation::Move,
    Operation::Suspend,
    Operation::ResumeThere,
    Operation::Restore,
    Operation::Clone,
    Operation::Checkpoint,
    Operation::Resume,
];
const DEATHS: [Death; 7] =
    [Death::Plane, Death::Daemon, Death::Runner, Death::Host, Death::OtherHost, Death::Store, Death::Network];

/// What a guest has: the generation of its pages, a note, and how often it was booted.
struct Having {
    generation: String,
    note: String,
    boots: String,
}

struct Story {
    fleet: Fleet,
    _bucket: Seaweed,
    store: Link,
    links: HashMap<&'static str, Link>,
    guest: Guest,
    id: String,
    dice: Dice,
    /// How long an operation takes, as far as that is known.
    takes: HashMap<Operation, Duration>,
}

impl Story {
    fn begin(seed: u64) -> Self {
        let bucket = Seaweed::start();
        let store = Link::to(bucket.port());
        let mut fleet = Fleet::start_with_bucket(PROGRAM, store.port());
        let links = ["b", "c"].map(|name| (name, fleet.join_over_link(name))).into();
        fleet.publish(&tiny("1"));
        let guest = Guest::launch(&fleet, "n", &["--host", "b"]);
        let id = fleet.info("n")["id"].as_str().unwrap().to_owned();
        Self { fleet, _bucket: bucket, store, links, guest, id, dice: Dice::new(seed), takes: HashMap::new() }
    }

    fn host(&self) -> &'static str {
        if self.fleet.info("n")["host"] == "b" { "b" } else { "c" }
    }

    fn other(host: &str) -> &'static str {
        if host == "b" { "c" } else { "b" }
    }

    /// New pages and a new note, and the writer runs.
    fn renew(&self, note: &str) -> Having {
        let generation = self.guest.get("/fill?20");
        self.guest.put("/notes/now", note);
        self.guest.get("/count?on");
        Having { generation, note: note.to_owned(), boots: self.guest.get("/boots") }
    }

    /// One operation, and one death in the middle of it.
    fn round(&mut self, round: usize, operation: Operation, death: Death) {
        let (host, note) = (self.host(), format!("round {round}"));
        let other = Self::other(host);
        let then = self.renew(&format!("{note}, then"));
        let kept = (operation == Operation::Restore).then(|| self.fleet.json(&["checkpoint", "n"])["id"].to_string());
        let now = self.renew(&note);
        if matches!(operation, Operation::Resume | Operation::ResumeThere) {
            self.fleet.ok(&["suspend", "n"]);
        }
        let clone = Guest { port: free_port() };
        let (name, port) = (format!("copy-{round}"), format!("{}:80", clone.port));
        let command: Vec<&str> = match operation {
            Operation::Suspend => vec!["suspend", "n"],
            Operation::Resume => vec!["resume", "n"],
            Operation::Checkpoint => vec!["checkpoint", "n"],
            Operation::Restore => vec!["restore", "n", kept.as_deref().unwrap()],
            Operation::Clone => vec!["clone", "n", "--name", &name, "--publish", &port],
            Operation::Move => vec!["move", "n", "--to", other, "--no-live"],
            Operation::ResumeThere => vec!["resume", "n", "--host", other],
        };
        let whole = self.takes.get(&operation).copied().unwrap_or(Duration::from_millis(1500));
        let instant = whole * self.dice.roll(1100) as u32 / 1000;
        eprintln!("round {round}: {death:?} {} ms after {command:?} of {}", instant.as_millis(), whole.as_millis());
        let (acknowledged, ended) = self.disturb(&command, death, host, instant, &note);
        // The next instants lie within what it takes.
        let longer = ended.unwrap_or(whole.max(instant) * 5 / 4);
        self.takes.insert(operation, longer.max(Duration::from_millis(100)));
        self.settle(&command);

        // What did not come to its end comes to it now.
        let went_back = kept.is_some() && self.has(&then);
        if operation == Operation::Clone {
            self.check_clone(&name, &clone, &command, &now);
        } else if operation == Operation::Restore {
            if !went_back {
                self.check(&now, death, &acknowledged);
                self.fleet.ok(&command);
            }
            return self.check(&then, death, &[]);
        } else if matches!(operation, Operation::Move | Operation::ResumeThere)
            && (self.host() != other || self.never_came())
        {
            self.fleet.ok(&["move", "n", "--to", other, "--no-live"]);
        }
        if self.state() == "suspended" {
            self.fleet.ok(&["resume", "n"]);
        }
        self.check(&now, death, &acknowledged);
        if operation == Operation::Suspend {
            self.fleet.ok(&["suspend", "n"]);
            assert_eq!(self.state(), "suspended");
            self.fleet.ok(&["resume", "n"]);
            self.check(&now, death, &acknowledged);
        }
    }

    /// Runs the command with somebody dying meanwhile, and a user who writes and a watch for second machines. Gives the notes that were
    /// acknowledged, and how long the command took if it was quicker.
    fn disturb(
        &mut self,
        command: &[&str],
        death: Death,
        host: &'static str,
        instant: Duration,
        note: &str,
    ) -> (Vec<String>, Option<Duration>) {
        let over = AtomicBool::new(false);
        let (port, id) = (self.guest.port, self.id.clone());
        // What is written after a restore is ordered belongs to neither side.
        let writes = command[0] != "restore";
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let names = (0..).map(|index| format!("{}-{index}", note.replace(' ', "-")));
                let names = names.take_while(|_| writes && !over.load(Relaxed));
                let write = |name: &String| {
                    std::thread::park_timeout(Duration::from_millis(30));
                    let put = Guest { port }.request("PUT", &format!("/notes/{name}"), name);
                    put.is_some_and(|(status, _)| status == 201)
                };
                names.filter(write).collect::<Vec<_>>()
            });
            let watch = scope.spawn(|| {
                let mut most = 0;
                while !over.load(Relaxed) {
                    most = most.max(Fleet::machines(&id));
                    std::thread::park_timeout(Duration::from_millis(20));
                }
                most
            });
            let begun = Instant::now();
            let mut child = self.fleet.spawn(command);
            let ended = wait(&mut child, instant).then(|| begun.elapsed());
            self.die(death, host);
            wait(&mut child, AWAY);
            self.come_back(death, host);
            let came_to_its_end = wait(&mut child, LONG);
            over.store(true, Relaxed);
            assert!(came_to_its_end, "{command:?} does not end after {death:?}");
            assert!(watch.join().unwrap() <= 1, "two machines of one instance");
            (writer.join().unwrap(), ended)
        })
    }

    fn die(&mut self, death: Death, host: &str) {
        match death {
            Death::Plane => self.fleet.kill_up(),
            Death::Daemon => self.fleet.kill_host(host),
            Death::Runner => self.fleet.kill_runner("n"),
            Death::Host => self.fleet.kill_whole_host(host),
            Death::OtherHost => self.fleet.kill_whole_host(Self::other(host)),
            Death::Store => self.store.cut(),
            Death::Network => self.links[host].cut(),
        }
    }

    fn come_back(&mut self, death: Death, host: &str) {
        match death {
            Death::Plane => self.fleet.up(),
            Death::Daemon | Death::Host => self.fleet.run_host(host),
            Death::OtherHost => self.fleet.run_host(Self::other(host)),
            Death::Store => self.store.mend(),
            Death::Runner => {}
            Death::Network => self.links[host].mend(),
        }
    }

    fn state(&self) -> String {
        self.fleet.info("n")["state"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits until nothing is under way, and its host has said how it is after all that happened.
    fn settle(&self, command: &[&str]) {
        eventually(&format!("it settles after {command:?}"), LONG, || {
            let told = self.fleet.run(&["logs", "n"]);
            let info = self.fleet.info("n");
            let idle = info["operations"].as_array().is_some_and(Vec::is_empty);
            let open = |port: &serde_json::Value| port["open"] == true;
            let open = info["ports"].as_array().is_some_and(|ports| ports.iter().all(open));
            let rests = info["state"] == "suspended" || (info["state"] == "running" && open);
            let never_came = told.stderr.contains(NEVER_CAME);
            let stuck = info["state"] == "failed";
            assert!(!stuck, "after {command:?} a person is needed: {info}");
            (idle && ((told.code == Some(0) && rests) || never_came)).then_some(())
        });
    }

    fn never_came(&self) -> bool {
        self.fleet.run(&["logs", "n"]).stderr.contains(NEVER_CAME)
    }

    fn has(&self, having: &Having) -> bool {
        if self.state() == "suspended" {
            self.fleet.ok(&["resume", "n"]);
        }
        self.guest.answers();
        self.guest.get("/notes/now") == having.note
    }

    /// It goes on where it was, or, where its host died, was booted; with all that was acknowledged.
    fn check(&self, having: &Having, death: Death, acknowledged: &[String]) {
        self.guest.answers();
        assert_eq!(Fleet::machines(&self.id), 1);
        let boots = self.guest.get("/boots");
        if boots == having.boots {
            self.guest.sound(&having.generation);
        } else {
            // A runner that saved it and ended it, and then died, could not say so any more.
            assert!(matches!(death, Death::Host | Death::Runner), "it was booted, though its host did not die");
            assert_eq!(self.guest.get("/pages"), "0 pages of 0, 0 bad");
        }
        assert_eq!(self.guest.get("/notes/now"), having.note);
        for name in acknowledged {
            assert_eq!(self.guest.get(&format!("/notes/{name}")), *name);
        }
    }

    /// A clone is there and as the first one was, or is made now; and goes.
    fn check_clone(&self, name: &str, clone: &Guest, command: &[&str], having: &Having) {
        if self.fleet.run(&["info", name]).code != Some(0) {
            self.fleet.ok(command);
        }
        self.fleet.wait_until_settled(name);
        clone.answers();
        assert_eq!(clone.get("/notes/now"), having.note);
        if !clone.get("/pages").starts_with("0 pages") {
            clone.sound(&having.generation);
        }
        self.fleet.ok(&["delete", name, "--data"]);
    }
}

/// Waits for the end of a command, so long.
fn wait(child: &mut Child, limit: Duration) -> bool {
    let begun = Instant::now();
    loop {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        if begun.elapsed() >= limit {
            return false;
        }
        std::thread::park_timeout(Duration::from_millis(5).min(limit.saturating_sub(begun.elapsed())));
    }
}

fn story(seed: u64, rounds: usize, deaths: &[Death]) {
    eprintln!("SEED={seed}");
    let mut story = Story::begin(seed);
    for round in 0..rounds {
        let operation = OPERATIONS[(seed as usize + round) % OPERATIONS.len()];
        let travels = matches!(operation, Operation::Move | Operation::ResumeThere);
        let death = *story.dice.pick(deaths);
        let death = if death == Death::OtherHost && !travels { Death::Host } else { death };
        story.round(round, operation, death);
    }
}

#[test]
fn somebody_dies() {
    seeds(1).for_each(|seed| story(seed, 4, &DEATHS));
}

#[test]
fn its_runner_dies() {
    seeds(1).for_each(|seed| story(seed, OPERATIONS.len(), &[Death::Runner]));
}

#[test]
#[ignore = "takes minutes for each seed; run by make soak"]
fn somebody_dies_at_many_instants() {
    seeds(3).for_each(|seed| story(seed, 28, &DEATHS));
}
