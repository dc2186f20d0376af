//! Answers of sock_diag(7) about UNIX sockets. The length in the header is put right for every second
//! input, so that what comes after it is reached.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [choice, reply @ ..] = data else { return };
    let mut reply = reply.to_vec();
    if choice & 1 == 0 && reply.len() >= 4 {
        let length = reply.len() as u32;
        reply[..4].copy_from_slice(&length.to_ne_bytes());
    }
    if let Ok(socket) = sys::unix_diag::parse(&reply) {
        assert!(socket.pending.len() * 4 <= reply.len());
    }
});
