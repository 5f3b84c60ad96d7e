//! Which processes a fleet has, and how they die.

use crate::fleet::SOON;
use crate::{Fleet, eventually};

impl Fleet {
    /// The runner of an instance.
    pub fn runner_pid(&self, name: &str) -> i32 {
        let dir = self.run_dir(&self.info(name)).expect("a run directory");
        let mark = dir.to_string_lossy().into_owned();
        let found = processes().into_iter().find(|(_, line)| line.contains("runner") && line.contains(&mark));
        found.map(|(pid, _)| pid).unwrap_or_else(|| panic!("{name} has no runner"))
    }

    /// `kill -9` of the runner of an instance, if it has one.
    pub fn kill_runner(&self, name: &str) {
        let dir = self.run_dir(&self.info(name)).expect("a run directory");
        let mark = dir.to_string_lossy().into_owned();
        let is_one = |line: &str| line.contains(" runner ") && line.ends_with(&format!("{mark} "));
        processes().into_iter().filter(|(_, line)| is_one(line)).for_each(|(pid, _)| kill(pid));
    }

    /// QEMU of an instance.
    pub fn qemu_pid(&self, name: &str) -> i32 {
        let uuid = uuid(self.info(name)["id"].as_str().expect("an id"));
        let found = processes().into_iter().find(|(_, line)| line.contains("qemu-system") && line.contains(&uuid));
        found.map(|(pid, _)| pid).unwrap_or_else(|| panic!("{name} has no QEMU"))
    }

    /// The process with plane and host `a`.
    pub fn up_pid(&self) -> u32 {
        self.up.as_ref().expect("it is up").id()
    }

    /// `kill -9` of the process with plane and host `a`.
    pub fn kill_up(&mut self) {
        let mut child = self.up.take().expect("it is up");
        child.kill().expect("it can be killed");
        child.wait().expect("it ends");
    }

    /// `kill -9` of a host daemon.
    pub fn kill_host(&mut self, name: &str) {
        let index = self.hosts.iter().position(|(host, _)| host == name).expect("a host");
        let (_, mut child) = self.hosts.remove(index);
        child.kill().expect("it can be killed");
        child.wait().expect("it ends");
    }

    /// The whole machine of a joined host dies at once: its daemon, all runners and every QEMU. It has to be run again.
    pub fn kill_whole_host(&mut self, name: &str) {
        let mark = format!("{}/", self.host_data(name).display());
        let index = self.hosts.iter().position(|(host, _)| host == name).expect("a host");
        let (_, mut daemon) = self.hosts.remove(index);
        let others = processes().into_iter().filter(|(_, line)| line.contains(&mark));
        others.map(|(pid, _)| pid).chain([daemon.id() as i32]).for_each(kill);
        daemon.wait().expect("it ends");
        self.end_processes(&mark);
    }

    /// How many machines of the instance with this id there are, on all hosts. A rehearsal is nobody's machine.
    pub fn machines(id: &str) -> usize {
        let uuid = uuid(id);
        let is_one = |line: &str| line.contains("qemu-system") && line.contains(&uuid) && !line.contains("/rehearsal/");
        processes().into_iter().filter(|(_, line)| is_one(line)).count()
    }

    /// A power cut to every machine of the fleet, as far as processes go: daemons, runners and QEMU die at once.
    pub fn kill_everything(&mut self) {
        for mut child in self.up.take().into_iter().chain(self.hosts.drain(..).map(|(_, child)| child)) {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.end_processes(&self.dir.path().to_string_lossy());
    }

    pub(crate) fn end_processes(&self, mark: &str) {
        eventually("all processes of the fleet end", SOON, || {
            let left: Vec<i32> = processes().into_iter().filter(|(_, line)| line.contains(mark)).map(|p| p.0).collect();
            left.iter().for_each(|pid| kill(*pid));
            left.is_empty().then_some(())
        });
    }
}

/// An id as QEMU is told it.
fn uuid(id: &str) -> String {
    format!("{}-{}-{}-{}-{}", &id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..])
}

/// `kill -9`.
pub fn kill(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// All processes with their arguments.
fn processes() -> Vec<(i32, String)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let process = |entry: std::fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&line).replace('\0', " ")))
    };
    entries.filter_map(process).filter(|(pid, _)| *pid != std::process::id() as i32).collect()
}
