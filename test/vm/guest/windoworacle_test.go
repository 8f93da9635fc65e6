//go:build vm

package guest

import (
	"os"
	"testing"
)

// The scripts that ask for nothing but measuring hold for the kernel's own IMA, too: what they expect is what it does. The
// file's name sorts behind those of all other tests: a policy once written stays until the machine is off.
func TestWindowZScriptsAndTheKernel(t *testing.T) {
	sample(t, "6.12")
	if err := os.WriteFile(kernelIMA+"policy", []byte(oraclePolicy()), 0o600); err != nil {
		t.Logf("the kernel has the policy already: %v", err) // by TestMainJobZOracle, and the same; else nothing is measured below
	}
	scripts := []string{"barrier", "remeasure"}
	if _, err := os.Stat(kernelIMA + "ascii_runtime_measurements_sha512"); err == nil && !short() { // since 6.10
		scripts = append(scripts, "tools")
	}
	for _, name := range scripts {
		t.Run(name, func(t *testing.T) {
			b := startUnshared(t, 1, "")
			// The files that only a namespace has are made up.
			b.sh(`mkdir -p /tmp/sec/ima && cd /tmp/sec && ln -s . integrity && echo 1 >ima/active && echo >ima/policy
ln -s /sys/kernel/security/ima/* ima 2>/dev/null
head -n 1 ima/ascii_runtime_measurements | cut -d ' ' -f 3 >ima/template_name`)
			b.script(t, name, "IMA=/tmp/sec/ima")
		})
	}
}
