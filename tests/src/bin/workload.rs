//! Runs one workload: `workload AREA::NAME DIRECTORY`.
//!
//! Standard error is the workload's log. Ends with 0 when every assertion held, with 101 and a line
//! `FAIL ...` otherwise.

use std::path::PathBuf;

use crtools_tests::case::Trial;
use crtools_tests::{sys, workloads};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (Some(name), Some(directory)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: workload AREA::NAME DIRECTORY");
        std::process::exit(2);
    };
    let Some(case) = workloads::by_name(&name) else {
        eprintln!("FAIL no workload is called {name}");
        std::process::exit(2);
    };
    // A failed assertion in any thread or forked child ends that process at once: unwinding a forked child
    // would run on in its parent's code.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("FAIL {panic}");
        sys::exit_now(101);
    }));
    (case.body)(&Trial::new(PathBuf::from(directory)));
    sys::exit_now(0);
}
