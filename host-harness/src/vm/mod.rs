// SPDX-License-Identifier: MIT OR Apache-2.0

//! The virtual machine: memory, vCPUs, boot, ACPI, serial ports and power.
