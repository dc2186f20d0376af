//! The vdso of an image: an ELF file whose table of functions is read, and redirected to our own.
#![no_main]

use agent::arch::vdso;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = vdso::functions(data);
    let mut old = data.to_vec();
    let _ = vdso::redirect(&mut old, data, 0x7000_0000);
    assert_eq!(old.len(), data.len());
});
