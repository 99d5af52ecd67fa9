/* SPDX-License-Identifier: GPL-2.0 */
/* Input of bindgen: C declarations that the kernel's own bindings do not have. */
#include <linux/reboot.h>
