package oci

import (
	"encoding/json"
	"fmt"
)

// Names of the hooks, as imans-agent runtime-hook takes them.
const (
	CreateRuntime = "createRuntime"
	Poststop      = "poststop"
)

// hookTimeout bounds, in seconds, how long a runtime waits for a hook of ours, which itself gives up long before.
const hookTimeout = 60

// AgentHooks are the hooks by which the agent at runDir learns of a container's life. program is this program; with required set,
// a container that the agent can't be told of is not created.
func AgentHooks(program, runDir string, required bool) Hooks {
	hook := func(stage string, required bool) []Hook {
		args := []string{"imans-agent", "runtime-hook", "--run-dir", runDir}
		if required {
			args = append(args, "--required")
		}
		return []Hook{{Path: program, Args: append(args, stage), Timeout: hookTimeout}}
	}
	return Hooks{CreateRuntime: hook(CreateRuntime, required), Poststop: hook(Poststop, false)}
}

// State is what a runtime tells a hook on its standard input. Source: the OCI runtime specification, runtime.md, State.
type State struct {
	ID     string `json:"id"`
	PID    int    `json:"pid"` // as the runtime's process namespace has it; 0 behind the container's end
	Bundle string `json:"bundle"`
}

// ParseState reads a state.
func ParseState(text []byte) (State, error) {
	var s State
	if err := json.Unmarshal(text, &s); err != nil {
		return s, fmt.Errorf("parse the state on standard input: %w; this command is for runtimes to run as a hook", err)
	}
	return s, CheckID(s.ID)
}
