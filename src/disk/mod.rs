//! Being built.

use std::io;
use std::path::PathBuf;
use std::str::FromStr;

/// What `--disk` says.
#[derive(Debug, Clone)]
pub struct DiskOptions {
    /// The image.
    pub path: PathBuf,
}

impl DiskOptions {
    /// The text of `--help` about the keys, made from their table.
    pub fn keys_help() -> String {
        String::new()
    }
}

impl FromStr for DiskOptions {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self { path: text.split(',').next().unwrap_or_default().into() })
    }
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use disk image")]
pub struct ImageError;

/// An open image.
#[derive(Debug)]
pub struct Image;

impl Image {
    /// Opens, locks and probes the image.
    pub fn open(_options: &DiskOptions) -> Result<Self, ImageError> {
        Ok(Self)
    }
    /// One line for the start-up banner, and warnings to be logged.
    pub fn banner(&self) -> String {
        String::new()
    }
    /// The final fdatasync, where the mode honours flushes (E4).
    pub fn close(&self) -> io::Result<()> {
        Ok(())
    }
}
