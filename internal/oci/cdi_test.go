package oci

import (
	"encoding/json"
	"reflect"
	"testing"
)

func TestCDI(t *testing.T) {
	spec, err := CDI("/usr/sbin/imans-agent", "/run/imans", Grant{Env: []string{"A=b"}, Mounts: []Mount{{Source: "/run/imans/fs", Destination: "/sys/kernel/security"}}})
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"cdiVersion": "0.5.0", "kind": "imans.dev/vtpm", "devices": [{"name": "auto", "containerEdits": {
		"env": ["A=b"],
		"hooks": [
			{"hookName": "createRuntime", "path": "/usr/sbin/imans-agent", "timeout": 60,
			 "args": ["imans-agent", "runtime-hook", "--ask", "--run-dir", "/run/imans", "createRuntime"]},
			{"hookName": "poststop", "path": "/usr/sbin/imans-agent", "timeout": 60,
			 "args": ["imans-agent", "runtime-hook", "--run-dir", "/run/imans", "poststop"]}],
		"mounts": [{"hostPath": "/run/imans/fs", "containerPath": "/sys/kernel/security", "type": "bind",
			"options": ["bind", "nosuid", "noexec", "nodev", "private"]}]}}]}`
	var got, expected any
	if err := json.Unmarshal(spec, &got); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(want), &expected); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, expected) {
		t.Errorf("got %s", spec)
	}
}
