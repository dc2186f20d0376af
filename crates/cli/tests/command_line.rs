//! The command as other programs see it: exit status, what is printed where, and the log file. None of
//! these come as far as touching a process.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A directory of its own for one test, empty at the start, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("crtools-cli-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The command with nothing of this user's configuration, run in `directory`.
fn command(directory: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_crtools"));
    command.args(args).current_dir(directory).stdin(Stdio::null());
    command.env("HOME", directory).env_remove("CRIU_CONFIG_FILE");
    command
}

fn run(directory: &Path, args: &[&str]) -> Output {
    command(directory, args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn help_is_a_success_and_goes_to_standard_output() {
    let dir = Scratch::new("help");
    for args in [&["-h"][..], &["--help"], &["dump", "--help"], &["--nonsense", "-h"]] {
        let output = run(&dir.0, args);
        assert_eq!(output.status.code(), Some(0));
        assert!(stdout(&output).contains("--images-dir"));
        assert_eq!(stderr(&output), "");
    }
}

#[test]
fn the_version_is_that_of_criu_first() {
    let dir = Scratch::new("version");
    let output = run(&dir.0, &["--version"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).starts_with("Version: 4.2\n"));
}

#[test]
fn mistakes_end_with_1_and_removed_commands_with_255() {
    let dir = Scratch::new("mistakes");
    for (args, status, text) in [
        (&[][..], 1, "Usage: crtools"),
        (&["dmup"][..], 1, "no command dmup"),
        (&["dump"][..], 1, "dump needs --tree"),
        (&["dump", "-t", "1", "--nonsense"][..], 1, "no option --nonsense"),
        (&["dump", "-t", "1", "two"][..], 1, "two: one word too many"),
        (&["dump", "-t", "1", "--tcp-close"][..], 1, "--tcp-close is known but not supported yet"),
        (&["cpuinfo", "dump"][..], 1, "the command cpuinfo is known but not supported yet"),
        (&["restore", "-D", "nowhere"][..], 1, "nowhere: cannot use the images directory"),
        (&["exec"][..], 255, "compel"),
        (&["show"][..], 255, "crit"),
    ] {
        let output = run(&dir.0, args);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
        assert!(said.contains(text), "{args:?}: {said}");
        assert!(said.starts_with("Error ("), "{args:?}: {said}");
        assert_eq!(stdout(&output), "", "{args:?}");
    }
}

#[test]
fn the_log_is_private_emptied_and_in_the_work_directory() {
    let dir = Scratch::new("log");
    fs::create_dir(dir.path("images")).unwrap();
    fs::create_dir(dir.path("work")).unwrap();
    let log = dir.path("work/check.log");
    let args = ["check", "--feature", "mnt_id", "-D", "images", "-W", "work", "-o", "check.log", "-v4"];
    for _ in 0..2 {
        let output = run(&dir.0, &args);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!(stdout(&output), "mnt_id is supported\n");
    }
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.iter().filter(|line| line.contains("Version: 4.2")).count(), 1, "{text}");
    assert!(lines[0][12..].starts_with("Run ID: "), "{text}");
    assert!(lines[1][12..].starts_with("Version: 4.2 (crtools "), "{text}");
    assert!(lines[2][12..].starts_with("Running on "), "{text}");
    assert!(lines.iter().all(|line| line.starts_with('(') && &line[10..12] == ") "), "{text}");
    assert_eq!(fs::metadata(&log).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn without_a_work_directory_the_log_is_beside_the_images() {
    let dir = Scratch::new("log-images");
    fs::create_dir(dir.path("images")).unwrap();
    run(&dir.0, &["check", "--feature", "mnt_id", "-D", "images", "-o", "log"]);
    assert!(dir.path("images/log").exists());
}

#[test]
fn errors_go_to_the_log_and_to_standard_error() {
    let dir = Scratch::new("errors");
    // No pid is that high: the kernel's limit is four millions.
    let output = run(&dir.0, &["dump", "-t", "2000000000", "-o", "log"]);
    assert_eq!(output.status.code(), Some(1));
    let log = fs::read_to_string(dir.path("log")).unwrap();
    assert!(log.ends_with(": Dumping FAILED.\n"), "{log}");
    assert!(log.lines().count() >= 2, "{log}");
    assert!(log.lines().all(|line| line.starts_with("Error (")), "{log}");
    assert_eq!(stderr(&output), log);
}

#[test]
fn an_empty_folder_cannot_be_restored() {
    let dir = Scratch::new("restore");
    let output = run(&dir.0, &["restore", "-d", "-v0"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output), "", "level 0 is silence");
    let output = run(&dir.0, &["restore", "-d", "-o", "-"]);
    assert!(stdout(&output).ends_with(": Restoring FAILED.\n"));
    assert!(stderr(&output).ends_with(": Restoring FAILED.\n"));
}

#[test]
fn a_failed_dump_leaves_nothing_but_its_log() {
    let dir = Scratch::new("nothing");
    run(&dir.0, &["dump", "-t", "2000000000", "-o", "log"]);
    let names: Vec<_> = fs::read_dir(&dir.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["log"]);
}

#[test]
fn configuration_files_are_read_and_their_mistakes_are_placed() {
    let dir = Scratch::new("config");
    fs::create_dir(dir.path(".criu")).unwrap();
    fs::write(dir.path(".criu/default.conf"), "# ours\nlog-file from-home.log\nverbosity=3\n").unwrap();
    assert_eq!(run(&dir.0, &["check", "--feature", "mnt_id"]).status.code(), Some(0));
    assert!(fs::read_to_string(dir.path("from-home.log")).unwrap().contains("Run ID: "));

    fs::remove_file(dir.path("from-home.log")).unwrap();
    run(&dir.0, &["check", "--feature", "mnt_id", "--no-default-config"]);
    assert!(!dir.path("from-home.log").exists());

    fs::write(dir.path("bad.conf"), "\nwork-dir a b\n").unwrap();
    let output = command(&dir.0, &["check"]).env("CRIU_CONFIG_FILE", dir.path("bad.conf")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("bad.conf: line 2: more than one word"));

    let output = run(&dir.0, &["check", "--feature", "mnt_id", "--config", "not-there.conf"]);
    assert_eq!(output.status.code(), Some(0), "a missing file is no mistake");
}

#[test]
fn features_of_others_are_known_but_not_supported() {
    let dir = Scratch::new("feature");
    for name in ["autofs", "cgroupns", "tun"] {
        let output = run(&dir.0, &["check", "--feature", name]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("not supported yet by crtools"));
    }
    let output = run(&dir.0, &["check", "--feature", "telepathy"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("no such feature"));
}

#[test]
fn an_inherited_descriptor_can_be_closed() {
    let dir = Scratch::new("close");
    let output = run(&dir.0, &["check", "--feature", "mnt_id", "--close", "1"]);
    assert_eq!(stdout(&output), "");
}
