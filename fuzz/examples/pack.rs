//! Makes a seed for the target `checkpoint` of a folder of images:
//! `cargo run --example pack DIR >SEED`.

#[path = "../folder.rs"]
mod folder;

use std::io::Write;

fn main() {
    let dir = std::path::PathBuf::from(std::env::args_os().nth(1).expect("usage: pack DIR >SEED"));
    let seed = folder::pack(|name| std::fs::read(dir.join(name)).ok());
    std::io::stdout().write_all(&seed).expect("write the seed");
}
