//! Command lines and configuration files. The words of the command line are separated by zero bytes;
//! after two of them in a row comes the text of the configuration file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use model::options::Request;
use model::options::config::{self, Environment};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

fuzz_target!(|data: &[u8]| {
    let split = data.windows(2).position(|pair| pair == [0, 0]);
    let (line, file) = match split {
        Some(at) => (&data[..at], &data[at + 2..]),
        None => (data, &[][..]),
    };
    let _ = config::parse(file);
    let args = line.split(|&byte| byte == 0).map(|word| OsString::from_vec(word.to_vec())).collect();
    let environment = Environment { home: None, config_file: Some("/file".into()) };
    let _ = Request::read(args, &environment, &mut |_| Ok(Some(file.to_vec())));
});
