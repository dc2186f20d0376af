//! The parsers of `/proc` text. The first byte chooses one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sys::proc::*;

fuzz_target!(|data: &[u8]| {
    let [choice, text @ ..] = data else { return };
    match choice % 8 {
        0 => {
            drop(parse_vma_line(text));
        }
        1 => {
            let mut whole = SmapsParser::default();
            whole.feed(text);
            let mut pieces = SmapsParser::default();
            text.chunks(1 + usize::from(choice >> 3)).for_each(|piece| pieces.feed(piece));
            assert_eq!(whole.finish(), pieces.finish(), "it matters where the text was cut");
        }
        2 => drop(parse_status(text)),
        3 => drop(parse_stat(text)),
        4 => drop(parse_timers(text)),
        5 => drop(parse_epoll(text)),
        6 => {
            for key in ["pos", "flags", "eventfd-count", "sigmask", ""] {
                let _ = fdinfo(text, key);
                let _ = fdinfo_hex(text, key);
            }
        }
        _ => {
            assert!(unescape(text).len() <= text.len());
            let _ = (decimal::<u64>(text), decimal::<i32>(text));
        }
    }
});
