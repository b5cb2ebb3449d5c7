//! What a driver does, generated: a plan is a seed's whole run, and shrinks to the shortest one
//! that still fails.

use proptest::collection::vec;
use proptest::prelude::*;

use minivmm_block::disk::disk_queue::StableBy;

use super::storage::{Fault, SECTORS};

/// A request as the driver makes it.
#[derive(Debug, Clone, Copy)]
pub enum Ask {
    Read {
        sector: usize,
        sectors: usize,
    },
    Write {
        sector: usize,
        sectors: usize,
    },
    /// A write to a sector whose byte offset does not fit into 64 bits.
    WriteFarAway {
        sector: usize,
    },
    Flush,
    Discard {
        sector: usize,
        sectors: usize,
    },
    WriteZeroes {
        sector: usize,
        sectors: usize,
        unmap: bool,
    },
}

/// One step of a run.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// The driver makes a request available.
    Submit { queue: usize, ask: Ask },
    /// The queue's worker does one round, or the rest of it.
    Turn { queue: usize },
    /// The queue's worker goes on, at most so many accesses to what queues share.
    Move { queue: usize, pauses: usize },
    /// The host starts or ends one operation.
    Progress,
    /// The host starts or ends so many operations of one queue, and leaves the others alone.
    Serve { queue: usize, times: usize },
    /// The host writes one sector back.
    WriteBack { sector: usize },
    /// The driver submits nothing until nothing moves any more.
    Rest,
    /// The driver writes config.writeback.
    SetWriteback { on: bool },
    /// The driver resets the device and negotiates anew.
    Reset { flush: bool, config_wce: bool },
}

/// A whole run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub queues: usize,
    pub mode: usize,
    pub stable: StableBy,
    pub blocks_of_4096: bool,
    pub bounce_always: bool,
    pub flush: bool,
    pub config_wce: bool,
    /// Faults by the number of operations that have ended.
    pub faults: Vec<(u32, Fault)>,
    /// Faults by the number of syncs that have ended: fdatasyncs and DSYNC writes.
    pub sync_faults: Vec<(u32, Fault)>,
    /// EVENT_IDX is negotiated.
    pub event_idx: bool,
    /// The driver looks at the used ring only when it was told.
    pub waits_for_interrupts: bool,
    /// The driver rings whether the device asks for it or not.
    pub rings_always: bool,
    pub steps: Vec<Step>,
    pub dice: u64,
}

impl Plan {
    /// Whether the worker makes operations that are alone itself.
    pub fn keeps_what_is_alone(&self) -> bool {
        self.dice & 1 == 1
    }
}

fn range() -> impl Strategy<Value = (usize, usize)> {
    // Few sectors, so that requests overlap; whole blocks now and then, for 4096-byte blocks.
    prop_oneof![
        3 => (0..12usize, 1..4usize),
        1 => (0..SECTORS / 8, 1..3usize).prop_map(|(block, blocks)| {
            (block * 8, (blocks * 8).min(SECTORS - block * 8))
        }),
    ]
}

fn ask() -> impl Strategy<Value = Ask> {
    prop_oneof![
        8 => range().prop_map(|(sector, sectors)| Ask::Write { sector, sectors }),
        3 => range().prop_map(|(sector, sectors)| Ask::Read { sector, sectors }),
        5 => Just(Ask::Flush),
        1 => range().prop_map(|(sector, sectors)| Ask::Discard { sector, sectors }),
        2 => (range(), any::<bool>())
            .prop_map(|((sector, sectors), unmap)| Ask::WriteZeroes { sector, sectors, unmap }),
        1 => (0..12usize).prop_map(|sector| Ask::WriteFarAway { sector }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => (0..3usize, ask()).prop_map(|(queue, ask)| Step::Submit { queue, ask }),
        12 => (0..3usize).prop_map(|queue| Step::Turn { queue }),
        20 => Just(Step::Progress),
        1 => (0..12usize).prop_map(|sector| Step::WriteBack { sector }),
        2 => any::<bool>().prop_map(|on| Step::SetWriteback { on }),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(flush, config_wce)| Step::Reset { flush, config_wce }),
    ]
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        Just(Fault::Eintr),
        Just(Fault::Eio),
        Just(Fault::Enospc),
        Just(Fault::Short),
        Just(Fault::Unsupported)
    ]
}

/// Plans in the modes with these indices.
pub fn plans(modes: &'static [usize]) -> impl Strategy<Value = Plan> {
    let shape = (
        1..4usize,
        proptest::sample::select(modes),
        proptest::sample::select(&StableBy::ALL[..]),
        prop::bool::weighted(0.2),
    );
    let driver = (prop::bool::weighted(0.1), prop::bool::weighted(0.8), prop::bool::weighted(0.7));
    // Half of the runs without a fault: a latched error hides much of what comes after.
    let faults = prop_oneof![1 => Just(Vec::new()), 1 => vec((1..40u32, fault()), 1..3)];
    (shape, driver, faults, vec(step(), 1..80), any::<u64>()).prop_map(
        |(
            (queues, mode, stable, blocks_of_4096),
            (bounce_always, flush, config_wce),
            faults,
            steps,
            dice,
        )| {
            let mut faults = faults;
            faults.sort_by_key(|&(at, _)| at);
            Plan {
                queues,
                mode,
                stable,
                blocks_of_4096,
                bounce_always,
                flush,
                config_wce,
                faults,
                sync_faults: Vec::new(),
                event_idx: false,
                waits_for_interrupts: false,
                rings_always: true,
                steps,
                dice,
            }
        },
    )
}

/// What a sync fails with: whatever it is, nothing is stable.
const ERRNOS: [i32; 8] = [
    libc::EIO,
    libc::ENOSPC,
    libc::EDQUOT,
    libc::EFBIG,
    libc::EROFS,
    libc::ENODEV,
    libc::ETIMEDOUT,
    libc::ESTALE,
];

fn sync_fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        6 => proptest::sample::select(&ERRNOS[..]).prop_map(Fault::Fails),
        1 => Just(Fault::Eintr),
    ]
}

fn race_step() -> impl Strategy<Value = Step> {
    // A few pauses end in the middle of a round, many at its end.
    let pauses = prop_oneof![1 => 1..4usize, 1 => 4..16usize, 2 => 16..60usize];
    let write = (0..4usize).prop_map(|sector| Ask::Write { sector, sectors: 1 });
    let ask = prop_oneof![3 => Just(Ask::Flush), 2 => write, 1 => ask()];
    prop_oneof![
        8 => (0..3usize, ask).prop_map(|(queue, ask)| Step::Submit { queue, ask }),
        16 => (0..3usize, pauses).prop_map(|(queue, pauses)| Step::Move { queue, pauses }),
        4 => Just(Step::Progress),
        8 => (0..3usize, 1..4usize).prop_map(|(queue, times)| Step::Serve { queue, times }),
        2 => any::<bool>().prop_map(|on| Step::SetWriteback { on }),
        1 => Just(Step::Rest),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(flush, config_wce)| Step::Reset { flush, config_wce }),
    ]
}

/// Three FLUSHes whose fdatasyncs overlap: one is still with the host when the next one's end is there, unheard
/// of, and the third one's is heard of. What the third may say depends on both.
fn standoff() -> impl Strategy<Value = Vec<Step>> {
    let order = Just(vec![0_usize, 1, 2]).prop_shuffle();
    (order, 0..2usize, 0..60usize, 0..60usize).prop_map(|(order, started, first, second)| {
        let flush = |queue| [Step::Submit { queue, ask: Ask::Flush }, Step::Move { queue, pauses: 60 }];
        let (older, newer, third) = (order[0], order[1], order[2]);
        let mut steps = flush(older).to_vec();
        steps.push(Step::Serve { queue: older, times: started });
        steps.extend(flush(newer));
        steps.push(Step::Serve { queue: newer, times: 2 });
        steps.extend(flush(third));
        steps.push(Step::Serve { queue: third, times: 2 });
        steps.push(Step::Move { queue: third, pauses: 60 });
        steps.push(Step::Serve { queue: older, times: 2 });
        steps.push(Step::Move { queue: older, pauses: first });
        steps.push(Step::Move { queue: third, pauses: 60 });
        steps.push(Step::Move { queue: newer, pauses: second });
        steps
    })
}

/// Plans whose queues are interleaved access by access, and whose syncs fail: what one queue makes of
/// another's sync, and who wakes whom.
pub fn races(modes: &'static [usize]) -> impl Strategy<Value = Plan> {
    let queues = prop_oneof![1 => Just(2), 3 => Just(3)];
    let shape = (queues, proptest::sample::select(modes), proptest::sample::select(&StableBy::ALL[..]));
    let driver = (prop::bool::weighted(0.9), prop::bool::weighted(0.7), any::<bool>(), any::<bool>());
    let faults = prop_oneof![1 => Just(Vec::new()), 3 => vec((1..7u32, sync_fault()), 1..3)];
    let switches = [false, true, false].map(|on| Step::SetWriteback { on });
    let moves = prop_oneof![
        30 => race_step().prop_map(|step| vec![step]),
        1 => standoff(),
        1 => Just(vec![switches[0], Step::Rest, switches[1], switches[2], Step::Rest]),
    ];
    (shape, driver, faults, vec(moves, 1..80), any::<u64>()).prop_map(
        |(
            (queues, mode, stable),
            (flush, config_wce, event_idx, waits_for_interrupts),
            faults,
            steps,
            dice,
        )| {
            let mut sync_faults = faults;
            sync_faults.sort_by_key(|&(at, _)| at);
            Plan {
                queues,
                mode,
                stable,
                blocks_of_4096: false,
                bounce_always: false,
                flush,
                config_wce,
                faults: Vec::new(),
                sync_faults,
                event_idx,
                waits_for_interrupts,
                rings_always: false,
                steps: steps.concat(),
                dice,
            }
        },
    )
}
