/* SPDX-License-Identifier: GPL-2.0 */
/* The part of the network interface that C gives as inline functions and macros; see helpers.c. */
#ifndef NETVSC_HELPERS_H
#define NETVSC_HELPERS_H

#include <linux/types.h>

struct device;
struct napi_struct;
struct net_device;
struct net_device_ops;
struct ethtool_ops;
struct sk_buff;
struct skb_shared_info;

/* Devices */
struct net_device *netvsc_helper_alloc_etherdev(int size, unsigned int queues);
void *netvsc_helper_priv(struct net_device *dev);
void netvsc_helper_set_parent(struct net_device *dev, struct device *parent);
void netvsc_helper_set_ops(struct net_device *dev, const struct net_device_ops *ops,
			   const struct ethtool_ops *ethtool);
bool netvsc_helper_is_usable(const struct net_device *dev);
bool netvsc_helper_is_registered(const struct net_device *dev);
bool netvsc_helper_is_running(const struct net_device *dev);
const char *netvsc_helper_name(const struct net_device *dev);
u32 netvsc_helper_mtu(const struct net_device *dev);
void netvsc_helper_set_mtu(struct net_device *dev, u32 mtu);
void netvsc_helper_set_mtu_range(struct net_device *dev, u32 min, u32 max);
void netvsc_helper_set_headroom(struct net_device *dev, u16 bytes);
const u8 *netvsc_helper_address(const struct net_device *dev);
void netvsc_helper_set_address(struct net_device *dev, const u8 *address);
u32 netvsc_helper_flags(const struct net_device *dev);
bool netvsc_helper_has_alias(const struct net_device *dev);
u32 netvsc_helper_real_tx_queues(const struct net_device *dev);
u32 netvsc_helper_real_rx_queues(const struct net_device *dev);
u64 netvsc_helper_features(const struct net_device *dev);
void netvsc_helper_set_features(struct net_device *dev, u64 features);
u64 netvsc_helper_hw_features(const struct net_device *dev);
void netvsc_helper_set_hw_features(struct net_device *dev, u64 features);
void netvsc_helper_set_vlan_features(struct net_device *dev, u64 features);
bool netvsc_helper_rxfh_is_configured(const struct net_device *dev);
void netvsc_helper_lockdep_set_classes(struct net_device *dev);

/* Transmit queues; the caller has checked the number. */
void netvsc_helper_stop_queue(struct net_device *dev, u32 queue);
void netvsc_helper_wake_queue(struct net_device *dev, u32 queue);
bool netvsc_helper_queue_stopped(struct net_device *dev, u32 queue);
bool netvsc_helper_xmit_stopped(struct net_device *dev, u32 queue);
void netvsc_helper_disable_tx(struct net_device *dev);
void netvsc_helper_wake_all(struct net_device *dev);
bool netvsc_helper_xmit_more(void);

/* NAPI */
void netvsc_helper_napi_add(struct net_device *dev, struct napi_struct *napi,
			    int (*poll)(struct napi_struct *napi, int budget));
void netvsc_helper_napi_del(struct napi_struct *napi);
void netvsc_helper_napi_schedule(struct napi_struct *napi);
void netvsc_helper_gro_receive(struct napi_struct *napi, struct sk_buff *skb);

/* Packets on their way out */
int netvsc_helper_skb_cow_head(struct sk_buff *skb, unsigned int headroom);
int netvsc_helper_skb_linearize(struct sk_buff *skb);
struct skb_shared_info *netvsc_helper_skb_shinfo(const struct sk_buff *skb);
const void *netvsc_helper_frag_address(const struct skb_shared_info *info, u32 frag);
u64 netvsc_helper_phys(const void *address);
u16 netvsc_helper_skb_protocol(const struct sk_buff *skb);
bool netvsc_helper_skb_is_gso(const struct sk_buff *skb);
bool netvsc_helper_skb_wants_checksum(const struct sk_buff *skb);
u8 netvsc_helper_skb_ipv4_protocol(const struct sk_buff *skb);
u8 netvsc_helper_skb_ipv6_protocol(const struct sk_buff *skb);
u32 netvsc_helper_skb_transport_offset(const struct sk_buff *skb);
void netvsc_helper_skb_prepare_tso4(struct sk_buff *skb);
void netvsc_helper_skb_prepare_tso6(struct sk_buff *skb);
bool netvsc_helper_skb_has_vlan(const struct sk_buff *skb);
u16 netvsc_helper_skb_vlan(const struct sk_buff *skb);
int netvsc_helper_skb_hoist_vlan(struct sk_buff *skb);
u32 netvsc_helper_skb_hash_raw(const struct sk_buff *skb);
void netvsc_helper_skb_timestamp(struct sk_buff *skb);
void netvsc_helper_skb_free(struct sk_buff *skb);
void netvsc_helper_skb_orphan(struct sk_buff *skb);
bool netvsc_helper_skb_is_tso6(const struct sk_buff *skb);
void netvsc_helper_skb_consume(struct sk_buff *skb);

/* The choice of a transmit queue */
int netvsc_helper_skb_recorded_tx_queue(const struct sk_buff *skb);
bool netvsc_helper_skb_may_reorder(const struct sk_buff *skb);
int netvsc_helper_skb_recorded_rx_queue(const struct sk_buff *skb);
u32 netvsc_helper_skb_hash(struct sk_buff *skb);
u32 netvsc_helper_skb_l3_hash(struct sk_buff *skb);
u8 netvsc_helper_skb_flow_kind(struct sk_buff *skb);
void netvsc_helper_skb_remember_tx_queue(const struct sk_buff *skb, u16 queue);

/* Packets that came in */
void netvsc_helper_skb_set_protocol(struct sk_buff *skb, struct net_device *dev);
void netvsc_helper_skb_checksum_ok(struct sk_buff *skb);
void netvsc_helper_skb_set_segments(struct sk_buff *skb, bool v6, u16 size, u16 count);
void netvsc_helper_skb_set_hash(struct sk_buff *skb, u32 hash);
void netvsc_helper_skb_set_vlan(struct sk_buff *skb, u16 tci);
void netvsc_helper_skb_record_rx_queue(struct sk_buff *skb, u16 queue);
bool netvsc_helper_skb_fix_ipv4_checksum(struct sk_buff *skb);
bool netvsc_helper_skb_is_multicast(const struct sk_buff *skb);

/* System */
u32 netvsc_helper_online_cpus(void);
bool netvsc_helper_cpu_present(u32 cpu);
u32 netvsc_helper_default_rss_queues(void);
u32 netvsc_helper_msg_init(int debug);
bool netvsc_helper_ratelimit(void);
void netvsc_helper_bh_disable(void);
void netvsc_helper_bh_enable(void);

/* Module parameters: params.c. */
extern unsigned int netvsc_ring_size;
extern int netvsc_debug;
extern unsigned int netvsc_host_timeout;

#endif
