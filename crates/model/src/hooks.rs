//! Action scripts: programs of the user that run at fixed steps of a dump or restore.
//!
//! Each is a line for the shell, run with three variables more than our own environment:
//! `CRTOOLS_SCRIPT_ACTION` (the step), `CRTOOLS_IMAGE_DIR`, and `CRTOOLS_INIT_PID` where the root of
//! the tree is known. The one added last runs first; the first that fails ends the series.
//!
//! A script is a child of this process and is waited for by its pid. Whoever calls must not collect
//! foreign children meanwhile (`waitpid(-1)`), or the script's status is lost.

use crate::failure::{Cause, Failure, Object};
use std::fmt;
use std::path::Path;
use std::process::Command;

/// The steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Before the connection to an image streamer.
    PreStream,
    /// Before anything is stopped.
    PreDump,
    /// The images are complete. A failure lets the tree run on and becomes our exit status.
    PostDump,
    /// Before anything is made.
    PreRestore,
    /// Everything is made, nothing runs. A failure ends the new tree.
    PostRestore,
    /// Just before the tree runs; its status is ignored.
    PreResume,
    /// The tree runs; a failure is only logged.
    PostResume,
    NetworkLock,
    NetworkUnlock,
    /// The root task exists, its namespaces are empty.
    SetupNamespaces,
    PostSetupNamespaces,
    OrphanPtsMaster,
    /// A server listens.
    StatusReady,
    /// The tree is stopped; which of its files are external?
    QueryExtFiles,
}

impl Action {
    pub const ALL: [Action; 14] = [
        Action::PreStream,
        Action::PreDump,
        Action::PostDump,
        Action::PreRestore,
        Action::PostRestore,
        Action::PreResume,
        Action::PostResume,
        Action::NetworkLock,
        Action::NetworkUnlock,
        Action::SetupNamespaces,
        Action::PostSetupNamespaces,
        Action::OrphanPtsMaster,
        Action::StatusReady,
        Action::QueryExtFiles,
    ];

    /// As scripts and RPC clients see it.
    pub fn name(self) -> &'static str {
        match self {
            Action::PreStream => "pre-stream",
            Action::PreDump => "pre-dump",
            Action::PostDump => "post-dump",
            Action::PreRestore => "pre-restore",
            Action::PostRestore => "post-restore",
            Action::PreResume => "pre-resume",
            Action::PostResume => "post-resume",
            Action::NetworkLock => "network-lock",
            Action::NetworkUnlock => "network-unlock",
            Action::SetupNamespaces => "setup-namespaces",
            Action::PostSetupNamespaces => "post-setup-namespaces",
            Action::OrphanPtsMaster => "orphan-pts-master",
            Action::StatusReady => "status-ready",
            Action::QueryExtFiles => "query-ext-files",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The scripts of one run.
#[derive(Debug, Clone, Default)]
pub struct Hooks {
    scripts: Vec<String>,
}

impl Hooks {
    /// `scripts` in the order in which they were given.
    pub fn new(scripts: Vec<String>) -> Hooks {
        Hooks { scripts }
    }

    pub fn is_empty(&self) -> bool {
        self.scripts.is_empty()
    }

    /// Runs every script for one step and waits for each.
    ///
    /// `image_dir` is told to the scripts as it is: it should be a path that holds from any
    /// directory. `init_pid` is the root of the tree as seen from here.
    pub fn run(&self, action: Action, image_dir: &Path, init_pid: Option<i32>) -> Result<(), Failure> {
        for script in self.scripts.iter().rev() {
            log::debug!("Running the {action} script {script}");
            // Through the shell: the option's value has always been a command line, with arguments.
            let mut command = Command::new("/bin/sh");
            command.arg("-c").arg(script);
            command.env("CRTOOLS_SCRIPT_ACTION", action.name()).env("CRTOOLS_IMAGE_DIR", image_dir);
            match init_pid {
                Some(pid) => command.env("CRTOOLS_INIT_PID", pid.to_string()),
                None => command.env_remove("CRTOOLS_INIT_PID"),
            };
            let object = || Object::Named(format!("script {script}"));
            let status = command.status().map_err(|error| {
                Failure::errno(
                    object(),
                    format!("run for {action}"),
                    "execve",
                    error.raw_os_error().unwrap_or(0),
                )
            })?;
            if !status.success() {
                let cause = Cause::Script { action, status: status.code() };
                return Err(Failure::new(object(), "", cause));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// A directory of its own for one test; removed at the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path = std::env::temp_dir().join(format!("crtools-hooks-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Scratch(path)
        }

        fn read(&self, name: &str) -> String {
            std::fs::read_to_string(self.0.join(name)).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_script_learns_action_images_and_pid() {
        let dir = Scratch::new("environment");
        let out = dir.0.join("out");
        let script = format!(
            "echo $CRTOOLS_SCRIPT_ACTION $CRTOOLS_IMAGE_DIR ${{CRTOOLS_INIT_PID-none}} >> {}",
            out.display()
        );
        let hooks = Hooks::new(vec![script]);
        hooks.run(Action::PostRestore, Path::new("/images"), Some(42)).unwrap();
        hooks.run(Action::PreDump, Path::new("/images"), None).unwrap();
        assert_eq!(dir.read("out"), "post-restore /images 42\npre-dump /images none\n");
    }

    #[test]
    fn the_script_added_last_runs_first() {
        let dir = Scratch::new("order");
        let out = dir.0.join("out");
        let scripts = ["one", "two", "three"].map(|word| format!("echo {word} >> {}", out.display()));
        Hooks::new(scripts.to_vec()).run(Action::PreRestore, Path::new("/"), None).unwrap();
        assert_eq!(dir.read("out"), "three\ntwo\none\n");
    }

    #[test]
    fn a_failing_script_ends_the_series_and_keeps_its_status() {
        let dir = Scratch::new("failing");
        let out = dir.0.join("out");
        let scripts = vec![format!("echo never >> {}", out.display()), "exit 32".into()];
        let failure = Hooks::new(scripts).run(Action::PostDump, Path::new("/"), None).unwrap_err();
        assert_eq!(failure.cause, Cause::Script { action: Action::PostDump, status: Some(32) });
        assert_eq!(failure.to_string(), "script exit 32: post-dump ended with status 32");
        assert!(!out.exists());
    }

    #[test]
    fn a_script_ended_by_a_signal_has_failed() {
        let failure =
            Hooks::new(vec!["kill -9 $$".into()]).run(Action::NetworkLock, Path::new("/"), None).unwrap_err();
        assert_eq!(failure.cause, Cause::Script { action: Action::NetworkLock, status: None });
    }

    #[test]
    fn no_scripts_is_a_success() {
        Hooks::default().run(Action::PreResume, Path::new("/"), None).unwrap();
    }

    #[test]
    fn every_action_has_a_name_of_its_own() {
        let mut names = Action::ALL.map(Action::name).to_vec();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), Action::ALL.len());
    }
}
