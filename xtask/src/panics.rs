// SPDX-License-Identifier: MIT OR Apache-2.0

//! Finds the lines of the modules' own sources that can panic.
//!
//! A panic in a module takes the guest's kernel down, so no code of ours may have one: no index that can be out of
//! bounds, no arithmetic that can overflow (Debian's kernel checks it), no `unwrap`. What the compiler
//! could not rule out has the place to be named in the panic's message, a `core::panic::Location`, among the object
//! file's constants: the address and length of the source's name, line and column.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use object::{Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget, elf};

/// The places (`FILE:LINE`) in sources with relative names, which ours have, that a module can panic at.
///
/// # Errors
///
/// When it is no object file.
pub fn find(module: &[u8]) -> Result<BTreeSet<String>> {
    let file = object::File::parse(module).context("not an object file")?;
    let mut places = BTreeSet::new();
    for section in file.sections() {
        if !section.name()?.starts_with(".rodata") && !section.name()?.starts_with(".data") {
            continue;
        }
        let data = section.data()?;
        for (offset, relocation) in section.relocations() {
            if relocation.flags()
                != (RelocationFlags::Elf {
                    r_type: elf::R_X86_64_64,
                })
            {
                continue;
            }
            let RelocationTarget::Symbol(symbol) = relocation.target() else {
                continue;
            };
            let symbol = file.symbol_by_index(symbol)?;
            let Some(index) = symbol.section_index() else {
                continue;
            };
            let address = symbol.address().wrapping_add_signed(relocation.addend());
            let strings = file.section_by_index(index)?.data()?;
            places.extend(place(data, offset, strings, address));
        }
    }
    Ok(places)
}

/// Reads a `Location` at `offset`, whose name is at `address`, if that is what is there and it is ours.
fn place(data: &[u8], offset: u64, strings: &[u8], address: u64) -> Option<String> {
    let rest = data.get(usize::try_from(offset).ok()?.checked_add(8)?..)?;
    let length = u64::from_le_bytes(*rest.first_chunk()?);
    let line = u32::from_le_bytes(*rest.get(8..)?.first_chunk()?);
    let name = strings
        .get(usize::try_from(address).ok()?..)?
        .get(..usize::try_from(length).ok()?)?;
    let name = std::str::from_utf8(name).ok()?;
    let is_source = name.ends_with(".rs") && !name.starts_with('/') && !name.contains(' ');
    is_source.then(|| format!("{name}:{line}"))
}

#[cfg(test)]
mod tests {
    use object::write;

    use super::*;

    /// An object file with one location.
    fn module(name: &str) -> Vec<u8> {
        let mut file = write::Object::new(
            object::BinaryFormat::Elf,
            object::Architecture::X86_64,
            object::Endianness::Little,
        );
        let section = file.section_id(write::StandardSection::ReadOnlyData);
        let at = file.append_section_data(section, format!("text{name}").as_bytes(), 1);
        let mut location = vec![0; 8];
        location.extend((name.len() as u64).to_le_bytes());
        location.extend(12_u32.to_le_bytes());
        location.extend(5_u32.to_le_bytes());
        let offset = file.append_section_data(section, &location, 8);
        let symbol = file.section_symbol(section);
        file.add_relocation(
            section,
            write::Relocation {
                offset,
                symbol,
                addend: i64::try_from(at).unwrap() + 4,
                flags: RelocationFlags::Elf {
                    r_type: elf::R_X86_64_64,
                },
            },
        )
        .unwrap();
        file.write().unwrap()
    }

    #[test]
    fn own_lines_are_found() {
        let found = find(&module("storvsc/storvsc.rs")).unwrap();
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            ["storvsc/storvsc.rs:12"]
        );
    }

    #[test]
    fn others_are_not() {
        for name in [
            "/linux/rust/kernel/time.rs",
            "storvsc/storvsc.rs:12",
            "text",
        ] {
            assert!(find(&module(name)).unwrap().is_empty(), "{name}");
        }
        assert!(find(b"text").is_err());
    }
}
