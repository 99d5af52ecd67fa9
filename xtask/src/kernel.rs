// SPDX-License-Identifier: MIT OR Apache-2.0

//! The guest's kernel: Debian's own packages, packages from a directory, or a tree that the user built.
//!
//! Debian's header packages have no Rust metadata. It is made again from the source of the same version,
//! with the compilers and the configuration that Debian used; the result fits the packaged kernel.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::UNIX_EPOCH,
};

use anyhow::{Context, Result, bail};

use crate::{
    Unmet,
    cache::{Cache, Key, Recipe},
    cmd, debian,
    root::{self, BuildRoot},
    tree::Tree,
    ui::{self, Step},
};

/// The kernel series that the modules are for.
pub const SERIES: &str = "7.3";

/// Where the kernel comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KernelSource {
    /// The newest complete set of packages in Debian's archive.
    #[default]
    Archive,
    /// `.deb` files in a directory.
    Packages(PathBuf),
    /// A kernel tree that was built with Rust enabled.
    Tree(PathBuf),
}

impl KernelSource {
    /// Looks whether what the user named is there and usable, before any work is done for it.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Archive => {}
            Self::Packages(directory) => drop(package_files(directory)?),
            Self::Tree(path) => drop(Tree::open(path)?.image()?),
        }
        Ok(())
    }
}

/// A kernel that is ready for use.
pub struct Kernel {
    /// What `uname -r` prints in it.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// Its modules: the contents of `/lib/modules/RELEASE`.
    pub modules: PathBuf,
    /// Its key, for the keys of what is built for it.
    pub key: String,
    /// How modules for it are built.
    pub build: Build,
}

/// How modules are built.
pub enum Build {
    /// In the build root.
    Root {
        /// The build root.
        root: BuildRoot,
        /// The kernel's release.
        release: String,
        /// The kernel's source tree.
        source: PathBuf,
        /// Its build tree with the Rust metadata.
        objects: PathBuf,
    },
    /// With the machine's tools, in the user's tree.
    Tree(Tree),
}

impl Kernel {
    /// Its source tree.
    pub fn source(&self) -> PathBuf {
        match &self.build {
            Build::Root { source, .. } => source.clone(),
            Build::Tree(tree) => tree.source(),
        }
    }
}

/// `make` for Debian's kernel, to be run in the build root.
pub fn make_in_root(release: &str) -> String {
    format!(
        "make -j$(nproc) ARCH=x86 CROSS_COMPILE=x86_64-linux-gnu- CC=x86_64-linux-gnu-gcc-14 HOSTCC=gcc-14 \
         KERNELRELEASE={}",
        root::quote(release)
    )
}

/// Gets the kernel and what is needed to build modules for it.
///
/// # Errors
///
/// When there is no such kernel (the message names the alternatives), or a step fails.
pub fn ensure(cache: &Cache, source: &KernelSource, update: bool) -> Result<Kernel> {
    match source {
        KernelSource::Archive => from_packages(cache, None, update),
        KernelSource::Packages(directory) => from_packages(cache, Some(directory), false),
        KernelSource::Tree(path) => from_tree(cache, path),
    }
}

/// The `.deb` files of a directory, in order.
fn package_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .map_err(|error| Unmet(format!("--kernel-package {}: {error}", directory.display())))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    files.sort();
    for part in ["linux-image-", "linux-headers-", "linux-source-"] {
        let found = files.iter().any(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(part))
        });
        if !found {
            bail!(Unmet(format!(
                "--kernel-package {}: there is no {part}*.deb",
                directory.display()
            )));
        }
    }
    Ok(files)
}

fn from_packages(cache: &Cache, directory: Option<&Path>, update: bool) -> Result<Kernel> {
    let root = &root::ensure(cache)?;
    let mut key = Key::new("kernel 2").add("series", SERIES.as_bytes());
    let mut files = Vec::new();
    if let Some(directory) = directory {
        files = package_files(directory)?;
        for path in &files {
            let metadata = fs::metadata(path)?;
            let modified = metadata
                .modified()?
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            key = key
                .add("file", path.to_string_lossy().as_bytes())
                .add("size", &metadata.len().to_le_bytes())
                .add("modified", &modified.as_nanos().to_le_bytes());
        }
    }
    let recipe = Recipe {
        name: "kernel",
        title: "kernel packages",
        key,
        expected_lines: 40,
    };
    if update {
        cache.forget(&recipe)?;
    }
    let packages = cache.get(&recipe, |tmp, step| {
        let debs = tmp.join("debs");
        fs::create_dir(&debs)?;
        if directory.is_some() {
            for file in &files {
                let name = file.file_name().unwrap_or_default();
                fs::copy(file, debs.join(name))?;
            }
        } else {
            download(root, tmp, step)?;
        }
        unpack(root, tmp, step)?;
        Files::of(tmp).map(drop)
    })?;
    let Files {
        release,
        version,
        image,
        modules,
    } = Files::of(&packages)?;
    let source = packages.join("source");

    let recipe = Recipe {
        name: "metadata",
        title: "kernel Rust metadata",
        key: Key::new("metadata 1")
            .add("kernel", packages.as_os_str().as_encoded_bytes())
            .add("version", version.as_bytes())
            .add("root", root.key.as_bytes()),
        expected_lines: 420,
    };
    let key = recipe.key.hex();
    let headers = packages
        .join("files/usr/src")
        .join(format!("linux-headers-{release}"));
    let objects = cache.get(&recipe, |tmp, step| {
        fs::copy(headers.join(".config"), tmp.join(".config"))
            .context("the headers package has no .config")?;
        root.script(format!(
            "cd {source}\n{make} O={objects} olddefconfig prepare modules_prepare",
            make = make_in_root(&release),
            source = root::SOURCE,
            objects = root::OBJECTS,
        ))
        .read(&source, root::SOURCE)
        .write(tmp, root::OBJECTS)
        .run(step)?;
        if !tmp.join("rust/libkernel.rmeta").exists() {
            bail!("this kernel's configuration has no CONFIG_RUST, or the compilers do not fit it");
        }
        fs::copy(headers.join("Module.symvers"), tmp.join("Module.symvers"))
            .context("the headers package has no Module.symvers")?;
        Ok(())
    })?;
    Ok(Kernel {
        image,
        modules,
        key,
        build: Build::Root {
            root: root.clone(),
            release: release.clone(),
            source,
            objects,
        },
        release,
    })
}

/// What the unpacked packages hold.
struct Files {
    release: String,
    version: String,
    image: PathBuf,
    modules: PathBuf,
}

impl Files {
    /// Finds the parts; fails when one is missing.
    fn of(packages: &Path) -> Result<Self> {
        let read = |name: &str| -> Result<String> {
            let text = fs::read_to_string(packages.join(name))?;
            Ok(text.trim().to_owned())
        };
        let release = read("release")?;
        let modules = packages.join("files/usr/lib/modules").join(&release);
        // Newer packages keep the image with the modules.
        let image = [
            modules.join("vmlinuz"),
            packages.join(format!("files/boot/vmlinuz-{release}")),
        ]
        .into_iter()
        .find(|path| path.exists());
        match image {
            Some(image) if modules.join("modules.dep").exists() => Ok(Self {
                version: read("version")?,
                release,
                image,
                modules,
            }),
            _ => bail!(Unmet(format!(
                "the kernel packages of {release} hold no vmlinuz and modules of that release"
            ))),
        }
    }
}

/// Fetches the packages of the newest complete kernel into `tmp/debs`.
fn download(root: &BuildRoot, tmp: &Path, step: &mut Step) -> Result<()> {
    // The archive is the one that is named now, which need not be the one that the root was made from.
    let sources = root::sources(&root::SUITES).join("\n") + "\n";
    fs::write(tmp.join("sources.list"), sources)?;
    let apt_options = format!(
        "-o Dir::Etc::SourceList={work}/sources.list -o Dir::Etc::SourceParts=/dev/null \
         -o APT::Sandbox::User=root -o Acquire::Retries=3 -o Acquire::Languages=none \
         -o Dir::State::Lists={work}/lists -o Dir::Cache={work}/cache",
        work = root::WORK
    );
    root.script(format!(
        "cd {work}; mkdir -p lists/partial cache/archives/partial\n\
         apt-get {apt_options} update\n\
         apt-get {apt_options} indextargets --format '$(FILENAME)' 'Created-By: Packages' | while read f; do\n\
             /usr/lib/apt/apt-helper cat-file \"$f\"; echo\n\
         done | awk 'BEGIN {{ RS = \"\"; ORS = \"\\n\\n\" }} /^Package: linux-/' > Packages",
        work = root::WORK
    ))
    .write(tmp, root::WORK)
    .run(step)?;
    let list = fs::read_to_string(tmp.join("Packages"))?;
    let choice = debian::choose_kernel(&debian::parse_packages(&list), SERIES)
        .map_err(|error| Unmet(error.to_string()))?;
    step.line(&format!("chosen: {} {}", choice.release, choice.version));
    let names: Vec<String> = choice
        .packages
        .iter()
        .map(|name| root::quote(&format!("{name}={}", choice.version)))
        .collect();
    root.script(format!(
        "cd {work}/debs; apt-get {apt_options} download {}\n\
         cd ..; rm -rf lists cache Packages sources.list",
        names.join(" "),
        work = root::WORK
    ))
    .write(tmp, root::WORK)
    .run(step)
}

/// Unpacks `tmp/debs` into `tmp/files` and the source into `tmp/source`; notes release and version.
fn unpack(root: &BuildRoot, tmp: &Path, step: &mut Step) -> Result<()> {
    root.script(format!(
        "cd {work}; mkdir files source\n\
         for deb in debs/*.deb; do echo \"unpacking $deb\"; dpkg-deb -x \"$deb\" files; done\n\
         dpkg-deb -f debs/linux-headers-*.deb Version > version\n\
         basename $(dirname files/usr/src/linux-headers-*/Module.symvers) | sed s/linux-headers-// > release\n\
         for deb in debs/linux-*.deb; do\n\
             test \"$(dpkg-deb -f \"$deb\" Version)\" = \"$(cat version)\" || \
                 {{ echo \"$deb is not of version $(cat version)\"; exit 1; }}\n\
         done\n\
         test -e files/usr/lib || mkdir -p files/usr/lib\n\
         if [ -d files/lib/modules ]; then mv files/lib/modules files/usr/lib/; fi\n\
         depmod -b files/usr \"$(cat release)\"\n\
         tar -C source --strip-components=1 -xf files/usr/src/linux-source-*.tar.xz\n\
         rm -rf debs files/usr/src/linux-source-* files/usr/share",
        work = root::WORK
    ))
    .write(tmp, root::WORK)
    .run(step)
}

/// Takes a tree that the user built. Its modules are installed into the store, without touching the tree.
fn from_tree(cache: &Cache, path: &Path) -> Result<Kernel> {
    let tree = Tree::open(path)?;
    let image = tree.image()?;
    let release = tree.release.clone();
    let recipe = Recipe {
        name: "tree",
        title: "modules of the kernel tree",
        key: tree.key("tree 2")?,
        expected_lines: 100,
    };
    let key = recipe.key.hex();
    let installed = cache.get(&recipe, |tmp, step| {
        let modules = tmp.join("lib/modules").join(&release);
        fs::create_dir_all(&modules)?;
        if tree.path.join("modules.order").exists() {
            let mut command = tree.make();
            command
                .args(["modules_install", "INSTALL_MOD_STRIP=1"])
                .arg(format!("INSTALL_MOD_PATH={}", tmp.display()));
            cmd::run_logged(&mut command, step)?;
        }
        Ok(())
    })?;
    ui::info(&format!("kernel {release} from {}", tree.path.display()));
    Ok(Kernel {
        modules: installed.join("lib/modules").join(&release),
        release,
        image,
        key,
        build: Build::Tree(tree),
    })
}

/// What `git` knows of the checkout's files, for the keys: tracked ones, and new ones that are not ignored.
///
/// # Errors
///
/// When git fails.
pub fn checkout_files(checkout: &Path) -> Result<Vec<PathBuf>> {
    let list = cmd::output(Command::new("git").arg("-C").arg(checkout).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]))?;
    let mut files: Vec<PathBuf> = list
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(PathBuf::from)
        .filter(|name| checkout.join(name).is_file())
        .collect();
    files.sort();
    files.dedup();
    Ok(files)
}
