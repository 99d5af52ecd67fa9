/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What bindgen reads for storvsc: the kernel's SCSI host interface, which the kernel's own Rust
 * bindings do not have, and our helpers for its inline functions.
 */
#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <scsi/scsi.h>
#include <scsi/scsi_cmnd.h>
#include <scsi/scsi_device.h>
#include <scsi/scsi_devinfo.h>
#include <scsi/scsi_eh.h>
#include <scsi/scsi_host.h>

#include "helpers.h"
