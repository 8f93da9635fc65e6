/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * measured.h - what needs no event: content that is already in every list that wants it.
 *
 * The agent enters a key here after its entry is in the log, never before, and only where the version in the key is proof
 * of the content. The kernel side only looks. So a crash anywhere leaves either the record in the ring buffer, the entry in
 * the log, or an event that flows again.
 */
#ifndef IMANS_MEASURED_H
#define IMANS_MEASURED_H

/* Full: the agent's insert fails, it empties the map, and events simply flow once more. The other map likewise. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct imans_measured_content);
	__type(value, __u32);
} measured_contents SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct imans_measured_key);
	__type(value, __u32);
} measured_by_subject SEC(".maps");

/*
 * Keeps the loads before it before those after it. BPF has no such instruction before 6.14; x86 needs none, and elsewhere an atomic
 * operation that returns a value is a full barrier.
 */
static __always_inline void imans_read_barrier(void)
{
#ifdef __TARGET_ARCH_x86
	barrier();
#else
	__u64 word = 0;

	__sync_fetch_and_add(&word, 1);
#endif
}

/* Two contents of one slot take turns; the one that is not there is found in measured_contents. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1 << IMANS_SLOT_BITS);
	__type(key, __u32);
	__type(value, struct imans_measured_slot);
} measured_slots SEC(".maps");

/*
 * Whether the slot of an inode, which a policy's chain sees on a device as its own, has the inode's content of now. Only what the agent
 * finished before the look and began to replace after it counts. This is what a repeated exec costs, so each field is read as it is
 * compared, and no key is built.
 */
static __always_inline bool imans_is_in_slot(struct inode *real, bool typed, __u32 dev, __u32 seen_dev, __u64 policy, __u32 func)
{
	__u64 ino = IMANS_READ(typed, real, i_ino);
	__u32 index = (ino + (policy << 24) + func) * IMANS_SLOT_FACTOR >> (64 - IMANS_SLOT_BITS);
	volatile struct imans_measured_slot *slot = bpf_map_lookup_elem(&measured_slots, &index);
	bool versioned;
	__u64 sequence;

	if (!slot)
		return false;
	sequence = slot->sequence;
	imans_read_barrier();
	if ((sequence & 1) || slot->content.version.ino != ino || slot->content.policy != policy || slot->content.func != func ||
	    slot->content.version.dev != dev || slot->content.seen_dev != seen_dev ||
	    slot->content.version.change != imans_read_change(real, typed, &versioned) ||
	    slot->content.version.ctime != imans_read_ctime(real, typed) ||
	    slot->content.version.generation != IMANS_READ(typed, real, i_generation) ||
	    IMANS_READ(typed, real, i_writecount.counter) > 0 || slot->content.version.subvolume != imans_subvolume(real, typed))
		return false;
	imans_read_barrier();
	return slot->sequence == sequence;
}

static __always_inline bool imans_has_cap(const struct cred *cred, int cap)
{
	if (bpf_core_field_exists(struct kernel_cap_struct, cap))
		return ((struct cred___6_1 *)cred)->cap_effective.cap[cap >> 5] & (1u << (cap & 31));
	return cred->cap_effective.val & (1ull << cap);
}

static __always_inline __u32 imans_cap_flags(const struct cred *cred)
{
	return (imans_has_cap(cred, CAP_SETUID) ? IMANS_SETUID_CAP : 0) | (imans_has_cap(cred, CAP_SETGID) ? IMANS_SETGID_CAP : 0);
}

/* What stands for the function and the flags that a rule can see, in a key of contents whose chain names no id. */
static __always_inline __u32 imans_func_without_ids(__u32 func, __u32 flags)
{
	return func | ((flags & IMANS_REQPROT) | IMANS_IDS_IGNORED) << 8;
}

/* The same for an overlayfs inode. */
static __noinline bool imans_is_overlay_in_slot(struct inode *inode, __u32 seen_dev, __u64 policy, __u32 func)
{
	struct inode *real = imans_overlay_real(inode);

	if (!real)
		return false;
	if (bpf_rdonly_cast) {
		real = bpf_rdonly_cast(real, bpf_core_type_id_kernel(struct inode));
		return imans_is_in_slot(real, true, real->i_sb->s_dev, seen_dev, policy, func);
	}
	return imans_is_in_slot(real, false, BPF_CORE_READ(real, i_sb, s_dev), seen_dev, policy, func);
}

/* The same look as imans_is_measured, where it is cheapest: most contents that were measured are found here. */
static __always_inline bool imans_is_measured_in_slot(struct inode *inode, __u32 func, __u32 flags,
						      const struct imans_namespace_policy *policy)
{
	struct super_block *sb = inode->i_sb;
	__u32 dev = sb->s_dev;

	if (!(policy->flags & IMANS_IGNORE_IDS))
		return false;
	func = imans_func_without_ids(func, flags);
	if (sb->s_magic == OVERLAYFS_SUPER_MAGIC)
		return imans_is_overlay_in_slot(inode, dev, policy->generation, func);
	return imans_is_in_slot(inode, true, dev, dev, policy->generation, func);
}

/*
 * Whether the chain whose policy this is has measured the inode's content, or does not care for it. Nothing the rules can
 * see may be missing from the key, or one decision would be taken for another's. All but a look-up is plain loads. A function of its own: the
 * stacks of all that call one another have 512 bytes in all, and the key needs none once this is done.
 */
static __noinline bool imans_is_measured(struct task_struct *task, struct inode *inode, __u32 func, __u32 flags,
					      const struct imans_namespace_policy *policy)
{
	const struct cred *cred;
	struct imans_measured_key key;
	__u32 found;

	found = imans_read_version(inode, &key.content.version);
	if (found & (IMANS_WRITERS | IMANS_REAL_UNKNOWN))
		return false;
	key.content.policy = policy->generation;
	key.content.seen_dev = inode->i_sb->s_dev;
	if (policy->flags & IMANS_IGNORE_IDS) {
		key.content.func = imans_func_without_ids(func, flags);
		return bpf_map_lookup_elem(&measured_contents, &key.content);
	}
	cred = task->cred;
	key.content.func = func | ((flags & IMANS_REQPROT) | imans_cap_flags(cred)) << 8;
	key.uid = cred->uid.val;
	key.euid = cred->euid.val;
	key.suid = cred->suid.val;
	key.gid = cred->gid.val;
	key.egid = cred->egid.val;
	key.sgid = cred->sgid.val;
	return bpf_map_lookup_elem(&measured_by_subject, &key);
}

#endif
