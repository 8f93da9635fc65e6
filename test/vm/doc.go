// Package vm boots stock Debian kernels under QEMU and runs programs in them as root.
//
// A machine has an emulated hardware TPM (swtpm), a Debian root disk whose changes are thrown away, and two folders of
// the host: /payload (read only: programs and test binaries) and /host (the share: what the run leaves behind). The
// program's output is streamed while it runs, its exit status comes back through the share, and a kernel that panics or
// hangs is a *CrashError with the end of the console.
//
// Order of calls: Missing tells what the host lacks; OpenCache; Cache.Prepare builds or finds a kernel and the root disk;
// BuildPayload compiles what the guest runs; Image.Run boots, runs and powers off. The commands vmrun and vmtest beside
// this package are thin layers over it.
//
// Everything built is kept in the cache, keyed by a hash of its recipe. An entry is made in a folder of another name and
// renamed when complete, under a lock of its own, so that any number of runs may share one cache and a killed build
// leaves nothing that looks whole.
//
// KVM is used where QEMU can start a processor with it, else QEMU's own translator (TCG). Only amd64 hosts are supported.
package vm
