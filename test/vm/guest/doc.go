// Package guest holds the tests that run as root in a machine with a stock kernel (build tag vm): run them with
// make test-vm. A test finds the agent and the probe programs in PATH, the kernel's series in IMANS_VM_KERNEL, and an
// emulated hardware TPM at /dev/tpmrm0; what it leaves in /host reaches the host. The machine is new for each run and
// nothing that a test changes outlives it.
package guest
