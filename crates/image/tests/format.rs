//! Every message and enum that this workspace declares agrees with the table of the format.
//!
//! `format.tsv` holds the facts: the image format of CRIU 4.2. Derived messages cannot be asked for their
//! own fields, so the declarations themselves are read: whatever in `crates/*/src` derives
//! `prost::Message` or `prost::Enumeration`, and every kind of file that claims a field of `files.img`.

use crtools_image::{FileEntry, FownEntry, Message};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use syn::punctuated::Punctuated;
use syn::{Expr, ImplItem, Item, Lit, Meta, Token, Type};

/// From here up numbers are ours.
const FIRST_OWN: u32 = 1000;

/// Messages that CRIU does not have.
const OWN_MESSAGES: &[&str] = &[
    "InotifyEventEntry",
    "IoUringEntry",
    "RegisteredRing",
    "RingBuffers",
    "SecretEntry",
    "UnixCredEntry",
    "WorkingSetEntry",
    "XstateComponent",
];

/// Values that CRIU does not have, in enums that it has.
const OWN_VALUES: &[(&str, &str, u32)] = &[("FdTypes", "iouring", 1000), ("FdTypes", "secret", 1001)];

/// Fields of `files.img` that CRIU does not have.
const OWN_KINDS: &[(u32, &str)] = &[(1000, "iouringentry"), (1001, "secretentry")];

/// Fields that CRIU does not have, in messages that it has.
const OWN_FIELDS: &[(&str, &str, u32)] = &[
    ("EventfdFileEntry", "semaphore", 1000),
    ("EventpollTfdEntry", "at", 1000),
    ("EventpollTfdEntry", "taken", 1001),
    ("FanotifyMarkEntry", "filesystem", 1000),
    ("FhEntry", "file", 1000),
    ("GhostFileEntry", "atim_nsec", 1000),
    ("GhostFileEntry", "mtim_nsec", 1001),
    ("IpcShmEntry", "content", 1000),
    ("FanotifyFileEntry", "lost", 1000),
    ("InotifyFileEntry", "lost", 1000),
    ("InotifyFileEntry", "unread", 1001),
    ("MmEntry", "locks_future", 1001),
    ("MmEntry", "mdwe", 1002),
    ("MmEntry", "merges", 1003),
    ("MmEntry", "thp_flags", 1004),
    ("MmEntry", "whole_auxv", 1000),
    ("NetlinkSkEntry", "options", 1001),
    ("NetlinkSkEntry", "type", 1000),
    ("PagemapEntry", "same_as", 1000),
    ("PipeDataEntry", "packets", 1000),
    ("PosixTimerEntry", "pending_overrun", 1000),
    ("RemapFilePathEntry", "handle", 1000),
    ("SkOptsEntry", "others", 1000),
    ("SkPacketEntry", "from", 1000),
    ("SkPacketEntry", "sender", 1001),
    ("TaskCoreEntry", "exit_signal", 1000),
    ("TaskCoreEntry", "has_no_terminal", 1001),
    ("ThreadCoreEntry", "affinity", 1000),
    ("ThreadCoreEntry", "numa_mode", 1002),
    ("ThreadCoreEntry", "numa_nodes", 1003),
    ("ThreadCoreEntry", "registered_rings", 1004),
    ("ThreadCoreEntry", "restart", 1005),
    ("ThreadCoreEntry", "timer_slack", 1001),
    ("TtyInfoEntry", "has_hung_up", 1000),
    ("TtyInfoEntry", "lines", 1002),
    ("TtyInfoEntry", "mode", 1001),
    ("TtyInfoEntry", "is_stopped_by_call", 1005),
    ("TtyInfoEntry", "is_stopped_by_character", 1004),
    ("TtyInfoEntry", "typed", 1003),
    ("UnixSkEntry", "elsewhere", 1003),
    ("UnixSkEntry", "own_cred", 1001),
    ("UnixSkEntry", "peek_offset", 1002),
    ("UnixSkEntry", "peer_cred", 1000),
    ("TunfileEntry", "device_flags", 1002),
    ("TunfileEntry", "flags", 1000),
    ("TunfileEntry", "fown", 1001),
    ("TunfileEntry", "link_flags", 1007),
    ("TunfileEntry", "mac", 1005),
    ("TunfileEntry", "mtu", 1006),
    ("TunfileEntry", "sndbuf", 1004),
    ("TunfileEntry", "vnethdr", 1003),
    ("UserX86XsaveEntry", "other", 1000),
    ("VmaEntry", "anon_name", 1001),
    ("VmaEntry", "is_io_uring", 1003),
    ("VmaEntry", "is_locked_on_fault", 1002),
    ("VmaEntry", "is_sealed", 1000),
    ("VmaEntry", "numa_mode", 1004),
    ("VmaEntry", "numa_nodes", 1005),
];

#[derive(Debug, Clone, PartialEq, Eq)]
struct Field {
    name: String,
    number: u32,
    label: String,
    /// Of the wire format, or the plain name of a message or enum.
    kind: String,
    /// Repeated numbers only.
    is_packed: bool,
}

/// Messages and enums by plain name; an enum's values are fields without label and type.
type Table = BTreeMap<String, Vec<Field>>;

/// A name in the spelling that `task_core_entry` and `TaskCoreEntry` share.
fn plain(name: &str) -> String {
    name.chars().filter(|letter| !"_.".contains(*letter)).flat_map(char::to_lowercase).collect()
}

fn is_scalar(kind: &str) -> bool {
    const SCALARS: [&str; 10] =
        ["uint32", "uint64", "int32", "int64", "sint32", "sint64", "bool", "fixed64", "bytes", "string"];
    SCALARS.contains(&kind)
}

fn format() -> Table {
    let mut table = Table::new();
    for line in include_str!("format.tsv").lines().filter(|line| !line.starts_with('#')) {
        let columns: Vec<&str> = line.split('\t').collect();
        let [owner, name, number, label, kind, packed] = columns[..] else { panic!("{line}") };
        table.entry(plain(owner)).or_default().push(Field {
            name: name.to_owned(),
            number: number.parse().expect(line),
            label: label.to_owned(),
            kind: if is_scalar(kind) { kind.to_owned() } else { plain(kind) },
            is_packed: !matches!(packed, "-" | "no"),
        });
    }
    table
}

/// What one run over the sources found.
#[derive(Default)]
struct Declared {
    messages: Vec<(String, Vec<Field>)>,
    enums: Vec<(String, Vec<Field>)>,
    /// Kinds of file: field of `files.img`, record.
    kinds: Vec<(u32, String)>,
}

fn derives(item: &[syn::Attribute], what: &str) -> bool {
    item.iter().filter(|attribute| attribute.path().is_ident("derive")).any(|attribute| {
        let paths = attribute.parse_args_with(Punctuated::<syn::Path, Token![,]>::parse_terminated);
        paths.expect("a list of traits").iter().any(|path| {
            path.segments.first().is_some_and(|first| first.ident == "prost")
                && path.segments.last().is_some_and(|last| last.ident == what)
        })
    })
}

fn text(value: &Expr) -> String {
    match value {
        Expr::Lit(literal) => match &literal.lit {
            Lit::Str(text) => text.value(),
            Lit::Int(number) => number.base10_digits().to_owned(),
            _ => panic!("neither text nor number"),
        },
        _ => panic!("no literal"),
    }
}

/// `T` of `Option<T>`, `Vec<T>` or `T`.
fn innermost(kind: &Type) -> String {
    let Type::Path(path) = kind else { panic!("a field has a type with a name") };
    let last = path.path.segments.last().expect("a path has segments");
    match &last.arguments {
        syn::PathArguments::AngleBracketed(inner) => match inner.args.first() {
            Some(syn::GenericArgument::Type(inner)) => innermost(inner),
            _ => panic!("a type as argument"),
        },
        _ => last.ident.to_string(),
    }
}

fn field(declared: &syn::Field) -> Field {
    let name = declared.ident.as_ref().expect("fields have names").to_string();
    let attribute = declared.attrs.iter().find(|attribute| attribute.path().is_ident("prost"));
    let words = attribute
        .unwrap_or_else(|| panic!("{name} has no attribute"))
        .parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated)
        .expect("a list of words");
    // Without a word about it prost packs.
    let (mut number, mut label, mut kind, mut packed) = (0, String::new(), String::new(), true);
    for word in &words {
        let path = word.path().get_ident().expect("one word").to_string();
        match word {
            Meta::NameValue(pair) if path == "tag" => number = text(&pair.value).parse().expect("a number"),
            Meta::NameValue(pair) if path == "packed" => packed = text(&pair.value) == "true",
            Meta::NameValue(pair) if path == "enumeration" => kind = plain(&text(&pair.value)),
            Meta::NameValue(_) if path == "bytes" => kind = path,
            Meta::Path(_) if path == "message" => kind = plain(&innermost(&declared.ty)),
            Meta::Path(_) if ["required", "optional", "repeated"].contains(&&*path) => label = path,
            Meta::Path(_) if is_scalar(&path) => kind = path,
            _ => panic!("{name}: {path} is not understood"),
        }
    }
    let can_be_packed = is_scalar(&kind) && !matches!(&*kind, "bytes" | "string");
    let is_packed = label == "repeated" && can_be_packed && packed;
    Field { name: name.trim_start_matches("r#").to_owned(), number, label, kind, is_packed }
}

/// The last segment of a path that is a value.
fn last_word(value: &Expr) -> String {
    match value {
        Expr::Path(path) => path.path.segments.last().expect("a path has segments").ident.to_string(),
        other => text(other),
    }
}

impl Declared {
    fn read(&mut self, items: &[Item]) {
        for item in items {
            match item {
                Item::Struct(item) if derives(&item.attrs, "Message") => {
                    self.messages.push((item.ident.to_string(), item.fields.iter().map(field).collect()));
                }
                Item::Enum(item) if derives(&item.attrs, "Enumeration") => {
                    let value = |variant: &syn::Variant| Field {
                        name: plain(&variant.ident.to_string()),
                        number: variant
                            .discriminant
                            .as_ref()
                            .map(|value| text(&value.1).parse().expect("a number"))
                            .expect("a value that is written out"),
                        label: "-".into(),
                        kind: "-".into(),
                        is_packed: false,
                    };
                    self.enums.push((item.ident.to_string(), item.variants.iter().map(value).collect()));
                }
                Item::Impl(item) => self.read_kind(item),
                _ => {}
            }
        }
    }

    fn read_kind(&mut self, item: &syn::ItemImpl) {
        let of = item.trait_.as_ref().and_then(|(_, path, _)| path.segments.last());
        if of.is_none_or(|name| name.ident != "FdKind") {
            return;
        }
        let (mut tag, mut entry) = (None, None);
        for member in &item.items {
            match member {
                ImplItem::Const(value) if value.ident == "TAG" => tag = Some(last_word(&value.expr)),
                ImplItem::Type(alias) if alias.ident == "Entry" => entry = Some(innermost(&alias.ty)),
                _ => {}
            }
        }
        let tag = tag.expect("a kind has a TAG").parse().expect("a number");
        self.kinds.push((tag, plain(&entry.expect("a kind has an Entry"))));
    }
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of sources").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn declared() -> Declared {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a crate lies beside others");
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(crates).expect("the crates").flatten() {
        let folder = entry.path().join("src");
        if folder.is_dir() {
            sources(&folder, &mut paths);
        }
    }
    paths.sort();
    let mut declared = Declared::default();
    for path in paths {
        let source = std::fs::read_to_string(&path).expect("a source");
        let file = syn::parse_file(&source).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        declared.read(&file.items);
    }
    declared
}

/// What is wrong with one declared field, by the field of the format that has its number.
fn judge(ours: &Field, theirs: Option<&Field>) -> Option<String> {
    let Some(theirs) = theirs else { return Some(format!("has no field {}", ours.number)) };
    // On the wire they are the same; the kernel does not promise UTF-8.
    let is_name = (&*ours.kind, &*theirs.kind) == ("bytes", "string");
    let same = |field: &Field| (plain(&field.name), field.label.clone(), field.is_packed);
    (same(ours) != same(theirs) || ours.kind != theirs.kind && !is_name)
        .then(|| format!("is {ours:?}, the format has {theirs:?}"))
}

#[test]
fn every_field_is_that_of_the_format() {
    let (table, declared) = (format(), declared());
    let mut wrong = Vec::new();
    let mut own_fields: BTreeSet<(&str, &str, u32)> = OWN_FIELDS.iter().copied().collect();
    for (message, fields) in &declared.messages {
        if OWN_MESSAGES.contains(&&**message) {
            continue;
        }
        let Some(theirs) = table.get(&plain(message)) else {
            wrong.push(format!("{message}: the format has no such message"));
            continue;
        };
        for ours in fields {
            if ours.number >= FIRST_OWN {
                if !own_fields.remove(&(message, &ours.name, ours.number)) {
                    wrong.push(format!("{message}.{}: {} is not listed as ours", ours.name, ours.number));
                }
                // Whoever does not know it must be able to read the rest.
                if ours.label == "required" {
                    wrong.push(format!("{message}.{}: ours, and required", ours.name));
                }
                continue;
            }
            let their = theirs.iter().find(|their| their.number == ours.number);
            wrong.extend(judge(ours, their).map(|why| format!("{message}.{}: {why}", ours.name)));
        }
        let is_missing = |their: &&Field| !fields.iter().any(|ours| ours.number == their.number);
        for their in theirs.iter().filter(|their| their.label == "required").filter(is_missing) {
            wrong.push(format!("{message}: lacks the required {} = {}", their.name, their.number));
        }
    }
    wrong.extend(own_fields.iter().map(|field| format!("{field:?} is listed as ours and not declared")));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The reader itself would be broken if it found next to nothing.
    assert!(declared.messages.len() > 50, "only {} messages were found", declared.messages.len());
}

#[test]
fn every_enum_has_the_values_of_the_format() {
    let (table, declared) = (format(), declared());
    let mut wrong = Vec::new();
    for (name, values) in &declared.enums {
        let known = |fields: &[Field]| -> BTreeSet<(u32, String)> {
            fields.iter().map(|field| (field.number, plain(&field.name))).collect()
        };
        let is_own = |(number, value): &(u32, String)| OWN_VALUES.contains(&(name, value, *number));
        let ours: BTreeSet<_> = known(values).into_iter().filter(|value| !is_own(value)).collect();
        match table.get(&plain(name)) {
            Some(theirs) if known(theirs) == ours => {}
            Some(theirs) => wrong.push(format!("{name}: {:?}, not {:?}", known(values), known(theirs))),
            None => wrong.push(format!("{name}: the format has no such enum")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(declared.enums.len() > 5, "only {} enums were found", declared.enums.len());
}

#[test]
fn every_kind_of_file_has_its_own_field() {
    let (table, declared) = (format(), declared());
    for (tag, entry) in declared.kinds.iter().filter(|(tag, entry)| !OWN_KINDS.contains(&(*tag, entry))) {
        let field = table["fileentry"].iter().find(|field| field.number == *tag);
        let field = field.unwrap_or_else(|| panic!("files.img has no field {tag}"));
        assert_eq!((&field.kind, &*field.label), (entry, "optional"), "field {tag}");
    }
    assert!(declared.kinds.len() > 5, "only {} kinds were found", declared.kinds.len());
}

#[test]
fn the_record_of_a_file_is_written_as_the_format_has_it() {
    let number = |name: &str| {
        let table = format();
        table["fileentry"].iter().find(|field| field.name == name).expect("a field of files.img").number
    };
    let entry = FileEntry::new(6, 77, number("efd"), &FownEntry::default());
    // A key is the number and the wire format: 0 for a varint, 2 for a length and bytes.
    let key = |name: &str, wire: u32| (number(name) << 3 | wire) as u8;
    let written = entry.encode_to_vec();
    assert_eq!(written[..5], [key("type", 0), 6, key("id", 0), 77, key("efd", 2)]);
}
