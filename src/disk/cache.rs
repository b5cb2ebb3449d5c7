//! The five cache modes: what each means is its row in [`POLICIES`], and nothing else asks for a
//! mode's name.
//!
//! Owns the mapping from a mode to host behaviour and the stability rule (virtio 5.2.6.2): must this
//! write be stable before it is reported complete? Knows nothing of files or queues.

use crate::mutants::{Mutant, is_on};
use crate::sync::{AtomicBool, AtomicU8, Ordering};

/// A cache mode, as a row of independent decisions.
///
/// O_DIRECT, O_SYNC and fsync are not the same mechanism: `direct` decides whether the host's page
/// cache holds the data, `write_cache` whether a completed write may still be volatile,
/// `honour_flush` whether FLUSH reaches the host's disk.
#[derive(Debug, PartialEq, Eq)]
pub struct CachePolicy {
    /// The name on the command line.
    pub name: &'static str,
    /// The image is opened with O_DIRECT: nothing of it stays in the host's page cache.
    pub direct: bool,
    /// The device has a volatile write cache: config.writeback is 1 after each reset.
    pub write_cache: bool,
    /// FLUSH is fdatasync. `false` breaks the promise of FLUSH on purpose (unsafe).
    pub honour_flush: bool,
}

/// All modes, in the order of the 2008 discussion: the default first.
pub static POLICIES: [CachePolicy; 5] = [
    CachePolicy { name: "none", direct: true, write_cache: true, honour_flush: true },
    CachePolicy { name: "writeback", direct: false, write_cache: true, honour_flush: true },
    CachePolicy { name: "writethrough", direct: false, write_cache: false, honour_flush: true },
    CachePolicy { name: "directsync", direct: true, write_cache: false, honour_flush: true },
    CachePolicy { name: "unsafe", direct: false, write_cache: true, honour_flush: false },
];

/// What the driver has negotiated of the features that decide stability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Negotiated {
    /// VIRTIO_BLK_F_FLUSH.
    pub flush: bool,
    /// VIRTIO_BLK_F_CONFIG_WCE.
    pub config_wce: bool,
}

impl CachePolicy {
    /// The row of that name.
    pub fn by_name(name: &str) -> Option<&'static CachePolicy> {
        POLICIES.iter().find(|policy| policy.name == name)
    }

    /// Must this write (or discard, or write-zeroes) be stable before it is reported complete?
    ///
    /// The stability rule of virtio 5.2.6.2 and our decisions where it leaves a choice:
    /// - a driver that cannot flush gets stable writes, whatever the mode's default;
    /// - with CONFIG_WCE the guest's `writeback` byte rules, and a write across a change of it gets
    ///   the stricter side (the specification leaves that undefined);
    /// - with FLUSH alone the mode's own write cache rules.
    pub fn write_must_be_stable(
        &self,
        acked: Negotiated,
        wb_at_submit: bool,
        wb_at_completion: bool,
    ) -> bool {
        let may_be_volatile = match (acked.flush, acked.config_wce) {
            _ if is_on(Mutant::DirectsyncWithoutSync) && self.direct && !self.write_cache => true,
            (false, _) if is_on(Mutant::NoFlushIsWriteback) => self.write_cache,
            (true, true) if is_on(Mutant::ToggleIgnored) => self.write_cache,
            (false, _) => false,
            (true, false) => self.write_cache,
            (true, true) => wb_at_submit && wb_at_completion,
        };
        self.honour_flush && !may_be_volatile
    }
}

/// The write cache of one device as the guest sees it: the `writeback` byte and what was
/// negotiated. Written by the vCPU that touches configuration space, read by the workers.
#[derive(Debug)]
pub struct WriteCache {
    policy: &'static CachePolicy,
    negotiated: AtomicU8,
    writeback: AtomicBool,
    switched_off: AtomicBool,
}

const NEGOTIATED_FLUSH: u8 = 1;
const NEGOTIATED_CONFIG_WCE: u8 = 2;

impl WriteCache {
    /// The write cache as it is after reset.
    pub fn new(policy: &'static CachePolicy) -> Self {
        Self {
            policy,
            negotiated: AtomicU8::new(0),
            writeback: AtomicBool::new(policy.write_cache),
            switched_off: AtomicBool::new(false),
        }
    }

    /// The mode.
    pub fn policy(&self) -> &'static CachePolicy {
        self.policy
    }

    /// Reset: the configured value is back, whatever the last driver did (B4).
    pub fn reset(&self) {
        self.negotiated.store(0, Ordering::SeqCst);
        self.switched_off.store(false, Ordering::SeqCst);
        if !is_on(Mutant::ResetKeepsWriteback) {
            self.writeback.store(self.policy.write_cache, Ordering::SeqCst);
        }
    }

    /// FEATURES_OK. CONFIG_WCE without FLUSH starts as writethrough (virtio 5.2.5.2), and so it
    /// stays.
    pub fn negotiate(&self, acked: Negotiated) {
        let bits =
            u8::from(acked.flush) * NEGOTIATED_FLUSH + u8::from(acked.config_wce) * NEGOTIATED_CONFIG_WCE;
        self.negotiated.store(bits, Ordering::SeqCst);
        if acked.config_wce && !acked.flush {
            self.writeback.store(false, Ordering::SeqCst);
        }
    }

    /// What was negotiated.
    pub fn negotiated(&self) -> Negotiated {
        let bits = self.negotiated.load(Ordering::SeqCst);
        Negotiated { flush: bits & NEGOTIATED_FLUSH != 0, config_wce: bits & NEGOTIATED_CONFIG_WCE != 0 }
    }

    /// config.writeback, now.
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::SeqCst)
    }

    /// The guest writes config.writeback. Ignored unless CONFIG_WCE was negotiated, and a 1 without
    /// FLUSH. Whether this turned the write cache off, so that a worker should be woken.
    pub fn guest_sets_writeback(&self, on: bool) -> bool {
        let acked = self.negotiated();
        if !acked.config_wce || (on && !acked.flush) {
            return false;
        }
        let was_on = self.writeback.swap(on, Ordering::SeqCst);
        let turned_off = was_on && !on;
        if turned_off {
            self.switched_off.store(true, Ordering::SeqCst);
        }
        turned_off
    }

    /// Whether the guest has turned the write cache off since this was last asked. The
    /// specification wants nothing then (5.2.6.1); we sync what is volatile all the same.
    pub fn take_switched_off(&self) -> bool {
        self.switched_off.swap(false, Ordering::SeqCst)
    }

    /// Whether nobody has yet seen to that.
    pub fn is_switch_pending(&self) -> bool {
        self.switched_off.load(Ordering::SeqCst)
    }

    /// [`CachePolicy::write_must_be_stable`] for a write that completes now.
    pub fn write_must_be_stable(&self, wb_at_submit: bool) -> bool {
        self.policy.write_must_be_stable(self.negotiated(), wb_at_submit, self.writeback())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// B5 to B8, written out: (flush, config_wce, wb at submit, at completion)
    /// to must-be-stable for {none, writeback}, {writethrough, directsync}, {unsafe}.
    #[rustfmt::skip]
    const TABLE: [(bool, bool, bool, bool, bool, bool, bool); 16] = [
        (false, false, false, false, true,  true,  false),
        (false, false, false, true,  true,  true,  false),
        (false, false, true,  false, true,  true,  false),
        (false, false, true,  true,  true,  true,  false),
        (true,  false, false, false, false, true,  false),
        (true,  false, false, true,  false, true,  false),
        (true,  false, true,  false, false, true,  false),
        (true,  false, true,  true,  false, true,  false),
        (false, true,  false, false, true,  true,  false),
        (false, true,  false, true,  true,  true,  false),
        (false, true,  true,  false, true,  true,  false),
        (false, true,  true,  true,  true,  true,  false),
        (true,  true,  false, false, true,  true,  false),
        (true,  true,  false, true,  true,  true,  false),
        (true,  true,  true,  false, true,  true,  false),
        (true,  true,  true,  true,  false, false, false),
    ];

    /// Shows B5, B6 and B8.
    #[test]
    fn the_stability_rule_holds_over_its_whole_domain() {
        for (flush, config_wce, submit, completion, volatile_modes, through_modes, unsafe_mode) in TABLE {
            for policy in &POLICIES {
                let expected = match policy.name {
                    "none" | "writeback" => volatile_modes,
                    "writethrough" | "directsync" => through_modes,
                    _ => unsafe_mode,
                };
                let acked = Negotiated { flush, config_wce };
                let actual = policy.write_must_be_stable(acked, submit, completion);
                assert_eq!(actual, expected, "{} {acked:?} {submit} {completion}", policy.name);
            }
        }
    }

    /// Shows H1.
    #[test]
    fn the_five_rows_are_those_of_the_table() {
        let rows: Vec<_> =
            POLICIES.iter().map(|p| (p.name, p.direct, p.write_cache, p.honour_flush)).collect();
        assert_eq!(
            rows,
            [
                ("none", true, true, true),
                ("writeback", false, true, true),
                ("writethrough", false, false, true),
                ("directsync", true, false, true),
                ("unsafe", false, true, false),
            ]
        );
    }

    /// Shows B4.
    #[test]
    fn reset_restores_the_configured_writeback_byte() {
        for policy in &POLICIES {
            let cache = WriteCache::new(policy);
            assert_eq!(cache.writeback(), policy.write_cache);
            cache.negotiate(Negotiated { flush: true, config_wce: true });
            cache.guest_sets_writeback(!policy.write_cache);
            assert_ne!(cache.writeback(), policy.write_cache, "{}", policy.name);
            cache.reset();
            assert_eq!(cache.writeback(), policy.write_cache, "{}", policy.name);
            assert!(!cache.take_switched_off());
        }
    }

    /// Shows B2.
    #[test]
    fn the_writeback_byte_is_the_guests_only_with_config_wce() {
        let cache = WriteCache::new(&POLICIES[0]);
        assert!(!cache.guest_sets_writeback(false));
        assert!(cache.writeback(), "not negotiated");
        cache.negotiate(Negotiated { flush: true, config_wce: false });
        assert!(!cache.guest_sets_writeback(false));
        assert!(cache.writeback(), "FLUSH alone");
        cache.negotiate(Negotiated { flush: false, config_wce: true });
        assert!(!cache.writeback(), "CONFIG_WCE without FLUSH starts as writethrough");
        cache.guest_sets_writeback(true);
        assert!(!cache.writeback(), "and stays");
    }

    #[test]
    fn only_a_change_to_writethrough_asks_for_a_sync() {
        let cache = WriteCache::new(&POLICIES[0]);
        cache.negotiate(Negotiated { flush: true, config_wce: true });
        assert!(!cache.guest_sets_writeback(true));
        assert!(!cache.take_switched_off());
        assert!(cache.guest_sets_writeback(false));
        assert!(!cache.guest_sets_writeback(false));
        assert!(cache.take_switched_off());
        assert!(!cache.take_switched_off());
    }
}
