//! Which descriptors are one open file, and which tasks share one object: what kcmp(2) says, asked as
//! seldom as possible.
//!
//! kcmp(2) sorts, so that a merge sort finds what is equal: halves are sorted on all processors.

use model::Errno;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::hash::Hash;
use sys::process::Kcmp;

/// A task, and a descriptor of it where that matters.
pub type At = (i32, i32);

/// Those that refer to one object: the first is compared for all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Class {
    first: At,
    others: Vec<At>,
}

/// Says how two objects are ordered.
pub type Compare = fn(Kcmp, At, At) -> Result<Ordering, Errno>;

/// Sorts them into classes, in the order of [`Compare`].
fn sort(compare: Compare, what: Kcmp, all: &[At]) -> Result<Vec<Class>, Errno> {
    match all {
        [] => Ok(Vec::new()),
        [first] => Ok(vec![Class { first: *first, others: Vec::new() }]),
        _ => {
            let (left, right) = all.split_at(all.len() / 2);
            merge(compare, what, sort(compare, what, left)?, sort(compare, what, right)?)
        }
    }
}

/// Joins two sorted lists. The first of a class is that of `left`, where it is in both.
fn merge(compare: Compare, what: Kcmp, left: Vec<Class>, right: Vec<Class>) -> Result<Vec<Class>, Errno> {
    let mut merged = Vec::with_capacity(left.len() + right.len());
    let mut right = right.into_iter().peekable();
    for mut class in left {
        while let Some(other) = right.peek() {
            let order = compare(what, class.first, other.first)?;
            if order.is_lt() {
                break;
            }
            let other = right.next().expect("it was there");
            if order.is_gt() {
                merged.push(other);
            } else {
                class.others.push(other.first);
                class.others.extend(other.others);
                break;
            }
        }
        merged.push(class);
    }
    merged.extend(right);
    Ok(merged)
}

/// Classes of candidates: only what has the same key is compared.
#[derive(Debug)]
pub struct Classes<K>(HashMap<K, Vec<Class>>);

impl<K> Default for Classes<K> {
    fn default() -> Classes<K> {
        Classes(HashMap::new())
    }
}

impl<K: Hash + Eq> Classes<K> {
    /// Sorts candidates.
    ///
    /// # Errors
    /// Those of kcmp(2).
    pub fn new(what: Kcmp, candidates: impl IntoIterator<Item = (K, At)>) -> Result<Classes<K>, Errno> {
        let mut all: HashMap<K, Vec<At>> = HashMap::new();
        for (key, at) in candidates {
            all.entry(key).or_default().push(at);
        }
        let sorted = |(key, all): (K, Vec<At>)| Ok((key, sort(sys::process::kcmp, what, &all)?));
        all.into_iter().map(sorted).collect::<Result<_, _>>().map(Classes)
    }

    /// Adds others. Who was here first stays the first of its class.
    ///
    /// # Errors
    /// Those of kcmp(2).
    pub fn add(&mut self, what: Kcmp, more: Classes<K>) -> Result<(), Errno> {
        for (key, more) in more.0 {
            let known = self.0.entry(key).or_default();
            *known = merge(sys::process::kcmp, what, std::mem::take(known), more)?;
        }
        Ok(())
    }

    /// The first of the class of each.
    pub fn firsts(&self) -> HashMap<At, At> {
        let classes = self.0.values().flatten();
        classes
            .flat_map(|class| class.others.iter().chain([&class.first]).map(|at| (*at, class.first)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Descriptors are one file when they have the same remainder.
    fn compare(_: Kcmp, left: At, right: At) -> Result<Ordering, Errno> {
        Ok((left.1 % 7).cmp(&(right.1 % 7)))
    }

    #[test]
    fn equal_ones_are_found_however_they_are_mixed() {
        let all: Vec<At> = (0..100).map(|n| (1, n * 13 % 100)).collect();
        let classes = sort(compare, Kcmp::File, &all).expect("no call fails");
        let remainders: Vec<i32> = classes.iter().map(|class| class.first.1 % 7).collect();
        assert_eq!(remainders, [0, 1, 2, 3, 4, 5, 6]);
        for class in &classes {
            assert!(class.others.iter().all(|at| at.1 % 7 == class.first.1 % 7));
        }
        assert_eq!(classes.iter().map(|class| 1 + class.others.len()).sum::<usize>(), 100);
    }

    #[test]
    fn the_first_stays_the_first() {
        let known = sort(compare, Kcmp::File, &[(1, 3), (1, 5)]).expect("no call fails");
        let more = sort(compare, Kcmp::File, &[(2, 12), (2, 1)]).expect("no call fails");
        let merged = merge(compare, Kcmp::File, known, more).expect("no call fails");
        let firsts: Vec<At> = merged.iter().map(|class| class.first).collect();
        assert_eq!(firsts, [(2, 1), (1, 3), (1, 5)]);
        assert_eq!(merged[2].others, [(2, 12)]);
    }
}
