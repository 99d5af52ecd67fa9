/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What Rust cannot call by itself: inline functions, macros and per-CPU variables of the kernel. One plain
 * function each, without logic. bindgen reads this file, helpers.c defines the functions.
 */
#ifndef VMBUS_DRV_HELPERS_H
#define VMBUS_DRV_HELPERS_H

#include <linux/types.h>

struct completion;
struct device;
struct device_dma_parameters;
struct device_driver;
struct page;
struct workqueue_struct;
struct kobject;
struct kobj_uevent_env;

/* Environment */
bool vmbus_helper_is_hyperv(void);
bool vmbus_helper_is_root_partition(void);
bool vmbus_helper_is_isolated(void);
bool vmbus_helper_c_driver_active(void);
bool vmbus_helper_auto_eoi(void);
u8 vmbus_helper_vector(void);
unsigned int vmbus_helper_max_version(void);

/* Hypercalls. The 16-bit status of the hypervisor is returned. */
u16 vmbus_helper_hypercall(u64 control, const void *input, u32 size);
u16 vmbus_helper_fast_hypercall(u16 code, u64 input);

/* CPUs */
u32 vmbus_helper_vp_number(u32 cpu);
bool vmbus_helper_cpu_online(u32 cpu);
bool vmbus_helper_cpu_present(u32 cpu);
bool vmbus_helper_cpu_housekeeping(u32 cpu);
int vmbus_helper_cpu_node(u32 cpu);
u32 vmbus_helper_current_cpu(void);
void vmbus_helper_on_each_cpu(void (*func)(void *info), void *info);
int vmbus_helper_cpuhp_setup_cpuslocked(const char *name, int (*online)(unsigned int cpu),
					int (*offline)(unsigned int cpu));
void vmbus_helper_cpuhp_remove(int state, bool invoke);

/* Memory */
unsigned int vmbus_helper_noio_save(void);
void vmbus_helper_noio_restore(unsigned int flags);
unsigned long vmbus_helper_zeroed_page(void);
void vmbus_helper_free_page(unsigned long page);
u64 vmbus_helper_page_phys(unsigned long page);
u64 vmbus_helper_page_pfn(struct page *page);
void *vmbus_helper_vmap(struct page **pages, u32 count);
void vmbus_helper_vunmap(void *address);

/* Waiting and work */
unsigned long vmbus_helper_msecs_to_jiffies(u32 ms);
void vmbus_helper_init_completion(struct completion *c);
struct workqueue_struct *vmbus_helper_alloc_ordered_queue(const char *name);
struct workqueue_struct *vmbus_helper_alloc_rescue_queue(const char *name);
struct workqueue_struct *vmbus_helper_alloc_unbound_queue(const char *name);
struct workqueue_struct *vmbus_helper_alloc_percpu_queue(const char *name);
struct workqueue_struct *vmbus_helper_alloc_bh_queue(const char *name);

/* Driver model */
int vmbus_helper_set_dev_name(struct device *dev, const char *name);
int vmbus_helper_dev_match_override(struct device *dev, const struct device_driver *drv);
int vmbus_helper_add_modalias(struct kobj_uevent_env *env, const char *modalias);
void vmbus_helper_set_node(struct device *dev, int node);
void vmbus_helper_init_dma(struct device *dev, u64 *mask,
			   struct device_dma_parameters *parms);
bool vmbus_helper_ratelimit(void);
bool vmbus_helper_ratelimit_news(void);

#endif
