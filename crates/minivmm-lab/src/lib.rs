//! minivmm's laboratory: what minivmm does besides running a guest of its own. Its binary, `minivmm-tools`, has the
//! subcommands `top`, `log`, `crash`, `bench` and `study`. Users call `minivmm` with them, which execs it.
//!
//! The crate depends on [`minivmm`], whose public parts it uses like any other program: disks, `--explain`, the
//! observation, the rules for output files. minivmm does not depend on it, so the VMM builds and runs without this
//! crate and without what draws on a terminal (ratatui, indicatif).
//!
//! Dependencies point down the list, never up (`tests/tidy.rs` of the workspace enforces it):
//!
//! | module | owns | must not know |
//! |---|---|---|
//! | [`cli`] | the arguments of the subcommands, and the whole command line with them | |
//! | [`study`] | claims of 2008 as experiments, with verdicts, as a page and JSON | KVM |
//! | [`mod@bench`] | fio in a guest beside its host, and which results do not measure a disk | KVM, devices |
//! | [`top`] | an observation as it grows, on a terminal or as lines | guests, disks |
//! | [`crash`] | write logs, and the disk states that a power loss could have left | guests, KVM |
//! | [`measuring`] | a boot of a real guest as an experiment: images, host description, fio, rounds | KVM, devices |
//! | [`child`] | child processes under watch | everything |
//! | [`scratch_dir`] | directories for temporary files | everything |
//! | [`estimate`] | how much longer something takes | everything |

pub mod bench;
pub mod child;
pub mod cli;
pub mod crash;
pub mod estimate;
pub mod measuring;
pub mod scratch_dir;
pub mod study;
pub mod top;
