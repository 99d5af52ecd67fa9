// SPDX-License-Identifier: MIT OR Apache-2.0

//! Errors of disk images: while opening, and while running.

use std::io;
use std::path::PathBuf;

/// A request to an open disk failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The medium is bad at this byte offset.
    #[error("medium error at byte {offset}")]
    Medium {
        /// The first bad byte.
        offset: u64,
    },
    /// The disk cannot be written.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The request is not inside the disk.
    #[error("{len} bytes at {offset} are outside a disk of {size} bytes")]
    OutOfRange {
        /// First byte of the request.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// The format or the file cannot do this.
    #[error("{0}")]
    Unsupported(String),
    /// The system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl DiskError {
    /// Whether the host has no space left for the data.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Io(e)
            if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::FileTooLarge))
    }
}

/// A disk image could not be opened (or made). Names the file and says what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("disk {path}: {reason}", path = .path.display())]
pub struct OpenError {
    /// The image.
    pub path: PathBuf,
    /// What is wrong, in words.
    pub reason: String,
}

impl OpenError {
    /// An error about `path`.
    pub(crate) fn new(path: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self {
            path: path.into(),
            reason: reason.to_string(),
        }
    }
}
