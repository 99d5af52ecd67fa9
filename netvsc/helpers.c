// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros of the network interface as functions that Rust can call. All reasoning is on
 * the Rust side (net/).
 */
#include <linux/bottom_half.h>
#include <linux/cpumask.h>
#include <linux/etherdevice.h>
#include <linux/ethtool.h>
#include <linux/if_vlan.h>
#include <linux/io.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/netdevice.h>
#include <linux/skbuff.h>
#include <linux/tcp.h>
#include <net/checksum.h>
#include <net/gro.h>
#include <net/ip6_checksum.h>
#include <net/netdev_lock.h>
#include <net/sock.h>

#include "helpers.h"

struct net_device *netvsc_helper_alloc_etherdev(int size, unsigned int queues)
{
	return alloc_etherdev_mqs(size, queues, queues);
}

void *netvsc_helper_priv(struct net_device *dev)
{
	return netdev_priv(dev);
}

void netvsc_helper_set_parent(struct net_device *dev, struct device *parent)
{
	SET_NETDEV_DEV(dev, parent);
}

void netvsc_helper_set_ops(struct net_device *dev, const struct net_device_ops *ops,
			   const struct ethtool_ops *ethtool)
{
	dev->netdev_ops = ops;
	dev->ethtool_ops = ethtool;
}

bool netvsc_helper_is_usable(const struct net_device *dev)
{
	return READ_ONCE(dev->reg_state) <= NETREG_REGISTERED;
}

bool netvsc_helper_is_registered(const struct net_device *dev)
{
	return READ_ONCE(dev->reg_state) == NETREG_REGISTERED;
}

bool netvsc_helper_is_running(const struct net_device *dev)
{
	return netif_running(dev);
}

const char *netvsc_helper_name(const struct net_device *dev)
{
	return netdev_name(dev);
}

u32 netvsc_helper_mtu(const struct net_device *dev)
{
	return READ_ONCE(dev->mtu);
}

void netvsc_helper_set_mtu(struct net_device *dev, u32 mtu)
{
	WRITE_ONCE(dev->mtu, mtu);
}

void netvsc_helper_set_mtu_range(struct net_device *dev, u32 min, u32 max)
{
	dev->min_mtu = min;
	dev->max_mtu = max;
}

void netvsc_helper_set_headroom(struct net_device *dev, u16 bytes)
{
	dev->needed_headroom = bytes;
}

const u8 *netvsc_helper_address(const struct net_device *dev)
{
	return dev->dev_addr;
}

void netvsc_helper_set_address(struct net_device *dev, const u8 *address)
{
	eth_hw_addr_set(dev, address);
}

u32 netvsc_helper_flags(const struct net_device *dev)
{
	return READ_ONCE(dev->flags);
}

bool netvsc_helper_has_alias(const struct net_device *dev)
{
	return rcu_access_pointer(dev->ifalias);
}

u32 netvsc_helper_real_tx_queues(const struct net_device *dev)
{
	return READ_ONCE(dev->real_num_tx_queues);
}

u32 netvsc_helper_real_rx_queues(const struct net_device *dev)
{
	return READ_ONCE(dev->real_num_rx_queues);
}

u64 netvsc_helper_features(const struct net_device *dev)
{
	return READ_ONCE(dev->features);
}

void netvsc_helper_set_features(struct net_device *dev, u64 features)
{
	WRITE_ONCE(dev->features, features);
}

u64 netvsc_helper_hw_features(const struct net_device *dev)
{
	return dev->hw_features;
}

void netvsc_helper_set_hw_features(struct net_device *dev, u64 features)
{
	dev->hw_features = features;
}

void netvsc_helper_set_vlan_features(struct net_device *dev, u64 features)
{
	dev->vlan_features = features;
}

bool netvsc_helper_rxfh_is_configured(const struct net_device *dev)
{
	return netif_is_rxfh_configured(dev);
}

void netvsc_helper_lockdep_set_classes(struct net_device *dev)
{
	netdev_lockdep_set_classes(dev);
}

void netvsc_helper_stop_queue(struct net_device *dev, u32 queue)
{
	netif_tx_stop_queue(netdev_get_tx_queue(dev, queue));
}

void netvsc_helper_wake_queue(struct net_device *dev, u32 queue)
{
	netif_tx_wake_queue(netdev_get_tx_queue(dev, queue));
}

bool netvsc_helper_queue_stopped(struct net_device *dev, u32 queue)
{
	return netif_tx_queue_stopped(netdev_get_tx_queue(dev, queue));
}

bool netvsc_helper_xmit_stopped(struct net_device *dev, u32 queue)
{
	return netif_xmit_stopped(netdev_get_tx_queue(dev, queue));
}

void netvsc_helper_disable_tx(struct net_device *dev)
{
	netif_tx_disable(dev);
}

void netvsc_helper_wake_all(struct net_device *dev)
{
	netif_tx_wake_all_queues(dev);
}

bool netvsc_helper_xmit_more(void)
{
	return netdev_xmit_more();
}

void netvsc_helper_napi_add(struct net_device *dev, struct napi_struct *napi,
			    int (*poll)(struct napi_struct *napi, int budget))
{
	netif_napi_add(dev, napi, poll);
}

void netvsc_helper_napi_del(struct napi_struct *napi)
{
	netif_napi_del(napi);
}

void netvsc_helper_napi_schedule(struct napi_struct *napi)
{
	napi_schedule(napi);
}

void netvsc_helper_gro_receive(struct napi_struct *napi, struct sk_buff *skb)
{
	napi_gro_receive(napi, skb);
}

int netvsc_helper_skb_cow_head(struct sk_buff *skb, unsigned int headroom)
{
	return skb_cow_head(skb, headroom);
}

int netvsc_helper_skb_linearize(struct sk_buff *skb)
{
	return skb_linearize(skb);
}

struct skb_shared_info *netvsc_helper_skb_shinfo(const struct sk_buff *skb)
{
	return skb_shinfo(skb);
}

const void *netvsc_helper_frag_address(const struct skb_shared_info *info, u32 frag)
{
	return skb_frag_address(&info->frags[frag]);
}

u64 netvsc_helper_phys(const void *address)
{
	return virt_to_phys((void *)address);
}

u16 netvsc_helper_skb_protocol(const struct sk_buff *skb)
{
	return ntohs(skb->protocol);
}

bool netvsc_helper_skb_is_gso(const struct sk_buff *skb)
{
	return skb_is_gso(skb);
}

bool netvsc_helper_skb_wants_checksum(const struct sk_buff *skb)
{
	return skb->ip_summed == CHECKSUM_PARTIAL;
}

u8 netvsc_helper_skb_ipv4_protocol(const struct sk_buff *skb)
{
	return ip_hdr(skb)->protocol;
}

u8 netvsc_helper_skb_ipv6_protocol(const struct sk_buff *skb)
{
	return ipv6_hdr(skb)->nexthdr;
}

u32 netvsc_helper_skb_transport_offset(const struct sk_buff *skb)
{
	return skb_transport_offset(skb);
}

/* A host that segments wants the length and the IP checksum to be zero, and a TCP checksum of the pseudo header only. */
void netvsc_helper_skb_prepare_tso4(struct sk_buff *skb)
{
	struct iphdr *ip = ip_hdr(skb);

	ip->tot_len = 0;
	ip->check = 0;
	tcp_hdr(skb)->check = ~csum_tcpudp_magic(ip->saddr, ip->daddr, 0, IPPROTO_TCP, 0);
}

void netvsc_helper_skb_prepare_tso6(struct sk_buff *skb)
{
	tcp_v6_gso_csum_prep(skb);
}

bool netvsc_helper_skb_has_vlan(const struct sk_buff *skb)
{
	return skb_vlan_tag_present(skb);
}

u16 netvsc_helper_skb_vlan(const struct sk_buff *skb)
{
	return skb_vlan_tag_get(skb);
}

/* Moves the tag of a frame that has one in its data (packet sockets send such) to the packet's metadata. */
int netvsc_helper_skb_hoist_vlan(struct sk_buff *skb)
{
	u16 tci;
	int ret;

	skb_reset_mac_header(skb);
	if (!pskb_may_pull(skb, VLAN_ETH_HLEN) || !eth_type_vlan(eth_hdr(skb)->h_proto))
		return 0;
	ret = __skb_vlan_pop(skb, &tci);
	if (!ret)
		__vlan_hwaccel_put_tag(skb, htons(ETH_P_8021Q), tci);
	return ret;
}

u32 netvsc_helper_skb_hash_raw(const struct sk_buff *skb)
{
	return skb_get_hash_raw(skb);
}

void netvsc_helper_skb_timestamp(struct sk_buff *skb)
{
	skb_tx_timestamp(skb);
}

void netvsc_helper_skb_free(struct sk_buff *skb)
{
	dev_kfree_skb_any(skb);
}

void netvsc_helper_skb_orphan(struct sk_buff *skb)
{
	skb_orphan(skb);
}

bool netvsc_helper_skb_is_tso6(const struct sk_buff *skb)
{
	return skb_shinfo(skb)->gso_type & SKB_GSO_TCPV6;
}

void netvsc_helper_skb_consume(struct sk_buff *skb)
{
	dev_consume_skb_any(skb);
}

int netvsc_helper_skb_recorded_tx_queue(const struct sk_buff *skb)
{
	return sk_tx_queue_get(skb->sk);
}

bool netvsc_helper_skb_may_reorder(const struct sk_buff *skb)
{
	return skb->ooo_okay;
}

int netvsc_helper_skb_recorded_rx_queue(const struct sk_buff *skb)
{
	return skb_rx_queue_recorded(skb) ? skb_get_rx_queue(skb) : -1;
}

u32 netvsc_helper_skb_hash(struct sk_buff *skb)
{
	return skb_get_hash(skb);
}

/* The hash of the addresses only; 0 if the packet has none. */
u32 netvsc_helper_skb_l3_hash(struct sk_buff *skb)
{
	struct flow_keys flow;
	static u32 seed __read_mostly;

	if (!skb_flow_dissect_flow_keys(skb, &flow, 0))
		return 0;
	net_get_random_once(&seed, sizeof(seed));
	if (flow.basic.n_proto == htons(ETH_P_IP))
		return jhash2((u32 *)&flow.addrs.v4addrs, 2, seed);
	if (flow.basic.n_proto == htons(ETH_P_IPV6))
		return jhash2((u32 *)&flow.addrs.v6addrs, 8, seed);
	return 0;
}

/* 1: TCP over IPv4, 2: TCP over IPv6, 3: UDP over IPv4, 4: UDP over IPv6, 0: something else. */
u8 netvsc_helper_skb_flow_kind(struct sk_buff *skb)
{
	struct flow_keys flow;
	u8 kind;

	if (!skb_flow_dissect_flow_keys(skb, &flow, 0))
		return 0;
	if (flow.basic.ip_proto == IPPROTO_TCP)
		kind = 1;
	else if (flow.basic.ip_proto == IPPROTO_UDP)
		kind = 3;
	else
		return 0;
	if (flow.basic.n_proto == htons(ETH_P_IP))
		return kind;
	return flow.basic.n_proto == htons(ETH_P_IPV6) ? kind + 1 : 0;
}

void netvsc_helper_skb_remember_tx_queue(const struct sk_buff *skb, u16 queue)
{
	struct sock *sk = skb->sk;

	if (sk && sk_fullsock(sk) && rcu_access_pointer(sk->sk_dst_cache))
		sk_tx_queue_set(sk, queue);
}

void netvsc_helper_skb_set_protocol(struct sk_buff *skb, struct net_device *dev)
{
	skb->protocol = eth_type_trans(skb, dev);
}

void netvsc_helper_skb_checksum_ok(struct sk_buff *skb)
{
	skb->ip_summed = CHECKSUM_UNNECESSARY;
}

/* The packet is one of TCP, put together from so many segments of such a size. */
void netvsc_helper_skb_set_segments(struct sk_buff *skb, bool v6, u16 size, u16 count)
{
	struct skb_shared_info *info = skb_shinfo(skb);

	info->gso_type = v6 ? SKB_GSO_TCPV6 : SKB_GSO_TCPV4;
	info->gso_size = size;
	info->gso_segs = count;
}

void netvsc_helper_skb_set_hash(struct sk_buff *skb, u32 hash)
{
	skb_set_hash(skb, hash, PKT_HASH_TYPE_L4);
}

void netvsc_helper_skb_set_vlan(struct sk_buff *skb, u16 tci)
{
	__vlan_hwaccel_put_tag(skb, htons(ETH_P_8021Q), tci);
}

void netvsc_helper_skb_record_rx_queue(struct sk_buff *skb, u16 queue)
{
	skb_record_rx_queue(skb, queue);
}

/* Computes the checksum of an IPv4 header. Returns false if there is no whole one in the linear data. */
bool netvsc_helper_skb_fix_ipv4_checksum(struct sk_buff *skb)
{
	struct iphdr *ip = (struct iphdr *)skb->data;

	if (skb->protocol != htons(ETH_P_IP))
		return true;
	if (skb_headlen(skb) < sizeof(*ip) || ip->ihl < 5 || skb_headlen(skb) < ip->ihl * 4)
		return false;
	ip->check = 0;
	ip->check = ip_fast_csum(ip, ip->ihl);
	return true;
}

bool netvsc_helper_skb_is_multicast(const struct sk_buff *skb)
{
	return skb->pkt_type == PACKET_MULTICAST || skb->pkt_type == PACKET_BROADCAST;
}

u32 netvsc_helper_online_cpus(void)
{
	return num_online_cpus();
}

bool netvsc_helper_cpu_present(u32 cpu)
{
	return cpu < nr_cpu_ids && cpu_present(cpu);
}

u32 netvsc_helper_default_rss_queues(void)
{
	return netif_get_num_default_rss_queues();
}

u32 netvsc_helper_msg_init(int debug)
{
	return netif_msg_init(debug, NETIF_MSG_DRV | NETIF_MSG_PROBE | NETIF_MSG_LINK | NETIF_MSG_IFUP |
			      NETIF_MSG_IFDOWN | NETIF_MSG_TX_ERR);
}

bool netvsc_helper_ratelimit(void)
{
	return net_ratelimit();
}

void netvsc_helper_bh_disable(void)
{
	local_bh_disable();
}

void netvsc_helper_bh_enable(void)
{
	local_bh_enable();
}
