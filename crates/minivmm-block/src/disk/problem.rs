//! Why an image cannot be used.
//!
//! Owns the wording; the checks belong to [`super::image`] and what stands below it.

use std::io;
use std::path::PathBuf;

use crate::disk::config::ConfigError;
use crate::files::OutputRefused;

/// Why an image cannot be used: what failed, why, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("cannot use disk image {}", path.display())]
pub struct ImageError {
    /// The image as named on the command line.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub reason: ImageProblem,
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageProblem {
    /// Its configuration has a value that is out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host refuses to open it.
    #[error("it cannot be opened {flags}")]
    Open {
        /// How we tried to open it.
        flags: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// No such file exists.
    #[error("it does not exist: check its name, or make it, as in `truncate -s 1G {0}`")]
    Missing(String),
    /// It is a symbolic link to nowhere.
    #[error("it is a symbolic link to {0}, which does not exist")]
    Dangling(String),
    /// The path is written with a key, as other VMMs do.
    #[error("it does not exist: the path comes first and without a key: --disk {0}")]
    KeyBeforePath(String),
    /// It is neither a regular file nor a block device.
    #[error("it is {0}; a disk is a regular file or a block device")]
    Kind(&'static str),
    /// Its file system does not support O_DIRECT.
    #[error(
        "its file system has no O_DIRECT, which cache={mode} needs: use cache=writeback, writethrough or unsafe, \
         or a file on ext4 or xfs"
    )]
    NoDirect {
        /// The mode that was asked for.
        mode: &'static str,
    },
    /// Its file system or the host's kernel has no RWF_DONTCACHE.
    #[error(
        "the host has no RWF_DONTCACHE for it, which cache={mode} needs (files on xfs have it since Linux 6.15, on \
         ext4 since 6.17): use cache=none or cache=writeback"
    )]
    NoDontcache {
        /// The mode that was asked for.
        mode: &'static str,
    },
    /// It is empty.
    #[error("it is empty: give it a size first, as in `truncate -s 1G {0}`")]
    Empty(String),
    /// Its size is not a whole number of blocks.
    #[error(
        "its {bytes} bytes are not a multiple of the block size of {block}: extend it with `truncate -s %{block} {path}`"
    )]
    PartialBlock {
        /// The size in bytes.
        bytes: u64,
        /// The block size in bytes.
        block: u32,
        /// The path of the image.
        path: String,
    },
    /// The logical block asked for is smaller than the host can do.
    #[error(
        "block-size={asked} is below the {needed} bytes that O_DIRECT needs here: use block-size={needed}"
    )]
    BlockTooSmall {
        /// The block size asked for, in bytes.
        asked: u32,
        /// The block size needed, in bytes.
        needed: u32,
    },
    /// The host needs larger blocks than virtio guests understand.
    #[error(
        "O_DIRECT needs blocks of {0} bytes here, more than the 4096 that guests understand: use cache=writeback"
    )]
    BlockTooLarge(u32),
    /// It looks like another format.
    #[error(
        "it looks like a {format} image, and guests would see its metadata as data: convert it with \
         `{convert}` and use that, or use format=raw if it is raw anyway"
    )]
    NotRaw {
        /// The format that it looks like.
        format: &'static str,
        /// The command that converts it.
        convert: String,
    },
    /// It is compressed, and the guest would write to it.
    #[error(
        "it is compressed ({format}), and what a guest writes would destroy it: unpack it with `{unpack}` and use \
         that, or use format=raw if it is raw anyway"
    )]
    Compressed {
        /// The format of the compression.
        format: &'static str,
        /// The command that unpacks it.
        unpack: String,
    },
    /// Somebody else has locked it.
    #[error(
        "another VM, or another --disk of this one, has locked it; disks can share an image if all are readonly"
    )]
    Locked(#[source] io::Error),
    /// The first sync failed: an older writeback error, or a dying disk.
    #[error("what was written to it before cannot be made stable: check the host's disk and its kernel log")]
    FirstSync(#[source] io::Error),
    /// Its write log would destroy something, or cannot be made.
    #[error(transparent)]
    Output(OutputRefused),
    /// This host uses it.
    #[error(
        "this host uses it: {uses}. Guest and host would each destroy what the other writes: end that use first, or \
         start anyway with the key shared-with-host"
    )]
    InUse {
        /// What the host does with it.
        uses: String,
    },
    /// A program has locked it by flock(2).
    #[error("{holders} has locked it (flock): end that first, or start anyway with the key shared-with-host")]
    Flocked {
        /// The processes that hold the lock, as far as they are known.
        holders: String,
    },
    /// Its write log cannot be created.
    #[error("its write log {path} cannot {what}")]
    WriteLog {
        /// The path of the log.
        path: String,
        /// What we tried.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// The host refused something else.
    #[error("{what}")]
    Host {
        /// What we tried.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
}

pub(super) fn host(what: &'static str) -> impl FnOnce(io::Error) -> ImageProblem {
    move |source| ImageProblem::Host { what, source }
}
