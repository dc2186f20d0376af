//! Programs that are asked over TCP on loopback: node, redis-server and nginx.

use std::path::Path;
use std::process::Command;

use super::{Program, command, put, wait_for};
use crate::subject::Subject;
use crate::tool::read_lossy;

/// What each count has to grow by until a look is satisfied.
const SOME: u64 = 3;

/// Runs a client; what it printed, or `None` when it failed: the server may not be there yet.
pub(super) fn ask(client: &str, words: &[&str]) -> Result<Option<String>, String> {
    let ran = command(client)?.args(words).output().map_err(|e| format!("run {client}: {e}"))?;
    let said = String::from_utf8_lossy(&ran.stdout).trim().to_owned();
    Ok(ran.status.success().then_some(said))
}

/// Waits until no connection is open: the server may hear of its end after the client.
pub(super) fn await_silence(subject: &mut Subject) -> Result<(), String> {
    const TIME_WAIT: &str = "06";
    const LISTEN: &str = "0A";
    wait_for(subject, "the end of all connections", || {
        let table = read_lossy(Path::new("/proc/self/net/tcp"));
        let states: Vec<&str> =
            table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(3)).collect();
        Ok(states.iter().all(|state| [TIME_WAIT, LISTEN].contains(state)).then_some(()))
    })
}

/// An HTTP server with intervals and two worker threads.
pub struct Node;

impl Program for Node {
    fn name(&self) -> &'static str {
        "node"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["node", "curl"]
    }

    fn command(&self, own: &Path) -> Result<Command, String> {
        put(&own.join("serve.js"), include_str!("serve.js"))?;
        let mut node = command("node")?;
        node.arg("serve.js");
        Ok(node)
    }

    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String> {
        let least = wait_for(subject, "higher counts", || {
            let Some(said) = ask("curl", &["-s", "http://127.0.0.1:8080/"])? else { return Ok(None) };
            let numbers: Option<Vec<u64>> = said.split(' ').map(|word| word.parse().ok()).collect();
            let numbers = numbers.ok_or_else(|| format!("the server says: {said}"))?;
            Ok(numbers.into_iter().min().filter(|least| *least >= before + SOME))
        })?;
        await_silence(subject)?;
        Ok(least)
    }

    fn end(&self, _subject: &mut Subject) -> Result<(), String> {
        ask("curl", &["-s", "http://127.0.0.1:8080/stop"]).map(drop)
    }
}

/// A master with two workers, which count requests in memory that they share.
pub struct Nginx;

const NGINX: &str = "
daemon off;
worker_processes 2;
user root;
pid nginx.pid;
error_log stderr info;
events { worker_connections 64; }
http {
    access_log access.log;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    keepalive_timeout 0;
    server {
        listen 127.0.0.1:8081;
        listen unix:web.socket;
        location /page { root .; }
        location /status { stub_status; }
    }
}
";

/// Requests of one look.
const REQUESTS: u64 = 20;

impl Program for Nginx {
    fn name(&self) -> &'static str {
        "nginx"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["nginx", "curl"]
    }

    fn command(&self, own: &Path) -> Result<Command, String> {
        put(&own.join("nginx.conf"), NGINX)?;
        put(&own.join("page"), "a page")?;
        let mut nginx = command("nginx")?;
        nginx.arg("-p").arg(own).args(["-c", "nginx.conf", "-e", "stderr"]);
        Ok(nginx)
    }

    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String> {
        let socket = subject.own("web.socket").display().to_string();
        let page = ["-s", "http://127.0.0.1:8081/page"];
        wait_for(subject, "a page", || Ok(ask("curl", &page)?.filter(|said| said == "a page")))?;
        for _ in 1..REQUESTS {
            let said = ask("curl", &["-s", "--unix-socket", &socket, "http://nginx/page"])?;
            if said.as_deref() != Some("a page") {
                return Err(format!("the page is {said:?}"));
            }
        }
        let status = ask("curl", &["-s", "http://127.0.0.1:8081/status"])?.unwrap_or_default();
        // In the third line: connections accepted, handled, and requests.
        let counted: Option<u64> =
            status.lines().nth(2).and_then(|line| line.split_whitespace().nth(2)?.parse().ok());
        let counted = counted.ok_or_else(|| format!("the status is {status:?}"))?;
        let log = read_lossy(&subject.own("access.log")).lines().count() as u64;
        // The question for the status counts itself, but is not in the log yet.
        if counted != before + REQUESTS + 1 || log + 1 < counted {
            return Err(format!("{before} requests before, {counted} counted now, {log} in the log"));
        }
        await_silence(subject)?;
        Ok(counted)
    }

    fn end(&self, subject: &mut Subject) -> Result<(), String> {
        use nix::sys::signal::{Signal, kill};
        kill(nix::unistd::Pid::from_raw(subject.pid), Signal::SIGQUIT).map_err(|e| format!("end it: {e}"))
    }
}

/// A server with half a million keys, that is counted with, sampled, and told to save.
pub struct Redis;

const KEYS: u64 = 500_000;

impl Program for Redis {
    fn name(&self) -> &'static str {
        "redis-server"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["redis-server", "redis-cli"]
    }

    fn command(&self, _own: &Path) -> Result<Command, String> {
        let mut redis = command("redis-server")?;
        redis.args(["--bind", "127.0.0.1", "--save", "", "--enable-debug-command", "local"]);
        Ok(redis)
    }

    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String> {
        wait_for(subject, "an answer", || Ok(ask("redis-cli", &["ping"])?.filter(|said| said == "PONG")))?;
        if before == 0 {
            expect(&["debug", "populate", &KEYS.to_string(), "key"], "OK")?;
            expect(&["set", "looks", "0"], "OK")?;
        }
        expect(&["dbsize"], &(KEYS + 1).to_string())?;
        for at in (0..KEYS).step_by(KEYS as usize / 20) {
            expect(&["get", &format!("key:{at}")], &format!("value:{at}"))?;
        }
        // What was counted before is still there.
        let looks = before + 1;
        expect(&["incr", "looks"], &looks.to_string())?;
        expect(&["bgsave"], "Background saving started")?;
        wait_for(subject, "the end of a save", || {
            let info = ask("redis-cli", &["info", "persistence"])?.unwrap_or_default();
            let has = |line: &str| info.lines().any(|found| found.trim() == line);
            if has("rdb_last_bgsave_status:err") {
                return Err("the save failed".into());
            }
            Ok(has("rdb_bgsave_in_progress:0").then_some(()))
        })?;
        let saved = subject.own("dump.rdb");
        let length = std::fs::metadata(&saved).map_err(|e| format!("find what was saved: {e}"))?.len();
        if length < KEYS * 8 {
            return Err(format!("{length} bytes were saved of {KEYS} keys"));
        }
        std::fs::remove_file(&saved).map_err(|e| format!("remove what was saved: {e}"))?;
        await_silence(subject)?;
        Ok(looks)
    }

    fn end(&self, _subject: &mut Subject) -> Result<(), String> {
        ask("redis-cli", &["shutdown", "nosave"]).map(drop)
    }
}

fn expect(words: &[&str], answer: &str) -> Result<(), String> {
    match ask("redis-cli", words)? {
        Some(said) if said == answer => Ok(()),
        other => Err(format!("{words:?} was answered with {other:?}, not {answer:?}")),
    }
}
