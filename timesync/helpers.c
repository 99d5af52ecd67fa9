// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions as functions that Rust can call, one line each, and the module parameter, which `module!`
 * of the kernel crate cannot make visible in sysfs.
 */
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/ptp_clock_kernel.h>
#include <asm/mshyperv.h>

#include "helpers.h"

bool timesync_implicit;
module_param(timesync_implicit, bool, 0644);
MODULE_PARM_DESC(timesync_implicit,
		 "Also set a clock that is five or more seconds behind when the host does not ask for it");

u64 timesync_helper_reference_counter(void)
{
	return hv_read_reference_counter();
}

void timesync_helper_read_prets(struct ptp_system_timestamp *sts)
{
	ptp_read_system_prets(sts);
}

void timesync_helper_read_postts(struct ptp_system_timestamp *sts)
{
	ptp_read_system_postts(sts);
}
