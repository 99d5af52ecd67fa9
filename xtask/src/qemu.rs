// SPDX-License-Identifier: MIT OR Apache-2.0

//! QEMU for the L1 VM, from Debian's packages but beside the machine's own: Debian 12's loses interrupts, and newer
//! ones deliver some twice.
//!
//! QEMU before 10.2 changes `CPUState::interrupt_request` from two threads without a lock: when its SVM code
//! clears `CPU_INTERRUPT_VIRQ` while the main loop sets `CPU_INTERRUPT_HARD`, the latter is lost, and with a one-shot
//! timer the VM stands still for ever. The packages are unpacked, not installed, and their programs run with their own
//! loader and libraries, so the machine's Debian release does not matter.
//!
//! QEMU to 11.1 at least leaves the vector of an interrupt that VMRUN injects in `CPUState::exception_index`
//! (`helper_vmrun`). `cpu_handle_interrupt` reads first whether there are interrupts and then whether to leave; when
//! the main loop sends an interrupt between the two, it leaves with the old vector, and the guest gets that interrupt
//! once more, even with interrupts off. (Counted at that branch in a running QEMU: 2 times in about 2 minutes of a test
//! under traffic, vector 0xf3. A guest that is just entering its kernel then dies with "ENTRY_TRAMPOLINE stack guard
//! page was hit".) Nothing but that vector can be there, so [`mend`] takes the branch out of the unpacked program.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    cache::{Cache, Key, Recipe},
    cmd, root, ui,
};

/// What is unpacked, with everything that it depends on.
const PACKAGES: &str = "qemu-system-x86";

/// The program.
const PROGRAM: &str = "usr/bin/qemu-system-x86_64";

/// Libraries, and among them the loader.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// An unpacked QEMU.
#[derive(Clone, Debug)]
pub struct Qemu(PathBuf);

impl Qemu {
    /// The one that is unpacked here.
    pub fn at(root: PathBuf) -> Self {
        Self(root)
    }

    /// Where it is unpacked.
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// Prepares to start it; ends with us.
    pub fn command(&self) -> std::process::Command {
        let libraries = self.0.join(LIBRARIES);
        let mut command = cmd::tied(libraries.join("ld-linux-x86-64.so.2"));
        command
            .env("QEMU_MODULE_DIR", libraries.join("qemu"))
            .arg("--library-path")
            .arg(&libraries)
            .arg(self.0.join(PROGRAM));
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(self.0.join(firmware));
        }
        command
    }
}

/// The instructions `cmp $-1,%ebp; jne ...; movl $EXCP_INTERRUPT,...(%rbx)` of `cpu_handle_interrupt`, where `None` is
/// any byte: an `exception_index` that is not -1 is kept, and not replaced by `EXCP_INTERRUPT`.
#[rustfmt::skip]
const BRANCH: [Option<u8>; 19] = [
    Some(0x83), Some(0xfd), Some(0xff),
    Some(0x0f), Some(0x85), None, None, None, None,
    Some(0xc7), Some(0x83), None, None, None, None, Some(0), Some(0), Some(1), Some(0),
];

/// Where the `jne` is in [`BRANCH`], and an instruction of the same length that does nothing.
const JUMP: usize = 3;
const NOTHING: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// Takes the branch out that delivers interrupts twice. Says whether it was there, exactly once; else the program stays
/// as it is.
fn mend(program: &mut [u8]) -> bool {
    let matches = |window: &[u8]| {
        let mut bytes = BRANCH.iter().zip(window);
        bytes.all(|(expected, byte)| expected.is_none_or(|expected| expected == *byte))
    };
    let mut places = program
        .windows(BRANCH.len())
        .enumerate()
        .filter(|(_, window)| matches(window))
        .map(|(place, _)| place + JUMP);
    let (Some(place), None) = (places.next(), places.next()) else {
        return false;
    };
    program
        .iter_mut()
        .skip(place)
        .zip(NOTHING)
        .for_each(|(byte, new)| *byte = new);
    true
}

/// Fetches and unpacks it.
///
/// # Errors
///
/// Those of `mmdebstrap`.
pub fn ensure(cache: &Cache) -> Result<Qemu> {
    let recipe = Recipe {
        name: "qemu",
        title: "QEMU for the L1 VM",
        key: Key::new("qemu 2").add("packages", PACKAGES.as_bytes()),
        expected_lines: 300,
    };
    let path = cache.get(&recipe, |tmp, step| {
        let target = tmp.join("root");
        let mut command = root::unpack(PACKAGES, &target, &root::SUITES, "trixie-backports");
        cmd::run_logged(&mut command, step)?;
        let program = tmp.join("root").join(PROGRAM);
        let mut bytes = fs::read(&program).context("cannot read QEMU")?;
        if mend(&mut bytes) {
            fs::write(&program, bytes).context("cannot write QEMU")?;
        } else {
            ui::info(
                "this QEMU is not known: its software CPU may give a guest an interrupt twice",
            );
        }
        Ok(())
    })?;
    Ok(Qemu(path.join("root")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The instructions in QEMU 11.1.3 as Debian has it.
    const FOUND: [u8; 19] = [
        0x83, 0xfd, 0xff, 0x0f, 0x85, 0x3f, 0xff, 0xff, 0xff, 0xc7, 0x83, 0xc0, 0x02, 0x00, 0x00,
        0x00, 0x00, 0x01, 0x00,
    ];

    #[test]
    fn the_branch_is_taken_out() {
        let mut program = [&[0x90; 7][..], &FOUND, &[0xc3; 3]].concat();
        assert!(mend(&mut program));
        let mut expected = FOUND;
        expected[3..9].copy_from_slice(&NOTHING);
        assert_eq!(program, [&[0x90; 7][..], &expected, &[0xc3; 3]].concat());
        // It is not there any more.
        assert!(!mend(&mut program));
    }

    #[test]
    fn what_is_not_clear_stays() {
        for program in [[FOUND, FOUND].concat(), FOUND[..18].to_vec(), Vec::new()] {
            let mut mended = program.clone();
            assert!(!mend(&mut mended));
            assert_eq!(mended, program);
        }
    }
}
