//! Chores around the code, run as `cargo xtask NAME`.
#![forbid(unsafe_code)]

mod completions;
mod demo;
mod generate;
#[cfg(test)]
mod layout;
mod man;
mod test;

use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask NAME

  demo       start a small program, save it, show that it is gone, bring it back
  test       run all tests; words that follow go to `cargo test`
  generate   write the man page and the shell completions anew from the table of options
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["demo"] => demo::run(),
        ["demo-inside", dir] => demo::inside(dir.as_ref()),
        ["demo-count", file] => demo::count(file.as_ref()),
        ["test", rest @ ..] => test::run(rest),
        ["generate"] => generate::run(),
        _ => Err(USAGE.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
