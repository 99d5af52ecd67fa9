// SPDX-License-Identifier: MIT OR Apache-2.0

//! The project's kernel modules, built with the top-level `Kbuild` from a copy of their sources.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::{
    cache::{Cache, Key, Recipe},
    checkout, cmd,
    kernel::{self, Build},
    root,
    ui::Step,
};

/// Folders of the checkout that no module is made from.
const HOST_ONLY: [&str; 4] = ["guest-agent", "host-harness", "tests", "xtask"];

/// Whether a file of the checkout may take part in the modules' build.
fn is_module_source(path: &Path) -> bool {
    let Some(Component::Normal(first)) = path.components().next() else {
        return false;
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if path.components().count() == 1 {
        return name.starts_with("Kbuild");
    }
    !first.to_string_lossy().starts_with('.')
        && !HOST_ONLY.iter().any(|folder| first == *folder)
        // Products of a build inside the checkout.
        && !name.contains("_generated.")
        && !name.starts_with('.')
}

/// The sources of the modules: names in the checkout.
pub fn sources() -> Result<Vec<PathBuf>> {
    let mut files = kernel::checkout_files(&checkout())?;
    files.retain(|path| is_module_source(path));
    Ok(files)
}

/// Where in the modules' directory a root file system begins that has them where `make modules_install` puts them.
pub const INSTALLED: &str = "installed";

/// Builds the modules for the kernel of that key, if they are not in the store. They are there twice: beside each
/// other, and in [`INSTALLED`].
///
/// # Errors
///
/// When the build fails; the message ends with what the compiler printed.
pub fn ensure(cache: &Cache, kernel: &str, build: &Build, bitflags: &Path) -> Result<PathBuf> {
    let sources = sources()?;
    let mut key = Key::new("modules 3")
        .add("kernel", kernel.as_bytes())
        .add("bitflags", bitflags.as_os_str().as_encoded_bytes());
    for path in &sources {
        key = key.add_file(&path.to_string_lossy(), &checkout().join(path))?;
    }
    let recipe = Recipe {
        name: "modules",
        title: "kernel modules",
        key,
        expected_lines: 40,
    };
    cache.get(&recipe, |tmp, step| {
        let work = tmp.join("build");
        copy_sources(&sources, &work)?;
        make(build, bitflags, &work, "modules", step)?;
        let inside = match build {
            Build::Root { .. } => Path::new(root::WORK),
            Build::Tree(_) => &work,
        };
        let install = format!(
            "modules_install INSTALL_MOD_PATH={}",
            inside.join(INSTALLED).display()
        );
        make(build, bitflags, &work, &install, step)?;
        fs::rename(work.join(INSTALLED), tmp.join(INSTALLED))
            .context("`make modules_install` installed nothing")?;
        let mut found = false;
        for entry in fs::read_dir(&work)?.flatten() {
            let name = entry.file_name();
            let is_module = Path::new(&name).extension().is_some_and(|e| e == "ko");
            if is_module || name == "Module.symvers" {
                found |= is_module;
                fs::rename(entry.path(), tmp.join(name))?;
            }
        }
        if !found {
            bail!("the build made no module{}", step.failure_text());
        }
        fs::remove_dir_all(&work)?;
        Ok(())
    })
}

/// Copies the modules' sources to a directory of their own.
///
/// # Errors
///
/// Those of the file system.
pub fn copy_sources(sources: &[PathBuf], target: &Path) -> Result<()> {
    for path in sources {
        let to = target.join(path);
        fs::create_dir_all(to.parent().unwrap_or(target))?;
        fs::copy(checkout().join(path), &to)
            .with_context(|| format!("cannot copy {}", path.display()))?;
    }
    Ok(())
}

/// Runs the kernel's `make` over a copy of the sources; `target` may hold variables too.
///
/// # Errors
///
/// When it fails.
pub fn make(
    build: &Build,
    bitflags: &Path,
    work: &Path,
    target: &str,
    step: &mut Step,
) -> Result<()> {
    match build {
        Build::Root {
            root,
            release,
            source,
            objects,
        } => root
            .script(format!(
                "{make} -C {objects} M={work} BITFLAGS_SRC={bitflags} {target}",
                make = kernel::make_in_root(release),
                objects = root::OBJECTS,
                work = root::WORK,
                bitflags = root::EXTRA,
            ))
            .read(source, root::SOURCE)
            .read(objects, root::OBJECTS)
            .read(bitflags, root::EXTRA)
            .write(work, root::WORK)
            .run(step),
        Build::Tree(tree) => {
            let mut command = tree.make();
            command
                .arg(format!("M={}", work.display()))
                .arg(format!("BITFLAGS_SRC={}", bitflags.display()))
                .args(target.split_whitespace());
            cmd::run_logged(&mut command, step)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_module_sources_count() {
        for (path, wanted) in [
            ("Kbuild", true),
            ("Kbuild.include", true),
            ("README.md", false),
            ("Cargo.toml", false),
            ("proto/src/ring.rs", true),
            ("vmbus_drv/helpers.c", true),
            ("vmbus_drv/bindings_generated.rs", false),
            ("vmbus_drv/.vmbus.o.cmd", false),
            (".cargo/config.toml", false),
            ("host-harness/src/lib.rs", false),
            ("xtask/src/kmod.rs", false),
        ] {
            assert_eq!(is_module_source(Path::new(path)), wanted, "{path}");
        }
    }
}
