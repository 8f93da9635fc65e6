/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * event.h - what crosses from the kernel to the agent: ring buffer records and map entries.
 *
 * internal/event decodes these bytes by explicit offsets; a test there compares every offset with the BTF of the
 * compiled object. All numbers are in the machine's byte order; padding is explicit and always zero.
 */
#ifndef IMANS_EVENT_H
#define IMANS_EVENT_H

#define IMANS_PATH_MAX 4096 /* PATH_MAX */
#define IMANS_SHORT_PATH 512
#define IMANS_FS_NAME_MAX 32
#define IMANS_DIGEST_MAX 64 /* IMA_MAX_DIGEST_SIZE */
#define IMANS_ANCESTORS 8
#define IMANS_ID_RANGES 5

enum imans_kind {
	IMANS_FILE = 1,
	IMANS_BIRTH = 2,
	IMANS_DEATH = 3,
	IMANS_MOVE = 4,
	IMANS_ID_MAPS = 5,
	IMANS_WRITE = 6,
};

/* The function, as internal/ima numbers it: enum ima_hooks of security/integrity/ima/ima.h from 0 = NONE. */
enum imans_func {
	IMANS_MMAP_CHECK = 2,
	IMANS_BPRM_CHECK = 4,
};

enum imans_flag {
	IMANS_REQPROT = 1 << 0,      /* the caller itself asked for PROT_EXEC: MMAP_CHECK_REQPROT too */
	IMANS_MPROTECT = 1 << 1,     /* from file_mprotect: no path, vma_start and vma_end instead */
	IMANS_UNLINKED = 1 << 2,     /* the name is gone: the path ends in " (deleted)" */
	IMANS_WRITERS = 1 << 3,      /* someone had it open for writing before or after hashing, or may write to it in memory */
	IMANS_CHANGED = 1 << 4,      /* the version moved while the kernel hashed */
	IMANS_VERSIONED = 1 << 5,    /* the file system keeps i_version */
	IMANS_OVERLAY = 1 << 6,      /* content is that of an overlayfs file's real inode */
	IMANS_NAME_ONLY = 1 << 7,    /* no path could be built: the path field is the last component */
	IMANS_FS_NAME_CUT = 1 << 8,  /* a file system name or subtype did not fit */
	IMANS_REAL_UNKNOWN = 1 << 9, /* an overlayfs file whose real inode could not be found, or one of btrfs whose subvolume could not */
	IMANS_SETUID_CAP = 1 << 10,  /* CAP_SETUID is effective: euid rules look at suid and uid too */
	IMANS_SETGID_CAP = 1 << 11,
	IMANS_IDS_IGNORED = 1 << 12, /* the key holds no ids, as no rule of the chain names one */
};

/* Which version of which real inode's bytes. 40 bytes. */
struct imans_version {
	__u64 ino;
	__u64 change; /* i_version without its QUERIED bit; the size where the file system keeps none */
	__u64 ctime;  /* change time: seconds since 1970 << 30 | nanoseconds */
	__u64 subvolume; /* of btrfs: its root's number << 32 | the transaction that made it a snapshot; 0 elsewhere */
	__u32 dev;    /* the kernel's dev_t: major << 20 | minor */
	__u32 generation;
};

/* Which content. 80 bytes. */
struct imans_content {
	struct imans_version version;
	__u64 size;
	__u32 nlink;
	__u32 writes; /* how often it was opened for writing since it is held, by then */
	__u64 fs_magic; /* of the file system that holds the real inode */
	__u8 fs_uuid[16];
};

/* Who: the process and the ids that rules can name, as the initial user namespace numbers them. 40 bytes. */
struct imans_subject {
	__u32 tgid;
	__u32 pid;
	__u64 start_boottime; /* ns; with tgid it names a process for good */
	__u32 uid, euid, suid;
	__u32 gid, egid, sgid;
};

/* Every record begins so. 32 bytes. */
struct imans_header {
	__u32 kind; /* enum imans_kind */
	__u32 inum; /* of the mount namespace concerned */
	__u64 mntns; /* its unique id */
	__u64 boottime; /* ns since boot, suspend included */
	__u64 sequence; /* per boot and program set, no gaps but those of lost records */
};

/* The kernel's digest, or why there is none. 72 bytes. */
struct imans_digest {
	__s32 algo; /* enum hash_algo, or a negative errno of bpf_ima_file_hash */
	__u32 pad;
	__u8 sum[IMANS_DIGEST_MAX];
};

/* Followed by path_len bytes of path, without a final zero. 368 bytes. */
struct imans_file {
	struct imans_header header;
	struct imans_subject subject;
	struct imans_content content;
	__u64 policy; /* generation of the chain's policies that the event was filtered by; 0: none known */
	__u64 seen_ino; /* inode number and device of the file as opened (overlayfs: its own inode) */
	__u64 seen_magic;
	__u8 seen_uuid[16];
	__u32 seen_dev;
	__u32 fowner, fgroup;
	__u32 func;
	__u32 flags;
	__u32 path_len;
	__u64 vma_start, vma_end;
	struct imans_digest digest;
	char fs_name[IMANS_FS_NAME_MAX];
	char fs_subtype[IMANS_FS_NAME_MAX];
};

/* An inode, for as long as it is in memory; an overlayfs inode's generation is 0. 16 bytes. */
struct imans_inode {
	__u64 ino;
	__u32 dev;
	__u32 generation;
};

/* A held inode that someone has open for reading is about to be opened for writing: what was measured may be changed now. 88 bytes. */
struct imans_write {
	struct imans_header header; /* the writer's namespace */
	struct imans_subject subject;
	struct imans_inode inode;
};

/* held_inodes: the inode's content was sent to be measured. 16 bytes. */
struct imans_hold {
	__u64 boottime; /* of the last time, ns */
	__u32 told;     /* a writer was told of since then */
	__u32 writes;   /* how often it was opened for writing since the first time; goes round */
};

/* A mount namespace came to be, or was first met (parent 0: not known). 80 bytes. */
struct imans_birth {
	struct imans_header header;
	__u64 parent;
	__u32 parent_inum;
	__u32 tgid; /* of its creator */
	__u32 ancestors[IMANS_ANCESTORS]; /* tgids of the creator's parent, its parent and so on; 0 beyond the first process */
};

/* UID_GID_MAP_MAX_BASE_EXTENTS: what the kernel keeps in the map itself. 12 bytes. */
struct imans_id_range {
	__u32 inside, outside, count;
};

/*
 * How the user namespace that owns header.mntns numbers ids, where that is not the initial one. Sent before a namespace's
 * file records until the agent says that it knows. A map of more ranges than fit is told by its count only. 160 bytes.
 */
struct imans_id_maps {
	struct imans_header header;
	__u32 users, groups; /* ranges; 0: not written yet */
	struct imans_id_range uids[IMANS_ID_RANGES];
	struct imans_id_range gids[IMANS_ID_RANGES];
};

/* A mount namespace is gone. */
struct imans_death {
	struct imans_header header;
};

/* A process entered header.mntns by setns or unshare. 56 bytes. */
struct imans_move {
	struct imans_header header;
	__u64 from;
	__u32 from_inum;
	__u32 tgid;
	__u64 start_boottime;
};

/*
 * measured_contents: a chain of policies has seen this content, and every list that wants it holds it. The version is part
 * of the key, so a newer version is simply another key. 56 bytes: each one counts, since the key is hashed at every exec.
 */
struct imans_measured_content {
	__u64 policy; /* its generation names the namespace too: none is given twice */
	struct imans_version version;
	__u32 seen_dev; /* rules see the overlay's own magic, name and owner */
	__u32 func;     /* func and, shifted left by 8, the flags that a rule can see, IMANS_IDS_IGNORED too */
};

/*
 * measured_slots: what measured_contents holds, once more where a look costs no hashing. Written by the agent alone, in memory
 * shared with it: the sequence is odd while it writes, and never the same for two contents. 64 bytes, a cache line.
 */
struct imans_measured_slot {
	__u64 sequence;
	struct imans_measured_content content;
};

#define IMANS_SLOT_BITS 12
#define IMANS_SLOT_FACTOR 0x9e3779b97f4a7c15ull /* 2^64 divided by the golden ratio */

/* measured_by_subject: the same, for chains with a rule that names an id. 80 bytes. */
struct imans_measured_key {
	struct imans_measured_content content;
	__u32 uid, euid, suid;
	__u32 gid, egid, sgid;
};

/* mount_namespaces, by unique id. 16 bytes. */
struct imans_mount_namespace {
	__u64 parent;
	__u32 inum;
	__u32 parent_inum;
};

/*
 * namespace_policies, by inode number less IMANS_FIRST_INUM; written by the agent, zeroed by the kernel side when the
 * namespace is gone. The id is last, as the agent's write goes upwards: who sees it sees what stands before it. 24 bytes.
 */
struct imans_namespace_policy {
	__u64 generation; /* of the policies of this namespace and all its ancestors */
	__u32 flags;      /* enum imans_namespace_policy_flag */
	__u32 pad;
	__u64 mntns;
};

enum imans_namespace_policy_flag {
	IMANS_IGNORE_IDS = 1 << 0, /* no rule of the chain names an id */
	IMANS_KNOWN_IDS = 1 << 1,  /* the agent has the id maps, which are written only once */
};

/* The kernel numbers namespaces densely from PROC_DYNAMIC_FIRST, 0xf0000000; the first ones of 6.18 stand just below. */
#define IMANS_FIRST_INUM 0xefffff00u
#define IMANS_INUM_MAX 131072

/* What the agent tells the running programs: the entries of settings. */
enum imans_setting {
	/*
	 * Ask the kernel for no digest of a file that may change where its own IMA does not notice: below overlayfs, or on a server. Once a
	 * policy is loaded, IMA answers bpf_ima_file_hash from its cache.
	 */
	IMANS_DISTRUST_CACHE = 0,
	IMANS_WAKE = 1, /* the agent sleeps: wake it for the next record, and clear this */
	IMANS_HOLD_ALL = 2, /* held_inodes was full: every inode counts as held. The agent makes room, and clears this */
	IMANS_LOSSES = 3,	  /* how often something was added to losses, modulo 2^32 */
	/* How many skipped runs of programs others stood in for, likewise; one word for each enum imans_function (standin.h). */
	IMANS_STAND_INS = 4,
	IMANS_SETTINGS = 8,
};

/* losses: how many events of a namespace could not be handed over, by reason (loss.json). */
struct imans_loss_key {
	__u64 mntns;
	__u32 inum;
	__u32 reason; /* enum imans_loss */
};

/* What iter/task writes, once a task. 40 bytes. */
struct imans_task {
	__u64 mntns;
	__u64 parent_mntns; /* of the task's parent; 0: none */
	__u64 start_boottime;
	__u32 inum;
	__u32 parent_inum;
	__u32 tgid;
	__u32 pid;
};

#endif
