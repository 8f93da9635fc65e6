package oci

import (
	"strings"
	"testing"
)

func TestParseArgs(t *testing.T) {
	at := func(command, id, dir string) Invocation {
		return Invocation{Command: command, ID: id, Bundle: Bundle{Dir: dir}}
	}
	logged := at("create", "c1", "/b")
	logged.Log, logged.LogJSON = "/l.json", true
	other := at("run", "c1", "/b")
	other.Bundle.Config = "other.json"
	for line, want := range map[string]Invocation{
		"create c1":               at("create", "c1", "."),
		"create --bundle /b c1":   at("create", "c1", "/b"),
		"create --bundle=/b c1":   at("create", "c1", "/b"),
		"create -b /b c1":         at("create", "c1", "/b"),
		"create -b=/b c1":         at("create", "c1", "/b"),
		"create -b/b c1":          at("create", "c1", "/b"),
		"create -bundle /b c1":    at("create", "c1", "/b"),
		"create c1 --bundle /b":   at("create", "c1", "/b"),
		"create --bundle /b -- x": at("create", "x", "/b"),
		"create --new=thing c1":   at("create", "c1", "."),
		"create --pid-file /p --console-socket /s --preserve-fds 3 --no-pivot -b /b c1": at("create", "c1", "/b"),
		"run -d --keep create":               at("run", "create", "."),
		"run -f other.json -b /b c1":         other,
		"restore --image-path /i -d c1":      at("restore", "c1", "."),
		"--root /r --debug create c1":        at("create", "c1", "."),
		"--root=/r --systemd-cgroup run c1":  at("run", "c1", "."),
		"--root create run c1":               at("run", "c1", "."),
		"delete --force c1":                  {Command: "delete", ID: "c1"},
		"delete -f c1":                       {Command: "delete", ID: "c1"},
		"delete --regex c.*":                 {},
		"state c1":                           {Command: "state"},
		"exec --bundle /b --what c1 sh -c x": {Command: "exec"},
		"--version":                          {},
		"create --help":                      {},
		"":                                   {},
		"--log /l.json --log-format json --root /r create -b /b c1": logged,
	} {
		if got, err := ParseArgs(strings.Fields(line)); err != nil || got != want {
			t.Errorf("%q: got %+v, %v, want %+v", line, got, err, want)
		}
	}
	for _, line := range []string{
		"create", "create a b", "create --bundle", "create --unknown c1", "--unknown create c1", "create -dk c1", "delete", "--root",
	} {
		if got, err := ParseArgs(strings.Fields(line)); err == nil {
			t.Errorf("%q: got %+v, want an error", line, got)
		}
	}
}
