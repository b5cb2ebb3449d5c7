//! What the durability monitor costs: instructions and time of each event, alone and inside the
//! disk's state machine. How to run it, and what came out, is in `docs/results/performance.md`.
//!
//! Usage: monitor_cost acknowledge|sync|write COUNT [IMAGE]

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use minivmm::disk::cache::{CachePolicy, Negotiated, WriteCache};
use minivmm::disk::disk_queue::{DiskQueue, Op, RequestId, StableBy};
use minivmm::disk::engine::{Ended, Engine, HostOp, OpToken, Wake};
use minivmm::disk::monitor::{Monitor, SyncEnd};
use minivmm::disk::{DiskConfig, Image};
use minivmm::mem::{AlignedBuffer, Iov};

/// Ends everything at once and does nothing.
#[derive(Default)]
struct Nothing(Vec<Ended>);

impl Engine for Nothing {
    fn submit(&mut self, token: OpToken, _: HostOp) -> Result<(), HostOp> {
        self.0.push(Ended { token, result: Ok(4096) });
        Ok(())
    }

    fn wait(&mut self, _: Wake<'_>, ended: &mut Vec<Ended>) -> io::Result<()> {
        ended.append(&mut self.0);
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let usage = "monitor_cost acknowledge|sync|write COUNT [IMAGE]";
    let [_, what, count, image @ ..] = &args[..] else { return Err(usage.into()) };
    let count: u64 = count.parse()?;
    let begin = Instant::now();
    match (what.as_str(), image) {
        ("acknowledge", []) => {
            let monitor = Monitor::default();
            (0..count).for_each(|_| monitor.acknowledges(4096));
        }
        ("sync", []) => {
            let monitor = Monitor::default();
            for _ in 0..count {
                monitor.acknowledges(4096);
                let start = monitor.sync_starts();
                monitor.sync_ends(start, SyncEnd::Stable);
            }
        }
        ("write", [image]) => writes(count, image)?,
        _ => return Err(usage.into()),
    }
    println!("{what}: {:.1} ns each", begin.elapsed().as_nanos() as f64 / count as f64);
    Ok(())
}

/// Writes of 4 KiB that need not be stable, one after another, through the state machine.
fn writes(count: u64, image: &str) -> Result<(), Box<dyn Error>> {
    let policy = CachePolicy::by_name("writeback").ok_or("no such mode")?;
    let image = Arc::new(Image::open(&DiskConfig { cache: policy, ..DiskConfig::new(image) })?);
    let cache = Arc::new(WriteCache::new(policy));
    cache.negotiate(Negotiated { flush: true, config_wce: true });
    let mut disk = DiskQueue::new(Arc::clone(&image), cache, Box::new(Nothing::default()), StableBy::Dsync);
    let range = image.geometry().check(0, 4096).ok_or("the image is too small")?;
    let buffer = Arc::new(AlignedBuffer::new(4096, 4096)?);
    for id in 0..count {
        disk.submit(RequestId(id), Op::Write(range, Iov::from_buffer(&buffer, 4096)));
        disk.wait(Wake::Now)?;
        if disk.take_completions().count() != 1 {
            return Err("a write has not ended".into());
        }
    }
    Ok(())
}
