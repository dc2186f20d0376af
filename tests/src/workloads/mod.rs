//! The workloads by area. A new one is a function in one of these files and a line in its `CASES`.

use crate::case::Case;

/// Declares the modules and the list of them in one place.
macro_rules! areas {
    ($($area:ident),* $(,)?) => {
        $(mod $area;)*
        const AREAS: &[(&str, &[Case])] = &[$((stringify!($area), $area::CASES)),*];
    };
}

areas! { aio, basic, bpf, events, fanotify, file_systems, files, ghosts, hugetlb, locks, mapped_files, memory, numa, pidfds, pipes, process, procfiles, refusals, registers, relatives, secrets, security, segments, signals, sockets, terminals, threads, tracking, tun, unix, unix_ends, unix_peers, unix_queues, uring, uring_rights, uring_waiting, validation, watches }

/// Pages that a workload touches, in order.
pub use memory::TOUCHED;

/// Every case with its area.
pub fn all() -> impl Iterator<Item = (&'static str, Case)> {
    AREAS.iter().flat_map(|(area, cases)| cases.iter().map(move |case| (*area, *case)))
}

/// Programs that a workload starts, without a checkpoint of their own.
const TARGETS: &[(&str, Case)] = &[
    ("process", Case::new("exec_target", process::exec_target)),
    ("ghosts", Case::new("varied_target", ghosts::varied_target)),
];

/// The case called `AREA::NAME`.
pub fn by_name(name: &str) -> Option<Case> {
    let (area, name) = name.split_once("::")?;
    let all = || all().chain(TARGETS.iter().copied());
    all().find(|(its_area, case)| *its_area == area && case.name == name).map(|(_, case)| case)
}
