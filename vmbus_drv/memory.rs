// SPDX-License-Identifier: GPL-2.0

//! Memory that is shared with the host: single pages, and buffers of single pages that are mapped
//! next to each other.
//!
//! The host may write to such memory at any time. So there are no references into it: words are
//! accessed as atomics, bytes are copied.
//!
//! C header: [`include/linux/vmalloc.h`](srctree/include/linux/vmalloc.h)

use crate::raw;
use core::{
    mem::MaybeUninit,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    page::{
        Page,
        PAGE_SIZE, //
    },
    prelude::*,
    sync::atomic::{
        Atomic,
        AtomicType, //
    }, //
};

/// The bus counts in pages of 4096 bytes, and so does this architecture.
const _: () = assert!(PAGE_SIZE == hv_proto::PAGE_SIZE);

/// Words of shared memory.
pub(crate) trait Word: AtomicType + Copy {}
impl Word for u32 {}
impl Word for u64 {}

/// One zeroed page in the kernel's linear mapping.
///
/// # Invariants
///
/// `address` is of a page that this value owns.
pub(crate) struct SharedPage {
    address: NonNull<u8>,
}

// SAFETY: The page belongs to no thread.
unsafe impl Send for SharedPage {}

// SAFETY: All access is by atomics or by copies that tolerate concurrent changes.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// Allocates a page; may sleep.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: Always safe to call from process context.
        let address = unsafe { raw::vmbus_helper_zeroed_page() };

        // INVARIANT: The page was just allocated.
        Ok(Self {
            address: NonNull::new(address as *mut u8).ok_or(ENOMEM)?,
        })
    }

    /// Guest physical address.
    pub(crate) fn phys(&self) -> u64 {
        // SAFETY: By the type invariants this is an address of the linear mapping.
        unsafe { raw::vmbus_helper_page_phys(self.address.as_ptr() as usize) }
    }

    /// The word at `offset` bytes; `None` if it is not inside of the page or not aligned.
    pub(crate) fn word<T: Word>(&self, offset: usize) -> Option<&Atomic<T>> {
        let size = core::mem::size_of::<T>();
        if offset % size != 0 || offset > PAGE_SIZE.checked_sub(size)? {
            return None;
        }

        // SAFETY: `offset` is inside of the page, by the check above.
        let word = unsafe { self.address.as_ptr().add(offset) };

        // SAFETY: The address is aligned, valid for as long as `self` is, and nothing but atomics
        // and byte copies accesses it.
        Some(unsafe { Atomic::from_ptr(word.cast()) })
    }

    /// Copies `buf.len()` bytes that start at `offset`. Returns false if they are not in the page.
    pub(crate) fn copy_out(&self, offset: usize, buf: &mut [u8]) -> bool {
        if !matches!(offset.checked_add(buf.len()), Some(end) if end <= PAGE_SIZE) {
            return false;
        }

        // SAFETY: The source is inside of the page, by the check above; `buf` is not, because no
        // reference into the page exists. The host may change the source meanwhile, then the copy
        // is of no particular moment, but a copy of bytes.
        unsafe {
            bindings::memcpy(
                buf.as_mut_ptr().cast(),
                self.address.as_ptr().add(offset).cast(),
                buf.len(),
            )
        };
        true
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the page is ours.
        unsafe { raw::vmbus_helper_free_page(self.address.as_ptr() as usize) };
    }
}

/// Single pages, mapped in some order and possibly several times into one range of addresses.
///
/// # Invariants
///
/// `address` is the start of a mapping of `len` bytes, all of them pages that exist for as long.
struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// Maps `pages`; may sleep.
    ///
    /// # Safety
    ///
    /// The pages must be valid until the mapping is gone.
    unsafe fn new(pages: &mut [*mut bindings::page]) -> Result<Self> {
        let count = u32::try_from(pages.len())?;

        // SAFETY: `pages` is an array of `count` pages, which are valid by the safety requirements.
        let address = unsafe { raw::vmbus_helper_vmap(pages.as_mut_ptr(), count) };

        // INVARIANT: `vmap` maps all the pages.
        Ok(Self {
            address: NonNull::new(address.cast()).ok_or(ENOMEM)?,
            len: pages.len().checked_mul(PAGE_SIZE).ok_or(EOVERFLOW)?,
        })
    }

    /// The word at `offset` bytes; `None` if it is not inside of the mapping or not aligned.
    fn word<T: Word>(&self, offset: usize) -> Option<&Atomic<T>> {
        let size = core::mem::size_of::<T>();
        if offset % size != 0 || offset > self.len.checked_sub(size)? {
            return None;
        }

        // SAFETY: `offset` is inside of the mapping, by the check above.
        let word = unsafe { self.address.as_ptr().add(offset) };

        // SAFETY: The address is aligned, valid for as long as `self` is, and nothing but atomics
        // and byte copies accesses it.
        Some(unsafe { Atomic::from_ptr(word.cast()) })
    }

    fn contains(&self, offset: usize, len: usize) -> bool {
        matches!(offset.checked_add(len), Some(end) if end <= self.len)
    }

    /// Copies from the mapping. Returns false, and copies nothing, if that is not inside of it.
    fn copy_out(&self, offset: usize, buf: &mut [u8]) -> bool {
        if !self.contains(offset, buf.len()) {
            return false;
        }

        // SAFETY: The source is inside of the mapping, by the check above; `buf` is not, because
        // no reference into the mapping exists. The host may change the source meanwhile, then the
        // copy is of no particular moment, but a copy of bytes.
        unsafe {
            bindings::memcpy(
                buf.as_mut_ptr().cast(),
                self.address.as_ptr().add(offset).cast(),
                buf.len(),
            )
        };
        true
    }

    /// Copies to the mapping. Returns false, and copies nothing, if that is not inside of it.
    fn copy_in(&self, offset: usize, buf: &[u8]) -> bool {
        if !self.contains(offset, buf.len()) {
            return false;
        }

        // SAFETY: The destination is inside of the mapping, by the check above; `buf` is not,
        // because no reference into the mapping exists.
        unsafe {
            bindings::memcpy(
                self.address.as_ptr().add(offset).cast(),
                buf.as_ptr().cast(),
                buf.len(),
            )
        };
        true
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: By the type invariants this is a mapping that `vmap` made, and it is ours.
        unsafe { raw::vmbus_helper_vunmap(self.address.as_ptr().cast()) };
    }
}

// SAFETY: The mapping belongs to no thread.
unsafe impl Send for Mapping {}

// SAFETY: All access is by atomics or by copies that tolerate concurrent changes.
unsafe impl Sync for Mapping {}

/// Zeroed single pages. None of them needs a neighbour, so this works on fragmented memory.
struct Pages(KVVec<Page>);

impl Pages {
    fn new(count: usize) -> Result<Self> {
        let mut pages = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            pages.push(Page::alloc_page(GFP_KERNEL | __GFP_ZERO)?, GFP_KERNEL)?;
        }
        Ok(Self(pages))
    }

    /// Frame number of page `index` as the host counts them; 0 if there is no such page.
    fn pfn(&self, index: u32) -> u64 {
        self.0.get(index as usize).map_or(0, |page| {
            // SAFETY: `page` is a valid page.
            unsafe { raw::vmbus_helper_page_pfn(page.as_ptr()) }
        })
    }
}

/// A buffer to share with the host: single pages with one mapping.
///
/// Make one, hand it to [`Channel::establish_gpadl`](crate::Channel::establish_gpadl), and access
/// it through the [`Gpadl`](crate::Gpadl) that comes back.
pub struct SharedBuffer {
    mapping: Mapping,
    pages: Pages,
}

impl SharedBuffer {
    /// Allocates a zeroed buffer of `len` bytes, rounded up to whole pages. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `EINVAL` if `len` is 0.
    pub fn new(len: usize) -> Result<Self> {
        let count = len.div_ceil(PAGE_SIZE);
        if count == 0 {
            return Err(EINVAL);
        }
        let pages = Pages::new(count)?;
        let mut list = KVVec::with_capacity(count, GFP_KERNEL)?;
        for page in pages.0.iter() {
            list.push(page.as_ptr(), GFP_KERNEL)?;
        }
        Ok(Self {
            // SAFETY: The pages are freed after the mapping: that is how the fields are ordered.
            mapping: unsafe { Mapping::new(&mut list) }?,
            pages,
        })
    }

    /// Size in bytes: whole pages.
    pub fn len(&self) -> usize {
        self.mapping.len
    }

    /// Whether the buffer has no bytes, which no buffer has.
    pub fn is_empty(&self) -> bool {
        self.mapping.len == 0
    }

    /// Copies from the buffer to `buf`.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the bytes are not all inside of the buffer; nothing is copied then.
    pub fn read_at(&self, offset: usize, buf: &mut [u8]) -> Result {
        self.mapping
            .copy_out(offset, buf)
            .then_some(())
            .ok_or(EINVAL)
    }

    /// As [`SharedBuffer::read_at`], to memory that need not be initialized. It is afterwards, and is returned.
    ///
    /// # Errors
    ///
    /// As [`SharedBuffer::read_at`].
    pub fn read_uninit<'a>(
        &self,
        offset: usize,
        buf: &'a mut [MaybeUninit<u8>],
    ) -> Result<&'a mut [u8]> {
        if !self.mapping.contains(offset, buf.len()) {
            return Err(EINVAL);
        }

        // SAFETY: The source is inside of the mapping, by the check above; `buf` is not, because no
        // reference into the mapping exists.
        unsafe {
            bindings::memcpy(
                buf.as_mut_ptr().cast(),
                self.mapping.address.as_ptr().add(offset).cast(),
                buf.len(),
            )
        };
        // SAFETY: All of it was written just now.
        Ok(unsafe { core::slice::from_raw_parts_mut(buf.as_mut_ptr().cast(), buf.len()) })
    }

    /// As [`SharedBuffer::write_at`], from memory that others may change meanwhile.
    ///
    /// # Errors
    ///
    /// As [`SharedBuffer::write_at`].
    ///
    /// # Safety
    ///
    /// `from` must be valid for reads of `len` bytes.
    pub unsafe fn write_from(&self, offset: usize, from: *const u8, len: usize) -> Result {
        if !self.mapping.contains(offset, len) {
            return Err(EINVAL);
        }

        // SAFETY: The destination is inside of the mapping, by the check above. The source is valid,
        // as the caller promises, and elsewhere; if it changes meanwhile, so does what is copied.
        unsafe {
            bindings::memcpy(
                self.mapping.address.as_ptr().add(offset).cast(),
                from.cast(),
                len,
            )
        };
        Ok(())
    }

    /// Copies `buf` to the buffer.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the bytes do not all fit; nothing is copied then.
    pub fn write_at(&self, offset: usize, buf: &[u8]) -> Result {
        self.mapping
            .copy_in(offset, buf)
            .then_some(())
            .ok_or(EINVAL)
    }

    /// Frame number of page `index` as the host counts them; 0 if there is no such page.
    pub fn pfn(&self, index: u32) -> u64 {
        self.pages.pfn(index)
    }
}

/// One half of a pair of rings: a control page and the data area, which is mapped twice in a row so
/// that copies need not wrap.
pub(crate) struct RingMapping {
    mapping: Mapping,
    data_len: u32,
}

impl RingMapping {
    /// Maps `pages`: the control page first, then the data.
    ///
    /// # Safety
    ///
    /// The pages must be valid until the mapping is gone.
    unsafe fn new(pages: &[Page]) -> Result<Self> {
        let (_, data) = pages.split_first().ok_or(EINVAL)?;
        let mut list = KVVec::new();
        for page in Iterator::chain(pages.iter(), data) {
            list.push(page.as_ptr(), GFP_KERNEL)?;
        }
        let data_len = data.len().checked_mul(PAGE_SIZE).ok_or(EOVERFLOW)?;
        Ok(Self {
            // SAFETY: By the safety requirements.
            mapping: unsafe { Mapping::new(&mut list) }?,
            data_len: u32::try_from(data_len)?,
        })
    }
}

impl hv_proto::ring::RingMem for RingMapping {
    fn data_len(&self) -> u32 {
        self.data_len
    }

    fn load(&self, field: hv_proto::ring::Field) -> u32 {
        self.mapping
            .word::<u32>(field.offset() as usize)
            .map_or(0, |word| word.load(kernel::sync::atomic::Acquire))
    }

    fn store(&self, field: hv_proto::ring::Field, value: u32) {
        if let Some(word) = self.mapping.word::<u32>(field.offset() as usize) {
            word.store(value, kernel::sync::atomic::Release);
        }
    }

    /// The host runs on other processors even when the guest has one, so this is never just a
    /// compiler barrier.
    fn fence(&self) {
        kernel::sync::barrier::mb(kernel::sync::barrier::Full);
    }

    fn read_at(&self, offset: u32, buf: &mut [u8]) {
        if offset < self.data_len {
            self.mapping.copy_out(data_offset(offset), buf);
        }
    }

    fn write_at(&self, offset: u32, buf: &[u8]) {
        if offset < self.data_len {
            self.mapping.copy_in(data_offset(offset), buf);
        }
    }
}

/// Where byte `offset` of the data area is in the mapping.
fn data_offset(offset: u32) -> usize {
    (offset as usize).saturating_add(PAGE_SIZE)
}

/// The two rings of a channel in one run of pages, as one GPADL describes them: first the one that
/// the guest writes, then the one that the host writes.
pub(crate) struct RingPair {
    /// Guest to host.
    pub(crate) outgoing: RingMapping,
    /// Host to guest.
    pub(crate) incoming: RingMapping,
    pages: Pages,
    outgoing_pages: u32,
}

impl RingPair {
    /// Allocates rings of `send` and `receive` bytes, control pages included. May sleep.
    pub(crate) fn new(send: usize, receive: usize) -> Result<Self> {
        let send_pages = send.div_ceil(PAGE_SIZE);
        let receive_pages = receive.div_ceil(PAGE_SIZE);
        if send_pages < 2 || receive_pages < 2 {
            return Err(EINVAL);
        }
        let pages = Pages::new(send_pages.checked_add(receive_pages).ok_or(EOVERFLOW)?)?;
        let (first, second) = pages.0.split_at_checked(send_pages).ok_or(EINVAL)?;
        let rings = Self {
            // SAFETY: The pages are freed after the mappings: that is how the fields are ordered.
            outgoing: unsafe { RingMapping::new(first) }?,
            // SAFETY: As above.
            incoming: unsafe { RingMapping::new(second) }?,
            outgoing_pages: u32::try_from(send_pages)?,
            pages,
        };
        hv_proto::ring::initialize(&rings.outgoing);
        hv_proto::ring::initialize(&rings.incoming);
        Ok(rings)
    }

    /// Frame number of page `index` as the host counts them; 0 if there is no such page.
    pub(crate) fn pfn(&self, index: u32) -> u64 {
        self.pages.pfn(index)
    }

    /// Size of both rings together, in bytes.
    pub(crate) fn len(&self) -> usize {
        self.pages.0.len().saturating_mul(PAGE_SIZE)
    }

    /// Number of pages of the outgoing ring: where the incoming one starts.
    pub(crate) fn outgoing_pages(&self) -> u32 {
        self.outgoing_pages
    }
}
