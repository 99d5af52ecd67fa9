/* SPDX-License-Identifier: GPL-2.0 */
/* What C gives as inline functions or as a variable that is called; see helpers.c. */
#ifndef TIMESYNC_HELPERS_H
#define TIMESYNC_HELPERS_H

#include <linux/types.h>

struct ptp_system_timestamp;

u64 timesync_helper_reference_counter(void);
void timesync_helper_read_prets(struct ptp_system_timestamp *sts);
void timesync_helper_read_postts(struct ptp_system_timestamp *sts);

/* Module parameter. */
extern bool timesync_implicit;

#endif
