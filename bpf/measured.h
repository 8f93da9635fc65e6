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

/* Full: the agent's insert fails, it empties the map, and events simply flow once more. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct imans_measured_key);
	__type(value, __u32);
} measured_contents SEC(".maps");

static __always_inline bool imans_has_cap(const struct cred *cred, int cap)
{
	if (bpf_core_field_exists(struct kernel_cap_struct, cap))
		return ((struct cred___6_1 *)cred)->cap_effective.cap[cap >> 5] & (1u << (cap & 31));
	return cred->cap_effective.val & (1ull << cap);
}

/* Fills the subject part of a key; returns the capability flags. */
static __always_inline __u32 imans_read_subject(const struct cred *cred, struct imans_measured_key *key)
{
	__u32 flags = 0;

	key->uid = cred->uid.val;
	key->euid = cred->euid.val;
	key->suid = cred->suid.val;
	key->gid = cred->gid.val;
	key->egid = cred->egid.val;
	key->sgid = cred->sgid.val;
	if (imans_has_cap(cred, CAP_SETUID))
		flags |= IMANS_SETUID_CAP;
	if (imans_has_cap(cred, CAP_SETGID))
		flags |= IMANS_SETGID_CAP;
	return flags;
}

/*
 * Builds the key of an event by the current task. Returns the record's flags. Nothing the rules can see may be missing
 * from the key, or one decision would be taken for another's.
 */
static __always_inline __u32 imans_build_key(struct task_struct *task, struct mnt_namespace *ns, struct inode *inode,
					     __u32 func, __u32 flags, struct imans_measured_key *key)
{
	struct imans_mount_namespace *known;
	__u64 policy = 0;
	__u32 ns_flags = 0;

	key->mntns = imans_mntns_id(ns);
	known = bpf_map_lookup_elem(&mount_namespaces, &key->mntns);
	if (known) {
		policy = known->policy;
		ns_flags = known->flags;
	}
	key->policy = policy;
	flags |= imans_read_content(inode, key);
	if (ns_flags & IMANS_IGNORE_IDS)
		flags |= IMANS_IDS_IGNORED;
	else
		flags |= imans_read_subject(task->cred, key);
	key->func = func | (flags & (IMANS_REQPROT | IMANS_SETUID_CAP | IMANS_SETGID_CAP)) << 8;
	return flags;
}

#endif
