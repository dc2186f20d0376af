//! The build id of an executable or a library: a note that the linker left in it.
//!
//! Source: elf(5); ld(1) --build-id.

use std::fs::File;
use std::os::unix::fs::FileExt;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;
/// More program headers, or longer notes, than a linker makes: the file is not to be trusted.
const HEADERS_MAX: usize = 128;
const NOTES_MAX: u64 = 64 << 10;
/// The longest that is looked for: twice a SHA-256.
const ID_MAX: usize = 64;

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The build id of a file; none where there is none, or the file is no executable of 64 bits.
pub fn read(file: &File) -> Option<Vec<u8>> {
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0).ok()?;
    if header[..6] != *b"\x7fELF\x02\x01" {
        return None;
    }
    let half = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (start, size, count) = (word64(&header, 32)?, half(54), half(56));
    if size != PROGRAM_HEADER || count > HEADERS_MAX {
        return None;
    }
    let mut headers = vec![0; size * count];
    file.read_exact_at(&mut headers, start).ok()?;
    headers.chunks_exact(size).filter(|header| word32(header, 0) == Some(PT_NOTE)).find_map(|header| {
        let (offset, length) = (word64(header, 8)?, word64(header, 32)?);
        let mut notes = vec![0; length.min(NOTES_MAX) as usize];
        file.read_exact_at(&mut notes, offset).ok()?;
        find(&notes)
    })
}

/// The build id among notes.
fn find(mut notes: &[u8]) -> Option<Vec<u8>> {
    loop {
        let (name, length, kind) =
            (word32(notes, 0)? as usize, word32(notes, 4)? as usize, word32(notes, 8)?);
        let name_end = 12usize.checked_add(name)?;
        let at = name_end.checked_next_multiple_of(4)?;
        let end = at.checked_add(length)?;
        if kind == NT_GNU_BUILD_ID && notes.get(12..name_end)? == b"GNU\0" {
            return notes.get(at..end).filter(|id| (1..=ID_MAX).contains(&id.len())).map(<[u8]>::to_vec);
        }
        notes = notes.get(end.checked_next_multiple_of(4)?..)?;
    }
}

/// As images hold it: words, the last filled up with zeros.
pub fn words(id: &[u8]) -> Vec<u32> {
    id.chunks(4)
        .map(|part| {
            let mut word = [0; 4];
            word[..part.len()].copy_from_slice(part);
            u32::from_ne_bytes(word)
        })
        .collect()
}

/// As people write it.
pub fn text(words: &[u32]) -> String {
    words.iter().flat_map(|word| word.to_ne_bytes()).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [name.len() as u32, content.len() as u32, kind] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        for part in [name, content] {
            note.extend_from_slice(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    #[test]
    fn the_id_is_found_behind_other_notes() {
        let notes = [note(b"GNU\0", 1, &[1; 16]), note(b"Go\0\0", 3, b"other"), note(b"GNU\0", 3, &[7; 20])];
        assert_eq!(find(&notes.concat()), Some(vec![7; 20]));
        assert_eq!(find(&notes[..2].concat()), None);
    }

    #[test]
    fn notes_that_lie_are_none() {
        let whole = note(b"GNU\0", 3, &[7; 20]);
        for length in 0..whole.len() {
            assert_eq!(find(&whole[..length]), None);
        }
        let mut huge = whole.clone();
        huge[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(find(&huge), None);
        assert_eq!(find(&note(b"GNU\0", 3, &[7; 65])), None);
    }

    #[test]
    fn words_are_filled_up() {
        assert_eq!(text(&words(&[1, 2, 3, 4, 5])), "0102030405000000");
    }

    #[test]
    fn a_file_that_is_no_executable_has_none() {
        assert_eq!(read(&File::open("/proc/self/maps").unwrap()), None);
        assert_eq!(read(&File::open("/dev/null").unwrap()), None);
    }
}
