// SPDX-License-Identifier: MIT OR Apache-2.0

//! The two initramfs images: the guest's, and the one of the L1 VM that a guest runs in where there is no KVM.
//!
//! Both are busybox, a script, and kernel modules, which are unpacked on the way: a software CPU takes
//! seconds for what xz does in the kernel. Archives are in the `newc` format of cpio and not compressed, for
//! the same reason. Format: Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::{
    cache::{Cache, Key, Recipe},
    kernel::{Build, Kernel},
    root::{self, BuildRoot},
    ui::Step,
};

/// What the L1 kernel needs beyond what is built in: the machine's files, KVM, a network, and what
/// the networks of guests are made of.
const L1_MODULES: &[&str] = &[
    "9p",
    "9pnet_virtio",
    "kvm",
    "kvm_amd",
    "virtio_net",
    "tun",
    "bridge",
    "veth",
    "8021q",
];

/// What the guest's kernel needs: disks and their file system, VLANs, input, and the C drivers for comparison.
const GUEST_MODULES: &[&str] = &[
    "scsi_mod",
    "sd_mod",
    "sg",
    "ext4",
    "loop",
    "hv_storvsc",
    "hv_netvsc",
    "8021q",
    "hid",
    "hid_generic",
    "evdev",
    "hv_utils",
    "hid_hyperv",
    "hyperv_keyboard",
];

/// Of these, what a kernel that the user built must have. Of the rest it may have what it likes.
const NEEDED_MODULES: &[&str] = &["scsi_mod", "sd_mod", "ext4"];

const L1_INIT: &str = include_str!("init-l1.sh");
const GUEST_INIT: &str = include_str!("init-guest.sh");

/// Writes a cpio archive into memory.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
    directories: BTreeSet<PathBuf>,
}

impl Cpio {
    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        let too_large = "file too large for the archive";
        self.inode += 1;
        let fields: [u32; 13] = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(data.len()).context(too_large)?,
            0,
            0,
            0,
            0,
            u32::try_from(name.len() + 1).context(too_large)?,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(data);
        self.align();
        Ok(())
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds the directory of that name and those that it is in.
    fn directory(&mut self, path: &Path) -> Result<()> {
        if path.as_os_str().is_empty() || !self.directories.insert(path.to_owned()) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        self.entry(&path.to_string_lossy(), 0o040_755, &[])
    }

    fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        if let Some(parent) = Path::new(name).parent() {
            self.directory(parent)?;
        }
        self.entry(name, 0o100_000 | mode, data)
    }

    /// Adds what is in a directory of the machine.
    fn tree(&mut self, from: &Path, name: &Path) -> Result<()> {
        self.directory(name)?;
        let mut paths: Vec<PathBuf> = fs::read_dir(from)?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        paths.sort();
        for path in paths {
            let inside = name.join(path.file_name().unwrap_or_default());
            if path.is_dir() {
                self.tree(&path, &inside)?;
            } else {
                let mode = fs::metadata(&path)?.permissions().mode() & 0o777;
                self.file(&inside.to_string_lossy(), mode, &fs::read(&path)?)?;
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }
}

/// The name of a module by its file: `kernel/fs/9p/9p.ko.xz` is `9p`; `-` and `_` are the same.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    let stem = file.split_once(".ko").map_or(file, |(stem, _)| stem);
    stem.replace('-', "_")
}

/// Files of the modules `wanted` and of what they depend on, from the texts of `modules.dep` and `modules.builtin`.
///
/// # Errors
///
/// Names the modules that are neither there nor built in, and that must not be missing.
fn module_files(
    dep: &str,
    builtin: &str,
    wanted: &[&str],
    may_miss: impl Fn(&str) -> bool,
) -> Result<BTreeSet<String>> {
    let lines: BTreeMap<String, &str> = dep
        .lines()
        .filter_map(|line| Some((module_name(line.split_once(':')?.0), line)))
        .collect();
    let built_in: BTreeSet<String> = builtin.lines().map(module_name).collect();
    let mut files = BTreeSet::new();
    let mut missing = Vec::new();
    for name in wanted {
        match lines.get(*name) {
            Some(line) => files.extend(
                line.split_whitespace()
                    .map(|file| file.trim_end_matches(':').to_owned()),
            ),
            None if built_in.contains(*name) || may_miss(name) => {}
            None => missing.push(*name),
        }
    }
    if missing.is_empty() {
        Ok(files)
    } else {
        bail!("the kernel has no module {}", missing.join(", "))
    }
}

/// Puts modules of the kernel into `tmp/tree/lib/modules/RELEASE`, unpacked, with the lists that `modprobe` reads.
fn collect_modules(
    root: &BuildRoot,
    kernel: &Kernel,
    wanted: &[&str],
    extra: &[PathBuf],
    tmp: &Path,
    step: &mut Step,
) -> Result<()> {
    let read = |name: &str| fs::read_to_string(kernel.modules.join(name)).unwrap_or_default();
    let may_miss =
        |name: &str| matches!(kernel.build, Build::Tree(_)) && !NEEDED_MODULES.contains(&name);
    let files = module_files(
        &read("modules.dep"),
        &read("modules.builtin"),
        wanted,
        may_miss,
    )?;
    let target = tmp.join("tree/lib/modules").join(&kernel.release);
    fs::create_dir_all(target.join("updates"))?;
    for name in [
        "modules.builtin",
        "modules.builtin.modinfo",
        "modules.order",
    ] {
        // A kernel without modules has none of these.
        fs::write(target.join(name), read(name))?;
    }
    for path in extra {
        let name = path.file_name().unwrap_or_default();
        fs::copy(path, target.join("updates").join(name))?;
    }
    let mut script = format!(
        "cd {}/tree/lib/modules/{}\n\
         get() {{ mkdir -p \"${{1%/*}}\"; case \"$1\" in\n\
             *.xz) xz -dc \"$2/$1\" > \"${{1%.xz}}\" ;;\n\
             *.zst) zstd -qdc \"$2/$1\" > \"${{1%.zst}}\" ;;\n\
             *.gz) gzip -dc \"$2/$1\" > \"${{1%.gz}}\" ;;\n\
             *) cp \"$2/$1\" \"$1\" ;;\n\
         esac; }}\n",
        root::WORK,
        root::quote(&kernel.release)
    );
    for file in &files {
        script.push_str(&format!("get {} {}\n", root::quote(file), root::EXTRA));
    }
    script.push_str(&format!(
        "find . -name '*.ko' -exec strip --strip-debug {{}} +\n\
         depmod -b {}/tree {}\n",
        root::WORK,
        root::quote(&kernel.release)
    ));
    root.script(script)
        .read(&kernel.modules, root::EXTRA)
        .write(tmp, root::WORK)
        .run(step)
}

/// Builds an archive from `tmp/tree`, busybox, a script and more files; leaves only the archive in `tmp`.
fn pack(root: &BuildRoot, init: &str, files: &[(&str, &Path)], tmp: &Path) -> Result<()> {
    let mut archive = Cpio::default();
    for name in ["dev", "proc", "sys", "run", "tmp", "bin", "mnt"] {
        archive.directory(Path::new(name))?;
    }
    archive.file(
        "bin/busybox",
        0o755,
        &fs::read(root.file("/usr/bin/busybox"))?,
    )?;
    archive.file("init", 0o755, init.as_bytes())?;
    for (name, path) in files {
        archive.file(name, 0o755, &fs::read(path)?)?;
    }
    let tree = tmp.join("tree");
    archive.tree(&tree.join("lib"), Path::new("lib"))?;
    fs::remove_dir_all(tree)?;
    fs::write(tmp.join("initramfs"), archive.finish()?)?;
    Ok(())
}

/// Makes the L1 VM's initramfs.
///
/// # Errors
///
/// When the kernel lacks a module that L1 needs, or a step fails.
pub fn ensure_l1(cache: &Cache, root: &BuildRoot, kernel: &Kernel) -> Result<PathBuf> {
    let recipe = Recipe {
        name: "l1",
        title: "L1 image",
        key: Key::new("l1 1")
            .add("kernel", kernel.key.as_bytes())
            .add("root", root.key.as_bytes())
            .add("modules", L1_MODULES.join(" ").as_bytes())
            .add("init", L1_INIT.as_bytes()),
        expected_lines: 3,
    };
    let path = cache.get(&recipe, |tmp, step| {
        collect_modules(root, kernel, L1_MODULES, &[], tmp, step)?;
        pack(root, L1_INIT, &[], tmp)
    })?;
    Ok(path.join("initramfs"))
}

/// Makes the guest's initramfs, with the project's modules and the agent.
///
/// # Errors
///
/// When the kernel lacks a module that the guest needs, or a step fails.
pub fn ensure_guest(
    cache: &Cache,
    root: &BuildRoot,
    kernel: &Kernel,
    modules: &Path,
    agent: &Path,
) -> Result<PathBuf> {
    let mut extra: Vec<PathBuf> = fs::read_dir(modules)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "ko"))
        .collect();
    extra.sort();
    let mut key = Key::new("initramfs 1")
        .add("kernel", kernel.key.as_bytes())
        .add("root", root.key.as_bytes())
        .add("modules", GUEST_MODULES.join(" ").as_bytes())
        .add("init", GUEST_INIT.as_bytes())
        .add_file("agent", agent)?;
    for path in &extra {
        key = key.add_file(
            &path.file_name().unwrap_or_default().to_string_lossy(),
            path,
        )?;
    }
    let recipe = Recipe {
        name: "initramfs",
        title: "guest initramfs",
        key,
        expected_lines: 3,
    };
    let path = cache.get(&recipe, |tmp, step| {
        collect_modules(root, kernel, GUEST_MODULES, &extra, tmp, step)?;
        pack(root, GUEST_INIT, &[("bin/guest-agent", agent)], tmp)
    })?;
    Ok(path.join("initramfs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/fs/mbcache.ko.xz\n\
                       kernel/fs/jbd2/jbd2.ko.xz:\nkernel/fs/mbcache.ko.xz:\n\
                       kernel/arch/x86/kvm/kvm-amd.ko.xz: kernel/arch/x86/kvm/kvm.ko.xz\n";

    #[test]
    fn modules_come_with_what_they_need() {
        let files = module_files(
            DEP,
            "kernel/drivers/scsi/sg.ko\n",
            &["ext4", "sg", "kvm_amd", "hid"],
            |name| name == "hid",
        );
        assert_eq!(
            files.unwrap().into_iter().collect::<Vec<_>>(),
            [
                "kernel/arch/x86/kvm/kvm-amd.ko.xz",
                "kernel/arch/x86/kvm/kvm.ko.xz",
                "kernel/fs/ext4/ext4.ko.xz",
                "kernel/fs/jbd2/jbd2.ko.xz",
                "kernel/fs/mbcache.ko.xz",
            ]
        );
        let error = module_files(DEP, "", &["ext4", "btrfs"], |_| false).unwrap_err();
        assert!(error.to_string().contains("btrfs"));
    }

    #[test]
    fn archive_is_newc() {
        let mut archive = Cpio::default();
        archive.file("a/b", 0o644, b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701"));
        // Header of 110 bytes, the name `a` with its end, one byte of padding.
        let second = bytes.get(112..).unwrap();
        assert!(second.starts_with(b"070701"));
        assert_eq!(second.get(14..22).unwrap(), b"000081a4");
        assert_eq!(second.get(54..62).unwrap(), b"00000005");
        assert_eq!(second.get(110..114).unwrap(), b"a/b\0");
        // 114 is padded to 116.
        assert_eq!(second.get(116..121).unwrap(), b"hello");
    }
}
