//! Round trips: a program sets something up, is dumped, seen gone, restored, and then checks itself.
//!
//! Three parts. `case` and `workloads` are the programs under test, run by the small binary `workload`.
//! `sys` holds what they need from the kernel beyond `std` and `nix`. `namespace`, `tool`, `fingerprint` and
//! `round` are the other side: they start a workload in namespaces of its own, run the tool around its
//! checkpoint, and judge. The program is the first judge, its look in /proc before and after is the second.

pub mod case;
pub mod certificates;
pub mod fingerprint;
pub mod huge_pages;
pub mod migration;
pub mod namespace;
pub mod real;
pub mod reap;
pub mod round;
pub mod runner;
pub mod subject;
pub mod sys;
pub mod tool;
pub mod workloads;
