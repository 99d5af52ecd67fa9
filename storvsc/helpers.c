// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions of the SCSI host interface as functions that Rust can call. One line each: all
 * reasoning is on the Rust side (scsi/).
 */
#include <linux/cpumask.h>
#include <linux/dma-mapping.h>
#include <linux/topology.h>
#include <scsi/scsi_cmnd.h>
#include <scsi/scsi_devinfo.h>
#include <scsi/scsi_host.h>

#include "helpers.h"

void *storvsc_helper_shost_priv(struct Scsi_Host *shost)
{
	return shost_priv(shost);
}

void *storvsc_helper_scsi_cmd_priv(struct scsi_cmnd *cmd)
{
	return scsi_cmd_priv(cmd);
}

u32 storvsc_helper_unique_tag(struct scsi_cmnd *cmd)
{
	return blk_mq_unique_tag(scsi_cmd_to_rq(cmd));
}

int storvsc_helper_add_host(struct Scsi_Host *shost, struct device *parent)
{
	return scsi_add_host(shost, parent);
}

u64 storvsc_helper_modern_bflags(void)
{
	return BLIST_REPORTLUN2 | BLIST_TRY_VPD_PAGES;
}

u32 storvsc_helper_cpu_node(u32 cpu)
{
	return cpu < nr_cpu_ids && cpu_possible(cpu) ? cpu_to_node(cpu) : 0;
}

void storvsc_helper_set_min_align(struct device *dev, u32 mask)
{
	dma_set_min_align_mask(dev, mask);
}

u32 storvsc_helper_online_cpus(void)
{
	return num_online_cpus();
}
