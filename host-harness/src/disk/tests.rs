// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests of the disk formats: each against a model in memory, against `qemu-img` (package
//! qemu-utils), and with damaged images.

use super::vhd::VhdKind;
use super::*;
use proptest::prelude::*;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn qemu_img(args: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(args)
        .output()
        .expect("qemu-img (package qemu-utils) is needed for this test");
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn read(disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xa5; len];
    disk.read_at(offset, &IoBuf::from_slice(&mut bytes))
        .expect("read");
    bytes
}

fn write(disk: &dyn Disk, offset: u64, bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    disk.write_at(offset, &IoBuf::from_slice(&mut bytes))
        .expect("write");
}

/// Bytes that tell where they should be.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (i.wrapping_mul(31).wrapping_add(seed.wrapping_mul(131)) >> 3) as u8)
        .collect()
}

fn open_writable(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .expect("open")
}

fn options(text: &str) -> DiskOptions {
    text.parse().expect(text)
}

fn open_error(text: &str) -> String {
    match open(&options(text)) {
        Ok(_) => panic!("{text} was opened"),
        Err(e) => e.to_string(),
    }
}

/// Makes an image of the format in `dir`.
fn make(dir: &Path, format: &str, size: u64) -> PathBuf {
    let path = dir.join(format!("disk.{format}"));
    match format {
        "img" => File::create(&path)
            .and_then(|file| file.set_len(size))
            .expect("raw image"),
        "vhd" => VhdDisk::create(&path, VhdKind::Dynamic, size, [7; 16]).expect("dynamic VHD"),
        "vpc" => VhdDisk::create(&path, VhdKind::Fixed, size, [7; 16]).expect("fixed VHD"),
        _ => {
            qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                text(&path),
                &size.to_string(),
            ]);
        }
    }
    path
}

/// The format's name for qemu-img.
fn qemu_name(format: &str) -> &'static str {
    match format {
        "img" => "raw",
        "vhd" | "vpc" => "vpc",
        _ => "qcow2",
    }
}

const FORMATS: [&str; 4] = ["img", "vhd", "vpc", "qcow2"];

#[derive(Debug, Clone)]
enum Action {
    Read(u64, usize),
    Write(u64, usize, u64),
    Zero(u64, u64, bool),
    Resize(u64),
    Reopen,
}

/// Sector numbers and counts on a disk of about 5 MiB, with the block edges of VHD in reach.
fn action() -> impl Strategy<Value = Action> {
    let sector = prop_oneof![0u64..10_000, 4080u64..4110, 0u64..16];
    let count = prop_oneof![1u64..20, 1u64..200, Just(5000u64)];
    prop_oneof![
        3 => (sector.clone(), count.clone()).prop_map(|(s, n)| Action::Read(s * 512, n as usize * 512)),
        4 => (sector.clone(), count.clone(), any::<u64>())
            .prop_map(|(s, n, seed)| Action::Write(s * 512, n as usize * 512, seed)),
        2 => (sector, count, any::<bool>()).prop_map(|(s, n, unmap)| Action::Zero(s * 512, n * 512, unmap)),
        1 => (1u64..12_000).prop_map(|sectors| Action::Resize(sectors * 512)),
        1 => Just(Action::Reopen),
    ]
}

/// Runs the actions on the disk and on a vector.
fn against_model(options: &DiskOptions, size: u64, actions: &[Action], reopen: bool) {
    let mut model = vec![0u8; size as usize];
    let mut disk = open(options).expect("open").disk;
    for action in actions {
        match *action {
            Action::Read(offset, len) => {
                let mut bytes = vec![0xa5; len];
                let result = disk.read_at(offset, &IoBuf::from_slice(&mut bytes));
                match model.get(offset as usize..offset as usize + len) {
                    Some(expected) => {
                        result.expect("read");
                        assert!(bytes == expected, "read of {len} at {offset}");
                    }
                    None => assert!(matches!(result, Err(DiskError::OutOfRange { .. }))),
                }
            }
            Action::Write(offset, len, seed) => {
                let mut bytes = pattern(seed, len);
                let expected = bytes.clone();
                let result = disk.write_at(offset, &IoBuf::from_slice(&mut bytes));
                match model.get_mut(offset as usize..offset as usize + len) {
                    Some(area) => {
                        result.expect("write");
                        area.copy_from_slice(&expected);
                    }
                    None => assert!(matches!(result, Err(DiskError::OutOfRange { .. }))),
                }
            }
            Action::Zero(offset, len, unmap) => {
                let result = disk.zero_at(offset, len, unmap);
                match model.get_mut(offset as usize..(offset + len) as usize) {
                    Some(area) => {
                        result.expect("zero");
                        area.fill(0);
                    }
                    None => assert!(matches!(result, Err(DiskError::OutOfRange { .. }))),
                }
            }
            Action::Resize(size) => {
                disk.resize(size).expect("resize");
                model.resize(size as usize, 0);
            }
            Action::Reopen => {
                if reopen {
                    disk.flush().expect("flush");
                    drop(disk);
                    disk = open(options).expect("open again").disk;
                }
            }
        }
        assert_eq!(disk.size(), model.len() as u64);
    }
    assert!(read(&*disk, 0, model.len()) == model, "whole disk");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_format_behaves_like_memory(
        actions in prop::collection::vec(action(), 1..24),
        format in prop::sample::select(FORMATS.to_vec()),
    ) {
        let dir = TempDir::new().expect("folder");
        let size = 5 * MIB;
        let path = make(dir.path(), format, size);
        against_model(&DiskOptions::new(&path), size, &actions, true);
        if format == "qcow2" {
            qemu_img(&["check", "-q", "-f", "qcow2", text(&path)]);
        }
    }

    #[test]
    fn a_snapshot_behaves_like_memory_and_leaves_the_image_alone(
        actions in prop::collection::vec(action(), 1..24),
        format in prop::sample::select(FORMATS.to_vec()),
    ) {
        let dir = TempDir::new().expect("folder");
        let size = 5 * MIB;
        let path = make(dir.path(), format, size);
        let before = std::fs::read(&path).expect("image");
        let mut options = DiskOptions::new(&path);
        options.snapshot = true;
        against_model(&options, size, &actions, false);
        prop_assert!(std::fs::read(&path).expect("image") == before);
    }

    #[test]
    fn damaged_vhd_never_panics(
        damage in prop::collection::vec((0usize..4096, any::<u8>()), 1..6),
        cut in 0usize..2000,
    ) {
        let dir = TempDir::new().expect("folder");
        let path = make(dir.path(), "vhd", 5 * MIB);
        let mut bytes = std::fs::read(&path).expect("image");
        let len = bytes.len();
        for (at, value) in damage {
            bytes[at % len] = value;
        }
        bytes.truncate(len - cut.min(len));
        std::fs::write(&path, &bytes).expect("image");
        if let Ok(disk) = VhdDisk::open(open_writable(&path), false) {
            let len = disk.size().min(5 * MIB) as usize;
            let mut buf = vec![0; len];
            // Either outcome is fine.
            let _ = disk.read_at(0, &IoBuf::from_slice(&mut buf));
            let _ = disk.write_at(0, &IoBuf::from_slice(&mut buf));
        }
    }
}

#[test]
fn qemu_reads_what_we_wrote() {
    for format in FORMATS {
        let dir = TempDir::new().expect("folder");
        let path = make(dir.path(), format, 9 * MIB);
        {
            let disk = open(&DiskOptions::new(&path)).expect("open").disk;
            write(&*disk, 512, &pattern(1, 70_000 / 512 * 512));
            write(&*disk, 5 * MIB - 1024, &pattern(2, 4096));
            disk.resize(11 * MIB).expect("resize");
            write(&*disk, 11 * MIB - 512, &pattern(3, 512));
            disk.zero_at(1024, 1024, true).expect("unmap");
            disk.flush().expect("flush");
        }
        let raw = dir.path().join("converted");
        qemu_img(&[
            "convert",
            "-f",
            qemu_name(format),
            "-O",
            "raw",
            text(&path),
            text(&raw),
        ]);
        let bytes = std::fs::read(&raw).expect("converted");
        assert_eq!(bytes.len() as u64, 11 * MIB, "{format}");
        let disk = open(&DiskOptions::new(&path)).expect("open").disk;
        assert!(read(&*disk, 0, bytes.len()) == bytes, "{format}");
        assert!(bytes[1024..2048].iter().all(|&b| b == 0), "{format}");
        assert!(bytes[512..1024] == pattern(1, 512), "{format}");
        if format == "qcow2" {
            qemu_img(&["check", "-q", "-f", "qcow2", text(&path)]);
        }
    }
}

#[test]
fn we_read_what_qemu_wrote() {
    let dir = TempDir::new().expect("folder");
    let raw = dir.path().join("source");
    let mut bytes = pattern(9, 7 * MIB as usize);
    bytes[2 * MIB as usize..5 * MIB as usize].fill(0);
    std::fs::write(&raw, &bytes).expect("source");
    for (format, qemu_options, ending) in [
        ("vpc", "subformat=dynamic,force_size=on", "vhd"),
        ("vpc", "subformat=fixed,force_size=on", "vhd"),
        ("qcow2", "compat=1.1", "qcow2"),
        ("qcow2", "compat=0.10", "qcow2"),
        ("qcow2", "cluster_size=4096", "qcow2"),
    ] {
        let path = dir.path().join(format!("image.{ending}"));
        qemu_img(&[
            "convert",
            "-f",
            "raw",
            "-O",
            format,
            "-o",
            qemu_options,
            text(&raw),
            text(&path),
        ]);
        let disk = open(&DiskOptions::new(&path)).expect("open").disk;
        assert_eq!(disk.size(), bytes.len() as u64, "{qemu_options}");
        assert!(read(&*disk, 0, bytes.len()) == bytes, "{qemu_options}");
        // A write into what was empty, and the image is still one for qemu.
        write(&*disk, 3 * MIB, &pattern(4, 8192));
        disk.flush().expect("flush");
        drop(disk);
        qemu_img(&["info", "-f", format, text(&path)]);
        if format == "qcow2" {
            qemu_img(&["check", "-q", "-f", format, text(&path)]);
        }
        std::fs::remove_file(&path).expect("remove");
    }
}

#[test]
fn what_a_shrink_cuts_off_does_not_come_back() {
    for format in FORMATS {
        let dir = TempDir::new().expect("folder");
        let path = make(dir.path(), format, 5 * MIB);
        let disk = open(&DiskOptions::new(&path)).expect("open").disk;
        write(&*disk, 0, &pattern(1, 5 * MIB as usize));
        for (cut, grown) in [(4 * MIB - 512, 5 * MIB), (3 * MIB + 1024, 4 * MIB + 512)] {
            disk.resize(cut).expect("shrink");
            disk.resize(grown).expect("grow");
            let bytes = read(&*disk, 0, grown as usize);
            assert!(
                bytes[..cut as usize] == pattern(1, cut as usize),
                "{format}"
            );
            assert!(bytes[cut as usize..].iter().all(|&b| b == 0), "{format}");
        }
    }
}

#[test]
fn qcow2_backing_file_shows_through() {
    let dir = TempDir::new().expect("folder");
    let base = dir.path().join("base.img");
    std::fs::write(&base, pattern(5, MIB as usize)).expect("base");
    let top = dir.path().join("top.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        "base.img",
        text(&top),
    ]);
    let disk = open(&DiskOptions::new(&top)).expect("open").disk;
    assert!(read(&*disk, 0, MIB as usize) == pattern(5, MIB as usize));
    write(&*disk, 4096, &pattern(6, 512));
    assert!(read(&*disk, 4096, 512) == pattern(6, 512));
    assert!(read(&*disk, 4608, 512) == pattern(5, MIB as usize)[4608..5120]);
    assert!(std::fs::read(&base).expect("base") == pattern(5, MIB as usize));
}

/// Makes an image in the old version of qcow2, with a file below if one is named.
fn make_old_qcow2(path: &Path, size: u64, base: Option<&str>) {
    let size = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", "compat=0.10"];
    if let Some(base) = base {
        args.extend(["-F", "raw", "-b", base]);
    }
    args.extend([text(path), &size]);
    qemu_img(&args);
}

#[test]
fn qcow2_of_the_old_version_can_be_zeroed_and_resized() {
    let dir = TempDir::new().expect("folder");
    let base = dir.path().join("base.img");
    std::fs::write(&base, pattern(5, 4 * MIB as usize)).expect("base");
    for base in [None, Some("base.img")] {
        for unmap in [true, false] {
            let path = dir.path().join("old.qcow2");
            make_old_qcow2(&path, 4 * MIB, base);
            let disk = open(&DiskOptions::new(&path)).expect("open").disk;
            let mut model = pattern(1, 4 * MIB as usize);
            write(&*disk, 0, &model);
            let space = || std::fs::metadata(&path).expect("metadata").len();
            disk.zero_at(4096, 2 * MIB, unmap).expect("zero");
            model[4096..4096 + 2 * MIB as usize].fill(0);
            assert!(read(&*disk, 0, model.len()) == model);
            if unmap && base.is_none() {
                // The freed clusters are used again.
                let before = space();
                write(&*disk, MIB, &pattern(2, MIB as usize));
                model[MIB as usize..2 * MIB as usize].copy_from_slice(&pattern(2, MIB as usize));
                disk.flush().expect("flush");
                assert_eq!(space(), before);
            }
            disk.resize(3 * MIB - 512).expect("shrink");
            disk.resize(4 * MIB).expect("grow");
            model[3 * MIB as usize - 512..].fill(0);
            assert!(read(&*disk, 0, model.len()) == model, "{base:?} {unmap}");
            drop(disk);
            qemu_img(&["check", "-q", "-f", "qcow2", text(&path)]);
        }
    }
}

#[test]
fn new_space_of_a_qcow2_hides_the_backing_file() {
    let dir = TempDir::new().expect("folder");
    let base = dir.path().join("base.img");
    std::fs::write(&base, pattern(5, 4 * MIB as usize)).expect("base");
    for old in [false, true] {
        // Smaller than its base.
        let path = dir.path().join("top.qcow2");
        if old {
            make_old_qcow2(&path, 2 * MIB, Some("base.img"));
        } else {
            let size = (2 * MIB).to_string();
            let mut args = vec!["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.img"];
            args.extend([text(&path), &size]);
            qemu_img(&args);
        }
        let disk = open(&DiskOptions::new(&path)).expect("open").disk;
        let mut model = pattern(5, 4 * MIB as usize);
        model.resize(5 * MIB as usize, 0);
        for cut in [2 * MIB, MIB + 512] {
            disk.resize(cut).expect("shrink");
            disk.resize(5 * MIB).expect("grow");
            model[cut as usize..].fill(0);
            assert!(read(&*disk, 0, model.len()) == model, "{old} {cut}");
        }
        drop(disk);
        qemu_img(&["check", "-q", "-f", "qcow2", text(&path)]);
    }
}

#[test]
fn a_snapshot_has_a_largest_size() {
    let dir = TempDir::new().expect("folder");
    let path = make(dir.path(), "img", MIB);
    let disk = open(&options(&format!("path={},snapshot=on", text(&path))))
        .expect("open")
        .disk;
    write(&*disk, 0, &pattern(1, 4096));
    assert!(matches!(
        disk.resize(4000 << 40),
        Err(DiskError::Unsupported(_))
    ));
    assert_eq!(disk.size(), MIB);
    disk.resize(16 << 40).expect("the largest");
    assert!(read(&*disk, 0, 4096) == pattern(1, 4096));
    write(&*disk, 15 << 40, &pattern(2, 512));
    disk.resize(MIB).expect("shrink");
    assert!(read(&*disk, 0, 4096) == pattern(1, 4096));
}

#[test]
fn what_another_program_left_behind_the_end_of_a_vhd_does_not_show() {
    let dir = TempDir::new().expect("folder");
    let path = make(dir.path(), "vhd", MIB);
    {
        let disk = open(&DiskOptions::new(&path)).expect("open").disk;
        write(&*disk, 0, &pattern(1, MIB as usize));
    }
    // The one block is at the end of the file, before the footer, and twice as long as the disk.
    let file = open_writable(&path);
    let len = file.metadata().expect("metadata").len();
    let after = len - 512 - MIB;
    file.write_all_at(&pattern(2, 4096), after).expect("data");
    // Its bitmap is before its data.
    file.write_all_at(&[0xff; 512], after - MIB - 512)
        .expect("bitmap");
    drop(file);
    let disk = open(&DiskOptions::new(&path)).expect("open").disk;
    assert!(read(&*disk, 0, MIB as usize) == pattern(1, MIB as usize));
    disk.resize(2 * MIB).expect("grow");
    assert!(read(&*disk, MIB, MIB as usize).iter().all(|&b| b == 0));
}

#[test]
fn vhd_survives_the_loss_of_its_last_footer() {
    let dir = TempDir::new().expect("folder");
    let path = make(dir.path(), "vhd", 8 * MIB);
    {
        let disk = open(&DiskOptions::new(&path)).expect("open").disk;
        write(&*disk, MIB, &pattern(1, 4096));
        disk.flush().expect("flush");
    }
    let file = open_writable(&path);
    let len = file.metadata().expect("metadata").len();
    file.write_all_at(&[0; 512], len - 512).expect("damage");
    drop(file);
    let disk = open(&DiskOptions::new(&path)).expect("open").disk;
    assert!(read(&*disk, MIB, 4096) == pattern(1, 4096));
    write(&*disk, 5 * MIB, &pattern(2, 4096));
    drop(disk);
    // The new block brought a new footer.
    qemu_img(&["info", "-f", "vpc", text(&path)]);
    let disk = open(&DiskOptions::new(&path)).expect("open").disk;
    assert!(read(&*disk, 5 * MIB, 4096) == pattern(2, 4096));
}

#[test]
fn sectors_without_data_in_a_vhd_block_are_zeroes() {
    let dir = TempDir::new().expect("folder");
    let path = make(dir.path(), "vhd", 4 * MIB);
    {
        let disk = open(&DiskOptions::new(&path)).expect("open").disk;
        write(&*disk, 0, &pattern(1, 8192));
    }
    // The first block's bitmap is where the footer was: after footer, header and one sector of
    // table. Sectors 2 to 7 lose their data.
    let file = open_writable(&path);
    file.write_all_at(&[0b1100_0000], 512 + 1024 + 512)
        .expect("bitmap");
    drop(file);
    let disk = open(&DiskOptions::new(&path)).expect("open").disk;
    let mut expected = pattern(1, 8192);
    expected[1024..4096].fill(0);
    assert!(read(&*disk, 0, 8192) == expected);
    write(&*disk, 2048, &pattern(3, 512));
    expected[2048..2560].copy_from_slice(&pattern(3, 512));
    assert!(read(&*disk, 0, 8192) == expected);
    drop(disk);
    let disk = open(&DiskOptions::new(&path)).expect("open").disk;
    assert!(read(&*disk, 0, 8192) == expected);
}

#[test]
fn damaged_images_name_the_file_and_the_damage() {
    let dir = TempDir::new().expect("folder");
    let cases: [(&str, u64, &[u8], &str); 6] = [
        ("vhd", 512 + 36, &[1], "damaged header of a dynamic VHD"),
        ("vhd", 512, b"xxxx", "cxsparse"),
        ("vhd", 512 + 1024, &[0, 0, 0, 0], "overlaps"),
        ("vhd", 512 + 1024, &[0, 1, 0, 0], "beyond the end"),
        ("qcow2", 4, &[0, 0, 0, 9], "qcow2"),
        ("qcow2", 0, b"XXXX", "not a qcow2 image"),
    ];
    for (format, at, bytes, message) in cases {
        let path = make(dir.path(), format, 4 * MIB);
        open_writable(&path)
            .write_all_at(bytes, at)
            .expect("damage");
        let error = open_error(&format!("path={}", text(&path)));
        assert!(error.contains(text(&path)), "{error}");
        assert!(error.contains(message), "{error}");
        assert!(!error.contains('\n'), "{error}");
        std::fs::remove_file(&path).expect("remove");
    }
    // Both footers of a dynamic image, the only one of a fixed image.
    let path = make(dir.path(), "vhd", 4 * MIB);
    let file = open_writable(&path);
    let len = file.metadata().expect("metadata").len();
    file.write_all_at(&[9], 70).expect("damage");
    file.write_all_at(&[9], len - 512 + 70).expect("damage");
    let error = open_error(&format!("path={}", text(&path)));
    assert!(error.contains("checksum"), "{error}");
    let path = make(dir.path(), "vpc", 4 * MIB);
    open_writable(&path)
        .write_all_at(&[9], 4 * MIB + 100)
        .expect("damage");
    let error = open_error(&format!("path={}", text(&path)));
    assert!(error.contains("checksum"), "{error}");
}

#[test]
fn a_format_is_never_guessed_against_the_contents() {
    let dir = TempDir::new().expect("folder");
    let qcow2 = make(dir.path(), "qcow2", MIB);
    let hidden = dir.path().join("hidden.img");
    std::fs::copy(&qcow2, &hidden).expect("copy");
    let hidden = text(&hidden);
    assert!(open_error(&format!("path={hidden}")).contains("look like qcow2"));
    assert!(open(&options(&format!("path={hidden},format=raw"))).is_ok());
    assert!(open(&options(&format!("path={hidden},format=qcow2"))).is_ok());
    assert!(open_error(&format!("path={hidden},format=vhd")).contains("not a vhd image"));
    let plain = make(dir.path(), "img", MIB);
    let plain = text(&plain);
    assert!(open_error(&format!("path={plain},format=qcow2")).contains("not a qcow2 image"));
    assert!(open_error(&format!("path={plain},format=vhd")).contains("no VHD footer"));
    assert!(open_error("path=/nonexistent/x.img").contains("no such file"));
    assert!(open_error("path=/tmp").contains("not a file"));
    let other = dir.path().join("disk.vhdx");
    std::fs::write(&other, [0; 512]).expect("file");
    assert!(open_error(&format!("path={}", text(&other))).contains("vhdx"));
    let empty = dir.path().join("empty.img");
    std::fs::write(&empty, []).expect("file");
    assert!(open_error(&format!("path={}", text(&empty))).contains("empty"));
}

#[test]
fn one_writer_or_many_readers() {
    let dir = TempDir::new().expect("folder");
    for format in FORMATS {
        let path = make(dir.path(), format, MIB);
        let path = text(&path);
        let writer = open(&options(&format!("path={path}"))).expect("writer");
        assert!(open_error(&format!("path={path}")).contains("in use"));
        assert!(open_error(&format!("path={path},readonly=on")).contains("being written"));
        drop(writer);
        let _one = open(&options(&format!("path={path},readonly=on"))).expect("reader");
        let _two = open(&options(&format!("path={path},snapshot=on"))).expect("reader");
        assert!(open_error(&format!("path={path}")).contains("in use"));
    }
}

#[test]
fn read_only_disks_refuse_writes() {
    let dir = TempDir::new().expect("folder");
    for format in FORMATS {
        let path = make(dir.path(), format, MIB);
        let disk = open(&options(&format!("path={},readonly=on", text(&path))))
            .expect("open")
            .disk;
        assert!(disk.read_only());
        let mut bytes = [1; 512];
        let result = disk.write_at(0, &IoBuf::from_slice(&mut bytes));
        assert!(matches!(result, Err(DiskError::ReadOnly)), "{format}");
        assert!(matches!(
            disk.zero_at(0, 512, true),
            Err(DiskError::ReadOnly)
        ));
        assert!(matches!(disk.resize(2 * MIB), Err(DiskError::ReadOnly)));
        disk.flush().expect("flush");
    }
}

#[test]
fn faults_name_the_first_bad_byte() {
    let dir = TempDir::new().expect("folder");
    let path = make(dir.path(), "img", MIB);
    let opened = open(&options(&format!(
        "path={},fault=read:10-11,fault=write:20",
        text(&path)
    )))
    .expect("open");
    let mut bytes = [0; 4096];
    let read = |offset| {
        opened
            .disk
            .read_at(offset, &IoBuf::from_slice(&mut [0; 4096]))
    };
    assert!(matches!(
        read(4096),
        Err(DiskError::Medium { offset: 5120 })
    ));
    assert!(matches!(
        read(5632),
        Err(DiskError::Medium { offset: 5632 })
    ));
    assert!(read(6144).is_ok());
    assert!(read(10240).is_ok());
    let result = opened.disk.write_at(8192, &IoBuf::from_slice(&mut bytes));
    assert!(matches!(result, Err(DiskError::Medium { offset: 10240 })));
    opened.disk.set_faults(Vec::new());
    assert!(
        opened
            .disk
            .read_at(4096, &IoBuf::from_slice(&mut bytes))
            .is_ok()
    );
}

#[test]
fn options_are_checked() {
    let parsed =
        options("path=a,,b.vhd,format=vhd,readonly=on,snapshot=off,controller=2,lun=7,id=x");
    assert_eq!(parsed.path, Path::new("a,b.vhd"));
    assert_eq!(parsed.format, Some(Format::Vhd));
    assert!(parsed.read_only && !parsed.snapshot);
    assert_eq!((parsed.controller, parsed.lun), (2, Some(7)));
    assert_eq!(parsed.id.as_deref(), Some("x"));
    for (bad, message) in [
        ("", "key=value"),
        ("disk.img", "key=value"),
        ("format=raw", "path=FILE is missing"),
        ("path=a,format=vmdk", "format=vmdk"),
        ("path=a,readonly=yes", "on or off"),
        ("path=a,lun=255", "0 to 254"),
        ("path=a,lun=1000", "not a number in range"),
        ("path=a,path=b", "given twice"),
        ("path=a,color=red", "unknown key 'color'"),
        ("path=a,fault=read:9-3", "read:FIRST-LAST"),
        ("path=a,bus=ide,lun=3", "bus=ide"),
        ("path=a,logical_block_size=1024", "512 or 4096"),
        ("path=a,serial=a b", "visible ASCII"),
        ("path=a,id=", "a name expected"),
        (
            "path=a,logical_block_size=4096,physical_block_size=512",
            "below",
        ),
    ] {
        let error = bad.parse::<DiskOptions>().expect_err(bad).to_string();
        assert!(error.contains(message), "{bad}: {error}");
    }
}

#[test]
fn identities_are_stable_and_distinct() {
    let dir = TempDir::new().expect("folder");
    let a = make(dir.path(), "img", MIB);
    let b = make(dir.path(), "vhd", MIB);
    let identity = |text: &str| open(&options(text)).expect(text).identity;
    let of_a = identity(&format!("path={},readonly=on", text(&a)));
    assert_eq!(of_a, identity(&format!("path={},readonly=on", text(&a))));
    assert_eq!(identity(&format!("path={}", text(&b))), [7; 16]);
    assert_ne!(of_a, identity(&format!("path={},id=root", text(&a))));
}

#[test]
fn buffers_copy_across_pieces() {
    let (mut a, mut b, mut c) = ([0u8; 3], [0u8; 5], [0u8; 4]);
    let buf = IoBuf::new([&mut a[..], &mut b[..], &mut c[..]].map(vm_memory::VolatileSlice::from));
    assert_eq!(buf.len(), 12);
    assert_eq!(buf.write(2, &[1, 2, 3, 4, 5, 6, 7]), 7);
    assert_eq!(buf.write(10, &[8, 9, 10]), 2);
    assert_eq!(buf.to_vec(), [0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 8, 9]);
    assert_eq!(buf.range(7, 100).to_vec(), [6, 7, 0, 8, 9]);
    assert!(buf.range(12, 1).is_empty());
    buf.range(1, 10).fill_zero();
    assert_eq!(buf.to_vec()[11], 9);
    assert!(buf.to_vec()[..11].iter().all(|&b| b == 0));
}

#[test]
fn many_threads_share_a_disk() {
    let dir = TempDir::new().expect("folder");
    for format in FORMATS {
        let path = make(dir.path(), format, 32 * MIB);
        let mut options = DiskOptions::new(&path);
        for snapshot in [true, false] {
            options.snapshot = snapshot;
            let disk = open(&options).expect("open").disk;
            let threads: Vec<_> = (0..4u64)
                .map(|thread| {
                    let disk = Arc::clone(&disk);
                    std::thread::spawn(move || {
                        for round in 0..40 {
                            let offset = (round * 4 + thread) * 3 * 4608;
                            write(&*disk, offset, &pattern(offset, 9216));
                            assert!(read(&*disk, offset, 9216) == pattern(offset, 9216));
                        }
                    })
                })
                .collect();
            for thread in threads {
                thread.join().expect("thread");
            }
            for at in 0..160 {
                let offset = at * 3 * 4608;
                assert!(
                    read(&*disk, offset, 9216) == pattern(offset, 9216),
                    "{format}"
                );
            }
        }
    }
}
