/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * protect.bpf.c - keeps who is in a container from the agent, whatever capabilities it has (--protect).
 *
 *   task_alloc             what a protected process starts is protected
 *   task_kill              signals
 *   file_send_sigiotask    signals that a descriptor sends
 *   task_setrlimit         limits; going over that of processor time ends a process
 *   task_setscheduler      scheduler, processors, timer slack
 *   task_setnice           nice value
 *   task_setioprio         how soon its disk accesses are served
 *   ptrace_access_check    ptrace, /proc/PID and all else that asks for the same right
 *   inode_unlink, inode_rename
 *                          the pins
 *
 * In a container is who has another mount namespace than the host, or another user namespace. The host's root is not kept from
 * anything. A refusal is counted, and is EPERM.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>

struct fown_struct;
struct kernel_siginfo;
struct rlimit;

/* ---- Globals ---- */

/* Set before load: the inode number of the host's mount namespace, which no other can have while the machine runs. */
const volatile __u32 imans_host_mntns = 0;

/* Set before load: the folders whose pins stay. */
struct imans_folder {
	__u64 ino;
	__u32 dev; /* as in the kernel: major << 20 | minor */
	__u32 pad;
};
const volatile struct imans_folder imans_folders[2] = {};

/* A process that is protected, by its first thread. An entry goes with its process. */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} protected_processes SEC(".maps");

/* How many attempts were refused. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} refusals SEC(".maps");

static __always_inline bool imans_is_protected(struct task_struct *task)
{
	return bpf_task_storage_get(&protected_processes, task->group_leader, 0, 0);
}

/* Whether the task that runs is one to keep away. The agent itself may be in a container. */
static __always_inline bool imans_is_outsider(void)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();

	return (task->nsproxy->mnt_ns->ns.inum != imans_host_mntns || task->cred->user_ns->level) && !imans_is_protected(task);
}

static __always_inline int imans_refuse(void)
{
	__u32 zero = 0;
	__u64 *count = bpf_map_lookup_elem(&refusals, &zero);

	if (count)
		__sync_fetch_and_add(count, 1);
	return -EPERM;
}

/* ---- Processes ---- */

SEC("lsm/task_alloc")
int BPF_PROG(imans_task_alloc, struct task_struct *task, unsigned long clone_flags, int ret)
{
	struct task_struct *parent = (struct task_struct *)bpf_get_current_task_btf();

	if (!ret && !(clone_flags & CLONE_THREAD) && imans_is_protected(parent))
		bpf_task_storage_get(&protected_processes, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	return ret;
}

SEC("lsm/task_kill")
int BPF_PROG(imans_task_kill, struct task_struct *task, struct kernel_siginfo *info, int sig, const struct cred *cred, int ret)
{
	if (!ret && imans_is_protected(task) && imans_is_outsider())
		return imans_refuse();
	return ret;
}

/* Who has set the descriptor up is not known here; none of ours waits for such a signal. */
SEC("lsm/file_send_sigiotask")
int BPF_PROG(imans_file_send_sigiotask, struct task_struct *task, struct fown_struct *owner, int sig, int ret)
{
	if (!ret && imans_is_protected(task))
		return imans_refuse();
	return ret;
}

SEC("lsm/task_setrlimit")
int BPF_PROG(imans_task_setrlimit, struct task_struct *task, unsigned int resource, struct rlimit *limit, int ret)
{
	if (!ret && imans_is_protected(task) && imans_is_outsider())
		return imans_refuse();
	return ret;
}

SEC("lsm/task_setscheduler")
int BPF_PROG(imans_task_setscheduler, struct task_struct *task, int ret)
{
	if (!ret && imans_is_protected(task) && imans_is_outsider())
		return imans_refuse();
	return ret;
}

SEC("lsm/task_setnice")
int BPF_PROG(imans_task_setnice, struct task_struct *task, int nice, int ret)
{
	if (!ret && imans_is_protected(task) && imans_is_outsider())
		return imans_refuse();
	return ret;
}

SEC("lsm/task_setioprio")
int BPF_PROG(imans_task_setioprio, struct task_struct *task, int ioprio, int ret)
{
	if (!ret && imans_is_protected(task) && imans_is_outsider())
		return imans_refuse();
	return ret;
}

SEC("lsm/ptrace_access_check")
int BPF_PROG(imans_ptrace_access_check, struct task_struct *child, unsigned int mode, int ret)
{
	if (!ret && imans_is_protected(child) && imans_is_outsider())
		return imans_refuse();
	return ret;
}

/* ---- Pins ---- */

static __always_inline bool imans_is_kept(struct inode *folder)
{
	for (int i = 0; i < 2; i++) {
		if (folder->i_ino == imans_folders[i].ino && folder->i_sb->s_dev == imans_folders[i].dev)
			return true;
	}
	return false;
}

SEC("lsm/inode_unlink")
int BPF_PROG(imans_inode_unlink, struct inode *dir, struct dentry *dentry, int ret)
{
	if (!ret && imans_is_kept(dir) && imans_is_outsider())
		return imans_refuse();
	return ret;
}

/* What a pin is moved over is gone; so is a folder that is moved away, for who looks for it. */
SEC("lsm/inode_rename")
int BPF_PROG(imans_inode_rename, struct inode *old_dir, struct dentry *old_dentry, struct inode *new_dir, struct dentry *new_dentry, int ret)
{
	struct inode *moved = old_dentry->d_inode;

	if (!ret && (imans_is_kept(old_dir) || imans_is_kept(new_dir) || (moved && imans_is_kept(moved))) && imans_is_outsider())
		return imans_refuse();
	return ret;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
