/* SPDX-License-Identifier: GPL-2.0 */
/* Input of bindgen: the C declarations that vmbus_drv uses and that the `bindings` crate does not have. */

#include <linux/hyperv.h>
#include <linux/mod_devicetable.h>
#include <linux/panic_notifier.h>
#include <asm/mshyperv.h>
#include <clocksource/hyperv_timer.h>
#include "helpers.h"
