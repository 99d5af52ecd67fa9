// SPDX-License-Identifier: MIT OR Apache-2.0

//! Positioned, vectored file I/O straight to and from guest memory, zeroing of file ranges, and
//! locks. The only `unsafe` code of the disk formats is here.

use super::IoBuf;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::time::Duration;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

/// How many pieces go into one system call (`IOV_MAX` of Linux).
const MAX_PIECES: usize = 1024;

/// Which way the data goes.
#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

/// Fills `buf` from the file. What lies after the end of the file reads as zeroes.
pub(super) fn read_at(file: &File, offset: u64, buf: &IoBuf<'_>) -> io::Result<()> {
    let done = transfer(file, offset, buf, Direction::Read)?;
    if done < buf.len() {
        buf.range(done, buf.len() - done).fill_zero();
    }
    Ok(())
}

/// Writes all of `buf` to the file.
pub(super) fn write_at(file: &File, offset: u64, buf: &IoBuf<'_>) -> io::Result<()> {
    if transfer(file, offset, buf, Direction::Write)? < buf.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(())
}

/// Moves data until all is done or the file ends. Returns the number of bytes moved.
fn transfer(file: &File, offset: u64, buf: &IoBuf<'_>, dir: Direction) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        let rest = buf.range(done, buf.len() - done);
        let pieces = &rest.slices()[..rest.slices().len().min(MAX_PIECES)];
        let position = libc::off_t::try_from(offset + done as u64)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // The guards keep the memory mapped until the system call is over.
        let guards: Vec<_> = pieces.iter().map(|p| p.ptr_guard_mut()).collect();
        let iovecs: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        // At most MAX_PIECES, so it fits.
        let count = iovecs.len() as libc::c_int;
        let moved = match dir {
            // SAFETY: `iovecs` describes `count` areas of memory that are valid for reads and
            // writes of their length while `guards` lives, and the kernel tolerates that they
            // overlap or change during the call. The file descriptor is open.
            Direction::Read => unsafe {
                libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), count, position)
            },
            // SAFETY: as above.
            Direction::Write => unsafe {
                libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), count, position)
            },
        };
        match usize::try_from(moved) {
            Ok(0) => break,
            Ok(moved) => done += moved,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(done)
}

/// Makes a range of the file read as zeroes, without changing the length of the file when that
/// can be done by the file system. With `unmap` the space is given back if that is possible.
pub(super) fn zero_at(file: &File, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let mode = if unmap {
        FallocateMode::PunchHole
    } else {
        FallocateMode::ZeroRange
    };
    match fallocate(file, mode, true, offset, len) {
        Ok(()) => Ok(()),
        Err(error) => match error.errno() {
            // The file system (or block device) cannot do it, so write the zeroes.
            libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV | libc::EPERM => {
                write_zeroes(file, offset, len)
            }
            errno => Err(io::Error::from_raw_os_error(errno)),
        },
    }
}

/// Writes zeroes piece by piece.
fn write_zeroes(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let zeroes = vec![0; len.min(1 << 20) as usize];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(zeroes.len() as u64);
        file.write_all_at(&zeroes[..n as usize], offset + done)?;
        done += n;
    }
    Ok(())
}

/// Length of a file or block device in bytes.
pub(super) fn length(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.file_type().is_block_device() {
        let mut file = file;
        file.seek(SeekFrom::End(0))
    } else {
        Ok(metadata.len())
    }
}

/// How often and how far apart a lock is tried. A process that has just ended, or a child that
/// another thread is about to start, can hold a lock for a moment longer than its owner.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Locks the whole file until it is closed: shared for readers, alone for a writer, so that two
/// machines do not write to one image. Only says no when somebody else holds a lock; a file
/// system without locks is not an obstacle.
pub(super) fn lock(file: &File, exclusive: bool) -> Result<(), &'static str> {
    let operation = if exclusive {
        libc::LOCK_EX
    } else {
        libc::LOCK_SH
    };
    for attempt in 0..LOCK_TRIES {
        if attempt > 0 {
            std::thread::sleep(LOCK_PAUSE);
        }
        // SAFETY: the descriptor is open, and the call touches no memory.
        let result = unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) };
        if result == 0 || io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock {
            return Ok(());
        }
    }
    Err(if exclusive {
        "it is in use by another process or another disk of this machine"
    } else {
        "it is being written by another process or another disk of this machine"
    })
}
