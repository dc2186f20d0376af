//! What the kernel tells nobody but its own tracing: structures in its memory, read by a program of a few instructions
//! (bpf(2), an iterator over tasks), with its own description of its types (BTF).
//!
//! Where the kernel was built without, or forbids it (lockdown), nothing is told, and callers say what they then do.
//! An address that is none by now is no harm: the kernel checks, and then tells nothing.
//!
//! Source: Documentation/bpf/bpf_iterators.rst; Documentation/bpf/btf.rst.

use crate::bpf::{ARRAY, Map, PERCPU_ARRAY, Shape, bpf, number, owned, pair};
use crate::memory::View;
use model::Errno;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, OnceLock};

const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;
const ITER_CREATE: i32 = 33;
const PROG_TYPE_TRACING: u32 = 26;
const TRACE_ITER: u32 = 28;

/// Bytes that a program tells at a time.
pub const SOME: usize = 64;

// ------------------------------------------------------------------------------------------------ types

pub(crate) const STRUCT: u32 = 4;
const UNION: u32 = 5;
pub(crate) const FUNC: u32 = 12;

enum Text {
    Mapped(View),
    Read(Vec<u8>),
}

/// The kernel's description of its types.
#[allow(missing_debug_implementations)]
pub struct Types {
    text: Text,
    /// Where the first is described, and where their names begin.
    first: usize,
    names: usize,
    /// Where each is described, by its number less one.
    places: OnceLock<Vec<usize>>,
    /// What was found already.
    known: Mutex<HashMap<(u32, String), (u32, usize)>>,
}

fn word(text: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(text.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

impl Types {
    fn new(text: Text) -> Option<Types> {
        let types = Types { text, first: 0, names: 0, places: OnceLock::new(), known: Mutex::default() };
        let text = types.text();
        if word(text, 0)? & 0xffff != 0xeb9f {
            return None;
        }
        let head = word(text, 4)? as usize;
        let first = head.checked_add(word(text, 8)? as usize)?;
        let names = head.checked_add(word(text, 16)? as usize)?;
        (first.checked_add(word(text, 12)? as usize)? == names).then_some(())?;
        Some(Types { first, names, ..types })
    }

    fn text(&self) -> &[u8] {
        match &self.text {
            Text::Mapped(view) => view.bytes(),
            Text::Read(bytes) => bytes,
        }
    }

    /// Where each is described, in the order of their numbers, which begin with one.
    fn all(&self) -> impl Iterator<Item = usize> {
        let next = |at: &usize| {
            let info = word(self.text(), at + 4)?;
            let count = (info & 0xffff) as usize;
            let more = match info >> 24 & 0x1f {
                1 | 14 | 17 => 4,
                3 => 12,
                STRUCT | UNION | 15 | 19 => count * 12,
                6 | 13 => count * 8,
                _ => 0,
            };
            Some(at + 12 + more)
        };
        std::iter::successors(Some(self.first), next).take_while(|at| *at < self.names)
    }

    fn is(&self, name: u32, wanted: &str) -> bool {
        let text = self.text().get(self.names..).and_then(|names| names.get(name as usize..));
        text.and_then(|text| text.strip_prefix(wanted.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }

    fn kind(&self, at: usize) -> u32 {
        word(self.text(), at + 4).unwrap_or(0) >> 24 & 0x1f
    }

    /// The number of the type of this kind and name, and where it is described.
    fn find(&self, kind: u32, name: &str) -> Option<(u32, usize)> {
        let known = || self.known.lock().ok()?.get(&(kind, name.to_owned())).copied();
        known().or_else(|| {
            self.look_up(&[(kind, name)]);
            known()
        })
    }

    /// Finds some of them at once, for there are many thousands to look at.
    pub(crate) fn look_up(&self, wanted: &[(u32, &str)]) {
        let Ok(mut known) = self.known.lock() else { return };
        let mut missing: Vec<&(u32, &str)> =
            wanted.iter().filter(|(kind, name)| !known.contains_key(&(*kind, (*name).to_owned()))).collect();
        for (number, at) in (1..).zip(self.all()) {
            if missing.is_empty() {
                return;
            }
            let kind = self.kind(at);
            let name = word(self.text(), at);
            let is_it =
                |(of, wanted): &&(u32, &str)| *of == kind && name.is_some_and(|name| self.is(name, wanted));
            if let Some(found) = missing.iter().position(is_it) {
                let (kind, name) = *missing.swap_remove(found);
                known.insert((kind, name.to_owned()), (number, at));
            }
        }
    }

    /// The value of an enumerator, whatever its type is called; none where there is none, or a negative one.
    pub fn enumerator(&self, name: &str) -> Option<u64> {
        const ENUM: u32 = 6;
        let values = |at: usize| {
            let count = (word(self.text(), at + 4).unwrap_or(0) & 0xffff) as usize;
            (0..count).map(move |nth| at + 12 + nth * 8)
        };
        let mut all = self.all().filter(|at| self.kind(*at) == ENUM).flat_map(values);
        let found = all.find(|at| word(self.text(), *at).is_some_and(|named| self.is(named, name)))?;
        word(self.text(), found + 4).map(u64::from)
    }

    /// Of a structure, in bytes.
    pub fn size(&self, structure: &str) -> Option<u64> {
        word(self.text(), self.find(STRUCT, structure)?.1 + 8).map(u64::from)
    }

    /// Where in a structure a member is, in bytes; also one of those in it that have no name.
    pub fn offset(&self, structure: &str, member: &str) -> Option<u64> {
        self.member(self.find(STRUCT, structure)?.1, member, 8)
    }

    fn member(&self, structure: usize, wanted: &str, depth: u32) -> Option<u64> {
        let info = word(self.text(), structure + 4)?;
        let members = || {
            (0..(info & 0xffff) as usize).filter_map(|nth| {
                let at = structure + 12 + nth * 12;
                let [name, kind, bits] = [at, at + 4, at + 8].map(|at| word(self.text(), at));
                // With fields of bits the upper byte is a length.
                let bits = bits.map(|bits| if info >> 31 != 0 { bits & 0xff_ffff } else { bits });
                Some((name?, kind?, u64::from(bits? / 8)))
            })
        };
        if let Some((.., offset)) = members().find(|(name, ..)| self.is(*name, wanted)) {
            return Some(offset);
        }
        members().filter(|(name, ..)| *name == 0 && depth > 0).find_map(|(_, kind, offset)| {
            let places = self.places.get_or_init(|| self.all().collect());
            let inner = *places.get((kind as usize).checked_sub(1)?)?;
            let is_some = matches!(self.kind(inner), STRUCT | UNION);
            is_some.then(|| self.member(inner, wanted, depth - 1)).flatten().map(|within| offset + within)
        })
    }
}

/// Those of this kernel.
pub fn types() -> Option<&'static Types> {
    static TYPES: OnceLock<Option<Types>> = OnceLock::new();
    let read = || {
        let mut file = File::open("/sys/kernel/btf/vmlinux").ok()?;
        // Since Linux 6.16 it can be mapped, which takes a tenth of the time.
        match View::new(&file, file.metadata().ok()?.len() as usize) {
            Ok(view) => {
                view.populate(0..view.bytes().len());
                Types::new(Text::Mapped(view))
            }
            Err(_) => {
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes).ok()?;
                Types::new(Text::Read(bytes))
            }
        }
    };
    TYPES.get_or_init(read).as_ref()
}

// ------------------------------------------------------------------------------------------------ programs

/// Codes of instructions.
pub mod code {
    /// Eight bytes, or four, from a place in memory.
    pub const LOAD: u8 = 0x79;
    pub const LOAD_INT: u8 = 0x61;
    pub const STORE: u8 = 0x7b;
    pub const STORE_HALF: u8 = 0x62;
    pub const ADDRESS: u8 = 0x18;
    pub const COPY: u8 = 0xbf;
    pub const ADD: u8 = 0x07;
    /// Of another register, and shifts by a value.
    pub const ADD_OTHER: u8 = 0x0f;
    pub const SHIFT_LEFT: u8 = 0x67;
    pub const SHIFT_RIGHT: u8 = 0x77;
    pub const SET: u8 = 0xb7;
    pub const JUMP_IF_ZERO: u8 = 0x15;
    pub const JUMP_IF_OTHER: u8 = 0x55;
    pub const JUMP_IF_POSITIVE: u8 = 0x65;
    pub const CALL: u8 = 0x85;
    pub const EXIT: u8 = 0x95;
    /// What is called.
    pub const MAP_LOOKUP: i32 = 1;
    pub const MAP_LOOKUP_PERCPU: i32 = 195;
    pub const PROBE_READ_KERNEL: i32 = 113;
    pub const SEQ_WRITE: i32 = 127;
    pub const D_PATH: i32 = 147;
}

/// One instruction: code, registers, offset, value.
pub fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    u64::from(code)
        | u64::from(to | from << 4) << 8
        | u64::from(offset as u16) << 16
        | u64::from(value as u32) << 32
}

/// Where a program is to read.
enum Place<'m> {
    /// So many bytes behind the beginning of the task.
    InTask(u64),
    /// At the address that is the first value of a map; zero is the address of the task itself, which is then told.
    Noted(&'m OwnedFd),
    /// Nowhere: it tells the address of a map of one value for each processor, and that of the value of the processor
    /// whose number is the first value of another map.
    OfProcessor(&'m OwnedFd, &'m OwnedFd),
}

/// A program that writes [`SOME`] bytes for the task that it is given.
fn program(place: Place) -> Vec<u64> {
    use code::*;
    const STACK: u8 = 10;
    const FOUND: i32 = -(SOME as i32);
    const TASK: i16 = FOUND as i16 - 8;
    const KEY: i16 = FOUND as i16 - 16;
    // Into registers 1 and 2: where to put how much.
    let target = |at: i32, len: i32| {
        [instruction(COPY, 1, STACK, 0, 0), instruction(ADD, 1, 0, 0, at), instruction(SET, 2, 0, 0, len)]
    };
    let exit = [instruction(SET, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)];
    // Into register 8: what is noted.
    let noted = |map: &OwnedFd| {
        vec![
            instruction(STORE_HALF, STACK, 0, KEY, 0),
            // The number of a descriptor in the place of an address, which takes two.
            instruction(ADDRESS, 1, 1, 0, number(map) as i32),
            0,
            instruction(COPY, 2, STACK, 0, 0),
            instruction(ADD, 2, 0, 0, KEY.into()),
            instruction(CALL, 0, 0, 0, MAP_LOOKUP),
            instruction(JUMP_IF_OTHER, 0, 0, 1, 0),
            exit[1],
            instruction(LOAD, 8, 0, 0, 0),
        ]
    };
    let probe = [
        instruction(CALL, 0, 0, 0, PROBE_READ_KERNEL),
        instruction(JUMP_IF_ZERO, 0, 0, 2, 0),
        exit[0],
        exit[1],
    ];
    let read = match place {
        Place::InTask(offset) => {
            let mut read = target(FOUND, SOME as i32).to_vec();
            read.extend([instruction(COPY, 3, 7, 0, 0), instruction(ADD, 3, 0, 0, offset as i32)]);
            read.extend(probe);
            read
        }
        Place::Noted(map) => {
            let mut read = noted(map);
            read.push(instruction(STORE, STACK, 7, TASK, 0));
            read.extend(target(FOUND, SOME as i32));
            read.extend([
                instruction(COPY, 3, 8, 0, 0),
                instruction(JUMP_IF_OTHER, 8, 0, 3, 0),
                // The address that lies on the stack, as a number.
                instruction(SET, 2, 0, 0, 8),
                instruction(COPY, 3, STACK, 0, 0),
                instruction(ADD, 3, 0, 0, TASK.into()),
            ]);
            read.extend(probe);
            read
        }
        Place::OfProcessor(map, values) => {
            let mut read = noted(map);
            read.extend([
                instruction(ADDRESS, 1, 1, 0, number(values) as i32),
                0,
                instruction(STORE, STACK, 1, FOUND as i16, 0),
                instruction(COPY, 2, STACK, 0, 0),
                instruction(ADD, 2, 0, 0, KEY.into()),
                instruction(COPY, 3, 8, 0, 0),
                instruction(CALL, 0, 0, 0, MAP_LOOKUP_PERCPU),
                instruction(JUMP_IF_OTHER, 0, 0, 1, 0),
                exit[1],
                instruction(STORE, STACK, 0, FOUND as i16 + 8, 0),
            ]);
            read
        }
    };
    let mut text = vec![
        // struct bpf_iter__task: what is written to, and the task; none at the end.
        instruction(LOAD, 6, 1, 0, 0),
        instruction(LOAD, 7, 1, 8, 0),
        instruction(SET, 0, 0, 0, 0),
        instruction(JUMP_IF_OTHER, 7, 0, 1, 0),
        instruction(EXIT, 0, 0, 0, 0),
    ];
    for at in 0..SOME as i32 / 8 {
        text.push(instruction(STORE, STACK, 0, (FOUND + at * 8) as i16, 0));
    }
    text.extend(read);
    text.extend([
        instruction(LOAD, 1, 6, 0, 0),
        instruction(COPY, 2, STACK, 0, 0),
        instruction(ADD, 2, 0, 0, FOUND),
        instruction(SET, 3, 0, 0, SOME as i32),
        instruction(CALL, 0, 0, 0, SEQ_WRITE),
    ]);
    text.extend(exit);
    text
}

/// Loads a program that the kernel calls as the function `iterator`.
pub(crate) fn load(types: &Types, iterator: &str, code: &[u64]) -> Result<OwnedFd, Errno> {
    let unknown = Errno { call: "bpf", code: libc::EOPNOTSUPP };
    let (iterator, _) = types.find(FUNC, iterator).ok_or(unknown)?;
    let mut words = [0u64; 16];
    words[0] = pair(PROG_TYPE_TRACING, code.len() as u32);
    words[1] = code.as_ptr() as u64;
    words[2] = c"Dual MIT/GPL".as_ptr() as u64;
    // No log; then kern_version, flags, name, device, expected_attach_type.
    words[8] = pair(0, TRACE_ITER);
    // prog_btf_fd, func_info (three words), line_info (three), attach_btf_id.
    words[13] = pair(0, iterator);
    // SAFETY: the kernel reads the instructions and a C string.
    unsafe { bpf(PROG_LOAD, &mut words) }.map(owned)
}

/// What a program writes, to be read. `wanted` says of whom: union bpf_iter_link_info.
pub(crate) fn start(program: &OwnedFd, mut wanted: [u32; 4]) -> Option<OwnedFd> {
    let info = wanted.as_mut_ptr() as u64;
    let mut words = [pair(number(program), 0), pair(TRACE_ITER, 0), info, size_of_val(&wanted) as u64];
    // SAFETY: the kernel reads as much of the array as it has.
    let link = owned(unsafe { bpf(LINK_CREATE, &mut words) }.ok()?);
    let mut words = [pair(number(&link), 0)];
    // SAFETY: no addresses.
    Some(owned(unsafe { bpf(ITER_CREATE, &mut words) }.ok()?))
}

/// What a program says of a thread.
fn run(program: &OwnedFd, tid: i32) -> Option<[u8; SOME]> {
    // The tid; then pid, pidfd.
    let iterator = start(program, [tid as u32, 0, 0, 0])?;
    let mut bytes = [0u8; SOME];
    let count = crate::fd::read(&iterator, &mut bytes).ok()?;
    (count == bytes.len()).then_some(bytes)
}

/// Tells of each thread what lies at one place in its `task_struct`.
#[derive(Debug)]
pub struct OfTask(OwnedFd);

impl OfTask {
    /// None where this kernel tells nothing, or has no such member.
    pub fn new(member: &str) -> Option<OfTask> {
        let types = types()?;
        let code = program(Place::InTask(types.offset("task_struct", member)?));
        let loaded = load(types, "bpf_iter_task", &code)
            .map_err(|error| log::debug!("{member} of tasks cannot be read: {error}"));
        loaded.ok().map(OfTask)
    }

    /// Of a thread that stands still.
    pub fn read(&self, tid: i32) -> Option<[u8; SOME]> {
        run(&self.0, tid)
    }
}

/// Tells what lies at an address.
#[allow(missing_debug_implementations)]
pub struct Inside {
    program: OwnedFd,
    /// And what tells where processors have something for themselves.
    of_processor: OnceLock<Option<OwnedFd>>,
    place: Map<OwnedFd>,
    /// One question at a time.
    turn: Mutex<()>,
    types: &'static Types,
}

/// None where this kernel tells nothing.
pub fn inside() -> Option<&'static Inside> {
    static INSIDE: OnceLock<Option<Inside>> = OnceLock::new();
    let open = || {
        let types = types()?;
        let explain = |error: Errno| log::debug!("the kernel's memory cannot be read: {error}");
        let shape = Shape { kind: ARRAY, key_size: 4, value_size: 8, max_entries: 1, ..Shape::default() };
        let place = Map::new(&shape).map_err(explain).ok()?;
        let program =
            load(types, "bpf_iter_task", &program(Place::Noted(&place.fd))).map_err(explain).ok()?;
        Some(Inside { program, of_processor: OnceLock::new(), place, turn: Mutex::new(()), types })
    };
    INSIDE.get_or_init(open).as_ref()
}

impl Inside {
    fn tell(&self, program: &OwnedFd, tid: i32, noted: u64) -> Option<[u8; SOME]> {
        let _turn = self.turn.lock().ok()?;
        self.place.fill(&0u32.to_ne_bytes(), &noted.to_ne_bytes()).ok()?;
        run(program, tid)
    }

    /// Where the kernel keeps a thread: its `task_struct`.
    pub fn task(&self, tid: i32) -> Option<u64> {
        let told = self.tell(&self.program, tid, 0)?;
        Some(u64::from_ne_bytes(told[..8].try_into().ok()?))
    }

    /// [`SOME`] bytes.
    pub fn bytes(&self, address: u64) -> Option<[u8; SOME]> {
        if address == 0 {
            return None;
        }
        // Any task will do, and this one is there.
        self.tell(&self.program, crate::process::own_pid(), address)
    }

    fn few<const COUNT: usize>(&self, address: u64) -> Option<[u8; COUNT]> {
        self.up_to(address, COUNT)?.try_into().ok()
    }

    /// As many bytes as wanted.
    pub fn text(&self, address: u64, len: usize) -> Option<Vec<u8>> {
        let mut text = Vec::with_capacity(len);
        while text.len() < len {
            let at = address.checked_add(text.len() as u64)?;
            match len - text.len() {
                SOME.. => text.extend(self.bytes(at)?),
                rest => text.extend(&self.up_to(at, rest)?),
            }
        }
        Some(text)
    }

    /// Fewer than [`SOME`] bytes, which may be the last that are there.
    fn up_to(&self, address: u64, count: usize) -> Option<Vec<u8>> {
        let behind =
            || Some(self.bytes(address.checked_sub((SOME - count) as u64)?)?[SOME - count..].to_vec());
        match self.bytes(address) {
            Some(bytes) => Some(bytes[..count].to_vec()),
            None => behind(),
        }
    }

    pub fn long(&self, address: u64) -> Option<u64> {
        self.few(address).map(u64::from_ne_bytes)
    }

    pub fn int(&self, address: u64) -> Option<u32> {
        self.few(address).map(u32::from_ne_bytes)
    }

    /// The nodes of a list (`struct list_head`, `hlist_head`), each by its address, from the head's address on until one says
    /// that `end` is next: the head, or nothing. None for one that the kernel does not tell, which is the last.
    pub fn nodes(&self, head: u64, end: u64) -> impl Iterator<Item = Option<u64>> + '_ {
        // Heads and nodes begin with where the next is.
        let mut link = Some(head);
        std::iter::from_fn(move || {
            let next = self.long(link.take()?);
            link = next;
            (next != Some(end)).then_some(next)
        })
    }

    /// The address of a member of the structure at `address`.
    pub fn at(&self, address: u64, structure: &str, member: &str) -> Option<u64> {
        address.checked_add(self.types.offset(structure, member)?).filter(|_| address != 0)
    }

    /// What a member of two bytes holds.
    pub fn half(&self, address: u64, structure: &str, member: &str) -> Option<u16> {
        self.int(self.at(address, structure, member)?).map(|word| word as u16)
    }

    /// The entries of a `struct xarray` and their numbers.
    ///
    /// Source: include/linux/xarray.h.
    pub fn entries(&self, array: u64) -> Option<Vec<(u64, u64)>> {
        let mut entries = Vec::new();
        self.add_entries(self.member(array, "xarray", "xa_head")?, 0, u64::BITS, &mut entries)?;
        Some(entries)
    }

    fn add_entries(&self, entry: u64, number: u64, below: u32, found: &mut Vec<(u64, u64)>) -> Option<()> {
        const NODE: &str = "xa_node";
        // Small numbers with this mark are no nodes but say that there is nothing.
        match (entry & 3, entry) {
            (2, ..=4096) | (_, 0) => return Some(()),
            (2, _) => {}
            _ => {
                found.push((number, entry));
                return Some(());
            }
        }
        let node = entry - 2;
        let shift = self.half(node, NODE, "shift")? as u32 & 0xff;
        let slots = self.at(node, NODE, "slots")?;
        let count = (self.types.offset(NODE, "marks")? - self.types.offset(NODE, "slots")?) / 8;
        if shift >= below {
            return None;
        }
        for slot in 0..count {
            self.add_entries(self.long(slots + slot * 8)?, number | slot << shift, shift, found)?;
        }
        Some(())
    }

    /// What a member of eight bytes holds: mostly an address.
    pub fn member(&self, address: u64, structure: &str, member: &str) -> Option<u64> {
        self.long(self.at(address, structure, member)?)
    }

    /// How far what a processor has for itself lies behind the address that all say; none for a processor that there
    /// is not.
    pub fn shift(&self, processor: u32) -> Option<u64> {
        let program = self.of_processor.get_or_init(|| {
            let shape =
                Shape { kind: PERCPU_ARRAY, key_size: 4, value_size: 8, max_entries: 1, ..Shape::default() };
            let loaded = Map::new(&shape).and_then(|values| {
                // The program keeps the map.
                load(self.types, "bpf_iter_task", &program(Place::OfProcessor(&self.place.fd, &values.fd)))
            });
            loaded.map_err(|error| log::debug!("what processors have cannot be read: {error}")).ok()
        });
        let told = self.tell(program.as_ref()?, crate::process::own_pid(), processor.into())?;
        let word = |at: usize| Some(u64::from_ne_bytes(told[at..at + 8].try_into().ok()?));
        let for_all = self.member(word(0)?, "bpf_array", "pptrs")?;
        Some(word(8)?.wrapping_sub(for_all))
    }

    /// Has nobody but us an open file, of which we have one descriptor? Source: include/linux/file_ref.h, which counts from
    /// zero; before Linux 6.13 the count was a plain one.
    pub fn is_ours_alone(&self, fd: impl AsFd) -> Option<bool> {
        let file = self.file(crate::process::own_pid(), fd.as_fd().as_raw_fd())?;
        match self.types.offset("file", "f_ref") {
            Some(_) => Some(self.member(file, "file", "f_ref")? == 0),
            None => Some(self.member(file, "file", "f_count")? == 1),
        }
    }

    /// The open file behind a descriptor of a thread: its `struct file`.
    pub fn file(&self, tid: i32, number: i32) -> Option<u64> {
        let files = self.member(self.task(tid)?, "task_struct", "files")?;
        let table = self.member(files, "files_struct", "fdt")?;
        let entries = self.member(table, "fdtable", "fd")?;
        self.long(entries.checked_add(u64::from(u32::try_from(number).ok()?) * 8)?).filter(|file| *file != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_describes_no_types() {
        for text in [&[][..], &[0xff; 64], &[0x9f, 0xeb, 1, 0, 24, 0, 0, 0]] {
            assert!(Types::new(Text::Read(text.to_vec())).is_none());
        }
    }

    #[test]
    fn enumerators_are_found() {
        let Some(types) = types() else { return println!("SKIP: no types here") };
        assert_eq!(types.enumerator("PIDTYPE_TGID"), Some(1));
        assert_eq!(types.enumerator("PIDTYPE_NONE"), None);
    }

    #[test]
    fn two_descriptors_of_one_file_have_one_address() {
        let Some(inside) = inside() else { return println!("SKIP: no BPF iterators here") };
        // SAFETY: takes nothing.
        let me = unsafe { libc::gettid() };
        let file = File::open("/dev/null").expect("open");
        let same = file.try_clone().expect("dup");
        let other = File::open("/dev/null").expect("open");
        let address = |file: &File| inside.file(me, file.as_raw_fd()).expect("an address");
        assert_eq!(address(&file), address(&same));
        assert_ne!(address(&file), address(&other));
        assert_eq!([&file, &other].map(|file| inside.is_ours_alone(file)), [Some(false), Some(true)]);
        assert_eq!(inside.long(8), None);
    }

    #[test]
    fn every_processor_has_its_own() {
        let Some(inside) = inside() else { return println!("SKIP: no BPF iterators here") };
        let shifts: Vec<u64> = (0..).map_while(|processor| inside.shift(processor)).collect();
        assert!(!shifts.is_empty());
        let mut different = shifts.clone();
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), shifts.len());
    }
}
