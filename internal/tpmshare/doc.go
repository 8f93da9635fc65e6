// Package tpmshare lets the programs of a container use the container's TPM by TCP on its loopback device, while the agent
// extends it. It is for containers without /dev/tpmrm0: the kernel lacks the vTPM proxy driver, or the container was running
// already.
//
// Open makes the only connection to the TPM. TPM.Agent is the agent's way to it; it is a tpmext.Dialer. Listen makes a Server
// for one container's network namespace, Server.Run serves until its context ends, TPM.Close ends the connection.
//
// Clients find swtpm's protocol: bare commands and responses on 127.0.0.1:2321, and what is harmless of the control channel on
// 127.0.0.1:2322 (TPM2TOOLS_TCTI=swtpm:host=127.0.0.1,port=2321, which is also among what the TCG software stack tries by
// itself; for IBM's, and so for evmctl, TPM_INTERFACE_TYPE=socsim TPM_SERVER_TYPE=raw).
//
// # What it establishes
//
//   - One command at a time is with the TPM. The agent's come first, but after sixteen of them a client that waits has a turn;
//     among clients each has its turn. The agent waits for one command of a client's at most, with the loading and saving around it:
//     swtpm makes an RSA key in up to some seconds.
//   - A client is a process: the TCG software stack makes a new connection for each command, so a connection can't be. It sees
//     its own objects, by handles of its own, and its own sessions; others' do not exist for it. What it has is flushed when
//     the process ends. A session that it saved by TPM2_ContextSave belongs to whoever loads the context: programs started one
//     after another by a script pass a session on like that.
//   - Any number of clients, up to the bounds, have objects and sessions loaded, whatever few places the TPM has.
//   - Measured PCRs are extended and reset by the agent alone. Nothing that a client sends clears the TPM, restarts it, or
//     takes away what it is known by: see commands and rules.refuse. Commands that are not in the table are refused.
//   - What one client does to the protocol ends its own connection only.
//
// # What it does not
//
//   - PCRs that are not in Config.Measured are the clients', those of the boot aggregate (0 to 9) too if the caller leaves them
//     out.
//   - A client can spoil its own container's TPM within these bounds: fill its NV storage, change the owner's authorization
//     value, have dictionary attack protection lock keys that are under it, keep it busy.
//   - Objects and sessions come and go between a client's commands, so a session for exclusive audit loses that property, as
//     with the kernel's resource manager. TPM2_GetCapability of handles takes no session.
//   - Containers that have one network namespace, as those of a pod, have one TPM.
//
// Source: TCG TPM 2.0 Library, Parts 1 to 3; TCG TSS 2.0 TAB and Resource Manager Specification. For the behaviour that programs
// are used to: the kernel's drivers/char/tpm/tpm2-space.c.
package tpmshare
