// SPDX-License-Identifier: GPL-2.0
/*
 * Module parameters. They are here because `module!` of the kernel crate has no parameters that sysfs
 * shows; params.rs reads them.
 */
#include <linux/module.h>
#include <linux/moduleparam.h>

#include "helpers.h"

int storvsc_ringbuffer_size = 128 * 1024;
module_param(storvsc_ringbuffer_size, int, 0444);
MODULE_PARM_DESC(storvsc_ringbuffer_size,
		 "Size of each ring of a channel in bytes, header included (default 131072)");

unsigned int storvsc_max_hw_queues;
module_param(storvsc_max_hw_queues, uint, 0644);
MODULE_PARM_DESC(storvsc_max_hw_queues,
		 "Most hardware queues (channels) of a controller; 0: one a CPU (default)");

int storvsc_vcpus_per_sub_channel = 4;
module_param(storvsc_vcpus_per_sub_channel, int, 0444);
MODULE_PARM_DESC(storvsc_vcpus_per_sub_channel,
		 "CPUs a sub-channel is expected to serve, for the size of the queues (default 4)");

int storvsc_ring_avail_percent_lowater = 10;
module_param_named(ring_avail_percent_lowater, storvsc_ring_avail_percent_lowater, int, 0444);
MODULE_PARM_DESC(ring_avail_percent_lowater,
		 "Another channel is tried when no more of a ring than this is free (percent, default 10)");

int storvsc_logging_level = 1;
module_param_named(logging_level, storvsc_logging_level, int, 0644);
MODULE_PARM_DESC(logging_level, "What is logged: 0 nothing, 1 errors (default), 2 warnings too");

unsigned int storvsc_request_timeout = 180;
module_param_named(request_timeout, storvsc_request_timeout, uint, 0644);
MODULE_PARM_DESC(request_timeout,
		 "Time that the host is given for a command, in seconds, of devices found later (default 180)");

unsigned int storvsc_timeout_extensions = 3;
module_param_named(timeout_extensions, storvsc_timeout_extensions, uint, 0644);
MODULE_PARM_DESC(timeout_extensions,
		 "How many times a command is given its time again before the controller is reset (default 3)");

unsigned int storvsc_host_timeout = 60;
module_param_named(host_timeout, storvsc_host_timeout, uint, 0644);
MODULE_PARM_DESC(host_timeout,
		 "Time that the host is given for a step of set-up or for a reset, in seconds (default 60)");
