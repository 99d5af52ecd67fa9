// SPDX-License-Identifier: MIT OR Apache-2.0

//! The build root: a Debian 13 tree with the compilers that Debian built its kernel with.
//!
//! Commands run in it through `chroot` in mount and process namespaces of their own, so nothing is ever
//! mounted for others to see or left to unmount, and all of it ends when we end. The root itself is
//! mounted read-only: a product in the store does not change.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::{
    cache::{Cache, Key, Recipe},
    cmd, host,
    ui::Step,
};

/// What is installed: the toolchain of Debian's kernel, and tools for the images.
const PACKAGES: &str = "rustc,rust-src,bindgen,rustfmt,rust-clippy,gcc-14,make,flex,bison,bc,libelf-dev,\
    libssl-dev,clang-19,libclang-19-dev,lld-19,llvm-19,xz-utils,kmod,cpio,dwarves,python3,busybox-static,e2fsprogs";

/// Places in the root that other directories are mounted on.
pub const MOUNT_POINTS: [&str; 4] = [SOURCE, OBJECTS, WORK, EXTRA];
/// The kernel's source tree.
pub const SOURCE: &str = "/viridian/linux";
/// The kernel's build tree.
pub const OBJECTS: &str = "/viridian/kbuild";
/// What is being made.
pub const WORK: &str = "/viridian/work";
/// One more input.
pub const EXTRA: &str = "/viridian/extra";

/// The suites that the root's packages come from.
pub const SUITES: [&str; 3] = ["trixie", "trixie-updates", "trixie-backports"];

/// Lines for apt that name the archive that packages come from.
pub fn sources(suites: &[&str]) -> Vec<String> {
    let mirror = std::env::var("VIRIDIAN_MIRROR")
        .unwrap_or_else(|_| "http://deb.debian.org/debian".to_owned());
    suites
        .iter()
        .map(|suite| format!("deb {mirror} {suite} main"))
        .collect()
}

/// `mmdebstrap` in namespaces of its own; ends with us.
fn mmdebstrap(variant: &str, packages: &str) -> Command {
    let mut command = if host::is_root() {
        let mut command = cmd::tied("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "mmdebstrap"]);
        command
    } else {
        cmd::tied("mmdebstrap")
    };
    command
        .args(["--verbose", "--architectures=amd64"])
        .arg(format!("--variant={variant}"))
        .arg(format!("--include={packages}"))
        .args([
            "--aptopt=Acquire::Languages none",
            "--dpkgopt=force-unsafe-io",
        ])
        .args(
            ["man", "doc", "locale", "info", "lintian"]
                .map(|directory| format!("--dpkgopt=path-exclude=/usr/share/{directory}/*")),
        );
    command
}

/// Where to, and from which suites of the archive.
fn from_archive(command: &mut Command, target: &Path, suites: &[&str]) {
    command.arg("--format=directory").arg("trixie").arg(target);
    command.args(sources(suites));
}

/// Prepares to install packages in a new tree.
pub fn install(packages: &str, target: &Path, suites: &[&str], hooks: &[String]) -> Command {
    let mut command = mmdebstrap("apt", packages);
    for hook in hooks {
        command.arg(format!("--customize-hook={hook}"));
    }
    from_archive(&mut command, target, suites);
    command
}

/// Prepares to unpack packages, and what they depend on, in a new tree: nothing of them is run. They are those of `suite`
/// where it has them.
pub fn unpack(packages: &str, target: &Path, suites: &[&str], suite: &str) -> Command {
    let mut command = mmdebstrap("extract", packages);
    command
        .arg(format!("--aptopt=APT::Default-Release \"{suite}\""))
        .arg("--aptopt=APT::Install-Recommends false");
    from_archive(&mut command, target, suites);
    command
}

/// Makes the build root.
///
/// # Errors
///
/// Those of `mmdebstrap`.
pub fn ensure(cache: &Cache) -> Result<BuildRoot> {
    let hooks = [
        format!(
            "cd \"$1\" && mkdir -p {}",
            MOUNT_POINTS.map(|path| format!(".{path}")).join(" ")
        ),
        "cd \"$1\" && : > etc/resolv.conf && : > etc/hosts".to_owned(),
    ];
    let recipe = Recipe {
        name: "buildroot",
        title: "Debian 13 build root",
        key: Key::new("buildroot 1")
            .add("packages", PACKAGES.as_bytes())
            .add("hooks", hooks.concat().as_bytes()),
        expected_lines: 900,
    };
    let key = recipe.key.hex();
    let path = cache.get(&recipe, |tmp, step| {
        cmd::run_logged(
            &mut install(PACKAGES, &tmp.join("root"), &SUITES, &hooks),
            step,
        )
    })?;
    Ok(BuildRoot {
        path: path.join("root"),
        key,
    })
}

/// A build root in the store.
#[derive(Clone)]
pub struct BuildRoot {
    path: PathBuf,
    /// Its key, for the keys of what is built in it.
    pub key: String,
}

/// Quotes a word for the shell.
pub fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

impl BuildRoot {
    /// A file of the root, as seen from outside.
    pub fn file(&self, path: &str) -> PathBuf {
        self.path.join(path.trim_start_matches('/'))
    }

    /// Prepares to run a shell script in the root.
    pub fn script(&self, script: impl Into<String>) -> RootScript<'_> {
        RootScript {
            root: self,
            script: script.into(),
            mounts: Vec::new(),
        }
    }
}

/// A shell script to run in the build root. It stops at the first command that fails.
pub struct RootScript<'a> {
    root: &'a BuildRoot,
    script: String,
    mounts: Vec<(PathBuf, &'static str, bool)>,
}

impl RootScript<'_> {
    /// Makes a directory visible at one of [`MOUNT_POINTS`], to read only.
    #[must_use]
    pub fn read(mut self, outside: &Path, inside: &'static str) -> Self {
        self.mounts.push((outside.to_owned(), inside, true));
        self
    }

    /// Makes a directory visible at one of [`MOUNT_POINTS`], to read and write.
    #[must_use]
    pub fn write(mut self, outside: &Path, inside: &'static str) -> Self {
        self.mounts.push((outside.to_owned(), inside, false));
        self
    }

    /// Runs the script to its end.
    ///
    /// # Errors
    ///
    /// When it fails or the user interrupts.
    pub fn run(self, step: &mut Step) -> Result<()> {
        let root = quote(&self.root.path.to_string_lossy());
        let mut outer = format!(
            "set -e; R={root}; PATH=$PATH:/usr/sbin:/sbin\n\
             mount --bind \"$R\" \"$R\"; mount -o remount,bind,ro \"$R\"\n\
             mount --rbind /dev \"$R/dev\"; mount -t proc proc \"$R/proc\"; mount -t tmpfs tmpfs \"$R/tmp\"\n\
             mount --bind /etc/resolv.conf \"$R/etc/resolv.conf\"; mount --bind /etc/hosts \"$R/etc/hosts\"\n"
        );
        for (outside, inside, read_only) in &self.mounts {
            let outside = quote(&outside.to_string_lossy());
            outer.push_str(&format!("mount --bind {outside} \"$R{inside}\"\n"));
            if *read_only {
                outer.push_str(&format!("mount -o remount,bind,ro \"$R{inside}\"\n"));
            }
        }
        let mut environment = String::new();
        for name in ["http_proxy", "https_proxy", "no_proxy"] {
            if let Ok(value) = std::env::var(name) {
                environment.push_str(&format!(" {name}={}", quote(&value)));
            }
        }
        // The shell is process 1 of the namespace and must not become the script: as process 1 that
        // would be deaf to signals.
        outer.push_str(&format!(
            "chroot \"$R\" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C.UTF-8 \
             DEBIAN_FRONTEND=noninteractive{environment} sh -ec {}\nexit $?\n",
            quote(&self.script)
        ));
        let mut command = cmd::tied("unshare");
        if !host::is_root() {
            command.args(["--user", "--map-root-user", "--map-auto"]);
        }
        command
            .args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c"])
            .arg(outer);
        cmd::run_logged(&mut command, step)
    }
}
