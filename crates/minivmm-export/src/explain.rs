//! `minivmm export --explain`: what a disk will do, and what its front end must do for durability.
//!
//! Owns the part about the front end. The part about the disk is [`minivmm::explain`]'s.

use std::fmt::Write;

use anyhow::anyhow;
use minivmm::explain::{self, Explanation};
use serde::Serialize;

use crate::daemon::Config;

/// One disk, its socket, and what is expected of whoever connects.
#[derive(Debug, Serialize)]
pub struct ExplainedExport {
    /// The socket, or the descriptor.
    pub socket: String,
    /// What the disk will do.
    pub disk: Explanation,
    /// What the front end must do, and what it need not.
    pub front_end: Vec<String>,
}

/// Describes each disk of `config`. Also returns everything for which nothing would be exported.
pub fn explain(config: &Config) -> (Vec<ExplainedExport>, Vec<anyhow::Error>) {
    let mut refused: Vec<anyhow::Error> = config.refusals().into_iter().map(Into::into).collect();
    let mut explained = Vec::new();
    for export in &config.exports {
        match explain::explain(&export.disk.config) {
            Ok(disk) => {
                let image = &disk.image;
                refused
                    .extend(disk.refusals.iter().map(|why| anyhow!("cannot use disk image {image}: {why}")));
                let front_end = duties(&disk);
                explained.push(ExplainedExport { socket: export.place.to_string(), disk, front_end });
            }
            Err(error) => refused.push(error.into()),
        }
    }
    (explained, refused)
}

/// Returns what the front end of this disk must do.
fn duties(disk: &Explanation) -> Vec<String> {
    let durability = if disk.readonly {
        "nothing is written, so nothing needs to be made stable".to_owned()
    } else if disk.cache == "unsafe" {
        "whatever the front end does, cache=unsafe makes nothing stable".to_owned()
    } else if disk.writeback == 0 {
        format!(
            "a write is acknowledged only when it is stable (cache={}), whether the front end sends FLUSH or not, as long as \
             the driver does not turn the write cache on (config.writeback)",
            disk.cache
        )
    } else {
        format!(
            "pass the guest's FLUSH on: with cache={} a write is stable only after the next FLUSH. A front end that does not \
             negotiate FLUSH gets each write acknowledged only when it is stable",
            disk.cache
        )
    };
    vec![
        durability,
        "QEMU's vhost-user-blk-pci passes FLUSH and the guest's write-cache switch (config-wce=on, its default) through; \
         QEMU's own cache= settings mean nothing here, because QEMU opens no image"
            .to_owned(),
        "guest memory must be shared and large enough: QEMU's memory-backend-memfd,share=on, cloud-hypervisor's \
         --memory shared=on"
            .to_owned(),
        "to go on after a restart of minivmm, the front end must connect again by itself (QEMU: reconnect=1 on the chardev) \
         and keep the inflight region (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD; QEMU does)"
            .to_owned(),
    ]
}

/// Returns the explanations as a JSON list.
pub fn to_json(explained: &[ExplainedExport]) -> serde_json::Result<String> {
    serde_json::to_string_pretty(explained)
}

/// Returns the explanations as text.
pub fn to_text(explained: &[ExplainedExport]) -> String {
    let mut text = String::new();
    for export in explained {
        text += explain::to_text(std::slice::from_ref(&export.disk)).trim_end();
        // Writing to a string cannot fail.
        let _ = write!(text, "\n\nThe front end on {}\n", export.socket);
        for duty in &export.front_end {
            text += &minivmm::text::hang("  - ", duty);
        }
        text.push('\n');
    }
    text
}
