//! The census as images.

use crate::survey::{Census, Surveyed, namespace_ids};
use image::*;

fn one(kind: Kind, record: &impl Message) -> Writer {
    let mut writer = Writer::new(kind);
    writer.record(record);
    writer
}

/// Every image but the pages and the inventory, by name.
pub fn encode(census: Census) -> Vec<(String, Writer)> {
    let mut images: Vec<(String, Writer)> = Vec::new();
    let mut pstree = Writer::new(kind::PSTREE);
    for process in &census.processes {
        pstree.record(&process.pstree);
        encode_process(process, &mut images);
    }
    images.push(("pstree.img".into(), pstree));
    let mut files = Writer::new(kind::FILES);
    census.cx.files.iter().for_each(|entry| {
        files.record(entry);
    });
    images.push(("files.img".into(), files));
    images.push(("seccomp.img".into(), one(kind::SECCOMP, census.chains.entry())));
    images.push(("timens-0.img".into(), one(kind::TIMENS, &clocks())));
    images.extend(census.cx.images);
    images
}

fn encode_process(process: &Surveyed, images: &mut Vec<(String, Writer)>) {
    let pid = process.pid;
    for (tid, core) in &process.cores {
        images.push((format!("core-{tid}.img"), one(kind::CORE, core)));
    }
    let is_zombie = process.cores[0].1.thread_core.is_none();
    if is_zombie {
        return;
    }
    images.push((format!("ids-{pid}.img"), one(kind::IDS, &process.ids)));
    images.push((format!("mm-{pid}.img"), one(kind::MM, &process.mm)));
    images.push((format!("fs-{pid}.img"), one(kind::FS, &process.fs)));
    if !process.is_fdinfo_shared {
        let mut fdinfo = Writer::new(kind::FDINFO);
        process.fdinfo.iter().for_each(|entry| {
            fdinfo.record(entry);
        });
        images.push((format!("fdinfo-{}.img", process.ids.files_id), fdinfo));
    }
}

fn clocks() -> TimensEntry {
    let time = |clock| {
        let now = sys::clock::now_ns(clock);
        Timespec { tv_sec: now / 1_000_000_000, tv_nsec: now % 1_000_000_000 }
    };
    TimensEntry { monotonic: time(libc::CLOCK_MONOTONIC), boottime: time(libc::CLOCK_BOOTTIME) }
}

/// The last image.
pub fn inventory(run_id: &str) -> Writer {
    one(kind::INVENTORY, &entry(run_id))
}

/// The last image of a dump of memory alone.
pub fn inventory_of_memory(run_id: &str) -> Writer {
    // Every mapping is in it, also those that the process may not read: for CRIU that is the way called splice.
    const SPLICE: u32 = 1;
    one(kind::INVENTORY, &InventoryEntry { pre_dump_mode: Some(SPLICE), ..entry(run_id) })
}

fn entry(run_id: &str) -> InventoryEntry {
    // As CRIU reads it: a process that started later is another, though it has the same number.
    let uptime = sys::clock::now_ns(libc::CLOCK_BOOTTIME) / 10_000_000 * 10_000;
    InventoryEntry {
        img_version: 2,
        fdinfo_per_id: Some(true),
        root_ids: Some(TaskKobjIdsEntry { files_id: u32::MAX, ..namespace_ids() }),
        ns_per_id: Some(true),
        root_cg_set: Some(1),
        lsmtype: Some(Lsmtype::NoLsm.into()),
        dump_uptime: Some(uptime),
        dump_criu_run_id: Some(run_id.to_owned()),
        ..InventoryEntry::default()
    }
}
