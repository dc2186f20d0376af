//! postgresql as its own user, with all shared memory in SysV segments, asked over a UNIX socket.
//!
//! A prepared transaction holds a lock on a table from one look to the next.

use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};

use super::{Program, command, wait_for};
use crate::subject::Subject;
use crate::tool::read_lossy;

const NUMBERS: u64 = 100_000;
const SETTINGS: &[&str] = &[
    "listen_addresses=",
    "shared_memory_type=sysv",
    "dynamic_shared_memory_type=sysv",
    "shared_buffers=16MB",
    "max_prepared_transactions=4",
    "fsync=off",
    "autovacuum_naptime=1s",
];

pub struct Postgres;

fn user() -> Result<User, String> {
    let found = User::from_name("postgres").map_err(|e| format!("look for the user postgres: {e}"))?;
    found.ok_or_else(|| "there is no user postgres".into())
}

fn as_user(program: &str, user: &User) -> Result<Command, String> {
    let mut command = command(program)?;
    command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    Ok(command)
}

/// The answer to a question, or `None` when there is no server yet.
fn ask(subject: &Subject, question: &str) -> Result<Option<String>, String> {
    let mut psql = command("psql")?;
    psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "postgres", "-h"]);
    psql.arg(subject.own("")).args(["-c", question]);
    let ran = psql.output().map_err(|e| format!("run psql: {e}"))?;
    match ran.status.code() {
        Some(0) => Ok(Some(String::from_utf8_lossy(&ran.stdout).trim().to_owned())),
        // No connection.
        Some(2) => Ok(None),
        _ => Err(format!("{question} fails: {}", String::from_utf8_lossy(&ran.stderr))),
    }
}

fn expect(subject: &Subject, question: &str, answer: &str) -> Result<(), String> {
    match ask(subject, question)? {
        Some(said) if said == answer => Ok(()),
        other => Err(format!("{question} was answered with {other:?}, not {answer:?}")),
    }
}

impl Program for Postgres {
    fn name(&self) -> &'static str {
        "postgresql"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["postgres", "initdb", "psql"]
    }

    fn command(&self, own: &Path) -> Result<Command, String> {
        let user = user()?;
        chown(own, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
            .map_err(|e| format!("give it away: {e}"))?;
        let made = as_user("initdb", &user)?
            .args(["-U", "postgres", "-A", "trust", "--no-locale", "--no-sync", "-E", "UTF8", "-D"])
            .arg(own.join("data"))
            .current_dir(own)
            .output()
            .map_err(|e| format!("run initdb: {e}"))?;
        if !made.status.success() {
            return Err(format!("initdb: {}", String::from_utf8_lossy(&made.stderr)));
        }
        let mut postgres = as_user("postgres", &user)?;
        postgres.arg("-D").arg(own.join("data")).arg("-k").arg(own);
        for setting in SETTINGS {
            postgres.args(["-c", setting]);
        }
        Ok(postgres)
    }

    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String> {
        let start = std::time::Instant::now();
        while ask(subject, "select 1")?.is_none() {
            subject.still_there("waiting for the server")?;
            if start.elapsed() > super::PATIENCE {
                return Err("the server takes no connection".into());
            }
            crate::sys::nap();
        }
        if before == 0 {
            expect(subject, "create table looks (number int)", "")?;
            let made = format!("create table numbers as select generate_series(1, {NUMBERS}) as number");
            expect(subject, &made, "")?;
        } else {
            let held =
                "select count(*) from pg_locks where relation = 'looks'::regclass and mode = 'ExclusiveLock'";
            expect(subject, held, "1")?;
            expect(subject, "commit prepared 'held'", "")?;
        }
        expect(subject, "select count(*) from looks", &before.to_string())?;
        let sum = NUMBERS * (NUMBERS + 1) / 2;
        expect(subject, "select sum(number) from numbers", &sum.to_string())?;
        // Writes every page, through all of the buffers.
        expect(subject, "update numbers set number = number; checkpoint", "")?;
        let looks = before + 1;
        let hold = format!(
            "begin; lock table looks in exclusive mode; insert into looks values ({looks}); prepare transaction 'held'"
        );
        expect(subject, &hold, "")?;
        // The server may hear of the end of a connection after the client.
        let name = subject.own(".s.PGSQL.5432").display().to_string();
        wait_for(subject, "the end of all connections", || {
            let table = read_lossy(Path::new("/proc/self/net/unix"));
            Ok((table.lines().filter(|line| line.ends_with(&name)).count() == 1).then_some(()))
        })?;
        Ok(looks)
    }

    fn end(&self, subject: &mut Subject) -> Result<(), String> {
        kill(Pid::from_raw(subject.pid), Signal::SIGINT).map_err(|e| format!("end it: {e}"))
    }
}
