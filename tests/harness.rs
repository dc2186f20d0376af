//! Trials as libtest-mimic wants them, for the test programs of this folder.

use crtools_tests::runner::{Verdict, outside};
use libtest_mimic::{Arguments, Completion, Trial};

/// Runs the trials of these names, each in namespaces of its own, and ends.
pub fn run(names: impl IntoIterator<Item = String>) -> ! {
    let mut arguments = Arguments::from_args();
    // A trial mostly waits: a few more than there are processors fill the gaps.
    arguments.test_threads = arguments
        .test_threads
        .or_else(|| std::thread::available_parallelism().ok().map(|count| count.get() + 1));
    let trials = names
        .into_iter()
        .map(|name| {
            Trial::ignorable_test(name.clone(), move || match outside(&name)? {
                Verdict::Passed => Ok(Completion::Completed),
                Verdict::Skipped(reason) => {
                    println!("SKIP {name}: {reason}");
                    Ok(Completion::ignored_with(reason))
                }
            })
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit()
}
