//! The machine's own devices: serial port, power and reset, exit port, pvpanic, clock.
//!
//! Owns their registers. Knows nothing of KVM: an interrupt is an eventfd, and an effect on the machine is
//! the [`Outcome`](crate::bus::Outcome) that a write returns.

pub mod console;
pub mod exit;
pub mod kernel_log;
pub mod power;
pub mod rtc;
pub mod serial;
