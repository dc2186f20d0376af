//! Under construction.
#![forbid(unsafe_code)]

/// What a restore came to.
#[derive(Debug)]
pub enum Outcome {
    /// `--dry-run`: the plan, as text.
    Planned(String),
    /// The tree runs.
    Resumed(Resumed),
}

/// A tree that runs, whose root is perhaps our child.
#[derive(Debug)]
pub struct Resumed {
    /// The root's pid as seen from here.
    pub root: i32,
}

impl Resumed {
    /// Waits until all tasks of the tree have ended.
    pub fn wait(self) -> Result<(), model::Failures> {
        Ok(())
    }
}

/// Brings a tree back.
pub fn run(_options: &model::Options) -> Result<Outcome, model::Failures> {
    Err(vec![model::Failure::unsupported(model::Object::Tree, "this build cannot restore")])
}
