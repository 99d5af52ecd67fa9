// SPDX-License-Identifier: GPL-2.0
/*
 * Definitions of helpers.h: one call each, no logic and no state, except for the module parameter that the
 * Rust `module!` macro cannot make visible in sysfs.
 */

#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/completion.h>
#include <linux/device.h>
#include <linux/dma-mapping.h>
#include <linux/hyperv.h>
#include <linux/jiffies.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/ratelimit.h>
#include <linux/sched/isolation.h>
#include <linux/sched/mm.h>
#include <linux/smp.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>
#include <asm/mshyperv.h>
#include "helpers.h"

static unsigned int max_version = UINT_MAX;
module_param(max_version, uint, 0444);
MODULE_PARM_DESC(max_version,
		 "Newest VMBus protocol version to negotiate, (major << 16) | minor (default: the newest known)");

bool vmbus_helper_is_hyperv(void)
{
	return hv_is_hyperv_initialized();
}

bool vmbus_helper_is_root_partition(void)
{
	return hv_root_partition() && !hv_nested;
}

bool vmbus_helper_is_isolated(void)
{
	return hv_is_isolation_supported() || ms_hyperv.paravisor_present;
}

/* The C driver may be in vmlinux, a module, or not there at all: ask for its symbol by name. */
bool vmbus_helper_c_driver_active(void)
{
	bool (*exists)(void) = (bool (*)(void))__symbol_get("hv_vmbus_exists");
	bool active;

	if (!exists)
		return false;
	active = exists();
	__symbol_put("hv_vmbus_exists");
	return active;
}

bool vmbus_helper_auto_eoi(void)
{
	return hv_recommend_using_aeoi();
}

u8 vmbus_helper_vector(void)
{
	return HYPERVISOR_CALLBACK_VECTOR;
}

unsigned int vmbus_helper_max_version(void)
{
	return max_version;
}

u16 vmbus_helper_hypercall(u64 control, const void *input, u32 size)
{
	unsigned long flags;
	void *page;
	u64 status;

	if (size > HV_HYP_PAGE_SIZE)
		return HV_STATUS_INVALID_PARAMETER;

	local_irq_save(flags);
	page = *this_cpu_ptr(hyperv_pcpu_input_arg);
	memcpy(page, input, size);
	status = hv_do_hypercall(control, page, NULL);
	local_irq_restore(flags);

	return hv_result(status);
}

u16 vmbus_helper_fast_hypercall(u16 code, u64 input)
{
	return hv_result(hv_do_fast_hypercall8(code, input));
}

u32 vmbus_helper_vp_number(u32 cpu)
{
	return hv_cpu_number_to_vp_number(cpu);
}

bool vmbus_helper_cpu_online(u32 cpu)
{
	return cpu < nr_cpu_ids && cpu_online(cpu);
}

bool vmbus_helper_cpu_present(u32 cpu)
{
	return cpu < nr_cpu_ids && cpu_present(cpu);
}

bool vmbus_helper_cpu_housekeeping(u32 cpu)
{
	return cpu < nr_cpu_ids && cpumask_test_cpu(cpu, housekeeping_cpumask(HK_TYPE_MANAGED_IRQ));
}

int vmbus_helper_cpu_node(u32 cpu)
{
	return cpu_to_node(cpu);
}

u32 vmbus_helper_current_cpu(void)
{
	return raw_smp_processor_id();
}

void vmbus_helper_on_each_cpu(void (*func)(void *info), void *info)
{
	on_each_cpu(func, info, 1);
}

int vmbus_helper_cpuhp_setup_cpuslocked(const char *name, int (*online)(unsigned int cpu),
					int (*offline)(unsigned int cpu))
{
	return cpuhp_setup_state_nocalls_cpuslocked(CPUHP_AP_ONLINE_DYN, name, online, offline);
}

void vmbus_helper_cpuhp_remove(int state, bool invoke)
{
	if (invoke)
		cpuhp_remove_state(state);
	else
		cpuhp_remove_state_nocalls(state);
}

unsigned int vmbus_helper_noio_save(void)
{
	return memalloc_noio_save();
}

void vmbus_helper_noio_restore(unsigned int flags)
{
	memalloc_noio_restore(flags);
}

unsigned long vmbus_helper_zeroed_page(void)
{
	return get_zeroed_page(GFP_KERNEL);
}

void vmbus_helper_free_page(unsigned long page)
{
	free_page(page);
}

u64 vmbus_helper_page_phys(unsigned long page)
{
	return virt_to_phys((void *)page);
}

u64 vmbus_helper_page_pfn(struct page *page)
{
	return page_to_hvpfn(page);
}

void *vmbus_helper_vmap(struct page **pages, u32 count)
{
	return vmap(pages, count, VM_MAP, PAGE_KERNEL);
}

void vmbus_helper_vunmap(void *address)
{
	vunmap(address);
}

unsigned long vmbus_helper_msecs_to_jiffies(u32 ms)
{
	return msecs_to_jiffies(ms);
}

void vmbus_helper_init_completion(struct completion *c)
{
	init_completion(c);
}

struct workqueue_struct *vmbus_helper_alloc_ordered_queue(const char *name)
{
	return alloc_ordered_workqueue("%s", 0, name);
}

struct workqueue_struct *vmbus_helper_alloc_rescue_queue(const char *name)
{
	return alloc_ordered_workqueue("%s", WQ_MEM_RECLAIM, name);
}

struct workqueue_struct *vmbus_helper_alloc_unbound_queue(const char *name)
{
	return alloc_workqueue("%s", WQ_MEM_RECLAIM | WQ_UNBOUND, 0, name);
}

struct workqueue_struct *vmbus_helper_alloc_percpu_queue(const char *name)
{
	return alloc_workqueue("%s", WQ_MEM_RECLAIM | WQ_HIGHPRI | WQ_PERCPU, 0, name);
}

struct workqueue_struct *vmbus_helper_alloc_bh_queue(const char *name)
{
	return alloc_workqueue("%s", WQ_BH | WQ_HIGHPRI | WQ_PERCPU, 0, name);
}

int vmbus_helper_set_dev_name(struct device *dev, const char *name)
{
	return dev_set_name(dev, "%s", name);
}

int vmbus_helper_dev_match_override(struct device *dev, const struct device_driver *drv)
{
	return device_match_driver_override(dev, drv);
}

int vmbus_helper_add_modalias(struct kobj_uevent_env *env, const char *modalias)
{
	return add_uevent_var(env, "MODALIAS=%s", modalias);
}

void vmbus_helper_set_node(struct device *dev, int node)
{
	set_dev_node(dev, node);
}

/* As for the devices of the C driver: 64-bit DMA, coherent, no limit but the page for a segment. */
void vmbus_helper_init_dma(struct device *dev, u64 *mask,
			   struct device_dma_parameters *parms)
{
	dev->dma_parms = parms;
	dev->dma_mask = mask;
	dma_set_mask(dev, DMA_BIT_MASK(64));
	dma_set_coherent_mask(dev, DMA_BIT_MASK(64));
}

bool vmbus_helper_ratelimit(void)
{
	static DEFINE_RATELIMIT_STATE(state, DEFAULT_RATELIMIT_INTERVAL, DEFAULT_RATELIMIT_BURST);

	return __ratelimit(&state);
}

bool vmbus_helper_ratelimit_news(void)
{
	/* The flag: what was left out is not worth a warning. */
	static struct ratelimit_state state =
		RATELIMIT_STATE_INIT_FLAGS(state, DEFAULT_RATELIMIT_INTERVAL,
					   DEFAULT_RATELIMIT_BURST, RATELIMIT_MSG_ON_RELEASE);

	return __ratelimit(&state);
}
