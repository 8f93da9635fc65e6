package oci

import (
	"fmt"
	"slices"
	"strings"
)

// Invocation is what a command line of an OCI runtime is about.
type Invocation struct {
	Command string // create, run, restore, delete or another; none if there is none
	ID      string // of create, run, restore and delete
	Bundle  Bundle // of create, run and restore; its folder is "." if the command line has none

	Log     string // file of the runtime's own log; none: standard error
	LogJSON bool   // each line of it is an object
}

// Options that take a value, of runc and crun. Source: their --help, runc 1.1 to 1.4, crun 1.8 to 1.25. Those of the runtime
// itself come before the command.
var (
	runtimeValues = []string{"cgroup-manager", "criu", "log", "log-format", "log-level", "root", "rootless"}
	runtimeBools  = []string{"debug", "help", "h", "?", "systemd-cgroup", "usage", "version", "v", "V"}
	commandValues = []string{
		"b", "bundle", "config", "console-socket", "empty-ns", "f", "image-path", "lsm-mount-context", "lsm-profile",
		"manage-cgroups-mode", "parent-path", "pid-file", "pidfd-socket", "preserve-fds", "work-path",
	}
	commandBools = []string{
		"?", "auto-dedup", "d", "detach", "ext-unix-sk", "file-locks", "h", "help", "keep", "lazy-pages", "no-new-keyring",
		"no-pivot", "no-subreaper", "shell-job", "tcp-close", "tcp-established", "usage",
	}
	deleteBools = []string{"?", "f", "force", "h", "help", "r", "regex", "usage"}
)

// ParseArgs reads the command line of a runtime, without the program's name. A command line that it can't be sure of is an error:
// it may be right for a runtime that has other options, and is to be handed on as it is.
func ParseArgs(args []string) (Invocation, error) {
	var inv Invocation
	rest, err := options(args, runtimeValues, runtimeBools, true, func(name, value string) {
		switch name {
		case "log":
			inv.Log = value
		case "log-format":
			inv.LogJSON = value == "json"
		}
	})
	if err != nil {
		return inv, err
	}
	if len(rest) == 0 {
		return inv, nil
	}
	inv.Command, args = rest[0], rest[1:]
	helped, regex := false, false
	seen := func(name, value string) {
		switch name {
		case "b", "bundle":
			inv.Bundle.Dir = value
		case "f", "config":
			inv.Bundle.Config = value
		case "?", "h", "help", "usage":
			helped = true
		case "r", "regex":
			regex = true
		}
	}
	switch inv.Command {
	case "create", "run", "restore":
		inv.Bundle.Dir = "."
		rest, err = options(args, commandValues, commandBools, false, seen)
	case "delete":
		rest, err = options(args, nil, deleteBools, false, seen)
		inv.Bundle.Config = ""
	default:
		return inv, nil
	}
	switch {
	case err != nil:
		return inv, err
	case helped || regex: // nothing is created, or who is meant is the runtime's to say
		return Invocation{Log: inv.Log, LogJSON: inv.LogJSON}, nil
	case len(rest) != 1:
		return inv, fmt.Errorf("%s takes one container id, and here are %d", inv.Command, len(rest))
	}
	inv.ID = rest[0]
	return inv, nil
}

// options hands the options of a command line to seen, and returns what is left: the positional arguments, or with first set
// everything from the first of them on.
func options(args, values, bools []string, first bool, seen func(name, value string)) ([]string, error) {
	var left []string
	for i := 0; i < len(args); i++ {
		arg := args[i]
		switch {
		case arg == "--":
			return append(left, args[i+1:]...), nil
		case len(arg) < 2 || arg[0] != '-':
			if first {
				return args[i:], nil
			}
			left = append(left, arg)
			continue
		}
		name, value, has := strings.Cut(strings.TrimPrefix(arg[1:], "-"), "=")
		switch {
		case has && slices.Contains(values, name) || slices.Contains(bools, name):
			seen(name, value)
		case slices.Contains(values, name):
			if i++; i == len(args) {
				return nil, fmt.Errorf("option %s has no value", arg)
			}
			seen(name, args[i])
		case has && strings.HasPrefix(arg, "--"): // whatever it is, its value is with it
		case arg[1] != '-' && slices.Contains(values, arg[1:2]): // -bDIR
			seen(arg[1:2], arg[2:])
		default:
			return nil, fmt.Errorf("option %s is not known; it may take a value or not", arg)
		}
	}
	return left, nil
}
