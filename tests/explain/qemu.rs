//! QEMU with the same guest, so the same driver, beside minivmm: where they differ, the difference is
//! one that docs/cache-modes.md explains.
