//! Files that are made from the table of options. They are kept in the repository, so that packagers
//! need no build to have them; a test fails when one is stale.

use crate::{completions, man};
use std::fs;
use std::path::{Path, PathBuf};

fn files() -> [(&'static str, String); 4] {
    [
        ("docs/man/crtools.8", man::page()),
        ("docs/completions/crtools.bash", completions::bash()),
        ("docs/completions/_crtools", completions::zsh()),
        ("docs/completions/crtools.fish", completions::fish()),
    ]
}

/// The top of the repository.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

pub fn run() -> Result<(), String> {
    for (name, text) in files() {
        let path = root().join(name);
        let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&path, text));
        written.map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_files_are_those_of_the_table() {
        for (name, text) in files() {
            let kept = fs::read_to_string(root().join(name)).unwrap_or_default();
            assert!(kept == text, "{name} is stale: run `cargo xtask generate`");
        }
    }
}
