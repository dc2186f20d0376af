//! The rows of the table. Names, letters, values and defaults are those of CRIU 4.2, so that one
//! program can stand in for the other; what each does is said in our own words.

use super::*;
use crate::command::Command;

pub const ANY_COMMAND: u16 = u16::MAX;
const DUMP: u16 = Command::Dump.bit();
const PRE_DUMP: u16 = Command::PreDump.bit();
const RESTORE: u16 = Command::Restore.bit();
const CHECK: u16 = Command::Check.bit();
const PAGE_SERVER_CMD: u16 = Command::PageServer.bit();
const LAZY: u16 = Command::LazyPages.bit();
const SERVICE: u16 = Command::Service.bit() | Command::Swrk.bit();
const CPUINFO: u16 = Command::Cpuinfo.bit();
const DEDUP: u16 = Command::Dedup.bit();
const BOTH: u16 = DUMP | RESTORE;
const DUMPS: u16 = DUMP | PRE_DUMP;
const SERVERS: u16 = PAGE_SERVER_CMD | LAZY | SERVICE;
const PAGES_MOVE: u16 = DUMPS | PAGE_SERVER_CMD | LAZY;

/// The features that `--feature` can name, in the order in which they are listed.
pub static FEATURES: &[&str] = &[
    "mnt_id",
    "mem_dirty_track",
    "aio_remap",
    "timerfd",
    "tun",
    "tun_ns",
    "userns",
    "fdinfo_lock",
    "seccomp_suspend",
    "seccomp_filters",
    "loginuid",
    "cgroupns",
    "autofs",
    "tcp_half_closed",
    "compat_cr",
    "uffd",
    "uffd-noncoop",
    "can_map_vdso",
    "sk_ns",
    "sk_unix_file",
    "net_diag_raw",
    "nsid",
    "link_nsid",
    "kcmp_epoll",
    "timens",
    "external_net_ns",
    "clone3_set_tid",
    "newifindex",
    "nftables",
    "has_ipt_legacy",
    "pidfd_store",
    "ns_pid",
    "apparmor_stacking",
    "network_lock_nftables",
    "sockopt_buf_lock",
    "memfd_hugetlb",
    "move_mount_set_group",
    "openat2",
    "get_rseq_conf",
    "ipv6_freebind",
    "pagemap_scan",
    "timer_cr_ids",
    "overlayfs_maps",
    "breakpoints",
    "pagemap_scan_guard_pages",
];

macro_rules! specs {
    ($($name:ident = $spec:expr;)*) => {
        $(pub static $name: OptionSpec = $spec;)*
        pub static OPTIONS: &[&OptionSpec] = &[$(&$name),*];
    };
}

/// A setter that stores whether the flag is on.
macro_rules! store {
    ($($field:ident).+) => {
        |options, given| {
            options.$($field).+ = given.on;
            Ok(())
        }
    };
}

use OptionSpec as Row;

specs! {
    // ------------------------------------------------------------------------------- general
    HELP = Row::flag("help").short('h').help("print this text").early();
    VERSION = Row::flag("version").short('V').help("print the version").early();
    TREE = Row::required("tree", "PID").short('t').of(DUMPS)
        .help("root of the process tree")
        .sets(|options, given| {
            let pid: i32 = number(given)?;
            if pid <= 0 {
                return Err("a pid is greater than 0".into());
            }
            options.tree = Some(pid);
            Ok(())
        });
    IMAGES_DIR = Row::required("images-dir", "DIR").short('D').default(".")
        .help("directory of the images")
        .sets(|options, given| {
            options.images_dir = path(given)?;
            Ok(())
        });
    WORK_DIR = Row::required("work-dir", "DIR").short('W')
        .help("directory for log, statistics and pid file instead of the images directory")
        .sets(|options, given| {
            options.work_dir = path(given)?;
            Ok(())
        });
    RESTORE_DETACHED = Row::flag("restore-detached").aliases(&["daemon"]).short('d').negatable()
        .of(RESTORE | SERVERS)
        .help("leave once the tree runs; a server goes to the background")
        .sets(store!(restore_detached));
    RESTORE_SIBLING = Row::flag("restore-sibling").short('S').negatable().of(RESTORE)
        .help("the tree becomes a child of the program that started the restore (with -d)")
        .sets(store!(restore_sibling));
    LEAVE_STOPPED = Row::flag("leave-stopped").short('s').of(BOTH)
        .help("leave the tree stopped at the end, instead of ended or running")
        .sets(|options, _| {
            (options.leave_stopped, options.leave_running) = (true, false);
            Ok(())
        });
    LEAVE_RUNNING = Row::flag("leave-running").short('R').of(DUMP)
        .help("let the tree run on after the dump")
        .sets(|options, _| {
            (options.leave_stopped, options.leave_running) = (false, true);
            Ok(())
        });
    PREV_IMAGES_DIR = Row::required("prev-images-dir", "DIR").of(DUMPS | PAGE_SERVER_CMD)
        .help("images of an earlier dump that hold the unchanged memory, relative to -D")
        .sets(|options, given| {
            options.prev_images_dir = Some(path(given)?);
            Ok(())
        });
    PIDFILE = Row::required("pidfile", "FILE").of(RESTORE | SERVERS)
        .help("write the pid of the restored root, or of the server, to a new file")
        .sets(|options, given| {
            options.pidfile = Some(path(given)?);
            Ok(())
        });
    LOG_FILE = Row::required("log-file", "FILE").short('o')
        .help("write the log to a file in the work directory; - is standard output")
        .sets(|options, given| {
            options.log_file = Some(path(given)?);
            Ok(())
        });
    VERBOSITY = Row::optional("verbosity", "LEVEL").short('v').default("2")
        .help("more to log: -v, -vv, or a level: 0 nothing, 1 errors, 2 warnings, 3 steps, 4 everything")
        .sets(verbosity);
    LOG_PID = Row::flag("log-pid").negatable().of(RESTORE)
        .help("one log for each restored process, named after its pid");
    CONFIG = Row::required("config", "FILE")
        .help("read options from a file, and not from the default files").early();
    NO_DEFAULT_CONFIG = Row::flag("no-default-config")
        .help("do not read the default configuration files").early();
    CLOSE = Row::required("close", "FD").repeatable()
        .help("close an inherited descriptor before anything else")
        .sets(|options, given| {
            let fd: i32 = number(given)?;
            if fd < 0 {
                return Err("a descriptor is not negative".into());
            }
            options.close.push(fd);
            Ok(())
        });
    LIBDIR = Row::required("libdir", "DIR").short('L').of(BOTH)
        .help("directory of plugins");
    ACTION_SCRIPT = Row::required("action-script", "COMMAND").repeatable()
        .help("run a shell command at each step of the work; the one given last runs first")
        .sets(|options, given| {
            options.action_scripts.push(text(given)?.to_owned());
            Ok(())
        });
    DISPLAY_STATS = Row::flag("display-stats").negatable().of(BOTH | PRE_DUMP)
        .help("print times and counts at the end")
        .sets(store!(display_stats));
    STREAM = Row::flag("stream").negatable().of(BOTH | PRE_DUMP | CPUINFO)
        .help("write images to, or read them from, a streaming program");
    UNPRIVILEGED = Row::flag("unprivileged").negatable()
        .help("work with CAP_CHECKPOINT_RESTORE only");
    // CRIU gates old behaviours with it. There are none here, so it changes nothing.
    DEPRECATED = Row::flag("deprecated").negatable()
        .help("accepted for compatibility; changes nothing")
        .sets(|_, _| Ok(()));
    TIMEOUT = Row::required("timeout", "SECONDS").default("10").of(DUMPS)
        .help("give up when the tree cannot be stopped in this time")
        .sets(|options, given| {
            options.timeout_s = number(given)?;
            Ok(())
        });
    CPU_CAP = Row::optional("cpu-cap", "LIST").default("fpu,ins").of(BOTH | CPUINFO)
        .help("what of the processor must be the same: none, fpu, cpu, ins, all; ^ takes one away")
        .sets(cpu_cap);
    EVASIVE_DEVICES = Row::flag("evasive-devices").negatable().of(BOTH)
        .help("accept another path to the same device");
    MS = Row::flag("ms").of(CHECK).removed("the checks it left out are gone");
    DRY_RUN = Row::flag("dry-run").of(RESTORE).own()
        .help("print what would be done, in order, and do nothing")
        .sets(store!(dry_run));
    COPY_ON_WRITE = Row::flag("copy-on-write").negatable().section(Section::Memory).of(DUMPS).own()
        .help("let the tree run on while its memory is read from copies; so by default, unless a script is told the steps")
        .sets(|options, given| {
            options.copy_on_write = Some(given.on);
            Ok(())
        });
    PRE_COPY = Row::flag("pre-copy").negatable().section(Section::Memory).of(DUMP).own()
        .help("save memory while the tree runs, then what it changed; so by default of much that is to run on")
        .sets(|options, given| {
            options.pre_copy = Some(given.on);
            Ok(())
        });
    COMPRESS = Row::optional("compress", "HOW").section(Section::Memory).of(DUMPS | PAGE_SERVER_CMD).own()
        .help("compress pages in blocks, by lz4 (if nothing is said) or zstd; CRIU cannot read that")
        .sets(|options, given| {
            options.compress = Some(match given.value {
                None => Compression::Lz4,
                Some(_) => {
                    let name = text(given)?;
                    let found = Compression::ALL.into_iter().find(|how| how.name() == name);
                    found.ok_or("must be lz4 or zstd")?
                }
            });
            Ok(())
        });
    SHARE_PAGES = Row::flag("share-pages").negatable().section(Section::Memory).of(DUMPS).own()
        .help("store pages once that relatives share, if they are many; so by default. CRIU cannot read that")
        .sets(store!(share_pages));
    SECRET_MEMORY = Row::flag("secret-memory").section(Section::Memory).of(DUMPS).own()
        .help("store the content of memfd_secret(2), which nobody else is to read, in the images")
        .sets(store!(secret_memory));
    RECORD_WORKING_SET = Row::flag("record-working-set").section(Section::Memory).of(RESTORE).own()
        .help("note in the images what is touched first; the next lazy restore gives that first")
        .sets(store!(record_working_set));
    PROGRESS = Row::required("progress", "WHEN").default("auto").own().of(BOTH)
        .help("draw progress: auto (on a terminal, when it takes long), always, never")
        .sets(|options, given| {
            options.progress_mode = match text(given)? {
                "auto" => ProgressMode::Auto,
                "always" => ProgressMode::Always,
                "never" => ProgressMode::Never,
                _ => return Err("must be auto, always or never".into()),
            };
            Ok(())
        });

    // ---------------------------------------------------------------------- files and mounts
    ROOT = Row::required("root", "PATH").short('r').section(Section::Files).of(BOTH)
        .help("root of the restored mount namespace; must be a mount point")
        .sets(|options, given| {
            options.root = Some(path(given)?);
            Ok(())
        });
    EXTERNAL = Row::required("external", "RESOURCE").repeatable().section(Section::Files).of(BOTH)
        .help("a resource from outside of the tree, by its key; for now unix[INODE], tty[RDEV:DEV], file[MOUNT:INODE]")
        .sets(|options, given| {
            let key = text(given)?;
            let (kind, rest) = key.split_once('[').unwrap_or_default();
            let inside = rest.strip_suffix(']').unwrap_or_default();
            let is_hex = |number: &str| u64::from_str_radix(number, 16).is_ok();
            let is_pair = inside.split_once(':').is_some_and(|(one, other)| is_hex(one) && is_hex(other));
            match kind {
                "unix" if inside.parse::<u32>().is_ok() => {}
                "unix" => return Err("is unix[] without the number of an inode".into()),
                "tty" | "file" if is_pair => {}
                "tty" => return Err("is not tty[RDEV:DEV] with two hexadecimal numbers of devices".into()),
                "file" => return Err("is not file[MOUNT:INODE] with two hexadecimal numbers".into()),
                "dev" | "mnt" | "net" | "pid" | "veth" | "macvlan" | "netdev" => {
                    let why = "is of a namespace of the tree's own, and such trees are not carried yet; a tree that \
                        shares those of the tool needs no such option";
                    return Err(why.into());
                }
                _ => return Err("only unix[INODE], tty[RDEV:DEV] and file[MOUNT:INODE] are known".into()),
            }
            options.external.push(key.to_owned());
            Ok(())
        });
    INHERIT_FD = Row::required("inherit-fd", "fd[N]:KEY").repeatable().section(Section::Files)
        .of(RESTORE).help("our descriptor N for KEY: socket:[INODE], pipe:[INODE], tty[RDEV:DEV], file[MOUNT:INODE], path without /")
        .sets(|options, given| {
            let (fd, key) = text(given)?.split_once("]:").ok_or("is not fd[N]:KEY")?;
            let fd = fd.strip_prefix("fd[").and_then(|fd| fd.parse().ok()).ok_or("is not fd[N]:KEY")?;
            if key.is_empty() {
                return Err("is fd[N]: without a key".into());
            }
            options.inherit_fd.push((fd, key.to_owned()));
            Ok(())
        });
    EXT_MOUNT_MAP = Row::required("ext-mount-map", "KEY:VALUE").short('M').repeatable()
        .section(Section::Files).of(BOTH).help("older spelling of external mounts");
    ENABLE_EXTERNAL_SHARING = Row::flag("enable-external-sharing").section(Section::Files).of(DUMP)
        .help("older spelling of external mounts that share");
    ENABLE_EXTERNAL_MASTERS = Row::flag("enable-external-masters").section(Section::Files).of(DUMP)
        .help("older spelling of external mounts that follow a master");
    SKIP_MNT = Row::required("skip-mnt", "PATH").repeatable().section(Section::Files).of(DUMP)
        .help("leave a mount out");
    ENABLE_FS = Row::required("enable-fs", "LIST").section(Section::Files).of(BOTH)
        .help("file systems to mount anew although they are not known, or all");
    MNTNS_COMPAT_MODE = Row::flag("mntns-compat-mode").negatable().section(Section::Files).of(RESTORE)
        .help("restore mounts in the order of older kernels");
    LINK_REMAP = Row::flag("link-remap").negatable().section(Section::Files).of(BOTH)
        .help("make hard links for files that are open under a name that is gone")
        .sets(store!(link_remap));
    GHOST_LIMIT = Row::required("ghost-limit", "SIZE").default("1M").section(Section::Files).of(DUMP)
        .help("largest removed file whose content goes to the images, in bytes allocated; K, M, G")
        .sets(|options, given| {
            options.ghost_limit = size(text(given)?)?;
            Ok(())
        });
    GHOST_FIEMAP = Row::flag("ghost-fiemap").negatable().section(Section::Files).of(DUMP)
        .help("accepted for compatibility; holes of removed files are always found and kept")
        .sets(|_, _| Ok(()));
    FORCE_IRMAP = Row::flag("force-irmap").negatable().section(Section::Files).of(DUMPS)
        .help("search the file system for the paths of watched files")
        .sets(store!(force_irmap));
    IRMAP_SCAN_PATH = Row::required("irmap-scan-path", "PATH").repeatable().section(Section::Files)
        .of(DUMPS).help("one more directory to search for watched files")
        .sets(|options, given| {
            options.irmap_scan_paths.push(path(given)?);
            Ok(())
        });
    FILE_LOCKS = Row::flag("file-locks").short('l').negatable().section(Section::Files).of(BOTH)
        .help("carry file locks, whose owners must all be in the tree")
        .sets(store!(file_locks));
    FILE_VALIDATION = Row::required("file-validation", "HOW").default("buildid").section(Section::Files)
        .of(BOTH).help("compare reopened files by filesize, or by buildid where there is one")
        .sets(|options, given| {
            options.file_validation = match text(given)? {
                "filesize" => FileValidation::Filesize,
                "buildid" => FileValidation::Buildid,
                _ => return Err("must be filesize or buildid".into()),
            };
            Ok(())
        });
    SKIP_FILE_RWX_CHECK = Row::flag("skip-file-rwx-check").negatable().section(Section::Files)
        .of(RESTORE).help("accept reopened files whose permissions have changed")
        .sets(store!(skip_file_rwx_check));
    LSM_PROFILE = Row::required("lsm-profile", "TYPE:NAME").section(Section::Files).of(RESTORE)
        .help("security profile instead of the dumped one (apparmor or selinux)");
    LSM_MOUNT_CONTEXT = Row::required("lsm-mount-context", "CONTEXT").section(Section::Files).of(RESTORE)
        .help("security context for mounts that had one");

    // -------------------------------------------------------------------- sockets and network
    EXT_UNIX_SK = Row::optional("ext-unix-sk", "INODES").short('x').section(Section::Network).of(BOTH)
        .help("let UNIX datagram sockets be connected to peers outside of the tree")
        .sets(|options, given| {
            let inodes = match given.value {
                None => Vec::new(),
                Some(_) => text(given)?
                    .split(',')
                    .map(|inode| inode.parse().map_err(|_| format!("{inode} is no inode")))
                    .collect::<Result<Vec<u32>, String>>()?,
            };
            options.ext_unix_sk.get_or_insert_default().extend(inodes);
            Ok(())
        });
    TCP_ESTABLISHED = Row::flag("tcp-established").negatable().section(Section::Network).of(BOTH)
        .help("carry live TCP connections");
    TCP_CLOSE = Row::flag("tcp-close").negatable().section(Section::Network).of(BOTH)
        .help("restore TCP connections as closed ones");
    SKIP_IN_FLIGHT = Row::flag("skip-in-flight").negatable().section(Section::Network).of(BOTH)
        .help("forget TCP connections that were not accepted yet");
    VETH_PAIR = Row::required("veth-pair", "IN=OUT").repeatable().section(Section::Network).of(RESTORE)
        .help("name of the outer end of a pair of network devices");
    EMPTY_NS = Row::required("empty-ns", "net").section(Section::Network).of(BOTH)
        .help("make the network namespace without its content");
    JOIN_NS = Row::required("join-ns", "NS:PID|PATH").short('J').repeatable().section(Section::Network)
        .of(RESTORE).help("restore into a namespace that exists");
    NETWORK_LOCK = Row::required("network-lock", "METHOD").default("iptables").section(Section::Network)
        .of(DUMP).help("how connections are kept silent: iptables, nftables, skip or none")
        .sets(|options, given| {
            options.network_lock = match text(given)? {
                "iptables" => NetworkLock::Iptables,
                "nftables" => NetworkLock::Nftables,
                "skip" | "none" => NetworkLock::Skip,
                _ => return Err("must be iptables, nftables, skip or none".into()),
            };
            Ok(())
        });
    WEAK_SYSCTLS = Row::flag("weak-sysctls").negatable().section(Section::Network).of(RESTORE)
        .help("pass over kernel settings that do not exist here");

    // --------------------------------------------------------------------------- control groups
    MANAGE_CGROUPS = Row::optional("manage-cgroups", "MODE").default("ignore").section(Section::Cgroups)
        .of(BOTH)
        .help("what to do about control groups; only ignore and none for now")
        .sets(|options, given| {
            options.manage_cgroups = match given.value.map(|_| text(given)).transpose()? {
                Some("ignore") => ManageCgroups::Ignore,
                Some("none") => ManageCgroups::None,
                None | Some("soft" | "props" | "full" | "strict") => {
                    return Err("control groups are not carried yet: only ignore and none".into());
                }
                Some(_) => return Err("must be none, props, soft, full, strict or ignore".into()),
            };
            Ok(())
        });
    CGROUP_ROOT = Row::required("cgroup-root", "[CONTROLLER:]/PATH").repeatable()
        .section(Section::Cgroups).of(BOTH).help("where the groups of the tree begin");
    CGROUP_PROPS = Row::required("cgroup-props", "TEXT").section(Section::Cgroups).of(DUMP)
        .help("which settings of groups are carried");
    CGROUP_PROPS_FILE = Row::required("cgroup-props-file", "FILE").section(Section::Cgroups).of(DUMP)
        .help("a file that says which settings of groups are carried");
    CGROUP_DUMP_CONTROLLER = Row::required("cgroup-dump-controller", "NAME").repeatable()
        .section(Section::Cgroups).of(DUMP).help("carry the groups of this controller only");
    CGROUP_YARD = Row::required("cgroup-yard", "PATH").section(Section::Cgroups).of(BOTH)
        .help("where the control group file systems are mounted");
    FREEZE_CGROUP = Row::required("freeze-cgroup", "PATH").section(Section::Cgroups).of(DUMPS)
        .help("stop the tree by freezing this group");

    // ----------------------------------------------------------------- memory and page transfer
    TRACK_MEM = Row::flag("track-mem").negatable().section(Section::Memory).of(DUMPS)
        .help("from now on, note which memory changes, for the next dump with --prev-images-dir")
        .sets(store!(track_mem));
    AUTO_DEDUP = Row::flag("auto-dedup").negatable().section(Section::Memory)
        .of(BOTH | PRE_DUMP | PAGE_SERVER_CMD | DEDUP)
        .help("dump: free pages in parent images that newer ones have; restore: free all, when the tree has them")
        .sets(store!(auto_dedup));
    PRE_DUMP_MODE = Row::required("pre-dump-mode", "MODE").default("splice").section(Section::Memory)
        .of(PRE_DUMP)
        .help("splice or read, the two ways of CRIU; here memory is taken in one way, from copies")
        .sets(|_, given| match text(given)? {
            "splice" | "read" => Ok(()),
            _ => Err("must be splice or read".into()),
        });
    LAZY_PAGES = Row::flag("lazy-pages").section(Section::Memory).of(BOTH | PAGE_SERVER_CMD)
        .help("dump: keep memory until it is asked for; restore: memory comes when it is touched, and meanwhile")
        .sets(store!(lazy_pages));
    PAGE_SERVER = Row::flag("page-server").negatable().section(Section::Memory).of(PAGES_MOVE | RESTORE)
        .help("dump: send memory to a page server; lazy-pages, restore: get it from a dump with --lazy-pages")
        .sets(store!(page_server));
    ADDRESS = Row::required("address", "HOST").section(Section::Memory).of(PAGES_MOVE | SERVERS | RESTORE)
        .help("address of the page server or of the dump that keeps memory, or path of the socket of the service")
        .sets(|options, given| {
            options.address = Some(text(given)?.to_owned());
            Ok(())
        });
    PORT = Row::required("port", "NUMBER").section(Section::Memory).of(PAGES_MOVE | RESTORE)
        .help("port of the page server or of the dump that keeps memory")
        .sets(|options, given| {
            options.port = Some(number(given)?);
            Ok(())
        });
    PS_SOCKET = Row::required("ps-socket", "FD").section(Section::Memory).of(PAGES_MOVE | RESTORE)
        .help("an inherited, connected socket for pages")
        .sets(|options, given| {
            options.ps_socket = Some(number(given)?);
            Ok(())
        });
    STATUS_FD = Row::required("status-fd", "FD").section(Section::Memory).of(DUMP | SERVERS)
        .help("write a zero byte to this descriptor when the server is ready")
        .sets(|options, given| {
            options.status_fd = Some(number(given)?);
            Ok(())
        });
    ALLOW_UPROBES = Row::flag("allow-uprobes").negatable().section(Section::Memory).of(BOTH)
        .help("accept the mapping that a user-space probe leaves behind");
    TLS = Row::flag("tls").negatable().section(Section::Memory).of(PAGES_MOVE | RESTORE)
        .help("encrypt page transfer; both ends show a certificate")
        .sets(store!(tls));
    TLS_CACERT = Row::required("tls-cacert", "FILE").default("/etc/pki/CA/cacert.pem")
        .section(Section::Memory).of(PAGES_MOVE | RESTORE).help("certificates of authorities that are trusted")
        .sets(|options, given| {
            options.tls_cacert = path(given)?;
            Ok(())
        });
    TLS_CACRL = Row::required("tls-cacrl", "FILE").default("/etc/pki/CA/cacrl.pem")
        .section(Section::Memory).of(PAGES_MOVE | RESTORE).help("certificates that are revoked; that file may be missing")
        .sets(|options, given| {
            options.tls_cacrl = path(given)?;
            Ok(())
        });
    TLS_CERT = Row::required("tls-cert", "FILE").default("/etc/pki/criu/cert.pem")
        .section(Section::Memory).of(PAGES_MOVE | RESTORE).help("our certificate")
        .sets(|options, given| {
            options.tls_cert = path(given)?;
            Ok(())
        });
    TLS_KEY = Row::required("tls-key", "FILE").default("/etc/pki/criu/private/key.pem")
        .section(Section::Memory).of(PAGES_MOVE | RESTORE).help("our private key")
        .sets(|options, given| {
            options.tls_key = path(given)?;
            Ok(())
        });
    TLS_NO_CN_VERIFY = Row::flag("tls-no-cn-verify").section(Section::Memory).of(PAGES_MOVE | RESTORE)
        .help("do not compare the name in the certificate with the address")
        .sets(store!(tls_no_cn_verify));

    // --------------------------------------------------------------------------------- sessions
    SHELL_JOB = Row::flag("shell-job").short('j').negatable().section(Section::Session).of(BOTH)
        .help("the tree is a job of a shell: its session and terminal stay outside (on both sides)")
        .sets(store!(shell_job));
    EXEC_CMD = Row::flag("exec-cmd").section(Section::Session).of(RESTORE)
        .help("when the tree runs, become the program after --");

    // ------------------------------------------------------------------------------------ check
    EXTRA = Row::flag("extra").negatable().section(Section::Check).of(CHECK)
        .help("also ask for what only some trees need")
        .sets(store!(check.extra));
    EXPERIMENTAL = Row::flag("experimental").negatable().section(Section::Check).of(CHECK)
        .help("also ask for what is not settled in the kernel")
        .sets(store!(check.experimental));
    ALL = Row::flag("all").section(Section::Check).of(CHECK)
        .help("--extra and --experimental")
        .sets(|options, _| {
            options.check.extra = true;
            options.check.experimental = true;
            Ok(())
        });
    FEATURE = Row::required("feature", "NAME").repeatable().section(Section::Check).of(CHECK)
        .help("ask for one feature only")
        .sets(|options, given| {
            let name = text(given)?;
            if !FEATURES.contains(&name) {
                return Err("no such feature; --help lists them".into());
            }
            options.check.features.push(name.to_owned());
            Ok(())
        });
}

fn text<'a>(given: &Given<'a>) -> Result<&'a str, String> {
    let value = given.value.ok_or("needs a value")?;
    value.to_str().ok_or_else(|| "is not valid UTF-8".into())
}

fn path(given: &Given<'_>) -> Result<PathBuf, String> {
    match given.value {
        Some(value) if !value.is_empty() => Ok(PathBuf::from(value)),
        _ => Err("needs a path".into()),
    }
}

fn number<T: std::str::FromStr>(given: &Given<'_>) -> Result<T, String> {
    text(given)?.parse().map_err(|_| "is not a number that fits".into())
}

/// Bytes, with a K, M or G for powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last().map(|last| last.to_ascii_uppercase()) {
        Some('K') => (&text[..text.len() - 1], 10),
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    number.ok_or_else(|| format!("{text} is no size"))
}

/// `-v` adds one, `-vv` two, `-vN` and `--verbosity=N` set.
fn verbosity(options: &mut Options, given: &Given<'_>) -> Result<(), String> {
    const HIGHEST: u8 = 4;
    let level = match given.value.map(|_| text(given)).transpose()? {
        None => options.log_level.saturating_add(1),
        // In `-vvv` the first letter is the option and the others are what is glued to it.
        Some(glued) if !glued.is_empty() && glued.bytes().all(|byte| byte == b'v') => {
            options.log_level.saturating_add(1).saturating_add(glued.len().min(9) as u8)
        }
        Some(level) => level.parse().map_err(|_| "is not a level from 0 to 4")?,
    };
    options.log_level = level.min(HIGHEST);
    Ok(())
}

fn cpu_cap(options: &mut Options, given: &Given<'_>) -> Result<(), String> {
    const ALL_BITS: u32 = CpuCap::FPU | CpuCap::CPU | CpuCap::INS;
    let Some(_) = given.value else {
        options.cpu_cap = CpuCap(ALL_BITS | CpuCap::IMAGE);
        return Ok(());
    };
    let mut bits = 0;
    for word in text(given)?.split(',') {
        let (on, name) = match word.strip_prefix('^') {
            Some(name) => (false, name),
            None => (true, word),
        };
        let mask = match name {
            "none" => {
                bits = 0;
                continue;
            }
            "fpu" => CpuCap::FPU,
            "cpu" => CpuCap::CPU,
            "ins" => CpuCap::INS,
            "all" => ALL_BITS,
            _ => return Err("must be a list of none, fpu, cpu, ins, all".into()),
        };
        if on {
            bits |= mask;
        } else {
            bits &= !mask;
        }
    }
    options.cpu_cap = CpuCap(bits | CpuCap::IMAGE);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::ffi::OsStr;

    fn set(spec: &OptionSpec, value: Option<&str>) -> Result<Options, String> {
        let mut options = Options::default();
        let Support::Yes(setter) = spec.support else { panic!("--{} sets nothing", spec.long) };
        setter(&mut options, &Given { on: true, value: value.map(OsStr::new) }).map(|()| options)
    }

    #[test]
    fn names_and_letters_are_used_once() {
        let mut names = HashSet::new();
        let mut letters = HashSet::new();
        for spec in OPTIONS {
            for name in spec.aliases.iter().chain([&spec.long]) {
                assert!(names.insert(name.to_string()), "--{name} twice");
                if spec.negatable {
                    assert!(names.insert(format!("no-{name}")), "--no-{name} twice");
                }
            }
            if let Some(letter) = spec.short {
                assert!(letters.insert(letter), "-{letter} twice");
            }
        }
    }

    #[test]
    fn what_is_outside_of_other_namespaces_is_refused_with_a_reason() {
        let spec = OPTIONS.iter().find(|spec| spec.long == "external").expect("--external");
        for key in
            ["dev[8/1]:disk", "dev[disk]:/dev/sda1", "mnt[/data]:data", "mnt[]", "net[4026531840]:host"]
        {
            let why = set(spec, Some(key)).expect_err("it is refused");
            assert!(why.contains("namespace") && why.contains("not carried yet"), "{key}: {why}");
        }
        assert_eq!(set(spec, Some("unix[5]")).expect("it is known").external, ["unix[5]"]);
    }

    #[test]
    fn every_option_is_explained_in_one_sentence() {
        for spec in OPTIONS {
            assert!(!spec.help.is_empty() || matches!(spec.support, Support::Removed(_)), "--{}", spec.long);
            assert!(!spec.help.ends_with('.'), "--{}", spec.long);
            assert!(!spec.negatable || spec.value == ValueKind::Flag, "--{}", spec.long);
            assert!(spec.help.len() <= 110, "--{}: {}", spec.long, spec.help.len());
        }
    }

    #[test]
    fn the_documented_default_is_the_real_one() {
        for spec in OPTIONS {
            // Any use of --cpu-cap also asks for cpuinfo.img, so saying the default is not the default.
            if let (Some(value), Support::Yes(_)) = (spec.default, spec.support)
                && !std::ptr::eq(*spec, &CPU_CAP)
            {
                let given = format!("{:?}", set(spec, Some(value)).unwrap());
                assert_eq!(given, format!("{:?}", Options::default()), "--{}", spec.long);
            }
        }
    }

    #[test]
    fn each_v_adds_one_and_a_number_sets() {
        for (value, level) in
            [(None, 3), (Some("v"), 4), (Some("vvvvv"), 4), (Some("0"), 0), (Some("4"), 4), (Some("9"), 4)]
        {
            assert_eq!(set(&VERBOSITY, value).unwrap().log_level, level, "{value:?}");
        }
        assert!(set(&VERBOSITY, Some("loud")).is_err());
    }

    #[test]
    fn processor_abilities_are_added_and_taken_away_in_order() {
        for (value, bits) in [
            (None, 7),
            (Some("none"), 0),
            (Some("fpu"), 1),
            (Some("cpu,ins"), 6),
            (Some("all,^fpu"), 6),
            (Some("fpu,none"), 0),
        ] {
            assert_eq!(set(&CPU_CAP, value).unwrap().cpu_cap, CpuCap(bits | CpuCap::IMAGE), "{value:?}");
        }
        assert!(set(&CPU_CAP, Some("gpu")).is_err());
    }

    #[test]
    fn values_that_make_no_sense_are_refused() {
        for (spec, value) in [
            (&TREE, "0"),
            (&TREE, "-5"),
            (&TREE, "99999999999"),
            (&TREE, "12x"),
            (&TIMEOUT, "-1"),
            (&CLOSE, "-1"),
            (&FILE_VALIDATION, "sha256"),
            (&NETWORK_LOCK, "ebpf"),
            (&MANAGE_CGROUPS, "soft"),
            (&MANAGE_CGROUPS, "lenient"),
            (&PROGRESS, "sometimes"),
            (&FEATURE, "list"),
            (&IMAGES_DIR, ""),
        ] {
            assert!(set(spec, Some(value)).is_err(), "--{} {value}", spec.long);
        }
    }
}
