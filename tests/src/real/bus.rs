//! dbus-daemon, dbus-monitor and dbus-send, all in one tree: the monitor's connection stays open.

use std::path::Path;
use std::process::Command;

use super::{Program, command, put, wait_for};
use crate::subject::Subject;
use crate::tool::read_lossy;

/// The calls that a look waits for.
const SOME: u64 = 10;
/// Of a daemon that listens at `FOLDER/bus`.
const CONFIGURATION: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path=FOLDER/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"#;

pub struct Dbus;

/// Writes what a daemon that listens at `folder/bus` is told.
pub fn configure(folder: &Path) -> Result<(), String> {
    put(&folder.join("bus.conf"), &CONFIGURATION.replace("FOLDER", &folder.display().to_string()))
}

/// How far the calls that were heard count, each once and in order.
fn heard(text: &str) -> Result<u64, String> {
    let turns =
        text.lines().filter_map(|line| line.trim().strip_prefix("string \"turn.n")?.strip_suffix('"'));
    let mut count = 0;
    for turn in turns {
        count += 1;
        if turn.parse() != Ok(count) {
            return Err(format!("call {turn} was heard as number {count}"));
        }
    }
    Ok(count)
}

impl Program for Dbus {
    fn name(&self) -> &'static str {
        "dbus-daemon"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["bash", "dbus-daemon", "dbus-monitor", "dbus-send", "grep", "sleep"]
    }

    fn command(&self, own: &Path) -> Result<Command, String> {
        put(&own.join("bus.sh"), include_str!("bus.sh"))?;
        configure(own)?;
        let mut bash = command("bash")?;
        bash.arg("bus.sh");
        Ok(bash)
    }

    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String> {
        let file = subject.own("heard");
        wait_for(subject, "more calls", || {
            let count = heard(&read_lossy(&file))?;
            Ok((count >= before + SOME).then_some(count))
        })
    }
}
