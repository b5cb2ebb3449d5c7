//! The six cache modes. A mode's row in [`POLICIES`] says all that it means; nothing else asks for its name.
//!
//! Owns the mapping from a mode to host behaviour and the stability rule (virtio 5.2.6.2): must this
//! write be stable before it is reported complete? Knows nothing of files or queues.

use crate::sync::{AtomicBool, AtomicU8, Ordering};

/// A cache mode, as a row of independent decisions.
///
/// O_DIRECT, RWF_DONTCACHE, O_SYNC and fsync are different mechanisms. `direct` decides whether data passes the
/// host's page cache by, and `drop_behind` whether it stays there. `write_cache` decides whether a completed
/// write may still be volatile. `honour_flush` decides whether FLUSH reaches the host's disk.
#[derive(Debug, PartialEq, Eq)]
pub struct CachePolicy {
    /// The name on the command line.
    pub name: &'static str,
    /// `true` if the image is opened with O_DIRECT: nothing of it stays in the host's page cache.
    pub direct: bool,
    /// `true` if each read and write has RWF_DONTCACHE: it goes through the host's page cache, which drops what it
    /// read or has written back. `direct` is `false` then.
    pub drop_behind: bool,
    /// `true` if the device has a volatile write cache: config.writeback is 1 after each reset.
    pub write_cache: bool,
    /// `true` if FLUSH is an fdatasync. `false` breaks the promise of FLUSH on purpose (unsafe).
    pub honour_flush: bool,
}

/// All modes: those of the 2008 discussion in its order, then later ones. The first is the default.
#[rustfmt::skip]
pub static POLICIES: [CachePolicy; 6] = [
    CachePolicy { name: "none", direct: true, drop_behind: false, write_cache: true, honour_flush: true },
    CachePolicy { name: "writeback", direct: false, drop_behind: false, write_cache: true, honour_flush: true },
    CachePolicy { name: "writethrough", direct: false, drop_behind: false, write_cache: false, honour_flush: true },
    CachePolicy { name: "directsync", direct: true, drop_behind: false, write_cache: false, honour_flush: true },
    CachePolicy { name: "unsafe", direct: false, drop_behind: false, write_cache: true, honour_flush: false },
    CachePolicy { name: "dontcache", direct: false, drop_behind: true, write_cache: true, honour_flush: true },
];

/// Which of the features that decide stability the driver has negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Negotiated {
    /// `true` if VIRTIO_BLK_F_FLUSH was negotiated.
    pub flush: bool,
    /// `true` if VIRTIO_BLK_F_CONFIG_WCE was negotiated.
    pub config_wce: bool,
}

impl CachePolicy {
    /// Returns the mode with that name, or `None` if there is none.
    pub fn by_name(name: &str) -> Option<&'static CachePolicy> {
        POLICIES.iter().find(|policy| policy.name == name)
    }

    /// Returns the RWF_* flags that each read and write of the image has.
    pub fn rw_flags(&self) -> libc::c_int {
        if self.drop_behind { libc::RWF_DONTCACHE } else { 0 }
    }

    /// Returns `true` if this write (or discard, or write-zeroes) must be stable before it is reported complete.
    ///
    /// This is the stability rule of virtio 5.2.6.2, with our decisions where it leaves a choice:
    /// - A driver that cannot flush gets stable writes, whatever the mode's default.
    /// - With CONFIG_WCE the guest's `writeback` byte decides.
    /// - If the byte changes while a write is in flight, the stricter value applies (the specification leaves
    ///   that undefined).
    /// - With FLUSH alone the mode's own write cache decides.
    ///
    /// A mode without `honour_flush` makes no write stable.
    pub fn write_must_be_stable(
        &self,
        acked: Negotiated,
        wb_at_submit: bool,
        wb_at_completion: bool,
    ) -> bool {
        let may_be_volatile = match (acked.flush, acked.config_wce) {
            (false, _) => false,
            (true, false) => self.write_cache,
            (true, true) => wb_at_submit && wb_at_completion,
        };
        self.honour_flush && !may_be_volatile
    }
}

/// The write cache of one device as the guest sees it: the `writeback` byte and the negotiated features.
///
/// The vCPU that accesses configuration space writes it; the workers read it.
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
    /// Returns the write cache in its state after a reset.
    pub fn new(policy: &'static CachePolicy) -> Self {
        Self {
            policy,
            negotiated: AtomicU8::new(0),
            writeback: AtomicBool::new(policy.write_cache),
            switched_off: AtomicBool::new(false),
        }
    }

    /// Returns the mode.
    pub fn policy(&self) -> &'static CachePolicy {
        self.policy
    }

    /// Resets the write cache: restores the configured `writeback` byte, whatever the last driver did (B4).
    pub fn reset(&self) {
        self.negotiated.store(0, Ordering::SeqCst);
        self.switched_off.store(false, Ordering::SeqCst);
        self.writeback.store(self.policy.write_cache, Ordering::SeqCst);
    }

    /// Stores the features that the driver has confirmed with FEATURES_OK. CONFIG_WCE without FLUSH starts as
    /// writethrough (virtio 5.2.5.2) and stays so.
    pub fn negotiate(&self, acked: Negotiated) {
        let bits =
            u8::from(acked.flush) * NEGOTIATED_FLUSH + u8::from(acked.config_wce) * NEGOTIATED_CONFIG_WCE;
        self.negotiated.store(bits, Ordering::SeqCst);
        if acked.config_wce && !acked.flush {
            self.writeback.store(false, Ordering::SeqCst);
        }
    }

    /// Returns the negotiated features.
    pub fn negotiated(&self) -> Negotiated {
        let bits = self.negotiated.load(Ordering::SeqCst);
        Negotiated { flush: bits & NEGOTIATED_FLUSH != 0, config_wce: bits & NEGOTIATED_CONFIG_WCE != 0 }
    }

    /// Returns the current value of config.writeback.
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::SeqCst)
    }

    /// Handles the guest's write to config.writeback. Returns `true` if it turned the write cache off, so that a
    /// worker should be woken. The write is ignored without CONFIG_WCE; a 1 is also ignored without FLUSH.
    pub fn guest_sets_writeback(&self, on: bool) -> bool {
        self.negotiated().config_wce && self.transport_sets_writeback(on)
    }

    /// Sets config.writeback like [`WriteCache::guest_sets_writeback`], but before the driver's features are known
    /// as well. A 1 is ignored with CONFIG_WCE but without FLUSH (virtio 5.2.5.2).
    pub fn transport_sets_writeback(&self, on: bool) -> bool {
        let acked = self.negotiated();
        if on && acked.config_wce && !acked.flush {
            return false;
        }
        let was_on = self.writeback.swap(on, Ordering::SeqCst);
        let turned_off = was_on && !on;
        if turned_off {
            self.switched_off.store(true, Ordering::SeqCst);
        }
        turned_off
    }

    /// Returns `true` if the guest has turned the write cache off since the last call. The specification requires
    /// nothing then (5.2.6.1); we sync what is volatile all the same.
    pub fn take_switched_off(&self) -> bool {
        self.switched_off.swap(false, Ordering::SeqCst)
    }

    /// Returns `true` if the guest has turned the write cache off and no worker has taken that up yet.
    pub fn is_switch_pending(&self) -> bool {
        self.switched_off.load(Ordering::SeqCst)
    }

    /// Returns [`CachePolicy::write_must_be_stable`] for a write that completes now.
    pub fn write_must_be_stable(&self, wb_at_submit: bool) -> bool {
        self.policy.write_must_be_stable(self.negotiated(), wb_at_submit, self.writeback())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The requirements B5 to B8 as a table. Maps (flush, config_wce, wb at submit, wb at completion)
    /// to must-be-stable for {none, writeback, dontcache}, {writethrough, directsync}, {unsafe}.
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
                    "none" | "writeback" | "dontcache" => volatile_modes,
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
    fn the_six_rows_are_those_of_the_table() {
        let rows: Vec<_> = POLICIES
            .iter()
            .map(|p| (p.name, p.direct, p.drop_behind, p.write_cache, p.honour_flush))
            .collect();
        assert_eq!(
            rows,
            [
                ("none", true, false, true, true),
                ("writeback", false, false, true, true),
                ("writethrough", false, false, false, true),
                ("directsync", true, false, false, true),
                ("unsafe", false, false, true, false),
                ("dontcache", false, true, true, true),
            ]
        );
    }

    #[test]
    fn one_mode_has_a_flag_on_each_read_and_write() {
        for policy in &POLICIES {
            // linux/fs.h: RWF_DONTCACHE is 0x80.
            let expected = if policy.name == "dontcache" { 0x80 } else { 0 };
            assert_eq!(policy.rw_flags(), expected, "{}", policy.name);
        }
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
    fn a_transport_may_set_the_byte_before_the_features_are_known() {
        let cache = WriteCache::new(&POLICIES[0]);
        assert!(cache.transport_sets_writeback(false));
        cache.negotiate(Negotiated { flush: true, config_wce: true });
        assert!(!cache.writeback() && cache.write_must_be_stable(false));
        assert!(!cache.transport_sets_writeback(true));
        assert!(cache.writeback());
        cache.negotiate(Negotiated { flush: false, config_wce: true });
        cache.transport_sets_writeback(true);
        assert!(!cache.writeback(), "without FLUSH it stays 0");
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
