// SPDX-License-Identifier: MIT OR Apache-2.0

//! The kernel's log, judged: what a healthy guest never prints.

/// Marks of a kernel that found itself broken, whoever caused it.
const BROKEN: &[&str] = &[
    "BUG:",
    "WARNING:",
    "Call Trace:",
    "Oops",
    "kernel BUG at",
    "general protection fault",
    "blocked for more than",
    "soft lockup",
    "rcu: INFO:",
    "UBSAN:",
    "unregister_netdevice: waiting",
    "refcount_t:",
    "possible recursive locking",
];

/// Prefixes of the messages of the drivers under test, the C ones and ours.
const DRIVERS: &[&str] = &[
    "vmbus",
    "hv_",
    "storvsc",
    "netvsc",
    "heartbeat ",
    "timesync ",
    "shutdown ",
    "hid_vsc ",
    "hid_hyperv ",
    "hid-hyperv ",
    "hyperv_keyboard ",
    "scsi",
    "sd ",
];

/// What the kernel says of every module that is not its own. It begins with the module's name.
const TAINT: &str = "loading out-of-tree module taints kernel";

/// syslog's `LOG_WARNING`: this and more urgent levels are smaller numbers.
const WARNING: u8 = 4;

/// The lines of `raw` (from `dmesg -r`: `<level>[time] text`) that a healthy guest does not print: marks of a broken
/// kernel, and warnings or errors of the drivers under test.
///
/// Lines that contain one of `expected` are what the test provoked and do not count, unless the kernel is broken.
pub fn problems<'a>(raw: &'a str, expected: &[&str]) -> Vec<&'a str> {
    raw.lines()
        .filter(|line| is_problem(line, expected))
        .collect()
}

fn is_problem(line: &str, expected: &[&str]) -> bool {
    let (level, text) = split(line);
    if BROKEN.iter().any(|mark| text.contains(mark)) {
        return true;
    }
    let urgent = level.is_some_and(|level| level <= WARNING);
    urgent
        && DRIVERS.iter().any(|prefix| text.starts_with(prefix))
        && !text.contains(TAINT)
        && !expected.iter().any(|part| text.contains(part))
}

/// `<12>[    1.234567] text` as the level (3 bits; the rest is the facility) and the text.
fn split(line: &str) -> (Option<u8>, &str) {
    let Some((priority, rest)) = line.strip_prefix('<').and_then(|rest| rest.split_once('>'))
    else {
        return (None, line);
    };
    let text = match rest.split_once("] ") {
        Some((time, text)) if time.starts_with('[') => text,
        _ => rest,
    };
    (
        priority
            .parse::<u32>()
            .ok()
            .map(|priority| (priority & 7) as u8),
        text,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_healthy_log_has_no_problems() {
        let log = "<6>[    0.1] hv_vmbus: Vmbus version:5.3\n<4>[    0.2] ACPI: something old\n<5>[    0.3] sd 0:0:0:0: [sda] Attached";
        assert_eq!(problems(log, &[]), Vec::<&str>::new());
    }

    #[test]
    fn a_drivers_warning_is_a_problem_unless_expected() {
        let log = "<4>[    0.1] storvsc 1-2: tag#1 failed";
        assert_eq!(problems(log, &[]).len(), 1);
        assert_eq!(problems(log, &["tag#1"]), Vec::<&str>::new());
    }

    #[test]
    fn a_broken_kernel_is_a_problem_at_any_level_and_never_expected() {
        let log = "<6>[    0.1] WARNING: CPU: 0 PID: 1 at x.c:1";
        assert_eq!(problems(log, &["WARNING"]).len(), 1);
    }
}
