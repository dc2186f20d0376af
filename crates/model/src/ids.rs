//! What belongs to the ids of an image.

/// Values by their ids. Ids in images mostly follow each other, so that an id leads straight to its place; where they do
/// not, it is searched for. Whatever ids an image makes up, that takes no longer than a search among them.
#[derive(Debug, Clone)]
pub struct IdMap<T> {
    /// In the order of their ids, each once.
    entries: Vec<(u32, T)>,
}

impl<T> Default for IdMap<T> {
    fn default() -> IdMap<T> {
        IdMap { entries: Vec::new() }
    }
}

impl<T> IdMap<T> {
    fn place(&self, id: u32) -> Option<usize> {
        let first = self.entries.first()?.0;
        let likely = id.checked_sub(first)? as usize;
        if self.entries.get(likely).is_some_and(|entry| entry.0 == id) {
            return Some(likely);
        }
        self.entries.binary_search_by_key(&id, |entry| entry.0).ok()
    }

    pub fn get(&self, id: u32) -> Option<&T> {
        Some(&self.entries[self.place(id)?].1)
    }

    pub fn contains(&self, id: u32) -> bool {
        self.place(id).is_some()
    }

    /// In the order of the ids.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.entries.iter().map(|(id, value)| (*id, value))
    }

    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().map(|(_, value)| value)
    }

    pub fn into_values(self) -> impl Iterator<Item = T> {
        self.entries.into_iter().map(|(_, value)| value)
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds these; those whose ids are taken, also by others of them, are given back, in their order.
    pub fn add(&mut self, more: impl IntoIterator<Item = (u32, T)>) -> Vec<(u32, T)> {
        self.entries.extend(more);
        // What was there first stays first.
        self.entries.sort_by_key(|entry| entry.0);
        let is_twice = |pair: &[(u32, T)]| pair[0].0 == pair[1].0;
        if !self.entries.windows(2).any(is_twice) {
            return Vec::new();
        }
        let mut taken = Vec::new();
        let mut kept: Vec<(u32, T)> = Vec::with_capacity(self.entries.len());
        for entry in self.entries.drain(..) {
            match kept.last().is_some_and(|last| last.0 == entry.0) {
                true => taken.push(entry),
                false => kept.push(entry),
            }
        }
        self.entries = kept;
        taken
    }
}

impl<T> std::ops::Index<u32> for IdMap<T> {
    type Output = T;

    /// # Panics
    /// If there is none.
    fn index(&self, id: u32) -> &T {
        self.get(id).expect("there is one with this id")
    }
}

impl<T> FromIterator<(u32, T)> for IdMap<T> {
    /// Of several with one id, the first.
    fn from_iter<I: IntoIterator<Item = (u32, T)>>(all: I) -> IdMap<T> {
        let mut map = IdMap::default();
        map.add(all);
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_leads_to_its_own() {
        for ids in [vec![], vec![7], vec![1, 2, 3, 4], vec![4, 2, 9, 3], vec![u32::MAX, 0, 5, 6]] {
            let map: IdMap<u32> = ids.iter().map(|id| (*id, !id)).collect();
            assert_eq!(map.len(), ids.len());
            for id in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, u32::MAX - 1, u32::MAX] {
                assert_eq!(map.get(id), ids.contains(&id).then_some(&!id), "{id} of {ids:?}");
            }
            assert!(map.iter().map(|(id, _)| id).is_sorted());
        }
    }

    #[test]
    fn an_id_that_is_taken_stays_with_the_first() {
        let mut map: IdMap<&str> = [(5, "a"), (3, "b")].into_iter().collect();
        assert_eq!(map.add([(4, "c"), (3, "d"), (4, "e")]), [(3, "d"), (4, "e")]);
        assert_eq!(map.values().copied().collect::<Vec<_>>(), ["b", "c", "a"]);
    }
}
