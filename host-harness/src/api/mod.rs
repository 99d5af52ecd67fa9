// SPDX-License-Identifier: MIT OR Apache-2.0

//! The control API: what an operator does with a running host, over a Unix socket. `API.md`
//! beside this crate's `Cargo.toml` is its reference.
//!
//! It is HTTP/1.1 with JSON, one request a connection, because every language and `curl
//! --unix-socket` speak that without a library of ours, and because users of Cloud Hypervisor and
//! Firecracker know the form. Events are one reply that does not end, with a JSON object a line.
//! HTTP is parsed by `httparse`, hyper's parser. The servers that were looked at do not fit: hyper
//! wants an asynchronous runtime, tiny_http has no time limits, dbs-uhttp cannot stream, and the
//! latter two accept connections themselves, so that the peer's user cannot be asked for.
//!
//! - `server.rs`: the socket, its clients and their limits.
//! - `http.rs`: one request, one reply.
//! - `calls.rs`: what can be called; uses [`crate::control`] for all of it.
//! - `client.rs`: the other end, for `host-harness ctl`.
//!
//! Only the user who owns the socket can use it: its mode is 0600, and the kernel is asked who is
//! at the other end. A client is still not trusted to behave: requests, clients and times are
//! bounded, and what is not understood changes nothing.

mod calls;
mod client;
mod http;
mod server;
#[cfg(test)]
mod tests;

pub use client::{Client, ClientError};
pub use server::{ApiServer, ApiSocket};
