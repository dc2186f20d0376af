//! bpf(2) maps: arrays and hash tables that a program shares with the kernel.
//!
//! Read from: `fdinfo`, BPF_OBJ_GET_INFO_BY_FD, and every key and value.
//! Rebuilt by: BPF_MAP_CREATE, an update for each key, BPF_MAP_FREEZE.
//! Refused: other sorts of maps, maps for a device, programs.
//! Not kept: the number of the map, types of its content (BTF), names in the BPF file system.

use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, set_status};
use image::{FdTypes, FownEntry, Reader, kind};
use model::{Errno, Failure, Failures, Object};
use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use sys::bpf::{ARRAY, HASH, Map, Shape};

pub static KIND: Bpfmap = Bpfmap;

#[derive(Debug)]
pub struct Bpfmap;

#[derive(Clone, PartialEq, prost::Message)]
pub struct BpfmapFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(uint64, required, tag = "3")]
    pub pos: u64,
    #[prost(message, required, tag = "4")]
    pub fown: FownEntry,
    #[prost(uint32, required, tag = "5")]
    pub map_type: u32,
    #[prost(uint32, required, tag = "6")]
    pub key_size: u32,
    #[prost(uint32, required, tag = "7")]
    pub value_size: u32,
    #[prost(uint32, required, tag = "8")]
    pub map_id: u32,
    #[prost(uint32, required, tag = "9")]
    pub max_entries: u32,
    #[prost(uint32, required, tag = "10")]
    pub map_flags: u32,
    #[prost(uint64, required, tag = "11")]
    pub memlock: u64,
    #[prost(bool, required, tag = "12")]
    pub frozen: bool,
    #[prost(bytes = "vec", required, tag = "13")]
    pub map_name: Vec<u8>,
    #[prost(uint32, required, tag = "14")]
    pub ifindex: u32,
    #[prost(sint32, optional, tag = "15")]
    pub mnt_id: Option<i32>,
    #[prost(uint64, optional, tag = "16")]
    pub map_extra: Option<u64>,
}

/// `bpfmap-data.img`: keys and values follow.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BpfmapDataEntry {
    #[prost(uint32, required, tag = "1")]
    pub map_id: u32,
    #[prost(uint32, required, tag = "2")]
    pub keys_bytes: u32,
    #[prost(uint32, required, tag = "3")]
    pub values_bytes: u32,
    #[prost(uint32, required, tag = "4")]
    pub count: u32,
}

const IMAGE: &str = "bpfmap-data.img";
/// Access of a descriptor. Source: include/uapi/linux/bpf.h.
const BPF_F_RDONLY: u32 = 1 << 3;
const BPF_F_WRONLY: u32 = 1 << 4;

#[derive(Debug, Default)]
struct Saved(HashSet<u32>);

/// Keys and values, by the number of their map.
type Contents = HashMap<u32, (Vec<u8>, Vec<u8>)>;

/// Maps that were made, by their old numbers; and what is to be put into others.
#[derive(Debug, Default)]
struct Made {
    maps: HashMap<u32, Map<OwnedFd>>,
    contents: Option<Contents>,
}

fn access(flags: u32) -> u32 {
    match flags as i32 & libc::O_ACCMODE {
        libc::O_RDONLY => BPF_F_RDONLY,
        libc::O_WRONLY => BPF_F_WRONLY,
        _ => 0,
    }
}

fn shape(entry: &BpfmapFileEntry) -> Shape {
    let mut name = [0; 16];
    for (to, from) in name[..15].iter_mut().zip(&entry.map_name) {
        *to = *from;
    }
    Shape {
        kind: entry.map_type,
        key_size: entry.key_size,
        value_size: entry.value_size,
        max_entries: entry.max_entries,
        flags: entry.map_flags & !(BPF_F_RDONLY | BPF_F_WRONLY),
        extra: entry.map_extra.unwrap_or(0),
        name,
    }
}

fn read_contents(cx: &OpenCx) -> Result<Contents, Failure> {
    let mut contents = Contents::new();
    let Some(bytes) = cx.images.read(IMAGE)? else { return Ok(contents) };
    let mut image = Reader::open(kind::BPFMAP_DATA, IMAGE, &bytes)?;
    while let Some(entry) = image.record::<BpfmapDataEntry>()? {
        let keys = image.payload(entry.keys_bytes as usize)?.to_vec();
        let values = image.payload(entry.values_bytes as usize)?.to_vec();
        contents.insert(entry.map_id, (keys, values));
    }
    Ok(contents)
}

fn make(entry: &BpfmapFileEntry, cx: &mut OpenCx) -> Result<Map<OwnedFd>, Failure> {
    let explain = |error: Errno| error.on(Object::Named(format!("BPF map {}", entry.map_id)), "make it");
    if cx.shelf.of::<Made>().contents.is_none() {
        let contents = read_contents(cx)?;
        cx.shelf.of::<Made>().contents = Some(contents);
    }
    let contents = cx.shelf.of::<Made>().contents.as_mut();
    let content = contents.and_then(|contents| contents.remove(&entry.map_id));
    let map = Map::new(&shape(entry)).map_err(explain)?;
    if let Some((keys, values)) = content {
        map.fill(&keys, &values).map_err(explain)?;
    }
    if entry.frozen {
        map.freeze().map_err(explain)?;
    }
    Ok(map)
}

impl FdKind for Bpfmap {
    type Entry = BpfmapFileEntry;
    const NAME: &'static str = "BPF map";
    const TYPE: FdTypes = FdTypes::Bpfmap;
    const TAG: u32 = 21;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.anon_inode() == Some(b"bpf-map")
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<BpfmapFileEntry, Failure> {
        let explain = |error: Errno| probe.fail(error, "read it");
        let number = |key: &str| {
            let number = sys::proc::fdinfo(probe.info(), key).and_then(sys::proc::decimal::<u64>);
            number.ok_or_else(|| probe.refuse(format!("the kernel does not tell its {key}")))
        };
        let map = Map::of(&probe.fd).map_err(explain)?;
        let Shape { kind: map_type, key_size, value_size, max_entries, flags, extra, name } = map.shape;
        if !matches!(map_type, HASH | ARRAY) {
            let why = format!("is a BPF map of type {map_type}; only arrays and hash tables are carried");
            return Err(probe.refuse(why));
        }
        if map.device != 0 {
            return Err(probe.refuse("is a BPF map for a network device, which is not carried"));
        }
        if cx.shelf.of::<Saved>().0.insert(map.id) {
            let (keys, values) = map.content().map_err(|error| match error.code {
                libc::EPERM => probe.refuse("is a BPF map that can only be written to"),
                _ => explain(error),
            })?;
            let length = |bytes: &[u8]| u32::try_from(bytes.len()).ok();
            let (Some(keys_bytes), Some(values_bytes)) = (length(&keys), length(&values)) else {
                return Err(probe.refuse("is a BPF map of more than 4 GiB"));
            };
            let count = keys_bytes / key_size;
            let entry = BpfmapDataEntry { map_id: map.id, keys_bytes, values_bytes, count };
            cx.image(IMAGE, kind::BPFMAP_DATA).record(&entry).payload(&keys).payload(&values);
        }
        Ok(BpfmapFileEntry {
            id,
            flags: probe.flags,
            pos: probe.position,
            fown: probe.owner()?,
            map_type,
            key_size,
            value_size,
            map_id: map.id,
            max_entries,
            map_flags: flags,
            memlock: number("memlock")?,
            frozen: number("frozen")? != 0,
            map_name: name.iter().copied().take_while(|byte| *byte != 0).collect(),
            ifindex: 0,
            mnt_id: None,
            map_extra: Some(extra),
        })
    }

    fn link(&self, entries: &[(u32, &BpfmapFileEntry)], _files: &FileTable) -> Failures {
        let is_wrong = |entry: &BpfmapFileEntry| {
            !matches!(entry.map_type, HASH | ARRAY) || entry.key_size == 0 || entry.value_size == 0
        };
        let wrong = entries.iter().filter(|(_, entry)| is_wrong(entry));
        wrong
            .map(|(id, _)| Failure::corrupt("files.img", None, format!("BPF map {id} is none")))
            .collect()
    }

    fn open(&self, entry: &BpfmapFileEntry, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: Errno| error.on(Object::Named(format!("BPF map {}", entry.map_id)), "open it");
        if !cx.shelf.of::<Made>().maps.contains_key(&entry.map_id) {
            let map = make(entry, cx)?;
            cx.shelf.of::<Made>().maps.insert(entry.map_id, map);
        }
        let fd = cx.shelf.of::<Made>().maps[&entry.map_id].reopen(access(entry.flags)).map_err(explain)?;
        set_status(&fd, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn owner<'e>(&self, entry: &'e BpfmapFileEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}
