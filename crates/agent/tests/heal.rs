//! A thread that runs the agent finds its own way back when the coordinator dies.
//!
//! The coordinator is this test program once more: it attaches to the victim and kills itself at the moment
//! that the test is about.

use crtools_agent::inject::{Context, Door, Host};
use crtools_agent::{List, Watch, remote};
use std::process::{Command, Stdio};
use std::rc::Rc;
use sys::ptrace::{self, Stop, Stopped};

const VICTIM: &str = "CRTOOLS_TEST_VICTIM";
const MOMENT: &str = "CRTOOLS_TEST_MOMENT";

/// Starts a program that sleeps, has a coordinator die on it, and sees it end as if nothing had happened.
fn survives(moment: &str) {
    let mut victim = Command::new("sleep").arg("0.6").spawn().expect("start a victim");
    let coordinator = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "coordinate"])
        .env(VICTIM, victim.id().to_string())
        .env(MOMENT, moment)
        .stdout(Stdio::null())
        .status()
        .expect("run a coordinator");
    assert_eq!(coordinator.code(), None, "the coordinator dies by its own signal");
    let status = victim.wait().unwrap();
    assert_eq!(status.code(), Some(0), "{status}");
}

#[test]
fn when_it_dies_while_a_list_is_executed() {
    survives("busy");
}

#[test]
fn when_it_dies_while_the_agent_waits_for_a_list() {
    survives("idle");
}

fn instruction(pid: i32) -> u64 {
    let maps = std::fs::read(format!("/proc/{pid}/maps")).unwrap();
    let mut maps = maps.split(|byte| *byte == b'\n').filter_map(sys::proc::parse_vma_line);
    let vdso = maps.find(|map| map.name == b"[vdso]").expect("a vdso");
    let mut code = vec![0; (vdso.end - vdso.start) as usize];
    sys::memory::read_remote(pid, vdso.start, &mut code).unwrap();
    remote::find_instruction(&code, vdso.start).expect("a system call in the vdso")
}

/// Waits until the victim sleeps in the program that it was started for.
fn await_sleep(pid: i32) {
    loop {
        let text = std::fs::read(format!("/proc/{pid}/stat")).unwrap();
        let stat = sys::proc::parse_stat(&text).unwrap();
        let wchan = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
        if stat.comm == b"sleep" && stat.state == b'S' && wchan.contains("nanosleep") {
            return;
        }
        std::thread::yield_now();
    }
}

fn stop(pid: i32) -> Stopped {
    let running = ptrace::seize(pid, ptrace::SUSPEND_SECCOMP | ptrace::SYSCALL_GOOD).unwrap();
    match running.halt().unwrap() {
        Stop::Trap(stopped) => stopped,
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "the part of the coordinator"]
fn coordinate() {
    let pid: i32 = std::env::var(VICTIM).unwrap().parse().unwrap();
    await_sleep(pid);
    let thread = stop(pid);
    let context = Context::read(&thread).unwrap();
    let watch = Rc::new(Watch::new().unwrap());
    let door = Door { pid, thread, context: &context, instruction: instruction(pid) };
    let (host, thread) = Host::enter_all(vec![door], &watch).remove(0).unwrap();
    let mut list = List::new();
    let is_busy = std::env::var(MOMENT).unwrap() == "busy";
    if is_busy {
        let time = host.area().put(&[0i64.to_ne_bytes(), 200_000_000i64.to_ne_bytes()].concat()).unwrap();
        list.ok(libc::SYS_nanosleep, &[time.into(), 0.into()]);
    } else {
        list.ok(libc::SYS_getpid, &[]);
    }
    let (running, run) = host.start(thread, &context, list).unwrap();
    if !is_busy {
        // Not taken back: told to stop, it could be caught between the two.
        assert!(host.area().wait(run, || true).is_ok());
    }
    let _ = sys::process::kill(sys::process::own_pid(), libc::SIGKILL);
    let _ = running;
}
