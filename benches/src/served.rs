//! Servers that the target starts and keeps busy over a UNIX socket: redis, and postgres in the manner of pgbench.
//!
//! Server and client are in one tree, so both tools carry the connection. A batch of work is answered before the next is
//! sent: the longest time between two answers is what a client has to wait.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use crtools_tests::real;
use nix::unistd::User;

/// Something that answers.
pub trait Served {
    /// Does some work, and waits until it is acknowledged.
    fn work(&mut self);

    /// # Panics
    /// When something that was acknowledged is not there.
    fn check(&mut self);

    fn server(&mut self) -> &mut Child;

    /// Ends it.
    ///
    /// # Panics
    /// When it is no child of this process any more.
    fn end(&mut self) {
        self.server().kill().expect("end the server");
        self.server().wait().expect("wait for the server");
    }
}

/// Why a case cannot be run here, if so.
pub fn missing(case: &str) -> Option<String> {
    match case.split('-').next() {
        Some("redis") => real::absent(&["redis-server"]),
        Some("postgres") => real::absent(&["postgres", "initdb"]),
        _ => None,
    }
}

/// Connects to a server that is about to start.
fn reach(path: &Path) -> UnixStream {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(e) => assert!(start.elapsed() < Duration::from_secs(30), "{}: {e}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// redis-server with values of 1000 bytes.
#[derive(Debug)]
pub struct Redis {
    server: Child,
    stream: UnixStream,
    keys: u64,
    /// The last value of each key that was written.
    written: Vec<u64>,
    batches: u64,
}

const BATCH: u64 = 20;
const WRITTEN: u64 = 10_000;

impl Redis {
    /// With so many MiB of values.
    ///
    /// # Panics
    /// When it does not start.
    pub fn begin(mib: usize, folder: &Path) -> Redis {
        let socket = folder.join("redis.socket");
        let mut server = real::command("redis-server").expect("redis-server");
        server.args(["--port", "0", "--save", "", "--enable-debug-command", "local", "--unixsocket"]);
        let server = server.arg(&socket).current_dir(folder).spawn().expect("start redis-server");
        let keys = (mib as u64) << 20 >> 10;
        let mut redis = Redis { server, stream: reach(&socket), keys, written: Vec::new(), batches: 0 };
        redis.ask(&format!("DEBUG POPULATE {keys} key 1000\r\n"), b"+OK\r\n");
        redis
    }

    fn ask(&mut self, words: &str, answer: &[u8]) {
        self.stream.write_all(words.as_bytes()).expect("write to redis");
        let mut said = vec![0; answer.len()];
        self.stream.read_exact(&mut said).expect("read from redis");
        let shown = String::from_utf8_lossy(&said);
        assert!(said == answer, "{:.60} was answered with {shown:.60}", words.escape_debug());
    }

    fn expect(&mut self, key: &str, value: &[u8]) {
        let answer = [format!("${}\r\n", value.len()).as_bytes(), value, b"\r\n"].concat();
        self.ask(&format!("GET {key}\r\n"), &answer);
    }
}

impl Served for Redis {
    fn server(&mut self) -> &mut Child {
        &mut self.server
    }

    fn work(&mut self) {
        let numbers = self.batches * BATCH..(self.batches + 1) * BATCH;
        let words: String =
            numbers.clone().map(|number| format!("SET written:{} {number}\r\n", number % WRITTEN)).collect();
        self.ask(&words, &b"+OK\r\n".repeat(BATCH as usize));
        for number in numbers {
            match self.written.get_mut((number % WRITTEN) as usize) {
                Some(last) => *last = number,
                None => self.written.push(number),
            }
        }
        self.batches += 1;
    }

    fn check(&mut self) {
        let all = self.keys + self.written.len() as u64;
        self.ask("DBSIZE\r\n", format!(":{all}\r\n").as_bytes());
        for (key, value) in std::mem::take(&mut self.written).into_iter().enumerate() {
            self.expect(&format!("written:{key}"), value.to_string().as_bytes());
        }
        for key in (0..self.keys).step_by(100) {
            let mut value = format!("value:{key}").into_bytes();
            value.resize(1000, 0);
            self.expect(&format!("key:{key}"), &value);
        }
    }
}

/// postgres with a table of accounts, of which each transaction changes one and notes it in another table.
#[derive(Debug)]
pub struct Postgres {
    server: Child,
    stream: UnixStream,
    rows: u64,
    transactions: u64,
}

/// Rows of the table in a MiB of it.
const ROWS: u64 = 8000;
const SETTINGS: &[&str] = &[
    "listen_addresses=",
    "shared_memory_type=mmap",
    "dynamic_shared_memory_type=sysv",
    "huge_pages=off",
    "fsync=off",
    "max_wal_size=4GB",
];

impl Postgres {
    /// With a table of so many MiB, all of which is in its memory.
    ///
    /// # Panics
    /// When it does not start.
    pub fn begin(mib: usize, folder: &Path) -> Postgres {
        let own = folder.join("postgres");
        fs::create_dir(&own).expect("make a folder");
        let user = User::from_name("postgres").expect("look for a user").expect("a user postgres");
        let (uid, gid) = (user.uid.as_raw(), user.gid.as_raw());
        chown(&own, Some(uid), Some(gid)).expect("give it away");
        let mut initdb = real::command("initdb").expect("initdb");
        initdb.args([
            "-U",
            "postgres",
            "-A",
            "trust",
            "--no-locale",
            "--no-sync",
            "-E",
            "UTF8",
            "-D",
            "data",
        ]);
        let made = initdb.current_dir(&own).uid(uid).gid(gid).output().expect("run initdb");
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let mut server = real::command("postgres").expect("postgres");
        // A table of more than a quarter of them is not read into them.
        server.args(["-D", "data", "-k"]).arg(&own).args(["-c", &format!("shared_buffers={}MB", 5 * mib)]);
        server.args(SETTINGS.iter().flat_map(|setting| ["-c", setting]));
        let server = server.current_dir(&own).uid(uid).gid(gid).spawn().expect("start postgres");
        let stream = loop {
            let mut stream = reach(&own.join(".s.PGSQL.5432"));
            // Until it takes connections it says so.
            if enter(&mut stream).is_ok() {
                break stream;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let rows = mib as u64 * ROWS;
        let mut postgres = Postgres { server, stream, rows, transactions: 0 };
        postgres.ask(&format!(
            "create table accounts as select number as aid, 0 as balance, repeat('x', 84) as filler \
             from generate_series(0, {}) as number; create unique index on accounts (aid); \
             create table history (aid int, at timestamp default now()); vacuum analyze accounts; \
             select sum(length(filler)) from accounts",
            rows - 1
        ));
        postgres
    }

    /// The first column of the last row of an answer.
    fn ask(&mut self, statements: &str) -> String {
        // Some statements are no part of a transaction.
        let mut value = String::new();
        for statement in statements.split("; ") {
            value = query(&mut self.stream, statement).unwrap_or_else(|e| panic!("{statement:.60}: {e}"));
        }
        value
    }
}

impl Served for Postgres {
    fn server(&mut self) -> &mut Child {
        &mut self.server
    }

    fn work(&mut self) {
        let aid = self.transactions.wrapping_mul(6_364_136_223_846_793_005) % self.rows;
        let words = format!(
            "update accounts set balance = balance + 1 where aid = {aid}; insert into history values ({aid})"
        );
        query(&mut self.stream, &words).unwrap_or_else(|e| panic!("a transaction: {e}"));
        self.transactions += 1;
    }

    fn check(&mut self) {
        let done = self.transactions.to_string();
        assert_eq!(self.ask("select sum(balance) from accounts"), done);
        assert_eq!(self.ask("select count(*) from history"), done);
        assert_eq!(self.ask("select sum(length(filler)) from accounts"), (self.rows * 84).to_string());
    }
}

/// Says who comes, and waits until it may ask.
fn enter(stream: &mut UnixStream) -> Result<(), String> {
    const VERSION: u32 = 3 << 16;
    let words = b"user\0postgres\0database\0postgres\0\0";
    let length = (8 + words.len()) as u32;
    let message = [&length.to_be_bytes()[..], &VERSION.to_be_bytes(), words].concat();
    stream.write_all(&message).map_err(|e| e.to_string())?;
    answer(stream).map(drop)
}

/// Asks in the simple manner: statements without parameters.
fn query(stream: &mut UnixStream, words: &str) -> Result<String, String> {
    let length = (4 + words.len() + 1) as u32;
    let message = [b"Q", &length.to_be_bytes()[..], words.as_bytes(), b"\0"].concat();
    stream.write_all(&message).map_err(|e| e.to_string())?;
    answer(stream)
}

/// Reads messages until the server is ready for the next question.
fn answer(stream: &mut UnixStream) -> Result<String, String> {
    let (mut value, mut wrong) = (String::new(), None);
    loop {
        let mut head = [0; 5];
        stream.read_exact(&mut head).map_err(|e| wrong.take().unwrap_or_else(|| e.to_string()))?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let mut body = vec![0; length.saturating_sub(4)];
        stream.read_exact(&mut body).map_err(|e| e.to_string())?;
        match head[0] {
            b'Z' => return wrong.map_or(Ok(value), Err),
            // The number of columns, the length of the first, the first.
            b'D' if body.len() > 6 => {
                let length = u32::from_be_bytes([body[2], body[3], body[4], body[5]]) as usize;
                value = String::from_utf8_lossy(&body[6..(6 + length).min(body.len())]).into_owned();
            }
            b'E' => wrong = Some(String::from_utf8_lossy(&body).replace('\0', " ")),
            _ => {}
        }
    }
}
