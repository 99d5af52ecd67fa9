// SPDX-License-Identifier: MIT OR Apache-2.0

//! The cache outside the checkout: every product under the hash of what it was made from.
//!
//! ```text
//! ~/.cache/viridian/            (XDG_CACHE_HOME is honoured; VIRIDIAN_CACHE names another place)
//!     store/NAME-KEY/           finished products; never changed after they appear
//!     tmp/                      products being made; renamed into store/ when complete
//!     log/NAME.log              what the last run of each step printed
//!     store.lock                held by the process that makes something
//!     use.lock                  shared by all who use the store; `clean` takes it exclusively
//! ```
//!
//! A product appears in `store/` by one `rename`, so an interruption at any point leaves only
//! something in `tmp/`, which the next process that makes something removes. Who uses a product holds a shared lock
//! on its directory, so that nobody who makes newer ones removes it meanwhile.

use std::{
    ffi::OsString,
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::SystemTime,
};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::{Unmet, cmd, ui, ui::Step};

/// Products of one name that are kept: the newest ones by use. Older ones are removed.
const KEEP: usize = 3;

/// The hash of everything that a product is made from.
#[derive(Clone)]
pub struct Key(Sha256);

impl Key {
    /// Starts the key of a product; `recipe` names the way of making it, and changes when that changes.
    pub fn new(recipe: &str) -> Self {
        Self(Sha256::new()).add("recipe", recipe.as_bytes())
    }

    /// Adds one named input. Names and lengths are hashed too, so that inputs cannot run into each other.
    #[must_use]
    pub fn add(mut self, name: &str, value: &[u8]) -> Self {
        for part in [name.as_bytes(), value] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// Adds a file's name and contents.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn add_file(self, name: &str, path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(self.add(name, &bytes))
    }

    /// The key in the form that is used in file names: 16 hexadecimal digits.
    pub fn hex(&self) -> String {
        self.0
            .clone()
            .finalize()
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// The cache directory, with the lock that keeps `clean` away while it is in use.
pub struct Cache {
    root: PathBuf,
    _use_lock: File,
    /// The lock of the store, while steps of this process hold it.
    store_lock: Mutex<Weak<File>>,
    /// The locks of the products that this process uses.
    used: Mutex<Vec<File>>,
}

/// One step of the set-up: what it makes, and from what.
pub struct Recipe<'a> {
    /// Name of the product in the store and of its log.
    pub name: &'a str,
    /// What the user is told.
    pub title: &'a str,
    /// Hash of the inputs.
    pub key: Key,
    /// About how many lines the step prints; only scales the progress bar.
    pub expected_lines: u64,
}

/// A temporary directory, removed when dropped unless it was renamed away.
pub struct Temporary(PathBuf);

impl Temporary {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // What cannot be removed now is removed by a later process.
        let _ = remove_tree(&self.0);
    }
}

/// Where the cache is, by the environment.
fn cache_root() -> Result<PathBuf> {
    cache_root_by(|name| std::env::var_os(name))
}

fn cache_root_by(variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    let path = |name: &str| {
        variable(name)
            .map(PathBuf::from)
            .filter(|path| !path.as_os_str().is_empty())
    };
    // Another place than the one that was meant must not be emptied.
    if let Some(path) = path("VIRIDIAN_CACHE") {
        if path.is_relative() {
            bail!(Unmet(format!(
                "VIRIDIAN_CACHE={}: an absolute path is needed",
                path.display()
            )));
        }
        return Ok(path);
    }
    // One that is not absolute has to be ignored, by the specification.
    let absolute = |name: &str| path(name).filter(|path| path.is_absolute());
    if let Some(path) = absolute("XDG_CACHE_HOME") {
        return Ok(path.join("viridian"));
    }
    match absolute("HOME") {
        Some(home) => Ok(home.join(".cache/viridian")),
        None => bail!("set HOME or VIRIDIAN_CACHE: there is no place for the cache"),
    }
}

fn lock_file(path: &Path) -> Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

impl Cache {
    /// Opens the cache, making its directories where they are missing.
    ///
    /// # Errors
    ///
    /// When the directories or locks cannot be made.
    pub fn open() -> Result<Self> {
        Self::at(cache_root()?)
    }

    fn at(root: PathBuf) -> Result<Self> {
        for name in ["store", "tmp", "log"] {
            let path = root.join(name);
            fs::create_dir_all(&path)
                .with_context(|| format!("cannot create {}", path.display()))?;
        }
        let use_lock = lock_file(&root.join("use.lock"))?;
        use_lock.lock_shared().context("cannot lock the cache")?;
        Ok(Self {
            root,
            _use_lock: use_lock,
            store_lock: Mutex::default(),
            used: Mutex::default(),
        })
    }

    /// Waits until no other process makes something, and removes what interrupted ones left. Steps of this process
    /// share the lock.
    fn lock_store(&self) -> Result<Arc<File>> {
        let mut held = self
            .store_lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = held.upgrade() {
            return Ok(file);
        }
        let file = lock_file(&self.root.join("store.lock"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                ui::info("waiting for another `cargo xtask`, which is making something");
                file.lock().context("cannot lock the cache")?;
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).context("cannot lock the cache");
            }
        }
        let tmp = self.root.join("tmp");
        for entry in fs::read_dir(&tmp).with_context(|| format!("cannot read {}", tmp.display()))? {
            let path = entry?.path();
            if !owner_lives(&path) {
                remove_tree(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        let file = Arc::new(file);
        *held = Arc::downgrade(&file);
        Ok(file)
    }

    /// The product of a recipe if it is in the store. It stays there for as long as this value exists.
    pub fn find(&self, recipe: &Recipe<'_>) -> Option<PathBuf> {
        let path = self.place(recipe);
        let lock = File::open(&path).ok()?;
        lock.lock_shared().ok()?;
        // It may have been removed before it was locked.
        path.exists().then(|| {
            self.used
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(lock);
            touch(&path);
            path
        })
    }

    /// Takes the product of a recipe out of the store, so that it is made again.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn forget(&self, recipe: &Recipe<'_>) -> Result<()> {
        let _lock = self.lock_store()?;
        let path = self.place(recipe);
        if path.exists() {
            self.discard(&path)
                .with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Removes a product: out of the store at once, then at leisure.
    fn discard(&self, path: &Path) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let gone = self
            .root
            .join("tmp")
            .join(format!("old-{name}-{}", std::process::id()));
        fs::rename(path, &gone)?;
        remove_tree(&gone)
    }

    fn place(&self, recipe: &Recipe<'_>) -> PathBuf {
        self.root
            .join("store")
            .join(format!("{}-{}", recipe.name, recipe.key.hex()))
    }

    /// Gives the product of a recipe, making it first when it is not in the store.
    ///
    /// `make` gets an empty directory to fill. The directory becomes the product only when `make`
    /// returns without an error.
    ///
    /// # Errors
    ///
    /// Those of `make`, and those of the file system.
    pub fn get(
        &self,
        recipe: &Recipe<'_>,
        make: impl FnOnce(&Path, &mut Step) -> Result<()>,
    ) -> Result<PathBuf> {
        if let Some(path) = self.find(recipe) {
            return Ok(path);
        }
        let _lock = self.lock_store()?;
        // Whoever had the lock may have made it.
        if let Some(path) = self.find(recipe) {
            return Ok(path);
        }
        let log = self.log_path(recipe.name);
        let mut step = Step::start(recipe.title, &log, recipe.expected_lines)?;
        let place = self.place(recipe);
        let temporary = self.temporary(recipe.name)?;
        make(&temporary.0, &mut step).with_context(|| format!("{} failed", recipe.title))?;
        // After a power failure the name must not be there without the data.
        cmd::run_logged(
            Command::new("sync").arg("--file-system").arg(&temporary.0),
            &mut step,
        )?;
        fs::rename(&temporary.0, &place)
            .with_context(|| format!("cannot rename to {}", place.display()))?;
        step.done();
        self.prune(recipe.name, &place);
        self.find(recipe)
            .with_context(|| format!("{} was removed at once", place.display()))
    }

    /// The log file of a step.
    pub fn log_path(&self, name: &str) -> PathBuf {
        self.root.join("log").join(format!("{name}.log"))
    }

    /// Makes an empty directory that is removed when it is dropped, or at worst by a later process.
    ///
    /// # Errors
    ///
    /// When it cannot be created.
    pub fn temporary(&self, name: &str) -> Result<Temporary> {
        let path = self
            .root
            .join("tmp")
            .join(format!("{name}-{}", std::process::id()));
        // A process that was killed may have had our number.
        remove_tree(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Temporary(path))
    }

    /// Removes the products of one name that were not used for longest, and that nobody uses now.
    fn prune(&self, name: &str, keep: &Path) {
        let Ok(entries) = fs::read_dir(self.root.join("store")) else {
            return;
        };
        let mut old: Vec<(SystemTime, PathBuf)> = entries
            .flatten()
            .filter(|entry| {
                let file_name = entry.file_name();
                let key = file_name
                    .to_str()
                    .and_then(|text| text.strip_prefix(name))
                    .and_then(|text| text.strip_prefix('-'));
                key.is_some_and(|key| key.len() == 16 && !key.contains('-')) && entry.path() != keep
            })
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        old.sort();
        old.reverse();
        for (_, path) in old.into_iter().skip(KEEP - 1) {
            let Ok(lock) = File::open(&path) else {
                continue;
            };
            if lock.try_lock().is_ok() {
                // A product that cannot be removed only costs space.
                let _ = self.discard(&path);
            }
        }
    }
}

/// A directory among the machine's temporary files for the sockets and logs of one run; the names of sockets have
/// to be short. Removed when dropped, or at worst by a later run.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one, and removes those of runs that were killed.
    ///
    /// # Errors
    ///
    /// When it cannot be created.
    pub fn create(kind: &str) -> Result<Self> {
        let base = std::env::temp_dir();
        let prefix = format!("viridian-{kind}-");
        for entry in fs::read_dir(&base).into_iter().flatten().flatten() {
            let ours = entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with(&prefix));
            if ours && !owner_lives(&entry.path()) {
                // Another user's stay.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let path = base.join(format!("{prefix}{}", std::process::id()));
        // A process that was killed may have had our number.
        remove_tree(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now is removed by a later run.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether the process that a temporary (`NAME-PID`) is named after still runs. Numbers of processes are used again,
/// in containers soon: it must be a program of ours.
pub fn owner_lives(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str()?.rsplit_once('-'))
        .and_then(|(_, pid)| fs::read_to_string(Path::new("/proc").join(pid).join("comm")).ok())
        .is_some_and(|program| program.starts_with(env!("CARGO_PKG_NAME")))
}

/// Marks a product as just used; only the choice of what to prune depends on it.
fn touch(path: &Path) {
    if let Ok(directory) = File::open(path) {
        let _ = directory.set_modified(SystemTime::now());
    }
}

/// Removes a directory tree or file if it is there.
///
/// # Errors
///
/// When something of it cannot be removed.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    match result {
        // Files of a build root made without root rights belong to the user's subordinate ids.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let status = Command::new("unshare")
                .args(["--user", "--map-auto", "--map-root-user", "rm", "-rf", "--"])
                .arg(path)
                .status()?;
            if status.success() { Ok(()) } else { Err(error) }
        }
        other => other,
    }
}

/// Removes the whole cache, unless it is in use.
///
/// # Errors
///
/// When another `cargo xtask` uses the cache, or something cannot be removed.
pub fn clean() -> Result<()> {
    let root = cache_root()?;
    if !root.exists() {
        ui::info("nothing to remove");
        return Ok(());
    }
    let lock = lock_file(&root.join("use.lock"))?;
    if lock.try_lock().is_err() {
        bail!(Unmet(
            "the cache is in use by another `cargo xtask`".to_owned()
        ));
    }
    for name in ["store", "tmp", "log", "store.lock"] {
        remove_tree(&root.join(name))
            .with_context(|| format!("cannot remove {}", root.join(name).display()))?;
    }
    ui::info(&format!("removed the contents of {}", root.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_depends_on_every_part() {
        let base = Key::new("r").add("a", b"1").hex();
        assert_eq!(base, Key::new("r").add("a", b"1").hex());
        assert_ne!(base, Key::new("s").add("a", b"1").hex());
        assert_ne!(base, Key::new("r").add("b", b"1").hex());
        assert_ne!(base, Key::new("r").add("a", b"2").hex());
        assert_ne!(base, Key::new("r").add("a", b"1").add("", b"").hex());
        assert_eq!(base.len(), 16);
    }

    #[test]
    fn the_place_is_the_one_that_was_meant() {
        let root = |variables: &[(&str, &str)]| {
            cache_root_by(|name| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| value.into())
            })
        };
        let home = ("HOME", "/h");
        let place = |variables: &[_]| root(variables).unwrap();
        assert_eq!(place(&[home]), Path::new("/h/.cache/viridian"));
        assert_eq!(
            place(&[home, ("XDG_CACHE_HOME", "/x")]),
            Path::new("/x/viridian")
        );
        assert_eq!(
            place(&[home, ("XDG_CACHE_HOME", "x")]),
            Path::new("/h/.cache/viridian")
        );
        assert_eq!(
            place(&[home, ("VIRIDIAN_CACHE", "")]),
            Path::new("/h/.cache/viridian")
        );
        assert_eq!(place(&[home, ("VIRIDIAN_CACHE", "/v")]), Path::new("/v"));
        let relative = root(&[home, ("VIRIDIAN_CACHE", "v")]);
        assert!(relative.unwrap_err().is::<Unmet>());
        assert!(root(&[]).is_err());
    }

    #[test]
    fn products_in_use_are_kept() {
        let scratch = Scratch::create("kept").unwrap();
        let make = |cache: &Cache, number: u8| {
            let recipe = Recipe {
                name: "product",
                title: "a product",
                key: Key::new("test").add("number", &[number]),
                expected_lines: 1,
            };
            cache.get(&recipe, |_, _| Ok(())).unwrap()
        };
        let user = Cache::at(scratch.path().to_owned()).unwrap();
        let used = make(&user, 0);
        let many: Vec<PathBuf> = (1..=5)
            .map(|number| make(&Cache::at(scratch.path().to_owned()).unwrap(), number))
            .collect();
        let left = |paths: &[PathBuf]| paths.iter().filter(|path| path.exists()).count();
        assert!(used.exists());
        assert_eq!(left(&many), KEEP);
        drop(user);
        make(&Cache::at(scratch.path().to_owned()).unwrap(), 6);
        assert!(!used.exists());
    }

    #[test]
    fn temporaries_end_with_their_process() {
        let kind = "ends";
        let scratch = Scratch::create(kind).unwrap();
        assert!(owner_lives(scratch.path()));
        // Process 1 is no program of ours.
        for gone in ["a-1", "a-4194999", "a", "", "a-x", "a-"] {
            assert!(!owner_lives(Path::new(gone)), "{gone}");
        }
        // One with our number was killed.
        fs::write(scratch.path().join("left"), "").unwrap();
        std::mem::forget(scratch);
        let again = Scratch::create(kind).unwrap();
        assert!(!again.path().join("left").exists());
    }

    #[test]
    fn key_inputs_do_not_run_into_each_other() {
        assert_ne!(
            Key::new("r").add("ab", b"c").hex(),
            Key::new("r").add("a", b"bc").hex()
        );
    }
}
