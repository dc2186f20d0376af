//! tun and tap devices, in the network namespace that the tree shares with the tool.

use std::fs::File;
use std::io::{Read, Write};

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::tun::{attach, device, link, make_persistent, open, set_address, set_up};

const TUN: u16 = 1;
const TAP: u16 = 2;
const MULTI_QUEUE: u16 = 0x0100;
const NO_PI: u16 = 0x1000;
const WHY: &str = "it carries devices with their namespace alone";

pub const CASES: &[Case] = &[
    case!(tun_file_without_a_device_goes_on).needs(has_tun).peer_cannot(WHY),
    // The position of its file counts bytes, and means nothing.
    case!(persistent_device_is_attached_again).restless().needs(has_tun).peer_cannot(WHY),
    case!(device_of_the_tree_is_made_again).needs(has_tun).peer_cannot(WHY),
    case!(two_queues_of_a_device_go_on).needs(has_tun).peer_cannot(WHY),
    case!(device_with_addresses_that_would_go_is_refused).refused(&["fd", "tun7", "addresses", "persistent"])
        .needs(has_tun).peer_cannot(WHY),
];

fn has_tun() -> Result<(), String> {
    open().map(drop).map_err(|error| format!("no tun here: {error}"))
}

/// A packet to 10.9.0.2 goes out through the device, and arrives at its file.
fn carries(file: &mut File) {
    let socket = std::net::UdpSocket::bind("10.9.0.1:0").expect("bind");
    socket.send_to(b"hello", "10.9.0.2:7").expect("send");
    let mut packet = [0; 2048];
    // The kernel has things of its own to say.
    crate::case::until("the packet", || {
        file.read(&mut packet).is_ok_and(|count| packet[..count].ends_with(b"hello"))
    });
}

fn tun_file_without_a_device_goes_on(t: &Trial) {
    let file = open().expect("open");
    t.checkpoint();
    assert!(device(&file).is_err());
    attach(&file, "tun3", TUN | NO_PI).expect("attach");
    assert_eq!(device(&file).expect("a device").0, "tun3");
}

fn persistent_device_is_attached_again(t: &Trial) {
    let mut file = open().expect("open");
    attach(&file, "tun7", TUN | NO_PI).expect("attach");
    make_persistent(&file);
    set_address("tun7");
    set_up("tun7", 1400);
    carries(&mut file);
    let before = (device(&file).expect("a device"), link("tun7").expect("a link"));
    t.checkpoint();
    assert_eq!((device(&file).expect("a device"), link("tun7").expect("a link")), before);
    carries(&mut file);
}

fn device_of_the_tree_is_made_again(t: &Trial) {
    let mut tap = open().expect("open");
    attach(&tap, "tap7", TAP).expect("attach");
    set_up("tap7", 1300);
    let mut tun = open().expect("open");
    attach(&tun, "tun8", TUN | NO_PI).expect("attach");
    let facts = |tap: &File, tun: &File| {
        let devices = (device(tap).expect("a device"), device(tun).expect("a device"));
        (devices, link("tap7").expect("a link"), link("tun8").expect("a link"))
    };
    let before = facts(&tap, &tun);
    t.checkpoint();
    assert_eq!(facts(&tap, &tun), before);
    set_address("tun8");
    set_up("tun8", 1500);
    carries(&mut tun);
    // An echo request, in an Ethernet frame that nobody wants, behind four bytes of information.
    assert_eq!(tap.write(&[0; 64]).expect("write"), 64);
}

fn two_queues_of_a_device_go_on(t: &Trial) {
    let files = [open().expect("open"), open().expect("open")];
    files.iter().for_each(|file| attach(file, "tun9", TUN | NO_PI | MULTI_QUEUE).expect("attach"));
    let before = files.each_ref().map(|file| device(file).expect("a device"));
    t.checkpoint();
    assert_eq!(files.each_ref().map(|file| device(file).expect("a device")), before);
}

fn device_with_addresses_that_would_go_is_refused(t: &Trial) {
    let mut file = open().expect("open");
    attach(&file, "tun7", TUN | NO_PI).expect("attach");
    set_address("tun7");
    set_up("tun7", 1400);
    t.checkpoint();
    carries(&mut file);
}
