/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * mntns.h - which mount namespace: identity that is never reused, and the table of those alive.
 *
 * A namespace's inode number is free for the next one as soon as it dies, so everything is keyed by the 64-bit id that
 * the kernel never gives twice: mnt_namespace.seq up to 6.17, ns_common.ns_id from 6.18.
 */
#ifndef IMANS_MNTNS_H
#define IMANS_MNTNS_H

/*
 * Every mount namespace that was seen and whose end the agent has not handled yet: until then it handles what ran in it. Full: the
 * namespace goes unregistered, which counts as a loss; its events still flow, because nothing about it can be found here.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, struct imans_mount_namespace);
} mount_namespaces SEC(".maps");

/* Inode number to unique id of those alive, because a death tells the number only. Full: as above. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, __u64);
} namespace_ids SEC(".maps");

/* Beyond its end a namespace is as one without policy: its events flow each time. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, IMANS_INUM_MAX);
	__type(key, __u32);
	__type(value, struct imans_namespace_policy);
} namespace_policies SEC(".maps");

static __always_inline __u64 imans_mntns_id(struct mnt_namespace *ns)
{
	if (bpf_core_field_exists(struct ns_common___6_18, ns_id))
		return ((struct ns_common___6_18 *)&ns->ns)->ns_id;
	return ((struct mnt_namespace___6_1 *)ns)->seq;
}

static __always_inline struct imans_namespace_policy *imans_mntns_policy(__u32 inum)
{
	__u32 index = inum - IMANS_FIRST_INUM;

	return bpf_map_lookup_elem(&namespace_policies, &index);
}

/* Registers a namespace; false if it was known. Losing a race with another CPU means it is known. */
static __always_inline bool imans_mntns_register(__u64 id, __u32 inum, __u64 parent, __u32 parent_inum)
{
	struct imans_mount_namespace entry = {
		.parent = parent, .inum = inum, .parent_inum = parent_inum,
	};
	/* int, not long: before 6.4 the upper half of what this helper returns is undefined (the call is made directly). */
	int err = bpf_map_update_elem(&mount_namespaces, &id, &entry, BPF_NOEXIST);

	if (!err)
		err = bpf_map_update_elem(&namespace_ids, &inum, &id, BPF_ANY);
	if (err && err != -17 /* EEXIST */)
		imans_lose(id, inum, IMANS_LOSS_NAMESPACE_MAP_FULL);
	return !err;
}

/* Ends the namespace of this inode number and returns its id; 0 if the number is not one of ours. */
static __always_inline __u64 imans_mntns_end(__u32 inum)
{
	__u64 *entry = bpf_map_lookup_elem(&namespace_ids, &inum);
	struct imans_namespace_policy *policy;
	__u64 id;

	if (!entry)
		return 0;
	id = *entry;
	policy = imans_mntns_policy(inum);
	if (policy)
		policy->mntns = 0;
	bpf_map_delete_elem(&namespace_ids, &inum);
	return id;
}

static __always_inline void imans_fill_id_ranges(struct imans_id_range *ranges, const struct uid_gid_map *map)
{
	for (int i = 0; i < IMANS_ID_RANGES; i++) {
		ranges[i].inside = map->extent[i].first;
		ranges[i].outside = map->extent[i].lower_first;
		ranges[i].count = map->extent[i].count;
	}
}

/* Tells how the current task's mount namespace's owner numbers ids. Lost: it is sent again with the next file. */
static __noinline int imans_submit_id_maps(__u64 id, __u32 inum)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct user_namespace *user_ns = task->nsproxy->mnt_ns->user_ns;
	struct imans_id_maps *record;

	if (!user_ns->level)
		return 0;
	record = bpf_ringbuf_reserve(&events, sizeof(*record), 0);
	if (!record)
		return 0;
	__builtin_memset(record, 0, sizeof(*record));
	imans_fill_header(&record->header, IMANS_ID_MAPS, id, inum);
	record->users = user_ns->uid_map.nr_extents;
	record->groups = user_ns->gid_map.nr_extents;
	if (record->users <= IMANS_ID_RANGES)
		imans_fill_id_ranges(record->uids, &user_ns->uid_map);
	if (record->groups <= IMANS_ID_RANGES)
		imans_fill_id_ranges(record->gids, &user_ns->gid_map);
	bpf_ringbuf_submit(record, imans_wake_flags());
	return 0;
}

#endif
