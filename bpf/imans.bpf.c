/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * imans.bpf.c - the kernel side of imans-agent.
 *
 *   bprm_check_security     a program, script or interpreter is about to run (BPRM_CHECK)
 *   mmap_file               a file is about to be mapped executable (MMAP_CHECK, MMAP_CHECK_REQPROT)
 *   file_mprotect           a mapped file is about to become executable (MMAP_CHECK)
 *   mnt_get_write_access    a file that was measured is about to be opened for writing (__mnt_want_write before 6.8)
 *   copy_mnt_ns             a mount namespace is born; its creator's is its parent
 *   switch_task_namespaces  a task moves into another mount namespace
 *   proc_free_inum          a mount namespace is gone
 *   iter/task               which mount namespaces there are, run once by the agent
 *
 * Every program records and allows: the value an earlier program returned is handed on.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "event.h"
#include "loss.h"

/* ---- Globals ---- */

/* Set before load. False: the agent hashes (--digest=agent, or a kernel without the helper). */
const volatile bool imans_kernel_digest = true;

#include "emit.h"
#include "standin.h"
#include "mntns.h"
#include "content.h"
#include "measured.h"
#include "digest.h"
#include "writers.h"
#include "file.h"

/* ---- Files ---- */

/* A file that is about to run, or to be mapped executable. */
static __noinline int imans_look_at_file(struct file *file, __u32 func, __u32 flags)
{
	struct imans_look look;

	if (imans_needs_event(file, func, flags, &look)) {
		look.vma_start = look.vma_end = 0;
		imans_submit_file(file, &look);
	}
	return 0;
}

/* Sleepable: the digest may have to be read from disk. */
SEC("lsm.s/bprm_check_security")
int BPF_PROG(imans_bprm_check_security, struct linux_binprm *bprm, int ret)
{
	if (!ret)
		imans_look_at_file(bprm->file, IMANS_BPRM_CHECK, 0);
	return ret;
}

/*
 * Sleepable, as it runs before mmap_lock is taken. The check for NULL is compulsory since 7.0. Most mappings are not executable: the
 * rest is a function of its own, so that here no register need be saved for it.
 */
SEC("lsm.s/mmap_file")
int BPF_PROG(imans_mmap_file, struct file *file, unsigned long reqprot, unsigned long prot, unsigned long flags, int ret)
{
	if (!(prot & PROT_EXEC) || ret || !file)
		return ret;
	return imans_look_at_file(file, IMANS_MMAP_CHECK, reqprot & PROT_EXEC ? IMANS_REQPROT : 0);
}

static __noinline int imans_make_executable(struct vm_area_struct *vma, __u32 flags)
{
	struct file *file = vma->vm_file;
	struct imans_look look;

	if (file && !(vma->vm_flags & VM_EXEC) && imans_needs_event(file, IMANS_MMAP_CHECK, flags, &look)) {
		look.vma_start = vma->vm_start;
		look.vma_end = vma->vm_end;
		imans_submit_mapping(file, &look);
	}
	return 0;
}

/*
 * Not sleepable: it runs under mmap_lock, where reading a file could wait for that very lock. So there is no digest and no
 * path: the agent finds both through the mapping. An overlayfs file's vm_file is the real file already. (fentry would cost a
 * third less, but the kernel skips a tracing program that was interrupted by itself.)
 */
SEC("lsm/file_mprotect")
int BPF_PROG(imans_file_mprotect, struct vm_area_struct *vma, unsigned long reqprot, unsigned long prot, int ret)
{
	if (!(prot & PROT_EXEC) || ret)
		return ret;
	return imans_make_executable(vma, IMANS_MPROTECT | (reqprot & PROT_EXEC ? IMANS_REQPROT : 0));
}

/* internal/loader attaches these two to the function of that kernel. Of two at a function the one named _again runs last (standin.h). */
SEC("fentry/mnt_get_write_access")
int BPF_PROG(imans_write_access, struct vfsmount *mnt)
{
	imans_look_at_writer(mnt);
	imans_leave_run(IMANS_WRITE_ACCESS);
	return 0;
}

SEC("fentry/mnt_get_write_access")
int BPF_PROG(imans_write_access_again, struct vfsmount *mnt)
{
	if (!imans_take_run(IMANS_WRITE_ACCESS))
		imans_look_at_writer(mnt);
	return 0;
}

/* ---- Mount namespaces ---- */

static __always_inline void imans_submit_birth(__u64 id, __u32 inum, __u64 parent, __u32 parent_inum)
{
	struct imans_birth *record = bpf_ringbuf_reserve(&events, sizeof(*record), 0);
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();

	if (!record) {
		imans_lose(id, inum, IMANS_LOSS_RING_BUFFER_FULL);
		return;
	}
	imans_fill_header(&record->header, IMANS_BIRTH, id, inum);
	record->parent = parent;
	record->parent_inum = parent_inum;
	record->tgid = task->tgid;
	for (int i = 0; i < IMANS_ANCESTORS; i++) {
		task = task->real_parent;
		record->ancestors[i] = task->tgid;
	}
	bpf_ringbuf_submit(record, imans_wake_flags());
}

static __always_inline void imans_see_birth(struct mnt_namespace *ns, struct mnt_namespace *copy)
{
	__u64 id;

	if (copy == ns || (unsigned long)copy >= (unsigned long)-4095 /* an error number */)
		return;
	id = imans_mntns_id(copy);
	if (imans_mntns_register(id, copy->ns.inum, imans_mntns_id(ns), ns->ns.inum))
		imans_submit_birth(id, copy->ns.inum, imans_mntns_id(ns), ns->ns.inum);
}

/* At the exit the new namespace has its id, and no task is in it yet: the birth precedes each of its events. */
SEC("fexit/copy_mnt_ns")
int BPF_PROG(imans_copy_mnt_ns, unsigned long flags, struct mnt_namespace *ns, void *user_ns, void *new_fs,
	     struct mnt_namespace *ret)
{
	imans_see_birth(ns, ret);
	imans_leave_run(IMANS_COPY_MNT_NS);
	return 0;
}

SEC("fexit/copy_mnt_ns")
int BPF_PROG(imans_copy_mnt_ns_again, unsigned long flags, struct mnt_namespace *ns, void *user_ns, void *new_fs,
	     struct mnt_namespace *ret)
{
	if (!imans_take_run(IMANS_COPY_MNT_NS))
		imans_see_birth(ns, ret);
	return 0;
}

/* Also how a namespace without any task when the agent first started is met. 6.1 calls it with NULL when a task exits. */
static __always_inline void imans_see_move(struct task_struct *task, struct nsproxy *new)
{
	struct mnt_namespace *from, *to;
	struct imans_move *record;
	__u64 id;

	if (!new)
		return;
	from = task->nsproxy->mnt_ns;
	to = new->mnt_ns;
	if (from == to)
		return;
	id = imans_mntns_id(to);
	if (imans_mntns_register(id, to->ns.inum, 0, 0))
		imans_submit_birth(id, to->ns.inum, 0, 0);
	record = bpf_ringbuf_reserve(&events, sizeof(*record), 0);
	if (!record) {
		imans_lose(id, to->ns.inum, IMANS_LOSS_RING_BUFFER_FULL);
		return;
	}
	imans_fill_header(&record->header, IMANS_MOVE, id, to->ns.inum);
	record->from = imans_mntns_id(from);
	record->from_inum = from->ns.inum;
	record->tgid = task->tgid;
	record->start_boottime = task->group_leader->start_boottime;
	bpf_ringbuf_submit(record, imans_wake_flags());
}

SEC("fentry/switch_task_namespaces")
int BPF_PROG(imans_switch_task_namespaces, struct task_struct *task, struct nsproxy *new)
{
	imans_see_move(task, new);
	imans_leave_run(IMANS_SWITCH_TASK_NAMESPACES);
	return 0;
}

SEC("fentry/switch_task_namespaces")
int BPF_PROG(imans_switch_task_namespaces_again, struct task_struct *task, struct nsproxy *new)
{
	if (!imans_take_run(IMANS_SWITCH_TASK_NAMESPACES))
		imans_see_move(task, new);
	return 0;
}

/* Called for every inode number of /proc that is given back, before it is free again. */
static __always_inline void imans_see_end(__u32 inum)
{
	__u64 id = imans_mntns_end(inum);
	struct imans_death *record;

	if (!id)
		return;
	record = bpf_ringbuf_reserve(&events, sizeof(*record), 0);
	if (!record) {
		imans_lose(id, inum, IMANS_LOSS_RING_BUFFER_FULL);
		return;
	}
	imans_fill_header(&record->header, IMANS_DEATH, id, inum);
	bpf_ringbuf_submit(record, imans_wake_flags());
}

SEC("fentry/proc_free_inum")
int BPF_PROG(imans_proc_free_inum, unsigned int inum)
{
	imans_see_end(inum);
	imans_leave_run(IMANS_PROC_FREE_INUM);
	return 0;
}

SEC("fentry/proc_free_inum")
int BPF_PROG(imans_proc_free_inum_again, unsigned int inum)
{
	if (!imans_take_run(IMANS_PROC_FREE_INUM))
		imans_see_end(inum);
	return 0;
}

SEC("iter/task")
int imans_iter_task(struct bpf_iter__task *ctx)
{
	struct seq_file *seq = ctx->meta->seq;
	struct task_struct *task = ctx->task;
	struct imans_task record = {};
	struct mnt_namespace *ns, *parent;

	if (!task)
		return 0;
	ns = task->nsproxy->mnt_ns;
	record.inum = ns->ns.inum;
	if (!record.inum)
		return 0;
	parent = task->real_parent->nsproxy->mnt_ns;
	record.mntns = imans_mntns_id(ns);
	record.parent_inum = parent->ns.inum;
	record.parent_mntns = imans_mntns_id(parent);
	record.start_boottime = task->group_leader->start_boottime;
	record.tgid = task->tgid;
	record.pid = task->pid;
	imans_mntns_register(record.mntns, record.inum, 0, 0);
	bpf_seq_write(seq, &record, sizeof(record));
	return 0;
}

/* ---- Types ---- */

/* The compiler keeps a type's layout only if a symbol has it; internal/loader's test compares these with the decoder. */
const struct imans_file *imans_keep_file;
const struct imans_birth *imans_keep_birth;
const struct imans_death *imans_keep_death;
const struct imans_move *imans_keep_move;
const struct imans_write *imans_keep_write;
const struct imans_task *imans_keep_task;
const struct imans_id_maps *imans_keep_id_maps;

/* GPL: the helpers that read kernel memory and the kernel's digest ask for it. */
char LICENSE[] SEC("license") = "Dual BSD/GPL";
