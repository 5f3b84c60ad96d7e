//! Processes started with lowered rights.

use super::*;
use std::io::Read;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(30);

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs a program to its end and returns what it wrote.
pub(crate) async fn run(program: &Path, arguments: &[&str], rights: Rights) -> (RawExit, String) {
    let mut log = tempfile::tempfile().unwrap();
    let arguments = arguments.iter().map(|&word| word.to_owned()).collect();
    let process = spawn(program, arguments, log.try_clone().unwrap(), rights).await.unwrap();
    let exit = tokio::time::timeout(LIMIT, process.exited()).await;
    process.kill();
    let mut text = String::new();
    std::io::Seek::rewind(&mut log).unwrap();
    log.read_to_string(&mut text).unwrap();
    (exit.unwrap_or_else(|_| panic!("it did not end; it wrote: {text}")), text)
}

#[tokio::test]
async fn the_environment_is_ours_and_new_rights_are_impossible() {
    let (exit, text) =
        run(Path::new("/bin/sh"), &["-c", "env; grep NoNewPrivs /proc/self/status; exit 7"], Rights::default()).await;
    assert_eq!(exit, RawExit { code: Some(7), signal: None });
    assert!(text.contains("NoNewPrivs:\t1"), "{text}");
    assert!(!text.contains("CARGO"), "{text}");
}

#[tokio::test]
async fn the_user_is_changed_with_all_groups() {
    if !is_root() {
        return eprintln!("skipped: only root can become another user");
    }
    let rights = Rights {
        user: Some((60001, 60002)),
        extra_group: Some(60003),
        parent_death_kill: true,
        guard: Some(GuardPolicy::default()),
        huge_pages: true,
    };
    let script = "grep -E '^(Uid|Gid|Groups|Seccomp):' /proc/self/status";
    let (_, text) = run(Path::new("/bin/sh"), &["-c", script], rights).await;
    for line in
        ["Uid:\t60001\t60001\t60001\t60001", "Gid:\t60002\t60002\t60002\t60002", "Groups:\t60003", "Seccomp:\t2"]
    {
        assert!(text.contains(line), "{line:?} is not in {text}");
    }
}

#[tokio::test]
async fn a_program_that_can_not_be_run_is_an_error_with_and_without_guard() {
    for guard in [None, Some(GuardPolicy::default())] {
        let rights = Rights { guard, ..Rights::default() };
        let error =
            spawn(Path::new("/nonexistent/qemu"), Vec::new(), tempfile::tempfile().unwrap(), rights).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/qemu: No such file"), "{error}");
    }
}

#[tokio::test]
async fn a_killed_process_reports_its_signal() {
    let log = tempfile::tempfile().unwrap();
    let process = spawn(Path::new("/bin/sleep"), vec!["600".into()], log, Rights::default()).await.unwrap();
    process.kill();
    assert_eq!(process.exited().await, RawExit { code: None, signal: Some(9) });
}

/// Not a test of its own: the role of a launcher that dies.
#[tokio::test]
#[ignore = "started by another test"]
async fn launcher() {
    if std::env::args().any(|word| word == "die") {
        let rights = Rights { parent_death_kill: true, ..Rights::default() };
        let process =
            spawn(Path::new("/bin/sleep"), vec!["600".into()], tempfile::tempfile().unwrap(), rights).await.unwrap();
        println!("\nPID {}", process.pid());
        std::process::exit(3);
    }
}

#[tokio::test]
async fn the_death_of_the_launcher_is_the_end_of_the_process() {
    let this_program = std::env::current_exe().unwrap();
    let arguments = ["spawn::tests::launcher", "--exact", "--ignored", "--nocapture", "die"];
    let (exit, text) = run(&this_program, &arguments, Rights::default()).await;
    assert_eq!(exit.code, Some(3), "{text}");
    let pid: u32 = text.lines().find_map(|line| line.strip_prefix("PID ")).and_then(|pid| pid.parse().ok()).unwrap();
    let is_gone = || match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        // A zombie waits only for whoever adopted it.
        Ok(stat) => stat.contains(") Z ") || !stat.contains("(sleep)"),
        Err(_) => true,
    };
    let gone = async {
        let mut tick = tokio::time::interval(Duration::from_millis(10));
        while !is_gone() {
            tick.tick().await;
        }
    };
    tokio::time::timeout(LIMIT, gone).await.unwrap();
}
