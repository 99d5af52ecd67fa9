// SPDX-License-Identifier: MIT OR Apache-2.0

//! The hypercalls that KVM leaves to user space. KVM itself serves the TLB flushes, the IPIs, the
//! spin-wait hint and HvSignalEvent on bound connections; it checks the control word's reserved
//! bits. Here are HvPostMessage, and the statuses for all that nobody serves. TLFS chapter 3, and
//! chapter 11 for the two.

use hv_proto::hypercall::{HvStatus, HypercallCode, HypercallInput, PostMessage, SignalEvent};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromZeros, IntoBytes};

use super::MessageSink;

/// Serves a hypercall of the guest and returns its status. `params` are the two parameters as the
/// exit gives them.
pub fn dispatch(
    memory: &GuestMemoryMmap,
    sink: Option<&dyn MessageSink>,
    input: u64,
    params: [u64; 2],
) -> HvStatus {
    let input = HypercallInput::from_raw(input);
    match input.code() {
        HypercallCode::POST_MESSAGE => match post_message(memory, sink, input, params[0]) {
            Ok(status) | Err(status) => status,
        },
        HypercallCode::SIGNAL_EVENT => match signal_event(memory, input, params[0]) {
            Ok(status) | Err(status) => status,
        },
        _ => HvStatus::INVALID_HYPERCALL_CODE,
    }
}

fn post_message(
    memory: &GuestMemoryMmap,
    sink: Option<&dyn MessageSink>,
    input: HypercallInput,
    address: u64,
) -> Result<HvStatus, HvStatus> {
    if input.is_fast() || !input.is_simple() {
        return Err(HvStatus::INVALID_HYPERCALL_INPUT);
    }
    let mut message = PostMessage::new_zeroed();
    read_input(memory, address, message.as_mut_bytes())?;
    let payload = message.payload()?;
    let sink = sink.ok_or(HvStatus::INVALID_CONNECTION_ID)?;
    Ok(sink.post_message(message.connection_id, message.message_type.get(), payload))
}

/// KVM comes here only when no event is bound to the connection.
fn signal_event(
    memory: &GuestMemoryMmap,
    input: HypercallInput,
    param: u64,
) -> Result<HvStatus, HvStatus> {
    if !input.is_simple() && !input.is_fast() {
        return Err(HvStatus::INVALID_HYPERCALL_INPUT);
    }
    if !input.is_fast() {
        // The parameter is the address of the input: it must be readable, and that is all that
        // is asked of it, because no connection is left that could be meant.
        let mut event = [0; size_of::<u64>()];
        read_input(memory, param, &mut event)?;
        let event = SignalEvent::from_raw(u64::from_le_bytes(event));
        tracing::debug!(connection = %event.connection_id(), "signal on an unbound connection");
    }
    Err(HvStatus::INVALID_CONNECTION_ID)
}

/// Copies a hypercall's input: it lies at a multiple of 8 bytes and within one page.
fn read_input(memory: &GuestMemoryMmap, address: u64, input: &mut [u8]) -> Result<(), HvStatus> {
    const PAGE: u64 = hv_proto::PAGE_SIZE as u64;
    if !address.is_multiple_of(8) || address % PAGE + input.len() as u64 > PAGE {
        return Err(HvStatus::INVALID_ALIGNMENT);
    }
    memory
        .read_slice(input, GuestAddress(address))
        .map_err(|_| HvStatus::INVALID_PARAMETER)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use hv_proto::ids::ConnectionId;
    use hv_proto::synic::SynicMessageType;

    use super::*;

    /// Connection, message type, payload.
    type Posted = (u32, u32, Vec<u8>);

    #[derive(Default)]
    struct Sink(Mutex<Vec<Posted>>);

    impl MessageSink for Sink {
        fn post_message(&self, connection: ConnectionId, kind: u32, payload: &[u8]) -> HvStatus {
            let mut posted = self.0.lock().unwrap();
            posted.push((connection.get(), kind, payload.to_vec()));
            HvStatus::SUCCESS
        }

        fn reset(&self) {}
    }

    struct Bench {
        memory: GuestMemoryMmap,
        sink: Sink,
    }

    impl Bench {
        fn new() -> Bench {
            Bench {
                memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap(),
                sink: Sink::default(),
            }
        }

        fn call(&self, input: u64, param: u64) -> HvStatus {
            dispatch(&self.memory, Some(&self.sink), input, [param, 0])
        }

        fn put(&self, address: u64, message: &PostMessage) {
            self.memory
                .write_slice(message.as_bytes(), GuestAddress(address))
                .unwrap();
        }
    }

    const POST: u64 = 0x5c;
    const SIGNAL: u64 = 0x5d;

    fn hello() -> PostMessage {
        PostMessage::new(
            ConnectionId::MESSAGE_V5,
            SynicMessageType::CHANNEL,
            b"hello",
        )
        .unwrap()
    }

    #[test]
    fn message_reaches_the_sink() {
        let bench = Bench::new();
        bench.put(0x1f00, &hello());
        assert_eq!(bench.call(POST, 0x1f00), HvStatus::SUCCESS);
        assert_eq!(*bench.sink.0.lock().unwrap(), [(4, 1, b"hello".to_vec())]);
    }

    #[test]
    fn bad_messages_do_not_reach_the_sink() {
        let bench = Bench::new();
        bench.put(0x1000, &hello());
        let too_long = PostMessage {
            payload_size: 241.into(),
            ..hello()
        };
        bench.put(0x2000, &too_long);
        let reserved_connection = PostMessage {
            connection_id: ConnectionId::new(0x0100_0004),
            ..hello()
        };
        bench.put(0x3000, &reserved_connection);
        for (input, address, status) in [
            (POST, 0x1001, HvStatus::INVALID_ALIGNMENT),
            (POST, 0x1f08, HvStatus::INVALID_ALIGNMENT),
            (POST, 0x1_0000, HvStatus::INVALID_PARAMETER),
            (POST, !7, HvStatus::INVALID_ALIGNMENT),
            (POST, 0xffff_ffff_ffff_f000, HvStatus::INVALID_PARAMETER),
            (POST, 0x2000, HvStatus::INVALID_PARAMETER),
            (POST, 0x3000, HvStatus::INVALID_CONNECTION_ID),
            (POST | 1 << 16, 0x1000, HvStatus::INVALID_HYPERCALL_INPUT),
            (POST | 1 << 32, 0x1000, HvStatus::INVALID_HYPERCALL_INPUT),
            (POST | 1 << 17, 0x1000, HvStatus::INVALID_HYPERCALL_INPUT),
        ] {
            assert_eq!(
                bench.call(input, address),
                status,
                "{input:#x} {address:#x}"
            );
        }
        assert!(bench.sink.0.lock().unwrap().is_empty());
    }

    proptest::proptest! {
        #[test]
        fn no_guest_input_panics(
            input in proptest::num::u64::ANY,
            code in proptest::sample::select(vec![POST, SIGNAL, 0x8001]),
            address in proptest::num::u64::ANY,
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 256),
        ) {
            let bench = Bench::new();
            bench.memory.write_slice(&bytes, GuestAddress(0x1000)).unwrap();
            for input in [input, code, input & !0xffff | code] {
                bench.call(input, address);
                bench.call(input, 0x1000);
            }
            for (_, _, payload) in bench.sink.0.lock().unwrap().iter() {
                proptest::prop_assert!(payload.len() <= 240);
            }
        }
    }

    #[test]
    fn without_a_server_no_connection_exists() {
        let bench = Bench::new();
        bench.put(0, &hello());
        assert_eq!(
            dispatch(&bench.memory, None, POST, [0, 0]),
            HvStatus::INVALID_CONNECTION_ID
        );
    }

    #[test]
    fn unbound_signals_and_unknown_calls_are_refused() {
        let bench = Bench::new();
        let none = HvStatus::INVALID_CONNECTION_ID;
        assert_eq!(bench.call(SIGNAL | 1 << 16, 2), none);
        assert_eq!(bench.call(SIGNAL, 0x1000), none);
        assert_eq!(bench.call(SIGNAL, 0x1004), HvStatus::INVALID_ALIGNMENT);
        for code in [0x0, 0x2, 0x5e, 0x69, 0x8001, 0xffff] {
            assert_eq!(bench.call(code, 0), HvStatus::INVALID_HYPERCALL_CODE);
        }
    }
}
