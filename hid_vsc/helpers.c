// SPDX-License-Identifier: GPL-2.0
/* Inline functions and macros as functions that Rust can call, one line each. */
#include <linux/device.h>
#include <linux/hid.h>
#include <linux/pm_wakeup.h>
#include <linux/serio.h>
#include <linux/slab.h>

#include "helpers.h"

unsigned int hid_vsc_helper_connect_mask(void)
{
	return HID_CONNECT_HIDINPUT | HID_CONNECT_HIDDEV;
}

int hid_vsc_helper_init_wakeup(struct device *dev, bool enable)
{
	return device_init_wakeup(dev, enable);
}

void hid_vsc_helper_wakeup(struct device *dev)
{
	pm_wakeup_hard_event(dev);
}

struct serio *hid_vsc_helper_alloc_serio(void)
{
	return kzalloc(sizeof(struct serio), GFP_KERNEL);
}
