// SPDX-License-Identifier: MIT OR Apache-2.0

//! The integration components and input devices of a guest under test.

use anyhow::{Context, Result};

use crate::guest::{Drivers, Guest};

impl Drivers {
    /// Modules of the integration components.
    pub fn service_modules(self) -> &'static [&'static str] {
        match self {
            Self::C => &["hv_utils"],
            Self::Rust => &["heartbeat", "timesync", "shutdown"],
        }
    }

    /// Modules of the input devices.
    pub fn input_modules(self) -> &'static [&'static str] {
        match self {
            Self::C => &["hid_hyperv", "hyperv_keyboard"],
            Self::Rust => &["hid_vsc"],
        }
    }
}

impl Guest {
    /// Load modules, and wait until the host has agreed on versions with these devices.
    ///
    /// # Errors
    ///
    /// When a module cannot be loaded, or the versions are not agreed on.
    pub fn load(&self, modules: &[&str], devices: &[&str]) -> Result<()> {
        // The small user space has busybox, whose modprobe takes one module; Debian's -a has another meaning.
        for module in modules {
            self.sh(&format!("modprobe {module}"))?;
        }
        self.until_negotiated(devices)
    }

    /// Load the drivers of the integration components, and wait until these work.
    ///
    /// # Errors
    ///
    /// As [`Guest::load`].
    pub fn load_services(&self) -> Result<()> {
        let devices = ["heartbeat", "timesync", "shutdown"];
        self.load(self.drivers().service_modules(), &devices)
    }

    /// Wait until the host has agreed on versions with these devices.
    ///
    /// # Errors
    ///
    /// When it did not.
    pub fn until_negotiated(&self, devices: &[&str]) -> Result<()> {
        for device in devices {
            self.until(&format!("{device} has a version"), || {
                self.version_of(device).is_some()
            })?;
        }
        Ok(())
    }

    /// The version that the host has agreed on with a device.
    pub fn version_of(&self, device: &str) -> Option<String> {
        use host_harness::vsp::services::ServiceStatus;
        match self.host().services().get(device)?.status() {
            ServiceStatus::Heartbeat(status) => status.link.version,
            ServiceStatus::Timesync(status) => status.link.version,
            ServiceStatus::Shutdown(status) => status.link.version,
            ServiceStatus::Keyboard(status) => status.version,
            ServiceStatus::Mouse(status) => status.version,
        }
    }

    /// How the guest's sysfs calls an integration component or input device.
    ///
    /// # Errors
    ///
    /// When there is no such device.
    pub fn service_instance(&self, device: &str) -> Result<String> {
        let instance = self.host().services().instance(device);
        Ok(instance.context("no such device")?.to_string())
    }

    /// Wait until the guest has taken all that was sent to a device.
    ///
    /// # Errors
    ///
    /// When it did not.
    pub fn until_taken(&self, device: &str) -> Result<()> {
        let instance = self.service_instance(device)?;
        self.wait_for(&format!(
            "test $(cat /sys/bus/vmbus/devices/{instance}/in_read_bytes_avail) = 0"
        ))?;
        Ok(())
    }

    /// What our driver `module` has counted of a device, by its name in the driver's state.
    ///
    /// # Errors
    ///
    /// When there is no such count.
    pub fn driver_count(&self, module: &str, device: &str, name: &str) -> Result<u64> {
        let instance = self.service_instance(device)?;
        let text = self.sh(&format!(
            "sed -n 's/^{name} //p' /sys/kernel/debug/{module}-{instance}/state"
        ))?;
        text.parse()
            .with_context(|| format!("{module} says '{text}' of {name}"))
    }
}
