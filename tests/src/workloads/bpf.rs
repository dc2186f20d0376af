//! Maps of bpf(2).

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::bpf::Map;

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const LRU_HASH: u32 = 9;
const NO_PREALLOC: u32 = 1;

const WHY: &str = "it is built without what it takes";

pub const CASES: &[Case] = &[
    case!(hash_table_keeps_what_is_in_it).needs(has_maps).peer_cannot(WHY),
    case!(array_keeps_what_is_in_it).needs(has_maps).peer_cannot(WHY),
    case!(frozen_map_stays_frozen).needs(has_maps).peer_cannot(WHY),
    case!(two_descriptors_of_one_map_stay_so).needs(has_maps).peer_cannot("it makes two maps of it"),
    case!(map_of_another_sort_is_refused).refused(&["fd", "BPF map", "type 9"]).needs(has_maps)
        .peer_cannot("its message is another"),
];

fn has_maps() -> Result<(), String> {
    Map::new(ARRAY, 1, 0).map(drop).map_err(|error| format!("no BPF maps here: {error}"))
}

fn facts(map: &Map) -> [String; 5] {
    ["map_type", "key_size", "value_size", "max_entries", "map_flags"].map(|name| map.fact(name))
}

fn hash_table_keeps_what_is_in_it(t: &Trial) {
    let (map, empty) = (Map::new(HASH, 500, NO_PREALLOC).expect("map"), Map::new(HASH, 8, 0).expect("map"));
    for key in (0..400).map(|key| key * 7) {
        map.set(key, key + 1).expect("set");
    }
    let before = (facts(&map), facts(&empty));
    t.checkpoint();
    assert_eq!((facts(&map), facts(&empty)), before);
    for key in 0..2800 {
        assert_eq!(map.get(key).ok(), (key % 7 == 0).then_some(key + 1));
    }
    assert!(empty.get(0).is_err());
    empty.set(5, 6).expect("set");
    assert_eq!(empty.get(5).expect("get"), 6);
}

fn array_keeps_what_is_in_it(t: &Trial) {
    let map = Map::new(ARRAY, 300, 0).expect("map");
    map.set(7, 70).expect("set");
    map.set(299, 2990).expect("set");
    let before = facts(&map);
    t.checkpoint();
    assert_eq!(facts(&map), before);
    assert_eq!([0, 7, 299].map(|key| map.get(key).expect("get")), [0, 70, 2990]);
    assert!(map.set(300, 1).is_err());
}

fn frozen_map_stays_frozen(t: &Trial) {
    let map = Map::new(ARRAY, 4, 0).expect("map");
    map.set(1, 10).expect("set");
    map.freeze().expect("freeze");
    t.checkpoint();
    assert_eq!(map.get(1).expect("get"), 10);
    assert!(map.set(1, 11).is_err());
    assert_eq!(map.fact("frozen"), "1");
}

fn two_descriptors_of_one_map_stay_so(t: &Trial) {
    let map = Map::new(HASH, 8, 0).expect("map");
    let reader = map.to_read().expect("another descriptor");
    map.set(1, 10).expect("set");
    t.checkpoint();
    assert_eq!(map.fact("map_id"), reader.fact("map_id"));
    map.set(1, 11).expect("set");
    assert_eq!(reader.get(1).expect("get"), 11);
    assert!(reader.set(1, 12).is_err());
}

fn map_of_another_sort_is_refused(t: &Trial) {
    let map = Map::new(LRU_HASH, 64, 0).expect("map");
    map.set(1, 10).expect("set");
    t.checkpoint();
    assert_eq!(map.get(1).expect("get"), 10);
}
