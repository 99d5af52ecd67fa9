// SPDX-License-Identifier: GPL-2.0
/*
 * Module parameters. They are here because `module!` of the kernel crate has no parameters that sysfs
 * shows; params.rs reads them.
 */
#include <linux/module.h>
#include <linux/moduleparam.h>

#include "helpers.h"

unsigned int netvsc_ring_size = 128;
module_param_named(ring_size, netvsc_ring_size, uint, 0444);
MODULE_PARM_DESC(ring_size, "Size of each ring of a channel in pages (default 128, at least 64)");

int netvsc_debug = -1;
module_param_named(debug, netvsc_debug, int, 0444);
MODULE_PARM_DESC(debug, "Debug level (0: none, ..., 16: all)");

unsigned int netvsc_host_timeout = 10;
module_param_named(host_timeout, netvsc_host_timeout, uint, 0644);
MODULE_PARM_DESC(host_timeout, "Time that the host is given for an answer, in seconds (default 10)");
