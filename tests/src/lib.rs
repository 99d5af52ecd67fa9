// SPDX-License-Identifier: MIT OR Apache-2.0

//! End-to-end and conformance tests: they boot real guests on the harness.
