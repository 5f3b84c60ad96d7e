//! Saving a machine that stands still, and bringing it back: devices by QEMU, memory from outside.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use tokio::time::sleep;

use crate::event::RunState;
use crate::memory::{self, GuestMemory};
use crate::state::{MachineState, RamBlock, parse_blocks};
use crate::vm::{Vm, VmError};

/// The guest's memory, by its name in QEMU.
pub(crate) const RAM: &str = "ram";
/// Devices are loaded in some milliseconds, and somebody waits.
const LOADED_RETRY: Duration = Duration::from_millis(1);

/// A machine to be brought back in place of being booted.
#[derive(Debug, Clone)]
pub struct Resume {
    /// Its memory: a file as long as the memory, or longer, that is never written to.
    pub memory: PathBuf,
    /// The rest of it, of the same instant; none: it comes later, with [`Vm::bring`].
    pub state: Option<MachineState>,
}

impl Vm {
    /// The guest's memory. To be called once for each machine.
    pub async fn memory(&self) -> Result<GuestMemory, VmError> {
        self.with_ram("look into the guest's memory", GuestMemory::attach).await
    }

    /// Whether the guest's memory, where that is a file, is read page by page as the guest touches it, so that exactly
    /// what it touches is read; or with what is near, which takes fewer reads.
    pub async fn page_by_page(&self, singly: bool) -> Result<(), VmError> {
        let advise = move |process, start, size| memory::page_by_page(process, start, size, singly);
        self.with_ram("say how the guest's memory is read", advise).await
    }

    /// Calls `act` with QEMU's process, and where in it the guest's memory begins and how long it is.
    async fn with_ram<T: Send + 'static>(
        &self,
        doing: &'static str,
        act: impl FnOnce(u32, u64, u64) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, VmError> {
        let failed = |reason: String| VmError::Memory { doing, reason };
        let blocks = self.blocks().await?;
        let ram =
            blocks.iter().find(|block| block.name == RAM).ok_or_else(|| failed("QEMU does not list it".into()))?;
        let (process, start, size) = (self.pid(), ram.address, ram.used);
        // It waits for the process to stop for a moment.
        let done = tokio::task::spawn_blocking(move || act(process, start, size)).await;
        done.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))
    }

    /// Saves everything but memory and disks; the machine must be paused, and stays so.
    pub async fn save_state(&self) -> Result<MachineState, VmError> {
        let failed = |reason: String| VmError::Memory { doing: "save the devices", reason };
        let path = self.run_dir().devices();
        let arguments = json!({ "filename": path.to_string_lossy(), "live": false });
        self.qmp().execute("xen-save-devices-state", arguments).await?;
        let devices = self.run_dir().take_devices().map_err(|e| failed(e.to_string()))?;
        let mut blocks = Vec::new();
        for RamBlock { name, used, address } in self.blocks().await? {
            if name != RAM {
                let content = memory::read_at(self.pid(), address, used as usize);
                blocks.push((name, content.map_err(|e| failed(e.to_string()))?));
            }
        }
        Ok(MachineState { devices, blocks, lengths: self.notices().lengths() })
    }

    /// Puts the small memories in place; the machine has not run yet.
    pub(crate) async fn fill_blocks(&self, state: &MachineState) -> Result<(), VmError> {
        let failed = |reason: String| VmError::Memory { doing: "bring the machine back", reason };
        let mut there = self.blocks().await?;
        there.retain(|block| block.name != RAM);
        for (name, content) in &state.blocks {
            let block = there.iter().position(|block| block.name == *name && block.used == content.len() as u64);
            let block = block.map(|at| there.swap_remove(at));
            let block = block.ok_or_else(|| failed(format!("it had the memory \"{name}\", and this one has not")))?;
            memory::write_at(self.pid(), block.address, content).map_err(|e| failed(e.to_string()))?;
        }
        match there.first() {
            None => Ok(()),
            Some(block) => Err(failed(format!("this machine has the memory \"{}\", and that one had not", block.name))),
        }
    }

    /// Brings the rest of a machine that was launched without it, whose memory is whole by now. It is paused then: it stands
    /// where it was saved.
    pub async fn bring(&self, state: &MachineState) -> Result<(), VmError> {
        let failed = |reason: String| VmError::Memory { doing: "bring the machine back", reason };
        self.run_dir().leave_devices(&state.devices, self.user()).map_err(|e| failed(e.to_string()))?;
        self.notices().recall(state);
        let path = self.run_dir().devices();
        self.qmp().execute("migrate-incoming", json!({ "uri": format!("file:{}", path.to_string_lossy()) })).await?;
        while let RunState::Other(state) = self.status().await? {
            if state != "inmigrate" && state != "prelaunch" {
                break;
            }
            sleep(LOADED_RETRY).await;
        }
        let _ = std::fs::remove_file(path);
        self.fill_blocks(state).await
    }

    /// Tells the network where the guest is now: its switches may have learnt another place.
    pub async fn announce(&self) -> Result<(), VmError> {
        let times = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
        self.qmp().execute("announce-self", times).await?;
        Ok(())
    }

    async fn blocks(&self) -> Result<Vec<RamBlock>, VmError> {
        Ok(parse_blocks(&self.monitor("info ramblock").await?))
    }
}
