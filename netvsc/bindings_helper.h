/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What bindgen reads for netvsc: the kernel's network interface, which the kernel's own Rust bindings do
 * not have, and our helpers for its inline functions.
 */
#include <linux/etherdevice.h>
#include <linux/ethtool.h>
#include <linux/if_link.h>
#include <linux/netdevice.h>
#include <linux/rtnetlink.h>
#include <linux/skbuff.h>

#include "helpers.h"
