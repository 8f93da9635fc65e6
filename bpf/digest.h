/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * digest.h - the kernel's digest of a file as it is now, before a byte of it runs; asked for once while the content stays.
 */
#ifndef IMANS_DIGEST_H
#define IMANS_DIGEST_H

/*
 * What the kernel hashed lately: an exec and the mappings that follow it, and other namespaces' of the same layer, need not
 * hash again. Only where an unchanged version proves unchanged content. Full: the least recently used goes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct imans_version);
	__type(value, struct imans_digest);
} recent_digests SEC(".maps");

/* File systems of this kernel's own that move a file's change time with its content. */
static __always_inline bool imans_keeps_time(__u64 magic)
{
	return magic == EXT4_SUPER_MAGIC || magic == XFS_SUPER_MAGIC || magic == BTRFS_SUPER_MAGIC || magic == F2FS_SUPER_MAGIC ||
	       magic == SQUASHFS_MAGIC || magic == EROFS_SUPER_MAGIC_V1;
}

/* Whether the kernel's IMA, once it has a policy, notices each change of a file before it answers from its cache. On tmpfs it misses stores to a mapping. */
static __always_inline bool imans_is_noticed(__u64 magic, __u32 flags)
{
	return !(flags & IMANS_OVERLAY) && imans_keeps_time(magic);
}

/*
 * Whether a change from now on must move the version: the change time is older than its clock's step can hide. TAI is ahead
 * of the time of day by the leap seconds, 37 by now; 60 s leave room for those and for a clock that is being corrected.
 */
static __always_inline bool imans_is_settled(const struct imans_version *version)
{
	return (__s64)(bpf_ktime_get_tai_ns() / 1000000000) - ((__s64)version->ctime >> 30) > 60;
}

/*
 * Fills the digest of the file whose content and flags are given, and returns more flags. It sleeps, so only sleepable hooks may call it, and never with
 * a record reserved: a slow file would hold up everyone's records. A version that moves without a writer need not be a change of the content: xfs
 * counts those of the access time, which the kernel's own reading is. What the file is then is hashed anew, once. The version read again afterwards
 * tells whether the content stood still.
 */
static __noinline __u32 imans_take_digest(struct file *file, struct imans_content *content, __u32 flags, struct imans_digest *digest)
{
	bool provable = !(flags & (IMANS_WRITERS | IMANS_REAL_UNKNOWN)) && imans_keeps_time(content->fs_magic);
	__u32 *distrust = imans_setting(IMANS_DISTRUST_CACHE);
	struct imans_version after = {};
	struct imans_digest *recent;

	digest->algo = -95; /* EOPNOTSUPP */
	if (!imans_kernel_digest || !distrust || (*distrust && !imans_is_noticed(content->fs_magic, flags)))
		return 0;
	if (provable) {
		recent = bpf_map_lookup_elem(&recent_digests, &content->version);
		if (recent) {
			__builtin_memcpy(digest, recent, sizeof(*digest));
			return 0;
		}
	}
	for (int try = 0; try < 2; try++) {
		digest->algo = bpf_ima_file_hash(file, digest->sum, sizeof(digest->sum));
		flags = imans_read_version(file->f_inode, &after) & IMANS_WRITERS;
		if (imans_same_version(&content->version, &after))
			break;
		flags |= IMANS_CHANGED;
		if (flags != IMANS_CHANGED)
			break;
		__builtin_memcpy(&content->version, &after, sizeof(after));
		imans_fill_content(file->f_inode, content);
	}
	if (provable && !flags && digest->algo >= 0 && imans_is_settled(&content->version))
		bpf_map_update_elem(&recent_digests, &content->version, digest, BPF_ANY);
	return flags;
}

#endif
