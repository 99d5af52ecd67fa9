// SPDX-License-Identifier: MIT OR Apache-2.0

//! The whole set-up, in order, and what it gives.

use std::{
    fs::{self, File},
    path::PathBuf,
};

use anyhow::{Context, Result, bail};

use crate::{
    Unmet,
    cache::{self, Cache},
    cargo::Workspace,
    cmd,
    host::{self, KvmChoice},
    initramfs,
    kernel::{self, Build, Kernel, KernelSource},
    kmod,
    l1::L1,
    qemu::{self, Qemu},
    root, rootfs,
    tree::Tree,
};

/// Everything that `boot` and `test` need.
pub struct Ready {
    /// Where guests run.
    pub kvm: KvmChoice,
    /// The guest's kernel.
    pub kernel: Kernel,
    /// The directory of the project's modules.
    pub modules: PathBuf,
    /// The harness.
    pub harness: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
    /// The Debian guest's disk.
    pub debian: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
    /// Where an L1 VM is used: what it is made of.
    pub l1: Option<L1Parts>,
}

/// What an L1 VM is made of.
pub struct L1Parts {
    qemu: Qemu,
    /// The bzImage.
    kernel: PathBuf,
    initramfs: PathBuf,
}

/// Does everything that is not yet done.
///
/// # Errors
///
/// Those of the steps.
pub fn run(cache: &Cache, source: &KernelSource, update: bool) -> Result<Ready> {
    source.check()?;
    let kvm = KvmChoice::probe();
    host::ensure_packages(&cache.log_path("packages"))?;
    let workspace = Workspace::load()?;
    // What is fetched and what is compiled side by side: on two processors that saves a third of the time.
    let (programs, (emulator, guest)) = side_by_side(
        || Ok((workspace.agent(cache)?, workspace.harness(cache)?)),
        || {
            side_by_side(
                || (!kvm.is_direct()).then(|| qemu::ensure(cache)).transpose(),
                || {
                    let root = root::ensure(cache)?;
                    let kernel = kernel::ensure(cache, source, update)?;
                    let (modules, debian) = side_by_side(
                        || kmod::ensure(cache, &kernel.key, &kernel.build, &workspace.bitflags),
                        || rootfs::ensure(cache, &root, &kernel),
                    )?;
                    Ok((root, kernel, modules, debian))
                },
            )
        },
    )?;
    let (agent, harness) = programs;
    let (root, kernel, modules, debian) = guest;
    let initramfs = initramfs::ensure_guest(cache, &root, &kernel, &modules, &agent)?;
    let l1 = match emulator {
        Some(qemu) => {
            // A kernel of the user's own need not have what the VM takes.
            let debian = match kernel.build {
                Build::Tree(_) => Some(kernel::ensure(cache, &KernelSource::Archive, false)?),
                Build::Root { .. } => None,
            };
            let kernel = debian.as_ref().unwrap_or(&kernel);
            Some(L1Parts {
                qemu,
                kernel: kernel.image.clone(),
                initramfs: initramfs::ensure_l1(cache, &root, kernel)?,
            })
        }
        None => None,
    };
    Ok(Ready {
        kvm,
        kernel,
        modules,
        harness,
        initramfs,
        debian,
        target: workspace.target,
        l1,
    })
}

/// Runs two parts of the work at once. Where one fails the other is interrupted.
///
/// # Errors
///
/// That of the part that failed.
fn side_by_side<A: Send, B>(
    one: impl FnOnce() -> Result<A> + Send,
    other: impl FnOnce() -> Result<B>,
) -> Result<(A, B)> {
    std::thread::scope(|scope| {
        let one = scope.spawn(|| cmd::together(one()));
        let other = cmd::together(other());
        let one = one
            .join()
            .unwrap_or_else(|_| bail!("a part of the set-up panicked"));
        cmd::both(one, other)
    })
}

/// Builds only the modules and gives their directory.
///
/// # Errors
///
/// Those of the steps.
pub fn modules(cache: &Cache, source: &KernelSource) -> Result<PathBuf> {
    let workspace = Workspace::load()?;
    if let KernelSource::Tree(path) = source {
        // Only modules: neither the tree's image nor anything of Debian's is needed.
        let tree = Tree::open(path)?;
        let key = tree.key("modules of a tree 1")?.hex();
        return kmod::ensure(cache, &key, &Build::Tree(tree), &workspace.bitflags);
    }
    source.check()?;
    host::ensure_packages(&cache.log_path("packages"))?;
    let kernel = kernel::ensure(cache, source, false)?;
    kmod::ensure(cache, &kernel.key, &kernel.build, &workspace.bitflags)
}

/// How much memory the L1 VM has beyond that of a guest in it, in MiB: its kernel, the harness, and what
/// guests write to their throw-away disks.
const L1_OVERHEAD: u64 = 2048;

impl Ready {
    /// The VM that a guest of this size runs in, if one is needed.
    pub fn l1(&self, guest_memory: u64) -> Option<L1> {
        self.l1.as_ref().map(|parts| L1 {
            qemu: parts.qemu.clone(),
            kernel: parts.kernel.clone(),
            initramfs: parts.initramfs.clone(),
            memory: guest_memory + L1_OVERHEAD,
            cpus: 1,
            timeout: None,
            writable: Vec::new(),
            keep: self.paths(),
        })
    }

    /// The places that a run reads.
    fn paths(&self) -> Vec<PathBuf> {
        let mut paths = vec![
            self.kernel.image.clone(),
            self.kernel.modules.clone(),
            self.modules.clone(),
            self.harness.clone(),
            self.initramfs.clone(),
            self.debian.clone(),
            self.kernel.source(),
        ];
        paths.push(crate::program());
        paths
    }

    /// What the tests are told, as JSON.
    pub fn manifest(&self, artefacts: &std::path::Path) -> serde_json::Value {
        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        serde_json::json!({
            "harness": text(&self.harness),
            "kernel": text(&self.kernel.image),
            "kernel_release": self.kernel.release,
            "lsvmbus": text(&self.kernel.source().join("tools/hv/lsvmbus")),
            "extract_vmlinux": text(&self.kernel.source().join("scripts/extract-vmlinux")),
            "initramfs": text(&self.initramfs),
            "rootfs": text(&self.debian),
            "modules_dir": text(&self.modules),
            "artefacts": text(artefacts),
        })
    }
}

/// A size such as `512M` or `2G`, in MiB. Without a letter it is in MiB.
///
/// # Errors
///
/// When it is none, or none of at least 64 MiB.
pub fn parse_memory(text: &str) -> Result<u64> {
    let (number, factor) = match text.strip_suffix(['M', 'm']) {
        Some(number) => (number, 1),
        None => match text.strip_suffix(['G', 'g']) {
            Some(number) => (number, 1024),
            None => (text, 1),
        },
    };
    match number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
    {
        Some(size) if (64..=1 << 20).contains(&size) => Ok(size),
        _ => bail!("not a size of memory from 64M to 1024G: {text}"),
    }
}

/// A disk of the user's own that keeps what the guest writes: a copy of the Debian disk, made at first use.
/// No other guest can have it while the file that is returned is open. (The harness locks its disks itself, but
/// a lock that is taken in the L1 VM is not seen outside.)
///
/// # Errors
///
/// When it cannot be made, or another guest has it.
pub fn kept_disk(ready: &Ready, path: &std::path::Path) -> Result<File> {
    make_kept_disk(ready, path)?;
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|error| Unmet(format!("{}: {error}", path.display())))?;
    if !ready.kvm.is_direct() && file.try_lock().is_err() {
        bail!(Unmet(format!(
            "{}: another guest is using this disk",
            path.display()
        )));
    }
    Ok(file)
}

fn make_kept_disk(ready: &Ready, path: &std::path::Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let Some(parent) = path.parent().filter(|parent| parent.is_dir()) else {
        bail!(Unmet(format!(
            "{}: its directory does not exist",
            path.display()
        )));
    };
    // Complete or not there at all, like everything else. What a killed process left is taken away.
    let temporary = parent.join(format!(".viridian-kept-{}", std::process::id()));
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let ours = entry
            .file_name()
            .to_string_lossy()
            .starts_with(".viridian-kept-");
        if ours && (!cache::owner_lives(&entry.path()) || entry.path() == temporary) {
            // If it stays, it only takes space.
            let _ = fs::remove_file(entry.path());
        }
    }
    let result = cmd::output(
        cmd::tied("cp")
            .args(["--sparse=always", "--reflink=auto", "--no-preserve=mode"])
            .arg(&ready.debian)
            .arg(&temporary),
    )
    .and_then(|_| fs::rename(&temporary, path).context("cannot rename"));
    if let Err(error) = result {
        // The error that follows says what is wrong.
        let _ = fs::remove_file(&temporary);
        return Err(error).with_context(|| format!("cannot make {}", path.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_sizes() {
        for (text, size) in [("512M", 512), ("2G", 2048), ("1024", 1024), ("64m", 64)] {
            assert_eq!(parse_memory(text).unwrap(), size);
        }
        for text in ["", "G", "-1", "12", "1.5G", "99999999999999999999G", "1T"] {
            assert!(parse_memory(text).is_err(), "{text}");
        }
    }
}
