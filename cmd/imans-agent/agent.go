package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"imans.dev/imans-agent/internal/agent"
)

const (
	defaultStateDir = "/var/lib/imans"
	defaultRunDir   = "/run/imans"
	defaultPinDir   = "/sys/fs/bpf/imans"
	defaultTPM      = "/dev/tpmrm0"
)

// newAgent is the root command: without a subcommand it runs the agent.
func newAgent() *cobra.Command {
	var c agent.Config
	var logLevel string
	var ring uint32
	cmd := &cobra.Command{
		Use:   "imans-agent --policy FILE",
		Short: "an IMA for every mount namespace, on a stock kernel",
		Long: `imans-agent gives every mount namespace its own IMA: a policy, a measurement list, a vTPM.

It runs until it gets SIGTERM. The kernel side and the vTPMs go on working meanwhile, and the next
start takes over where this one stopped; imans-agent unload takes them out.`,
		Example: `  imans-agent --policy exec                       measure programs and executable mappings
  imans-agent --policy /etc/imans/policy --pcr 11  the native list in PCR 11
  imans-agent --policy exec --tpm swtpm           no TPM in the machine: one in software, as honest as the host
  imans-agent --policy exec --namespaces containers --nri /var/run/nri/nri.sock
                                                  Kubernetes' containers get the vTPMs they ask for
  imans-agent ns                                  the namespaces and their lists`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if c.Policy == "" {
				return usageError{errors.New("--policy FILE is missing; --policy exec measures programs and executable mappings")}
			}
			if ring < 4 || ring > 1<<20 || ring&(ring-1) != 0 {
				return usageError{fmt.Errorf("--ring-size %d: want a power of two from 4 to 1048576, in KiB", ring)}
			}
			c.RingSize = ring << 10
			log, err := newLogger(cmd.ErrOrStderr(), logLevel)
			if err != nil {
				return usageError{err}
			}
			return agent.Run(cmd.Context(), c, log)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Policy, "policy", "", "policy of the native namespace: a file, or a built-in one by name (exec)")
	f.StringVar(&c.NSPolicy, "ns-policy", "", "policy that new namespaces start with (default: that of --policy)")
	f.StringVar(&c.StateDir, "state-dir", defaultStateDir, "folder for lists and vTPM state")
	f.StringVar(&c.RunDir, "run-dir", defaultRunDir, "folder for sockets")
	f.StringVar(&c.PinDir, "pin-dir", defaultPinDir, "folder on a bpffs for the kernel side's pins")
	f.StringVar(&c.TPM, "tpm", defaultTPM, "TPM of the native list: a device, unix:PATH, tcp:HOST:PORT, swtpm (the agent's own), or none")
	f.IntVar(&c.PCR, "pcr", 10, "PCR of the native list; not one that the kernel's own IMA extends")
	f.StringVar(&c.NSTPM, "ns-tpm", "swtpm", "TPMs of the other namespaces: swtpm or none")
	f.StringVar(&c.Swtpm, "swtpm", "swtpm", "the swtpm program")
	f.StringVar(&c.SwtpmUser, "swtpm-user", "", "user that all vTPMs run as, a name or a number (default: each as one of its own, by a number that nothing else has)")
	f.IntVar(&c.Pool, "vtpm-pool", 0, "how many vTPMs to keep ready for containers; without, each is made when it is asked for")
	f.StringVar(&c.PolicyDir, "policy-dir", "/etc/imans/policies", "folder of the policies that containers may name")
	f.StringVar(&c.NRI.Socket, "nri", agent.NoNRI, "containerd's or CRI-O's NRI socket, such as /var/run/nri/nri.sock: Kubernetes' containers that ask for a vTPM get it")
	f.StringArrayVar(&c.NRI.Namespaces, "nri-namespace", nil, "pod namespace whose containers get a vTPM without asking; may be repeated")
	f.StringArrayVar(&c.NRI.Labels, "nri-label", nil, "NAME=VALUE of pods whose containers get a vTPM without asking; may be repeated")
	f.BoolVar(&c.NRI.Required, "nri-required", false, "containers that are to get a vTPM fail without it; else they go on")
	f.StringVar(&c.Gate.Mode, "gate", "exec", "what waits in containers with a vTPM until it is measured and extended: off, exec (programs), all (what may be mapped, too), or one of exec-closed and all-closed: see --gate-closed")
	f.DurationVar(&c.Gate.Timeout, "gate-timeout", 5*time.Second, "how long it waits at most; then it is used, and a violation says so")
	f.BoolVar(&c.Gate.Closed, "gate-closed", false, "every gate is closed: what was not measured by then may not be used, and nothing may that needs an answer while the agent is down")
	f.BoolVar(&c.Protect, "protect", false, "let the kernel refuse who is in a container signals, limits, scheduling and ptrace to the agent and its vTPMs, and the removal of its pins")
	f.BoolVar(&c.Confine, "confine", true, "give up the capabilities and the system calls that a running agent does not need")
	f.IntVar(&c.Nice, "nice", -10, "how soon the agent runs among others, from -20 to 19, the latest; 0 is as any program")
	f.IntVar(&c.OOMAdj, "oom-score-adj", -999, "whom the kernel ends when memory runs out, from -1000, never the agent and its vTPMs, to 1000, they first")
	f.StringVar(&c.Digest, "digest", "auto", "who hashes files: kernel, agent, or auto (kernel where it can)")
	f.StringVar(&c.Template, "template", "ima-ng", "template of entries, as IMA's ima_template")
	f.StringVar(&c.Hash, "hash", "sha256", "hash of files, as IMA's ima_hash")
	f.StringVar(&c.Mode, "namespaces", "all", "which mount namespaces become IMA namespaces: all, newns (asked for), lazy (when given a policy) or containers")
	f.StringVar(&c.Archive, "archive", "", "folder for the lists of namespaces that end; without it they go")
	f.IntVar(&c.MaxRules, "max-rules", 1024, "rules that a namespace may have")
	f.Uint32Var(&ring, "ring-size", 16<<10, "size of the event buffer in KiB, a power of two")
	f.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	return cmd
}

// newLogger writes one JSON object a line.
func newLogger(w io.Writer, level string) (*zap.Logger, error) {
	l, err := zapcore.ParseLevel(level)
	if err != nil {
		return nil, fmt.Errorf("--log-level: %w; want debug, info, warn or error", err)
	}
	encoding := zap.NewProductionEncoderConfig()
	encoding.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	return zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(encoding), zapcore.Lock(zapcore.AddSync(w)), l)), nil
}
