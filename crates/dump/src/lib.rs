//! Under construction.
#![forbid(unsafe_code)]

/// Saves a tree.
pub fn run(_options: &model::Options) -> Result<(), model::Failures> {
    Err(vec![model::Failure::unsupported(model::Object::Tree, "this build cannot dump")])
}
