// SPDX-License-Identifier: MIT OR Apache-2.0

//! A kernel tree that the user built (`--kdir`): whether it is one that the modules can be built for, and `make` in it.
//!
//! Facts are from the kernel's top `Makefile` and `Documentation/kbuild/modules.rst`: what `make prepare` leaves in
//! `include/config`, and that external modules need `Module.symvers` of the whole build.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::UNIX_EPOCH,
};

use anyhow::{Result, bail};

use crate::{Unmet, cache::Key, cmd, kernel::SERIES};

/// What the modules cannot do without. The drivers of devices whose subsystem is not there are left out by `Kbuild`.
const OPTIONS: [&str; 2] = ["CONFIG_RUST", "CONFIG_HYPERV"];

/// A kernel tree that modules can be built for.
#[derive(Clone, Debug)]
pub struct Tree {
    /// The build tree, absolute.
    pub path: PathBuf,
    /// What `uname -r` prints in the kernel.
    pub release: String,
    /// The compiler that its Rust metadata is of, where that is not the `rustc` that is found first.
    rustc: Option<PathBuf>,
    clang: bool,
}

/// The values of an `auto.conf`.
struct Config(String);

impl Config {
    fn value(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| {
            let value = line.strip_prefix(name)?.strip_prefix('=')?;
            Some(value.trim_matches('"'))
        })
    }
}

/// What is wrong with a tree, in words; else its release and configuration.
fn examine(path: &Path) -> Result<(String, Config), String> {
    let read = |name: &str| fs::read_to_string(path.join(name)).ok();
    let Some(release) = read("include/config/kernel.release") else {
        let is_kernel = read("Makefile").is_some_and(|text| text.contains("PATCHLEVEL"));
        return Err(if is_kernel {
            "this kernel tree is not built yet (or was built with O=: name that directory)".into()
        } else {
            "this is not a kernel build tree (no include/config/kernel.release in it)".into()
        });
    };
    let release = release.trim().to_owned();
    let rest = release.strip_prefix(SERIES);
    if rest.is_none_or(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
        return Err(format!(
            "this is Linux {release}; the modules are for {SERIES}"
        ));
    }
    let config = Config(read("include/config/auto.conf").unwrap_or_default());
    for option in OPTIONS {
        if config.value(option) != Some("y") {
            return Err(format!(
                "this kernel is configured without {option}, which the modules need"
            ));
        }
    }
    for (name, how) in [
        ("rust/libkernel.rmeta", "`make prepare`"),
        ("Module.symvers", "`make`"),
    ] {
        if !path.join(name).exists() {
            return Err(format!(
                "{name} is missing, which {how} in the kernel's tree makes"
            ));
        }
    }
    Ok((release, config))
}

/// A compiler of this version, among those that are likely. `None` is the `rustc` that make finds by itself.
fn find_rustc(version: &str) -> Result<Option<PathBuf>, String> {
    let mut candidates = vec![PathBuf::from("rustc")];
    candidates.extend(std::env::var_os("RUSTC").map(PathBuf::from));
    candidates.push("/usr/bin/rustc".into());
    if let Some((series, _)) = version
        .trim_start_matches("rustc ")
        .rsplit_once('.')
        .filter(|_| version.starts_with("rustc "))
    {
        // Debian names additional ones so.
        candidates.push(format!("/usr/bin/rustc-{series}").into());
    }
    for (number, path) in candidates.into_iter().enumerate() {
        let found = cmd::output(Command::new(&path).arg("--version"));
        if found.is_ok_and(|text| text.trim() == version) {
            return Ok((number > 0).then_some(path));
        }
    }
    Err(format!(
        "this kernel was built with {version}, which is not here; name that compiler in RUSTC"
    ))
}

impl Tree {
    /// Checks a tree.
    ///
    /// # Errors
    ///
    /// Says why no modules can be built for it.
    pub fn open(path: &Path) -> Result<Self> {
        let unmet = |text: &str| Unmet(format!("--kdir {}: {text}", path.display()));
        let absolute = path
            .canonicalize()
            .map_err(|error| unmet(&error.to_string()))?;
        let (release, config) = examine(&absolute).map_err(|text| unmet(&text))?;
        let version = config
            .value("CONFIG_RUSTC_VERSION_TEXT")
            .unwrap_or_default();
        Ok(Self {
            rustc: find_rustc(version).map_err(|text| unmet(&text))?,
            clang: config.value("CONFIG_CC_IS_CLANG").is_some(),
            path: absolute,
            release,
        })
    }

    /// The kernel's image.
    ///
    /// # Errors
    ///
    /// When it was not built.
    pub fn image(&self) -> Result<PathBuf> {
        let image = self.path.join("arch/x86/boot/bzImage");
        if !image.exists() {
            bail!(Unmet(format!(
                "--kdir {}: there is no arch/x86/boot/bzImage in it, which guests need",
                self.path.display()
            )));
        }
        Ok(image)
    }

    /// The source tree: a build tree apart from its source has a link to it.
    pub fn source(&self) -> PathBuf {
        self.path
            .join("source")
            .canonicalize()
            .unwrap_or_else(|_| self.path.clone())
    }

    /// The key of what is made from the tree: which tree it is, and when it was built.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn key(&self, recipe: &str) -> Result<Key> {
        let mut key = Key::new(recipe).add("path", self.path.as_os_str().as_encoded_bytes());
        for name in [
            "arch/x86/boot/bzImage",
            "rust/libkernel.rmeta",
            "Module.symvers",
            "include/config/auto.conf",
        ] {
            let time = fs::metadata(self.path.join(name)).and_then(|metadata| metadata.modified());
            let nanoseconds = time
                .ok()
                .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
                .map_or(0, |time| time.as_nanos());
            key = key.add(name, &nanoseconds.to_le_bytes());
        }
        Ok(key)
    }

    /// `make` in the tree, with the compilers that it was built with; ends with us.
    pub fn make(&self) -> Command {
        let mut command = cmd::tied("make");
        command
            .arg(format!("-j{}", crate::cpus()))
            .arg("-C")
            .arg(&self.path);
        if let Some(rustc) = &self.rustc {
            command.arg(format!("RUSTC={}", rustc.display()));
        }
        // The kernel's Makefile takes these from the command line only.
        for name in ["CC", "BINDGEN"] {
            if let Ok(value) = std::env::var(name) {
                command.arg(format!("{name}={value}"));
            }
        }
        let chosen = ["CC", "LLVM"]
            .into_iter()
            .any(|name| std::env::var_os(name).is_some());
        if self.clang && !chosen {
            command.arg("LLVM=1");
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Scratch;

    const GOOD: &str = "CONFIG_RUST=y\nCONFIG_HYPERV=y\nCONFIG_RUSTC_VERSION_TEXT=\"rustc 1\"\n";

    /// A tree with these files.
    fn tree(name: &str, files: &[(&str, &str)]) -> Scratch {
        let scratch = Scratch::create(name).unwrap();
        for (name, text) in files {
            let path = scratch.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        scratch
    }

    fn complete<'a>(release: &'a str, config: &'a str) -> [(&'a str, &'a str); 4] {
        [
            ("include/config/kernel.release", release),
            ("include/config/auto.conf", config),
            ("rust/libkernel.rmeta", ""),
            ("Module.symvers", ""),
        ]
    }

    #[test]
    fn a_built_tree_is_taken() {
        for release in ["7.3.4\n", "7.3.4+deb13-amd64\n", "7.3.0-rc2-mine\n", "7.3"] {
            let tree = tree("good", &complete(release, GOOD));
            let (found, config) = examine(tree.path()).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(found, release.trim());
            assert_eq!(config.value("CONFIG_RUSTC_VERSION_TEXT"), Some("rustc 1"));
            assert_eq!(config.value("CONFIG_RUSTC"), None);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |files: &[(&str, &str)], part: &str| {
            let tree = tree("wrong", files);
            match examine(tree.path()) {
                Err(text) => assert!(text.contains(part), "{text}"),
                Ok(_) => panic!("taken without: {part}"),
            }
        };
        wrong(&[], "not a kernel build tree");
        wrong(&[("Makefile", "all:\n")], "not a kernel build tree");
        wrong(&[("Makefile", "PATCHLEVEL = 3\n")], "not built yet");
        wrong(&complete("7.4.1", GOOD), "this is Linux 7.4.1");
        wrong(&complete("7.30.1", GOOD), "this is Linux 7.30.1");
        wrong(&complete("6.12.0", GOOD), "for 7.3");
        wrong(
            &complete("7.3.4", "CONFIG_HYPERV=y\n"),
            "without CONFIG_RUST,",
        );
        wrong(
            &complete("7.3.4", "CONFIG_RUST=y\n"),
            "without CONFIG_HYPERV,",
        );
        wrong(
            &complete("7.3.4", GOOD)[..2],
            "rust/libkernel.rmeta is missing",
        );
        wrong(&complete("7.3.4", GOOD)[..3], "Module.symvers is missing");
    }

    #[test]
    fn the_compiler_must_be_the_same() {
        let text = cmd::output(Command::new("rustc").arg("--version")).unwrap();
        assert_eq!(find_rustc(text.trim()), Ok(None));
        let error = find_rustc("rustc 1.2.3 (of long ago)").unwrap_err();
        assert!(
            error.contains("1.2.3") && error.contains("RUSTC"),
            "{error}"
        );
    }
}
