// SPDX-License-Identifier: MIT OR Apache-2.0

//! Service providers: the host ends of the synthetic devices.
