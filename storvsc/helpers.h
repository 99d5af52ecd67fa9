/* SPDX-License-Identifier: GPL-2.0 */
/* The part of the SCSI and block interface that C gives as inline functions; see helpers.c. */
#ifndef STORVSC_HELPERS_H
#define STORVSC_HELPERS_H

#include <linux/types.h>

struct device;
struct Scsi_Host;
struct scsi_cmnd;

void *storvsc_helper_shost_priv(struct Scsi_Host *shost);
void *storvsc_helper_scsi_cmd_priv(struct scsi_cmnd *cmd);
u32 storvsc_helper_cpu_node(u32 cpu);
u32 storvsc_helper_online_cpus(void);
void storvsc_helper_set_min_align(struct device *dev, u32 mask);
u32 storvsc_helper_unique_tag(struct scsi_cmnd *cmd);
u64 storvsc_helper_modern_bflags(void);
int storvsc_helper_add_host(struct Scsi_Host *shost, struct device *parent);

/* Module parameters: params.c. */
extern int storvsc_ringbuffer_size;
extern unsigned int storvsc_max_hw_queues;
extern int storvsc_vcpus_per_sub_channel;
extern int storvsc_ring_avail_percent_lowater;
extern int storvsc_logging_level;
extern unsigned int storvsc_request_timeout;
extern unsigned int storvsc_timeout_extensions;
extern unsigned int storvsc_host_timeout;

#endif
