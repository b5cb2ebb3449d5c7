//! What `--disk` says, and the faults in it: whatever is accepted keeps to its limits, and is the same
//! when it is said again; whatever is refused is refused in one line.

use minivmm::disk::fault::plan::Faults;
use minivmm::disk::fault::spec::FaultSpec;
use minivmm::disk_options;

use super::input::Input;

/// What a mutator can put together to something that is accepted.
const WORDS: [&str; 49] = [
    "cache=",
    "none",
    "writethrough",
    "writeback",
    "directsync",
    "unsafe",
    "dontcache",
    "readonly",
    "=on",
    "=off",
    "serial=",
    "queues=",
    "queue-size=",
    "block-size=",
    "512",
    "4096",
    "discard",
    "engine=",
    "io_uring",
    "sync",
    "auto",
    "stable=",
    "dsync",
    "group",
    "batch=",
    "poll-us=",
    "transport=pci",
    "buffers=fixed",
    "bounce=always",
    "fault=",
    "fail",
    "=EIO",
    "=ENOSPC",
    "delay=",
    "short",
    "tear",
    "lose",
    ":write",
    ":flush",
    ":read",
    ":nth=",
    ":every=",
    ":chance=",
    "%",
    ":sectors=",
    "-",
    "+",
    "seed=",
    "flush-fail=once",
];

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let text = match input.below(3) {
        0 => String::from_utf8_lossy(input.rest()).into_owned(),
        _ => compose(&mut input),
    };
    check_options(&text);
    check_faults(&text);
}

fn compose(input: &mut Input<'_>) -> String {
    let mut text = if input.flag() { "disk.img,".to_owned() } else { String::new() };
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        match input.below(4) {
            0 => text.push(','),
            1 => text.push_str(&input.edgy().to_string()),
            2 => text.push_str(&String::from_utf8_lossy(input.bytes(8))),
            _ => text.push_str(input.pick(&WORDS)),
        }
    }
    text
}

fn check_options(text: &str) {
    match disk_options::parse(text) {
        Err(error) => check_message(&error),
        Ok(options) => {
            let config = &options.config;
            assert!(!config.path.as_os_str().is_empty());
            assert!(config.serial.as_ref().is_none_or(|serial| serial.len() <= 20), "B14");
            assert!(config.queue_size.is_power_of_two() && (4..=1024).contains(&config.queue_size));
            assert!(config.queues.is_none_or(|queues| (1..=16).contains(&queues)));
            assert!(config.block_size.is_none_or(|bytes| bytes == 512 || bytes == 4096));
            assert!((1..=1024).contains(&config.batch));
            assert!(config.poll_us.is_none_or(|us| us <= 1000));
            assert_eq!(disk_options::parse(text), Ok(options));
        }
    }
}

fn check_faults(text: &str) {
    match text.parse::<FaultSpec>() {
        Err(error) => check_message(&error),
        Ok(spec) => {
            assert_eq!(spec.text, text);
            assert_eq!(text.parse().as_ref(), Ok(&spec));
            let _ = (spec.lies(), Faults::new(spec));
        }
    }
}

fn check_message(error: &dyn std::error::Error) {
    let message = error.to_string();
    assert!(!message.is_empty());
}
