// SPDX-License-Identifier: GPL-2.0

//! The synthetic interrupt controller of one CPU: the message page and the event page that it
//! shares with the hypervisor, and the interrupt source that the bus uses.
//!
//! Layouts and numbers are in [`hv_proto::synic`].

use crate::{
    hypercall,
    memory::SharedPage, //
};
use hv_proto::{
    ids::MAX_CHANNELS,
    synic::{
        slot_offset,
        HvMessage,
        Sint,
        SynicMessageType,
        EVENT_FLAGS_SIZE,
        MSR_EOM,
        MSR_SCONTROL,
        MSR_SIEFP,
        MSR_SIMP,
        MSR_SINT0,
        REGISTER_ENABLE,
        VMBUS_SINT, //
    }, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full, //
        },
        barrier, //
    }, //
};
use zerocopy::{
    FromZeros,
    IntoBytes, //
};

/// Register of the interrupt source of the bus.
const MSR_SINT: u32 = MSR_SINT0 + VMBUS_SINT as u32;

/// Start of the message slot of the bus in the message page.
const MESSAGE_OFFSET: usize = match slot_offset(VMBUS_SINT) {
    Some(offset) => offset,
    None => 0,
};

/// Start of the event flags of the bus in the event page.
const EVENTS_OFFSET: usize = VMBUS_SINT as usize * EVENT_FLAGS_SIZE;

/// Bits of one word of event flags.
const WORD_BITS: usize = u64::BITS as usize;

/// The two pages of one CPU.
pub(crate) struct Synic {
    messages: SharedPage,
    events: SharedPage,
}

impl Synic {
    /// Allocates the pages; may sleep.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            messages: SharedPage::new()?,
            events: SharedPage::new()?,
        })
    }

    /// Hands the pages to the hypervisor and enables the interrupt. Runs on the CPU itself.
    pub(crate) fn enable(&self) {
        let page = |msr, page: &SharedPage| {
            let keep = hypercall::read_register(msr) & 0xffe;
            hypercall::write_register(msr, page.phys() | keep | REGISTER_ENABLE);
        };
        page(MSR_SIMP, &self.messages);
        page(MSR_SIEFP, &self.events);

        let mut sint = Sint::with_vector(hypercall::callback_vector());
        sint.set(Sint::AUTO_EOI, hypercall::auto_eoi());
        hypercall::write_register(MSR_SINT, sint.bits());

        let control = hypercall::read_register(MSR_SCONTROL);
        hypercall::write_register(MSR_SCONTROL, control | REGISTER_ENABLE);
    }

    /// Takes the pages back. Runs on the CPU itself.
    pub(crate) fn disable(&self) {
        let sint = Sint::from_bits_retain(hypercall::read_register(MSR_SINT)) | Sint::MASKED;
        hypercall::write_register(MSR_SINT, sint.bits());
        for msr in [MSR_SIMP, MSR_SIEFP] {
            let keep = hypercall::read_register(msr) & 0xffe;
            hypercall::write_register(msr, keep);
        }
        let control = hypercall::read_register(MSR_SCONTROL);
        hypercall::write_register(MSR_SCONTROL, control & !REGISTER_ENABLE);
    }

    fn event_word(&self, index: usize) -> Option<&Atomic<u64>> {
        let offset = index.checked_mul(size_of::<u64>())?;
        self.events.word(EVENTS_OFFSET.checked_add(offset)?)
    }

    /// Takes all event flags up to number `highest` that are set, and calls `f` for each.
    pub(crate) fn take_events(&self, highest: u32, mut f: impl FnMut(u32)) {
        let highest = (highest as usize).min(MAX_CHANNELS.saturating_sub(1));
        for index in 0..=highest / WORD_BITS {
            let Some(word) = self.event_word(index) else {
                return;
            };
            if word.load(Acquire) == 0 {
                continue;
            }
            let mut bits = word.xchg(0, Full);
            while bits != 0 {
                let bit = bits.trailing_zeros();
                bits &= bits.wrapping_sub(1);
                f((index as u32).wrapping_mul(u64::BITS).wrapping_add(bit));
            }
        }
    }

    /// Whether an event flag up to number `highest` is set that nobody took yet.
    pub(crate) fn has_events(&self, highest: u32) -> bool {
        let highest = (highest as usize).min(MAX_CHANNELS.saturating_sub(1));
        (0..=highest / WORD_BITS).any(|index| {
            self.event_word(index)
                .is_some_and(|word| word.load(Acquire) != 0)
        })
    }

    fn message_type(&self) -> Option<&Atomic<u32>> {
        self.messages.word(MESSAGE_OFFSET)
    }

    /// Whether a message waits in the slot.
    pub(crate) fn has_message(&self) -> bool {
        self.message_type()
            .is_some_and(|word| word.load(Acquire) != SynicMessageType::NONE.get())
    }

    /// A private copy of the message in the slot.
    pub(crate) fn message(&self) -> Option<HvMessage> {
        if !self.has_message() {
            return None;
        }
        let mut message = HvMessage::new_zeroed();
        self.messages
            .copy_out(MESSAGE_OFFSET, message.as_mut_bytes())
            .then_some(message)
    }

    /// Frees the slot and, if more messages wait for it, says so to the hypervisor. Runs on the CPU
    /// itself: on another one, the hypervisor does not hear it.
    pub(crate) fn end_of_message(&self, message: &HvMessage) {
        let Some(word) = self.message_type() else {
            return;
        };
        // Only the message that was seen is taken. The flag is read after the slot is free, as the
        // hypervisor wants it (TLFS, section "SynIC message flags").
        let taken = word.cmpxchg(
            message.message_type.get(),
            SynicMessageType::NONE.get(),
            Full,
        );
        if taken.is_err() {
            return;
        }
        barrier::mb(barrier::Full);
        let mut flags = [0u8];
        let offset = MESSAGE_OFFSET.saturating_add(hv_proto::synic::MESSAGE_FLAGS_OFFSET);
        if self.messages.copy_out(offset, &mut flags)
            && flags[0] & hv_proto::synic::MESSAGE_PENDING != 0
        {
            hypercall::write_register(MSR_EOM, 0);
        }
    }
}
