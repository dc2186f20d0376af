//! The envelope and the records of every kind of image file. The first byte chooses the kind; what is
//! decoded is encoded again, and must then decode to the same.
#![no_main]

use image::*;
use kinds::fd;
use libfuzzer_sys::fuzz_target;

fn read<M: Message + Default + PartialEq>(kind: Kind, bytes: &[u8]) {
    let mut whole = Writer::new(kind).bytes().to_vec();
    whole.extend_from_slice(bytes);
    let mut reader = Reader::open(kind, "fuzz.img", &whole).expect("the magic is right");
    while let Ok(Some(record)) = reader.record::<M>() {
        let again = M::decode(&*record.encode_to_vec()).expect("what was encoded is decoded");
        assert!(again == record, "a record changes on its way");
    }
    // And with whatever magic is there.
    let _ = Reader::open(kind, "fuzz.img", bytes).and_then(|mut reader| reader.all::<M>());
}

/// Records that are followed by bytes.
fn read_with_payload<M: Message + Default>(kind: Kind, bytes: &[u8], length: impl Fn(&M) -> usize) {
    let mut whole = Writer::new(kind).bytes().to_vec();
    whole.extend_from_slice(bytes);
    let mut reader = Reader::open(kind, "fuzz.img", &whole).expect("the magic is right");
    while let Ok(Some(record)) = reader.record::<M>() {
        if reader.payload(length(&record)).is_err() {
            break;
        }
    }
    let _ = reader.rest();
}

fuzz_target!(|data: &[u8]| {
    let [choice, bytes @ ..] = data else { return };
    match choice % 18 {
        0 => read::<InventoryEntry>(kind::INVENTORY, bytes),
        1 => read::<PstreeEntry>(kind::PSTREE, bytes),
        2 => read::<CoreEntry>(kind::CORE, bytes),
        3 => read::<TaskKobjIdsEntry>(kind::IDS, bytes),
        4 => read::<MmEntry>(kind::MM, bytes),
        5 => read::<FsEntry>(kind::FS, bytes),
        6 => read::<FdinfoEntry>(kind::FDINFO, bytes),
        7 => read::<FileEntry>(kind::FILES, bytes),
        8 => read::<SeccompEntry>(kind::SECCOMP, bytes),
        9 => read::<TimensEntry>(kind::TIMENS, bytes),
        10 => read::<StatsEntry>(kind::STATS, bytes),
        11 => read::<fd::memfd::MemfdInodeEntry>(kind::MEMFD, bytes),
        12 => read::<fd::tty::TtyInfoEntry>(kind::TTY_INFO, bytes),
        13 => {
            read_with_payload(kind::PIPES_DATA, bytes, |entry: &fd::pipe::PipeDataEntry| entry.bytes as usize)
        }
        14 => {
            read_with_payload(kind::SK_QUEUES, bytes, |entry: &fd::unix::SkPacketEntry| entry.length as usize)
        }
        15 => read::<fd::tty::TtyDataEntry>(kind::TTY_DATA, bytes),
        16 => read::<kinds::vma::sysv::IpcShmEntry>(kind::IPCNS_SHM, bytes),
        _ => read::<PagemapEntry>(kind::PAGEMAP, bytes),
    }
});
