/* SPDX-License-Identifier: GPL-2.0 */
/* What C gives as inline functions; see helpers.c. */
#ifndef HID_VSC_HELPERS_H
#define HID_VSC_HELPERS_H

#include <linux/types.h>

struct device;
struct serio;

unsigned int hid_vsc_helper_connect_mask(void);
int hid_vsc_helper_init_wakeup(struct device *dev, bool enable);
void hid_vsc_helper_wakeup(struct device *dev);
struct serio *hid_vsc_helper_alloc_serio(void);

#endif
