/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * kernel.h - the few kernel structures and fields that the programs read.
 *
 * Written by hand instead of a generated vmlinux.h: what is not here is not read. CO-RE moves every field to where the
 * running kernel has it, so only names and types must agree. A name with ___suffix is a flavour: the same structure as
 * another kernel version has it; the suffix is dropped when the loader looks the structure up.
 */
#ifndef IMANS_KERNEL_H
#define IMANS_KERNEL_H

#include <stdbool.h>

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed int __s32;
typedef signed long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_RINGBUF = 27,
	BPF_MAP_TYPE_TASK_STORAGE = 29,
};

/* include/uapi/linux/bpf.h */
#define BPF_ANY 0
#define BPF_NOEXIST 1
#define BPF_F_NO_PREALLOC 1
#define BPF_F_MMAPABLE (1 << 10)
#define BPF_LOCAL_STORAGE_GET_F_CREATE 1
#define BPF_RB_NO_WAKEUP 1
#define BPF_RB_FORCE_WAKEUP 2
/* include/uapi/linux/magic.h */
#define TMPFS_MAGIC 0x01021994
#define HUGETLBFS_MAGIC 0x958458f6ul
#define OVERLAYFS_SUPER_MAGIC 0x794c7630
#define EXT4_SUPER_MAGIC 0xef53
#define XFS_SUPER_MAGIC 0x58465342
#define BTRFS_SUPER_MAGIC 0x9123683eul
#define F2FS_SUPER_MAGIC 0xf2f52010
#define SQUASHFS_MAGIC 0x73717368
#define EROFS_SUPER_MAGIC_V1 0xe0f5e1e2
/* include/uapi/asm-generic/mman-common.h */
#define PROT_EXEC 4
/* include/linux/mm.h, fs.h, stat.h */
#define VM_EXEC 4
#define SB_KERNMOUNT (1 << 22)
#define SB_I_VERSION (1 << 23)
#define S_IFMT 0170000
#define S_IFREG 0100000
/* include/uapi/linux/fcntl.h */
#define F_SEAL_WRITE 8
/* include/uapi/linux/capability.h */
#define CAP_SETGID 6
#define CAP_SETUID 7
/* include/uapi/linux/sched.h */
#define CLONE_THREAD 0x10000
/* include/uapi/asm-generic/errno-base.h, errno.h */
#define EPERM 1
#define ENAMETOOLONG 36
/* fs/inode.c: the kernel's own flag in a multigrain time's nanoseconds */
#define I_CTIME_QUERIED (1u << 31)

#define BPF_CORE __attribute__((preserve_access_index))

typedef struct {
	__u32 val;
} kuid_t;

typedef struct {
	__u32 val;
} kgid_t;

struct ns_common {
	__u32 inum;
} BPF_CORE;

struct uid_gid_extent {
	__u32 first;
	__u32 lower_first;
	__u32 count;
} BPF_CORE;

struct uid_gid_map {
	struct uid_gid_extent extent[5];
	__u32 nr_extents;
} BPF_CORE;

struct user_namespace {
	struct uid_gid_map uid_map;
	struct uid_gid_map gid_map;
	int level;
} BPF_CORE;

/* 6.18: the id moved from each namespace's own structure to the common part. */
struct ns_common___6_18 {
	__u64 ns_id;
} BPF_CORE;

struct mnt_namespace {
	struct ns_common ns;
	struct user_namespace *user_ns;
} BPF_CORE;

struct mnt_namespace___6_1 {
	__u64 seq;
} BPF_CORE;

struct nsproxy {
	struct mnt_namespace *mnt_ns;
} BPF_CORE;

/* 6.3 made one word of 64 bits, without a structure tag, of 6.1's two of 32. */
struct kernel_cap_word {
	__u64 val;
} BPF_CORE;

struct kernel_cap_struct {
	__u32 cap[2];
} BPF_CORE;

struct cred {
	kuid_t uid;
	kgid_t gid;
	kuid_t suid;
	kgid_t sgid;
	kuid_t euid;
	kgid_t egid;
	struct kernel_cap_word cap_effective;
	struct user_namespace *user_ns;
} BPF_CORE;

struct cred___6_1 {
	struct kernel_cap_struct cap_effective;
} BPF_CORE;

struct nameidata;

struct task_struct {
	struct nameidata *nameidata;
	int pid;
	int tgid;
	__u64 start_boottime;
	struct task_struct *group_leader;
	struct task_struct *real_parent;
	struct nsproxy *nsproxy;
	const struct cred *cred;
} BPF_CORE;

struct file_system_type {
	const char *name;
} BPF_CORE;

typedef struct {
	__u8 b[16];
} uuid_t;

struct super_block {
	__u32 s_dev;
	unsigned long s_flags;
	unsigned long s_magic;
	uuid_t s_uuid;
	struct file_system_type *s_type;
	const char *s_subtype;
} BPF_CORE;

typedef struct {
	int counter;
} atomic_t;

typedef struct {
	__s64 counter;
} atomic64_t;

struct timespec64 {
	__s64 tv_sec;
	long tv_nsec;
} BPF_CORE;

struct inode {
	__u16 i_mode;
	kuid_t i_uid;
	kgid_t i_gid;
	struct super_block *i_sb;
	unsigned long i_ino;
	__s64 i_size;
	atomic64_t i_version;
	atomic_t i_writecount;
	atomic_t i_readcount;
	__u32 i_generation;
	unsigned int i_nlink;
} BPF_CORE;

/* The change time's three shapes: 6.1, 6.6, 6.11. */
struct inode___6_1 {
	struct timespec64 i_ctime;
} BPF_CORE;

struct inode___6_6 {
	struct timespec64 __i_ctime;
} BPF_CORE;

struct inode___6_11 {
	__s64 i_ctime_sec;
	__u32 i_ctime_nsec;
} BPF_CORE;

struct hlist_bl_node {
	struct hlist_bl_node **pprev;
} BPF_CORE;

struct qstr {
	__u32 len;
	const unsigned char *name;
} BPF_CORE;

struct dentry {
	struct hlist_bl_node d_hash;
	struct dentry *d_parent;
	struct qstr d_name;
	struct inode *d_inode;
} BPF_CORE;

struct vfsmount;

struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
} BPF_CORE;

/* fs/namei.c: the path that a task is opening, among others. */
struct nameidata {
	struct path path;
} BPF_CORE;

struct file {
	struct path f_path;
	struct inode *f_inode;
} BPF_CORE;

struct linux_binprm {
	struct file *file;
} BPF_CORE;

struct vm_area_struct {
	unsigned long vm_start;
	unsigned long vm_end;
	unsigned long vm_flags;
	struct file *vm_file;
} BPF_CORE;

struct bpf_iter_meta {
	struct seq_file *seq;
} BPF_CORE;

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
} BPF_CORE;

/* include/linux/shmem_fs.h, hugetlb.h */
struct shmem_inode_info {
	unsigned int seals;
	struct inode vfs_inode;
} BPF_CORE;

struct hugetlbfs_inode_info {
	unsigned int seals;
	struct inode vfs_inode;
} BPF_CORE;

/* fs/btrfs/ctree.h, btrfs_inode.h: in the btrfs module's BTF where btrfs is a module. */
struct btrfs_key {
	__u64 objectid;
	__u64 offset;
} BPF_CORE;

struct btrfs_root {
	struct btrfs_key root_key;
} BPF_CORE;

struct btrfs_inode {
	struct btrfs_root *root;
	struct inode vfs_inode;
} BPF_CORE;

/* fs/overlayfs/ovl_entry.h: their types are in the overlay module's BTF where overlay is a module. */
struct ovl_path {
	struct dentry *dentry;
} BPF_CORE;

struct ovl_entry {
	unsigned int __numlower;
	struct ovl_path __lowerstack[0];
} BPF_CORE;

enum ovl_inode_flag {
	OVL_UPPERDATA = 3,
};

struct ovl_inode {
	unsigned long flags;
	struct inode vfs_inode;
	struct dentry *__upperdentry;
	struct ovl_entry *oe;
} BPF_CORE;

struct ovl_inode___6_1 {
	struct inode *lowerdata;
	unsigned long flags;
	struct inode vfs_inode;
	struct dentry *__upperdentry;
	struct ovl_path lowerpath;
} BPF_CORE;

#endif
