//! virtio-console without a kernel: ports, control messages, streams, flow control and hostile
//! drivers, through mmio registers and rings that are written by hand.

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::time::Duration;

use minivmm::console::stream::{Sink, Source};
use minivmm::console::window::WindowSize;
use minivmm::console::{CONTROL_RX, CONTROL_TX, PortConfig, rx_queue, tx_queue};
use minivmm_testkit::console_rig::*;
use minivmm_testkit::over_pci;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

const INPUT: u16 = 1;
const OUTPUT: u16 = 2;
const REPORT: u16 = 3;

/// A device of three ports, and the host's ends of their pipes.
struct Ports {
    rig: ConsoleRig,
    input: Option<PipeWriter>,
    output: Option<PipeReader>,
    report: PipeReader,
}

fn port(name: &'static str, source: Option<Source>, sink: Option<Sink>, after_others: bool) -> PortConfig {
    PortConfig { name, source, sink, after_others }
}

fn ports() -> Ports {
    let (from_host, input) = std::io::pipe().unwrap();
    let (output, to_host) = std::io::pipe().unwrap();
    let (report, to_report) = std::io::pipe().unwrap();
    let rig = ConsoleRig::new(vec![
        port("in", Some(Source::new(from_host).unwrap()), None, false),
        port("out", None, Some(Sink::new(to_host).unwrap()), false),
        port("report", None, Some(Sink::new(to_report).unwrap()), true),
    ]);
    Ports { rig, input: Some(input), output: Some(output), report }
}

/// A driver that has done what Linux does until its ports are there and open.
fn live_ports() -> Ports {
    let mut ports = ports();
    ports.rig.start(MULTIPORT);
    ports.rig.hello(3);
    ports
}

fn random(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn ports_are_announced_as_linux_wants_them() {
    let mut ports = ports();
    let rig = &mut ports.rig;
    assert_eq!(rig.read(0x008), 3, "device id");
    assert_eq!(rig.config32(4), 4, "max_nr_ports: ours and port 0");
    rig.start(MULTIPORT);
    rig.offer(CONTROL_RX, 16, 64);
    rig.say(0, DEVICE_READY, 1);
    let messages: Vec<_> = (0..3).map(|_| rig.hear()).collect();
    assert_eq!(messages, [1, 2, 3].map(|id| (id, PORT_ADD, 0, String::new())));
    rig.say(2, PORT_READY, 1);
    assert_eq!(rig.hear(), (2, PORT_OPEN, 1, String::new()));
    assert_eq!(rig.hear(), (2, PORT_NAME, 1, "out".into()));
}

#[test]
fn a_driver_without_multiport_gets_no_ports_and_its_output_is_thrown_away() {
    let mut ports = ports();
    let rig = &mut ports.rig;
    rig.start(0);
    rig.offer(CONTROL_RX, 4, 64);
    rig.say(0, DEVICE_READY, 1);
    assert_eq!(rig.send(0, b"hello"), 0);
    assert_eq!(rig.used(CONTROL_RX), 0);
    assert!(!rig.needs_reset());
}

#[test]
fn a_mebibyte_goes_out_and_in_byte_for_byte_in_pieces_of_all_sizes() {
    let Ports { mut rig, mut input, mut output, .. } = live_ports();
    let bytes = random(1 << 20);
    let expected = bytes.clone();
    let mut output = output.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut all = vec![0; expected.len()];
        output.read_exact(&mut all).unwrap();
        assert!(all == expected);
    });
    let mut rest = bytes.as_slice();
    for size in (1..).map(|n: usize| n * n * 7 % 30_011 + 1) {
        let (now, later) = rest.split_at(size.min(rest.len()));
        rig.send(OUTPUT, now);
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    reader.join().unwrap();

    let mut input = input.take().unwrap();
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || input.write_all(&sent).unwrap());
    let mut got = Vec::new();
    while got.len() < bytes.len() {
        got.extend(rig.receive(INPUT, 3000));
    }
    writer.join().unwrap();
    assert!(got == bytes);
    // The end shows with a buffer at hand, as Linux always has one.
    rig.offer(rx_queue(INPUT), 1, 64);
    assert_eq!(rig.hear(), (u32::from(INPUT), PORT_OPEN, 0, String::new()), "the writer is gone: the end");
}

#[test]
fn input_waits_until_a_program_has_the_port_open() {
    let mut ports = ports();
    ports.input.as_mut().unwrap().write_all(b"early").unwrap();
    let rig = &mut ports.rig;
    rig.start(MULTIPORT);
    rig.offer(CONTROL_RX, 16, 64);
    rig.say(0, DEVICE_READY, 1);
    rig.offer(rx_queue(INPUT), 1, 100);
    rig.say(u32::from(INPUT), PORT_READY, 1);
    rig.send(OUTPUT, b"a round trip");
    assert_eq!(rig.used(rx_queue(INPUT)), 0);
    rig.say(u32::from(INPUT), PORT_OPEN, 1);
    assert_eq!(rig.wait_used(rx_queue(INPUT)).1, 5);
}

#[test]
fn a_reader_that_stops_reading_stalls_its_port_and_nothing_else() {
    let mut ports = live_ports();
    let rig = &mut ports.rig;
    let chunk = vec![7; 32 << 10];
    // A pipe holds 64 KiB; what is beyond it stays in the guest's buffers.
    let sent: Vec<_> = (0..8).map(|_| rig.post(OUTPUT, &chunk)).collect();
    let done = rig.settled(tx_queue(OUTPUT));
    assert!(done < sent.len(), "{done} of {} chains of 32 KiB went into a pipe", sent.len());
    // Input goes on meanwhile.
    ports.input.as_mut().unwrap().write_all(b"still").unwrap();
    assert_eq!(rig.receive(INPUT, 100), b"still");
    // And reset does not wait for the reader.
    let begin = std::time::Instant::now();
    rig.write(0x070, 0);
    assert_eq!(rig.read(0x070), 0);
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_report_goes_out_after_all_that_was_written_before_it() {
    let mut ports = live_ports();
    let rig = &mut ports.rig;
    let chunk = vec![1; 32 << 10];
    for _ in 0..8 {
        rig.post(OUTPUT, &chunk);
    }
    rig.post(REPORT, b"exited 0\n");
    // A round trip on another queue: the worker has seen the report, and must have held it back.
    rig.say(9, PORT_OPEN, 1);
    let seen = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut report = ports.report;
    let flag = std::sync::Arc::clone(&seen);
    let listener = std::thread::spawn(move || {
        let mut bytes = [0; 9];
        report.read_exact(&mut bytes).unwrap();
        flag.store(true, std::sync::atomic::Ordering::SeqCst);
        assert_eq!(&bytes, b"exited 0\n");
    });
    let mut output = ports.output.take().unwrap();
    let mut bytes = vec![0; 8 * chunk.len() - (64 << 10) - 1];
    output.read_exact(&mut bytes).unwrap();
    // More than a pipe is still to come, so the report cannot have gone.
    assert!(!seen.load(std::sync::atomic::Ordering::SeqCst));
    let mut rest = vec![0; (64 << 10) + 1];
    output.read_exact(&mut rest).unwrap();
    listener.join().unwrap();
}

#[test]
fn a_reader_that_went_away_is_told_to_the_driver_and_its_output_goes_nowhere() {
    let mut ports = live_ports();
    drop(ports.output.take());
    ports.rig.send(OUTPUT, b"to nobody");
    assert_eq!(ports.rig.hear(), (u32::from(OUTPUT), PORT_OPEN, 0, String::new()));
    for _ in 0..100 {
        ports.rig.send(OUTPUT, &[0; 32 << 10]);
    }
}

#[test]
fn a_full_disk_is_remembered() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let sink = Sink::new(full).unwrap();
    let error = sink.error();
    let mut rig = ConsoleRig::new(vec![port("out", None, Some(sink), false)]);
    rig.start(MULTIPORT);
    rig.hello(1);
    rig.send(1, b"lost");
    assert_eq!(error.get().unwrap().raw_os_error(), Some(libc::ENOSPC));
}

#[test]
fn a_regular_file_keeps_its_offset_and_gets_every_byte() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all(b"before ").unwrap();
    let mut rig = ConsoleRig::new(vec![port("out", None, Some(Sink::new(file.as_file()).unwrap()), false)]);
    rig.start(MULTIPORT);
    rig.hello(1);
    rig.send(1, b"after");
    assert_eq!(std::fs::read(file.path()).unwrap(), b"before after");
}

#[test]
fn a_second_driver_finds_everything_anew() {
    let mut ports = live_ports();
    for round in 0..3 {
        ports.rig.send(OUTPUT, b"again");
        let mut bytes = [0; 5];
        ports.output.as_mut().unwrap().read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"again", "round {round}");
        ports.rig.start(MULTIPORT);
        ports.rig.hello(3);
    }
}

#[test]
fn a_stopped_queue_is_not_touched_any_more() {
    if over_pci::is_pci() {
        return println!("over PCI a driver cannot stop a queue (virtio 4.1.4.3.2)");
    }
    let mut ports = live_ports();
    let rig = &mut ports.rig;
    rig.stop_queue(tx_queue(OUTPUT));
    rig.post(OUTPUT, b"too late");
    rig.send(REPORT, b"x");
    assert_eq!(rig.used(tx_queue(OUTPUT)), 0);
}

#[test]
fn chains_that_make_no_sense_are_returned_and_carry_nothing() {
    let mut ports = live_ports();
    let rig = &mut ports.rig;
    for (what, queue, chain) in [
        ("outside RAM", tx_queue(OUTPUT), vec![(1 << 40, 16, 0)]),
        ("the end of RAM", tx_queue(OUTPUT), vec![(RAM_BYTES - 8, 16, 0)]),
        ("wraps", tx_queue(OUTPUT), vec![(u64::MAX - 7, 16, 0)]),
        ("empty", tx_queue(OUTPUT), vec![(BUFFERS, 0, 0)]),
        ("only writable", tx_queue(OUTPUT), vec![(BUFFERS, 16, WRITE)]),
        ("readable behind writable", tx_queue(OUTPUT), vec![(BUFFERS, 16, WRITE), (BUFFERS, 16, 0)]),
        ("more than 4 GiB", tx_queue(OUTPUT), vec![(BUFFERS, u32::MAX, 0), (BUFFERS, u32::MAX, 0)]),
        ("a short message", CONTROL_TX, vec![(BUFFERS, 7, 0)]),
        ("a message outside RAM", CONTROL_TX, vec![(1 << 40, 8, 0)]),
        ("input only readable", rx_queue(INPUT), vec![(BUFFERS, 16, 0)]),
        ("input outside RAM", rx_queue(INPUT), vec![(1 << 40, 16, WRITE)]),
    ] {
        assert_eq!(rig.submit(queue, &chain), 0, "{what}");
        assert!(!rig.needs_reset(), "{what}");
    }
    rig.send(OUTPUT, b"sane");
    let mut bytes = [0; 4];
    ports.output.as_mut().unwrap().read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"sane");
}

#[test]
fn a_broken_ring_needs_a_reset_and_after_it_all_is_well() {
    type Break = fn(&mut ConsoleRig, u16);
    let breaks: [(&str, Break); 4] = [
        ("an index that jumps", |rig, queue| rig.set_avail_idx(queue, 1000)),
        ("a descriptor beyond the table", |rig, queue| rig.make_available(queue, 999)),
        ("a loop", |rig, queue| {
            rig.put_desc(queue, 0, (BUFFERS, 1, NEXT, 0));
            rig.make_available(queue, 0);
        }),
        ("an indirect table of no length", |rig, queue| {
            rig.put_desc(queue, 0, (BUFFERS, 0, INDIRECT, 0));
            rig.make_available(queue, 0);
        }),
    ];
    for queue in [0, tx_queue(0), CONTROL_TX, rx_queue(INPUT), tx_queue(OUTPUT), tx_queue(REPORT)] {
        for (what, break_it) in breaks {
            let mut ports = live_ports();
            let rig = &mut ports.rig;
            break_it(rig, queue);
            rig.ring(queue);
            if queue == 0 {
                // Nothing is ever taken from port 0's input.
                rig.send(OUTPUT, b"x");
                continue;
            }
            rig.wait_needs_reset(&format!("{what} on queue {queue}"));
            rig.start(MULTIPORT);
            rig.hello(3);
            rig.send(OUTPUT, b"well");
        }
    }
}

#[test]
fn a_flood_of_messages_takes_no_memory_and_an_answer_that_does_not_fit_is_passed_over() {
    let mut ports = ports();
    let rig = &mut ports.rig;
    rig.start(MULTIPORT);
    for _ in 0..2000 {
        rig.say(0, DEVICE_READY, 1);
    }
    rig.offer(CONTROL_RX, 1, 4);
    assert_eq!(rig.wait_used(CONTROL_RX).1, 0, "four bytes are too few");
    rig.offer(CONTROL_RX, 8, 64);
    assert_eq!(rig.hear().0, 2);
    assert_eq!(rig.hear().0, 3);
    rig.send(OUTPUT, b"x");
    assert_eq!(rig.used(CONTROL_RX), 3, "no more was kept");
}

/// Bit 1 of InterruptStatus, which is taken back: the configuration has changed.
fn wait_config_changed(rig: &mut ConsoleRig) {
    let begin = std::time::Instant::now();
    while rig.read(0x060) & 2 == 0 {
        assert!(begin.elapsed() < Duration::from_secs(10), "no configuration change was told");
        std::thread::yield_now();
    }
    rig.write(0x064, 3);
}

#[test]
fn a_terminals_device_shows_its_size_and_tells_each_change() {
    let (source, mut input) = std::io::pipe().unwrap();
    let (mut output, sink) = std::io::pipe().unwrap();
    let size = |columns, rows| WindowSize { columns, rows };
    let (mut rig, window) =
        ConsoleRig::terminal(Source::new(source).unwrap(), Sink::new(sink).unwrap(), size(101, 31));
    rig.write(0x014, 0);
    assert_eq!(rig.read(0x010) & 7, 1, "F_SIZE, and neither MULTIPORT nor EMERG_WRITE");
    rig.start(1);
    assert_eq!(rig.config32(0), 31 << 16 | 101, "cols, rows");
    assert_eq!(rig.config32(4), 0, "max_nr_ports belongs to MULTIPORT");
    wait_config_changed(&mut rig);

    // Linux throws away what it is told before its port is there; output comes after that.
    assert!(!window.has_output());
    assert_eq!(rig.send(0, b"prompt"), 0);
    let mut told = [0; 6];
    output.read_exact(&mut told).unwrap();
    assert_eq!(&told, b"prompt");
    assert!(window.has_output());
    wait_config_changed(&mut rig);

    let generation = rig.read(0x0fc);
    assert_eq!(rig.read(0x0fc), generation);
    window.resize(size(80, 24));
    wait_config_changed(&mut rig);
    assert_eq!(rig.config32(0), 24 << 16 | 80);
    assert_ne!(rig.read(0x0fc), generation, "a driver that has read half of the old size reads again");
    window.resize(size(80, 24));
    rig.send(0, b"x");
    assert_eq!(rig.read(0x060) & 2, 0, "the same size is no change");

    input.write_all(b"typed").unwrap();
    assert_eq!(rig.receive(0, 100), b"typed");
    // The next driver is told as well.
    rig.start(1);
    wait_config_changed(&mut rig);
    assert_eq!(rig.config32(0), 24 << 16 | 80);
    drop(input);
    rig.offer(rx_queue(0), 1, 64);
    rig.send(0, b"y");
    assert_eq!(rig.used(rx_queue(0)), 0, "the end of a terminal's input is no empty buffer");
    assert!(!rig.needs_reset());
}

#[test]
fn a_terminals_queues_can_be_taken_back_and_broken_rings_end_in_a_reset() {
    let (source, _input) = std::io::pipe().unwrap();
    let (_output, sink) = std::io::pipe().unwrap();
    let size = WindowSize { columns: 80, rows: 24 };
    let (mut rig, _window) =
        ConsoleRig::terminal(Source::new(source).unwrap(), Sink::new(sink).unwrap(), size);
    rig.start(1);
    if !over_pci::is_pci() {
        rig.stop_queue(rx_queue(0));
    }
    rig.send(0, b"x");
    rig.set_avail_idx(tx_queue(0), 1000);
    rig.ring(tx_queue(0));
    rig.wait_needs_reset("an index that jumps");
    rig.start(1);
    rig.send(0, b"x");
}
