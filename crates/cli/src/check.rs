//! `crtools check`: does this kernel, as this user, have what dump and restore use?

use model::options::{CheckOptions, FEATURES};
use std::process::ExitCode;
use sys::probe::{self, Answer};

/// When a question is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    /// Always: without it nothing works.
    Needed,
    /// With `--extra`: some trees need it, or it is slower without.
    Extra,
    /// Only when asked for by name.
    Named,
}

struct Question {
    /// Where it is one of [`FEATURES`], `--feature` finds it.
    name: &'static str,
    when: When,
    ask: fn() -> Answer,
}

const fn question(name: &'static str, when: When, ask: fn() -> Answer) -> Question {
    Question { name, when, ask }
}

/// In the order in which they are asked. Every row is about something this version uses; a feature of
/// CRIU's list without a row here is not.
static QUESTIONS: &[Question] = &[
    question("map_files", When::Needed, probe::map_files),
    question("sock_diag", When::Needed, probe::sock_diag),
    question("clone3_set_tid", When::Needed, probe::clone3_set_tid),
    question("peek_offset", When::Needed, probe::peek_offset),
    question("kcmp", When::Needed, probe::kcmp),
    question("set_mm_map", When::Needed, probe::set_mm_map),
    question("proc_stat", When::Needed, probe::proc_stat),
    question("fdinfo", When::Needed, probe::fdinfo),
    question("mnt_id", When::Needed, probe::mnt_id),
    question("ptrace_seize", When::Needed, probe::ptrace_seize),
    question("get_rseq_conf", When::Needed, probe::get_rseq_conf),
    question("pidfd_getfd", When::Needed, probe::pidfd_getfd),
    question("pagemap_scan", When::Needed, probe::pagemap_scan),
    question("can_map_vdso", When::Needed, probe::can_map_vdso),
    question("timerfd", When::Extra, probe::timerfd),
    question("kcmp_epoll", When::Extra, probe::kcmp_epoll),
    question("timer_cr_ids", When::Extra, probe::timer_cr_ids),
    question("pagemap_scan_guard_pages", When::Extra, probe::pagemap_scan_guard_pages),
    question("seccomp_suspend", When::Extra, probe::seccomp_suspend),
    question("terminals", When::Extra, probe::terminals),
    question("shm_next_id", When::Extra, probe::shm_next_id),
    question("mem_dirty_track", When::Extra, probe::mem_dirty_track),
    question("uffd", When::Extra, probe::uffd),
    question("uffd-noncoop", When::Extra, probe::uffd_noncoop),
    question("openat2", When::Named, probe::openat2),
    question("ns_pid", When::Named, probe::ns_pid),
    question("pidfd_store", When::Named, probe::pidfd_getfd),
];

/// Asks, prints the answer, and turns it into the exit status.
pub fn run(options: &CheckOptions) -> ExitCode {
    if !options.features.is_empty() {
        let mut all_good = true;
        for name in &options.features {
            all_good &= feature(name);
        }
        return if all_good { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    // Nothing here works half: the first lack decides.
    if let Some(false) = ask_all(When::Needed).find(|good| !good) {
        log::warn!("Does not look good.");
        return ExitCode::FAILURE;
    }
    // No question of ours is about an unsettled kernel interface, so --experimental adds none.
    if options.extra && ask_all(When::Extra).fold(false, |lacks, good| lacks | !good) {
        println!(
            "Looks good but some kernel features are missing\n\
             that only some process trees need; the log names them."
        );
        return ExitCode::FAILURE;
    }
    println!("Looks good.");
    ExitCode::SUCCESS
}

fn ask_all(when: When) -> impl Iterator<Item = bool> {
    QUESTIONS.iter().filter(move |question| question.when == when).map(|question| match (question.ask)() {
        Ok(()) => {
            log::info!("{} is there", question.name);
            true
        }
        Err(missing) => {
            log::error!("{} is missing: {missing}", question.name);
            false
        }
    })
}

fn feature(name: &str) -> bool {
    debug_assert!(FEATURES.contains(&name), "the option's setter refuses others");
    match QUESTIONS.iter().find(|question| question.name == name) {
        None => {
            log::error!("Feature {name} is known but not supported yet by crtools");
            false
        }
        Some(question) => match (question.ask)() {
            Ok(()) => {
                println!("{name} is supported");
                true
            }
            Err(missing) => {
                log::error!("{name} is not supported: {missing}");
                false
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_have_names_of_their_own() {
        for (index, question) in QUESTIONS.iter().enumerate() {
            assert!(QUESTIONS[index + 1..].iter().all(|other| other.name != question.name));
        }
    }

    #[test]
    fn features_that_only_others_use_are_refused() {
        assert!(!feature("autofs"));
    }

    #[test]
    fn what_can_be_asked_by_name_only_is_a_feature_of_criu() {
        for question in QUESTIONS.iter().filter(|question| question.when == When::Named) {
            assert!(FEATURES.contains(&question.name), "{}", question.name);
        }
    }
}
