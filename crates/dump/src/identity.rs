//! Which descriptors are one open file, and which tasks share one object: what kcmp(2) says, asked as
//! seldom as possible.

use std::cmp::Ordering;
use std::collections::HashMap;
use sys::process::{Kcmp, kcmp};

/// Objects of one kind seen so far, sorted as kcmp(2) sorts them.
#[derive(Debug, Default)]
pub struct Known<T> {
    sorted: Vec<((i32, i32), T)>,
}

impl<T: Copy> Known<T> {
    /// What was recorded for the object that `at` (process, descriptor) refers to; `new` records it.
    pub fn find(
        &mut self,
        what: Kcmp,
        at: (i32, i32),
        new: impl FnOnce() -> T,
    ) -> Result<(T, bool), model::Errno> {
        let (mut low, mut high) = (0, self.sorted.len());
        while low < high {
            let middle = (low + high) / 2;
            match kcmp(what, self.sorted[middle].0, at)? {
                Ordering::Equal => return Ok((self.sorted[middle].1, false)),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        let value = new();
        self.sorted.insert(low, (at, value));
        Ok((value, true))
    }
}

/// Open files, told apart first by what is known of them anyway: device, inode, flags, position.
#[derive(Debug, Default)]
pub struct Files(HashMap<Key, Known<(u32, i32)>>);

/// Device, inode, flags, position.
type Key = (u64, u64, u32, u64);

impl Files {
    /// Id and type of the open file, and whether it is new.
    pub fn find(
        &mut self,
        key: Key,
        at: (i32, i32),
        new: impl FnOnce() -> (u32, i32),
    ) -> Result<((u32, i32), bool), model::Errno> {
        self.0.entry(key).or_default().find(Kcmp::File, at, new)
    }
}
