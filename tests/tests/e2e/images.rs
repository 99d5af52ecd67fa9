// SPDX-License-Identifier: MIT OR Apache-2.0

//! Disk images for tests, made on the host.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// 1 MiB.
pub const MIB: u64 = 1 << 20;

/// A directory for the images of one test.
pub struct Images(TempDir);

impl Images {
    /// An empty one.
    pub fn new() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    /// Where a file of that name is or will be.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A raw image full of zeroes that takes no space.
    pub fn blank(&self, name: &str, size: u64) -> Result<PathBuf> {
        let path = self.path(name);
        File::create(&path)?.set_len(size)?;
        Ok(path)
    }

    /// A raw image with contents that do not repeat, the same for the same seed.
    pub fn random(&self, name: &str, size: u64, seed: u64) -> Result<PathBuf> {
        let path = self.path(name);
        let mut file = File::create(&path)?;
        let mut state = seed | 1;
        let mut block = vec![0; 1 << 16];
        let mut left = size;
        while left > 0 {
            for word in block.chunks_exact_mut(8) {
                // xorshift64: enough to make every sector different.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            let take = left.min(block.len() as u64);
            file.write_all(&block[..take as usize])?;
            left -= take;
        }
        Ok(path)
    }

    /// A raw image with an empty ext4 file system.
    pub fn ext4(&self, name: &str, size: u64) -> Result<PathBuf> {
        let path = self.blank(name, size)?;
        tool(
            Command::new("mke2fs")
                .args(["-q", "-F", "-t", "ext4"])
                .arg(&path),
        )?;
        Ok(path)
    }

    /// A raw image with an ext4 file system that holds copies of `files` under the names given with them.
    pub fn ext4_with(&self, name: &str, size: u64, files: &[(&Path, &str)]) -> Result<PathBuf> {
        let tree = self.path(&format!("{name}.tree"));
        std::fs::create_dir(&tree)?;
        for (from, to) in files {
            std::fs::copy(from, tree.join(to))
                .with_context(|| format!("cannot copy {}", from.display()))?;
        }
        let path = self.ext4_of(name, size, &tree)?;
        std::fs::remove_dir_all(&tree)?;
        Ok(path)
    }

    /// A raw image with an ext4 file system that holds a copy of what is in a directory.
    pub fn ext4_of(&self, name: &str, size: u64, tree: &Path) -> Result<PathBuf> {
        let path = self.blank(name, size)?;
        tool(
            Command::new("mke2fs")
                .args(["-q", "-F", "-t", "ext4", "-d"])
                .arg(tree)
                .arg(&path),
        )?;
        Ok(path)
    }
}

/// Check that a file system on a raw image is clean, as its own checker sees it.
pub fn check_ext4(image: &Path) -> Result<()> {
    tool(Command::new("e2fsck").args(["-f", "-n"]).arg(image))
}

/// Check that a file system on a raw image was unmounted by those who used it: its journal has nothing to recover.
pub fn check_unmounted(image: &Path) -> Result<()> {
    let output = Command::new("dumpe2fs").arg("-h").arg(image).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        text.contains("has_journal") && !text.contains("needs_recovery"),
        "{}: {text}{}",
        image.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    check_ext4(image)
}

/// SHA-256 of a file, in hexadecimal.
pub fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut block = vec![0; 1 << 16];
    loop {
        let count = file.read(&mut block)?;
        if count == 0 {
            return Ok(hasher
                .finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect());
        }
        hasher.update(&block[..count]);
    }
}

/// Run a tool that must succeed.
pub fn tool(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
