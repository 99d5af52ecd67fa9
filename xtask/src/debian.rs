// SPDX-License-Identifier: MIT OR Apache-2.0

//! Debian package lists: parsing, version order, and the choice of the kernel. Pure functions.
//!
//! The order of versions is the one of Debian Policy, section 5.6.12.

use std::{cmp::Ordering, collections::BTreeSet, fmt};

/// What the choice needs to know of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Name of the binary package.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Names of the packages that it depends on, without versions and alternatives.
    pub depends: Vec<String>,
}

/// A kernel for which everything is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelChoice {
    /// What `uname -r` prints in it, for example `7.3.4+deb13-amd64`.
    pub release: String,
    /// The version that all packages have.
    pub version: String,
    /// Names of the packages to fetch.
    pub packages: Vec<String>,
}

/// Why there is no kernel: what was there, for the message.
#[derive(Debug, PartialEq, Eq)]
pub struct NoKernel {
    series: String,
    images: Vec<String>,
    sources: Vec<String>,
}

impl fmt::Display for NoKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |items: &[String]| match items {
            [] => "none".to_owned(),
            items => items.join(", "),
        };
        write!(
            f,
            "no Linux {}.y has its image, headers and source packages in one version \
             (images: {}; sources: {}); name a directory with the .deb files of one version with \
             --kernel-package DIR, or a built kernel tree that has Rust enabled with --kdir BUILD_TREE",
            self.series,
            list(&self.images),
            list(&self.sources)
        )
    }
}

impl std::error::Error for NoKernel {}

/// Parses a `Packages` list (paragraphs of `Field: value` lines).
pub fn parse_packages(text: &str) -> Vec<Package> {
    text.split("\n\n")
        .filter_map(|paragraph| {
            let field = |name: &str| {
                paragraph.lines().find_map(|line| {
                    line.strip_prefix(name)
                        .and_then(|rest| rest.strip_prefix(':'))
                        .map(str::trim)
                })
            };
            Some(Package {
                name: field("Package")?.to_owned(),
                version: field("Version")?.to_owned(),
                depends: field("Depends")
                    .unwrap_or_default()
                    .split(',')
                    // Of alternatives (a | b) none matters here: the kernel's own are exact.
                    .filter(|item| !item.contains('|'))
                    .filter_map(|item| item.split_whitespace().next())
                    .map(|name| name.split(':').next().unwrap_or(name).to_owned())
                    .collect(),
            })
        })
        .collect()
}

/// Orders two Debian versions.
pub fn compare_versions(a: &str, b: &str) -> Ordering {
    let split = |text: &str| -> (u64, String, String) {
        let (epoch, rest) = match text.split_once(':') {
            Some((epoch, rest)) => (epoch.parse().unwrap_or(0), rest),
            None => (0, text),
        };
        match rest.rsplit_once('-') {
            Some((upstream, revision)) => (epoch, upstream.to_owned(), revision.to_owned()),
            None => (epoch, rest.to_owned(), String::new()),
        }
    };
    let (a, b) = (split(a), split(b));
    a.0.cmp(&b.0)
        .then_with(|| compare_parts(a.1.as_bytes(), b.1.as_bytes()))
        .then_with(|| compare_parts(a.2.as_bytes(), b.2.as_bytes()))
}

/// Rank of a byte in the non-digit parts: `~` before the end, the end before letters, letters before the rest.
fn rank(byte: Option<&u8>) -> i32 {
    match byte {
        None => 0,
        Some(b'~') => -1,
        Some(byte) if byte.is_ascii_digit() => 0,
        Some(byte) if byte.is_ascii_alphabetic() => i32::from(*byte),
        Some(byte) => i32::from(*byte) + 256,
    }
}

fn compare_parts(mut a: &[u8], mut b: &[u8]) -> Ordering {
    let is_text = |byte: Option<&u8>| byte.is_some_and(|byte| !byte.is_ascii_digit());
    while !a.is_empty() || !b.is_empty() {
        while is_text(a.first()) || is_text(b.first()) {
            let order = rank(a.first()).cmp(&rank(b.first()));
            if order != Ordering::Equal {
                return order;
            }
            a = a.get(1..).unwrap_or_default();
            b = b.get(1..).unwrap_or_default();
        }
        let order = take_number(&mut a).cmp(&take_number(&mut b));
        if order != Ordering::Equal {
            return order;
        }
    }
    Ordering::Equal
}

/// Takes the leading digits off and gives them in a form that orders as the number does.
fn take_number<'a>(text: &mut &'a [u8]) -> (usize, &'a [u8]) {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (number, rest) = text.split_at(digits);
    *text = rest;
    let zeros = number.iter().take_while(|byte| **byte == b'0').count();
    let number = number.get(zeros..).unwrap_or_default();
    (number.len(), number)
}

/// The release name in an image package's name: `linux-image-7.3.4+deb13-amd64` gives `7.3.4+deb13-amd64`.
/// Flavours (cloud, rt), debug symbols and unsigned images are not wanted.
fn image_release<'a>(name: &'a str, series: &str) -> Option<&'a str> {
    let release = name.strip_prefix("linux-image-")?;
    let rest = release.strip_prefix(series)?.strip_prefix('.')?;
    let (patch, suffix) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?);
    let distribution = suffix.strip_suffix("-amd64")?;
    let plain = distribution
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || c == '+' || c == '.' || c == '~');
    (!patch.is_empty() && plain).then_some(release)
}

/// Chooses the newest kernel of a series (`"7.3"`) that has image, headers and source in one version.
///
/// # Errors
///
/// When there is none; the error names what was found.
pub fn choose_kernel(packages: &[Package], series: &str) -> Result<KernelChoice, NoKernel> {
    let source_name = format!("linux-source-{series}");
    let has = |name: &str, version: &str| {
        packages
            .iter()
            .find(|package| package.name == name && package.version == version)
    };
    let images: Vec<(&Package, &str)> = packages
        .iter()
        .filter_map(|package| Some((package, image_release(&package.name, series)?)))
        .collect();
    let complete = |image: &Package, release: &str| -> Option<KernelChoice> {
        let version = image.version.as_str();
        has(&source_name, version)?;
        let headers = format!("linux-headers-{release}");
        has(&headers, version)?;
        // The image package may be split: what it needs of the same release comes along.
        let mut wanted = BTreeSet::from([image.name.clone()]);
        let mut open = vec![image];
        while let Some(package) = open.pop() {
            for name in &package.depends {
                if name.starts_with("linux-")
                    && name.ends_with(release)
                    && wanted.insert(name.clone())
                {
                    open.push(has(name, version)?);
                }
            }
        }
        wanted.insert(headers);
        wanted.insert(source_name.clone());
        Some(KernelChoice {
            release: release.to_owned(),
            version: version.to_owned(),
            packages: wanted.into_iter().collect(),
        })
    };
    images
        .iter()
        .filter_map(|(image, release)| complete(image, release))
        .max_by(|a, b| compare_versions(&a.version, &b.version))
        .ok_or_else(|| {
            let named = |package: &Package| format!("{} {}", package.name, package.version);
            NoKernel {
                series: series.to_owned(),
                images: images.iter().map(|(package, _)| named(package)).collect(),
                sources: packages
                    .iter()
                    .filter(|package| package.name == source_name)
                    .map(named)
                    .collect(),
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str, depends: &[&str]) -> Package {
        Package {
            name: name.to_owned(),
            version: version.to_owned(),
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    /// All packages of one kernel, in the split form.
    fn kernel(release: &str, version: &str) -> Vec<Package> {
        let binary = format!("linux-binary-{release}");
        let modules = format!("linux-modules-{release}");
        vec![
            package(
                &format!("linux-image-{release}"),
                version,
                &["kmod", &binary, &modules],
            ),
            package(&binary, version, &[]),
            package(&modules, version, &[&binary]),
            package(&format!("linux-headers-{release}"), version, &["make"]),
        ]
    }

    #[test]
    fn versions_order_as_policy_says() {
        let ordered = [
            "1.0~rc1-1",
            "1.0~rc1-2",
            "1.0-1~bpo13+1",
            "1.0-1",
            "1.0-1+b1",
            "1.0a-1",
            "1.0+x-1",
            "1.2-1",
            "1.10-1",
            "1:0.1-1",
        ];
        for (i, a) in ordered.iter().enumerate() {
            for (j, b) in ordered.iter().enumerate() {
                assert_eq!(compare_versions(a, b), i.cmp(&j), "{a} and {b}");
            }
        }
        assert_eq!(compare_versions("1.01-1", "1.1-1"), Ordering::Equal);
    }

    #[test]
    fn parses_paragraphs() {
        let text = "Package: a\nVersion: 1\nDepends: b (= 1), c | d, e:any (>= 2),\n\nPackage: x\n\n\
                    Package: y\nVersion: 2\nDescription: z\n";
        assert_eq!(
            parse_packages(text),
            [package("a", "1", &["b", "e"]), package("y", "2", &[])]
        );
    }

    #[test]
    fn takes_the_newest_complete_kernel() {
        let mut packages = kernel("7.3.4+deb13-amd64", "7.3.4-1~bpo13+1");
        packages.extend(kernel("7.3.12+deb13-amd64", "7.3.12-1~bpo13+1"));
        packages.extend(kernel("7.3.13+deb13-amd64", "7.3.13-1~bpo13+1"));
        packages.push(package("linux-source-7.3", "7.3.4-1~bpo13+1", &[]));
        packages.push(package("linux-source-7.3", "7.3.12-1~bpo13+1", &[]));
        let choice = choose_kernel(&packages, "7.3").unwrap();
        assert_eq!(choice.release, "7.3.12+deb13-amd64");
        assert_eq!(
            choice.packages,
            [
                "linux-binary-7.3.12+deb13-amd64",
                "linux-headers-7.3.12+deb13-amd64",
                "linux-image-7.3.12+deb13-amd64",
                "linux-modules-7.3.12+deb13-amd64",
                "linux-source-7.3",
            ]
        );
    }

    #[test]
    fn flavours_are_not_taken() {
        for name in [
            "linux-image-7.3.4+deb13-cloud-amd64",
            "linux-image-7.3.4+deb13-rt-amd64",
            "linux-image-7.3.4+deb13-amd64-dbg",
            "linux-image-7.3.4+deb13-amd64-unsigned",
            "linux-image-7.30.4+deb13-amd64",
            "linux-image-amd64",
        ] {
            assert_eq!(image_release(name, "7.3"), None, "{name}");
        }
    }

    #[test]
    fn no_kernel_names_what_is_there_and_the_ways_out() {
        let mut packages = kernel("7.3.5+deb13-amd64", "7.3.5-1");
        packages.push(package("linux-source-7.3", "7.3.4-1", &[]));
        let text = choose_kernel(&packages, "7.3").unwrap_err().to_string();
        for part in ["7.3.5-1", "7.3.4-1", "--kernel-package", "--kdir"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        // A part that the image needs is missing.
        packages.retain(|package| !package.name.starts_with("linux-modules"));
        packages.push(package("linux-source-7.3", "7.3.5-1", &[]));
        assert!(choose_kernel(&packages, "7.3").is_err());
    }
}
