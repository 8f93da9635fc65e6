/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * emit.h - handing a record over: reserve, fill, submit, and count each loss.
 *
 * The ring buffer is also the journal: the agent frees a record only after its entry is in the log, so records outlive the
 * agent's crash. The agent is woken for the first record after it went to sleep, then looks every few milliseconds (a
 * wake-up for each record costs an exec-heavy load half its speed).
 */
#ifndef IMANS_EMIT_H
#define IMANS_EMIT_H

/* Size set by the agent before load (--ring-size). Full: the record is lost and counted in losses. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16 << 20);
} events SEC(".maps");

/* Full: the loss is counted for the namespace id 0, which is the native one's concern, and for which the agent made room at load. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct imans_loss_key);
	__type(value, __u64);
} losses SEC(".maps");

/* One word each, to and from the agent while the programs run. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, IMANS_SETTINGS);
	__type(key, __u32);
	__type(value, __u32);
} settings SEC(".maps");

static __always_inline __u32 *imans_setting(__u32 which)
{
	return bpf_map_lookup_elem(&settings, &which);
}

static __u64 imans_sequence;

static __noinline int imans_lose(__u64 mntns, __u32 inum, __u32 reason)
{
	struct imans_loss_key key = { .mntns = mntns, .inum = inum, .reason = reason };
	__u64 one = 1, zero = 0, *count;
	__u32 *losses_ever = imans_setting(IMANS_LOSSES);

	bpf_map_update_elem(&losses, &key, &zero, BPF_NOEXIST);
	count = bpf_map_lookup_elem(&losses, &key);
	if (!count) {
		key.mntns = 0;
		key.inum = 0;
		bpf_map_update_elem(&losses, &key, &zero, BPF_NOEXIST);
		count = bpf_map_lookup_elem(&losses, &key);
	}
	if (count)
		__sync_fetch_and_add(count, one);
	if (losses_ever)
		__sync_fetch_and_add(losses_ever, 1);
	return 0;
}

/*
 * The flags to submit a record with. Call it once the record is reserved: the agent asks to be woken first and looks for
 * reserved records then, so that one of the two sees the other.
 */
static __always_inline __u64 imans_wake_flags(void)
{
	__u32 *wake = imans_setting(IMANS_WAKE);

	if (!wake || !*wake)
		return BPF_RB_NO_WAKEUP;
	*wake = 0;
	return BPF_RB_FORCE_WAKEUP;
}

static __always_inline void imans_fill_header(struct imans_header *header, __u32 kind, __u64 mntns, __u32 inum)
{
	header->kind = kind;
	header->inum = inum;
	header->mntns = mntns;
	header->boottime = bpf_ktime_get_boot_ns();
	header->sequence = __sync_fetch_and_add(&imans_sequence, 1);
}

static __always_inline void imans_fill_subject(struct imans_subject *subject, struct task_struct *task)
{
	const struct cred *cred = task->cred;

	subject->tgid = task->tgid;
	subject->pid = task->pid;
	subject->start_boottime = task->group_leader->start_boottime;
	subject->uid = cred->uid.val;
	subject->euid = cred->euid.val;
	subject->suid = cred->suid.val;
	subject->gid = cred->gid.val;
	subject->egid = cred->egid.val;
	subject->sgid = cred->sgid.val;
}

#endif
