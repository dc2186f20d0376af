//! The one error type that crosses crate borders: which object, whose, what was attempted, why it
//! failed, and what would help.

use crate::hooks::Action;
use crate::options::OptionSpec;
use std::borrow::Cow;
use std::fmt;

/// Everything that stands in the way of one tree, reported together.
pub type Failures = Vec<Failure>;

/// A system call that failed: its name and the error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno {
    pub call: &'static str,
    pub code: i32,
}

impl Errno {
    /// Says which object it hit and what was attempted.
    pub fn on(self, object: Object, doing: impl Into<Cow<'static, str>>) -> Failure {
        Failure::errno(object, doing, self.call, self.code)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.call, std::io::Error::from_raw_os_error(self.code))
    }
}

impl std::error::Error for Errno {}

/// What a failure is about, in the words a user would use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// The tree as a whole, or the run.
    Tree,
    /// The process named by [`Failure::pid`].
    Task,
    /// One thread of the process, by its tid.
    Thread(i32),
    /// A descriptor, with what it is ("tcp socket 10.0.0.1:443").
    Fd { number: i32, what: String },
    /// A range of memory, with what it is.
    Vma { start: u64, end: u64, what: String },
    /// A record of an image file; `entry` counts from zero.
    Image { file: String, entry: Option<usize> },
    /// A path on this host.
    Path(String),
    /// Something else that has a name of its own ("pid namespace", "timer 3").
    Named(String),
}

/// Why it failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// The kernel refused `call`.
    Errno { call: &'static str, errno: i32 },
    /// Not carried by this version.
    Unsupported(Cow<'static, str>),
    /// Carried only when the user asks for it.
    Policy(Cow<'static, str>),
    /// An image that cannot be what a dump wrote.
    Corrupt(Cow<'static, str>),
    /// The world is not as it has to be (a file changed, a pid is taken).
    Conflict(Cow<'static, str>),
    /// A script of the user said no. `status` is its exit status, absent when a signal ended it;
    /// that of a post-dump script becomes our own.
    Script { action: Action, status: Option<i32> },
}

/// What would help.
#[derive(Debug, Clone, Copy)]
pub enum Remedy {
    /// An option of this program: the definition, so that a renamed one cannot leave a stale hint.
    Option(&'static OptionSpec),
    /// A newer or otherwise configured kernel.
    Kernel(&'static str),
    /// Something the user can do.
    Advice(&'static str),
}

/// Why one object could not be dumped or restored.
#[derive(Debug, Clone)]
pub struct Failure {
    pub object: Object,
    /// As the user sees it: in the pid namespace of the tree.
    pub pid: Option<i32>,
    /// Lower case, no full stop: "read the registers".
    pub doing: Cow<'static, str>,
    pub cause: Cause,
    pub remedy: Option<Remedy>,
    /// The tree is on its way through this state, and may have left it at another moment.
    pub is_passing: bool,
}

impl Failure {
    pub fn new(object: Object, doing: impl Into<Cow<'static, str>>, cause: Cause) -> Failure {
        Failure { object, pid: None, doing: doing.into(), cause, remedy: None, is_passing: false }
    }

    /// An object that this version does not carry.
    pub fn unsupported(object: Object, why: impl Into<Cow<'static, str>>) -> Failure {
        Failure::new(object, "", Cause::Unsupported(why.into()))
    }

    /// An object that is carried only with an option.
    pub fn policy(object: Object, why: impl Into<Cow<'static, str>>, option: &'static OptionSpec) -> Failure {
        Failure::new(object, "", Cause::Policy(why.into())).help(Remedy::Option(option))
    }

    /// A record that no dump writes.
    pub fn corrupt(
        file: impl Into<String>,
        entry: Option<usize>,
        why: impl Into<Cow<'static, str>>,
    ) -> Failure {
        Failure::new(Object::Image { file: file.into(), entry }, "", Cause::Corrupt(why.into()))
    }

    pub fn conflict(
        object: Object,
        doing: impl Into<Cow<'static, str>>,
        why: impl Into<Cow<'static, str>>,
    ) -> Failure {
        Failure::new(object, doing, Cause::Conflict(why.into()))
    }

    pub fn errno(
        object: Object,
        doing: impl Into<Cow<'static, str>>,
        call: &'static str,
        errno: i32,
    ) -> Failure {
        Failure::new(object, doing, Cause::Errno { call, errno })
    }

    pub fn of(mut self, pid: i32) -> Failure {
        self.pid.get_or_insert(pid);
        self
    }

    /// It may be over soon, when the tree goes on.
    pub fn passes(mut self) -> Failure {
        self.is_passing = true;
        self
    }

    pub fn help(mut self, remedy: Remedy) -> Failure {
        self.remedy = Some(remedy);
        self
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::Tree => write!(f, "tree"),
            Object::Task => write!(f, "process"),
            Object::Thread(tid) => write!(f, "thread {tid}"),
            Object::Fd { number, what } => write!(f, "fd {number} ({what})"),
            Object::Vma { start, end, what } => write!(f, "mapping {start:#x}-{end:#x} ({what})"),
            Object::Image { file, entry: Some(n) } => write!(f, "{file}#{n}"),
            Object::Image { file, entry: None } => write!(f, "{file}"),
            Object::Path(path) => write!(f, "{path}"),
            Object::Named(name) => write!(f, "{name}"),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Errno { call, errno } => {
                write!(f, "{call}: {}", std::io::Error::from_raw_os_error(*errno))
            }
            Cause::Unsupported(why) | Cause::Policy(why) | Cause::Corrupt(why) | Cause::Conflict(why) => {
                write!(f, "{why}")
            }
            Cause::Script { action, status: Some(status) } => {
                write!(f, "{action} ended with status {status}")
            }
            Cause::Script { action, status: None } => write!(f, "{action} was ended by a signal"),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.pid, &self.object) {
            (Some(pid), Object::Task) => write!(f, "pid {pid}: ")?,
            (Some(pid), object) => write!(f, "pid {pid}: {object}: ")?,
            (None, object) => write!(f, "{object}: ")?,
        }
        match (&self.cause, &*self.doing) {
            (cause, "") => write!(f, "{cause}")?,
            (cause, doing) => write!(f, "cannot {doing}: {cause}")?,
        }
        match self.remedy {
            // Sending the user to an option that is refused would be worse than no hint.
            Some(Remedy::Option(option)) if option.is_not_yet() => {
                write!(f, "; --{} is to allow it, but is not supported yet", option.long)
            }
            Some(Remedy::Option(option)) => write!(f, "; --{} allows it", option.long),
            Some(Remedy::Kernel(what)) => write!(f, "; needs {what}"),
            Some(Remedy::Advice(what)) => write!(f, "; {what}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

impl From<Failure> for Failures {
    fn from(failure: Failure) -> Failures {
        vec![failure]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options;

    #[test]
    fn a_refusal_names_process_object_reason_and_option() {
        let object = Object::Fd { number: 0, what: "terminal /dev/pts/1".into() };
        let failure =
            Failure::policy(object, "belongs to a session outside of the tree", &options::SHELL_JOB).of(412);
        assert_eq!(
            failure.to_string(),
            "pid 412: fd 0 (terminal /dev/pts/1): belongs to a session outside of the tree; \
             --shell-job allows it"
        );
    }

    #[test]
    fn an_option_that_would_be_refused_is_no_promise() {
        let object = Object::Fd { number: 7, what: "tcp socket 10.0.0.1:443".into() };
        let text =
            Failure::policy(object, "has an established connection", &options::TCP_ESTABLISHED).to_string();
        let hint = match options::TCP_ESTABLISHED.is_not_yet() {
            true => "; --tcp-established is to allow it, but is not supported yet",
            false => "; --tcp-established allows it",
        };
        assert!(text.ends_with(hint), "{text}");
    }
}
