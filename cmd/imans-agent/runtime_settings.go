package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/syslog"
	"os"
	"path/filepath"
	"time"

	"imans.dev/imans-agent/internal/oci"
)

// defaultSettings is the wrapper's file. What starts containers gives it no options of ours.
const defaultSettings = "/etc/imans/runtime.json"

// What becomes of a container that the agent grants nothing.
const (
	onFailureContinue = "continue"
	onFailureFail     = "fail"
)

// runtimeSettings are the wrapper's.
type runtimeSettings struct {
	Runtime     string `json:"runtime"`                // program to become; none: runc
	RunDir      string `json:"run_dir"`                // folder with the agent's socket
	OnFailure   string `json:"on_failure"`             // continue or fail
	DefaultVTPM bool   `json:"default_vtpm"`           // for containers that say nothing of it
	WaitSeconds int    `json:"wait_seconds,omitempty"` // for the agent, which may have many vTPMs to make
}

// readSettings reads a file; the default one need not be there. Of a file that is wrong nothing is used, and containers are not
// created: it may be the one that says so.
func readSettings(path string) (runtimeSettings, error) {
	s := runtimeSettings{RunDir: defaultRunDir, OnFailure: onFailureContinue, DefaultVTPM: true, WaitSeconds: defaultWait}
	optional := path == ""
	if optional {
		path = defaultSettings
	}
	text, err := os.ReadFile(path)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return s, nil
	} else if err != nil {
		return s, fmt.Errorf("read the runtime's settings: %w; make the file or leave --settings out", err)
	}
	read := s
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&read); err != nil {
		return s, fmt.Errorf("parse %s: %w; see imans-agent runtime --help", path, err)
	}
	if read.OnFailure != onFailureContinue && read.OnFailure != onFailureFail {
		return s, fmt.Errorf(`%s: on_failure is %q: want "continue" or "fail"`, path, read.OnFailure)
	}
	if read.WaitSeconds < 1 {
		return s, fmt.Errorf("%s: wait_seconds is %d: want 1 or more", path, read.WaitSeconds)
	}
	if !filepath.IsAbs(read.RunDir) {
		return s, fmt.Errorf("%s: run_dir is %q: want an absolute path", path, read.RunDir)
	}
	return read, nil
}

// runtimeLog writes where the runtime itself does: standard error may be the container's. Managers throw that log away, so
// warnings go to the system's log, too.
type runtimeLog struct{ inv oci.Invocation }

func (l runtimeLog) warn(text string) {
	if w, err := syslog.New(syslog.LOG_WARNING|syslog.LOG_DAEMON, "imans-agent"); err == nil {
		w.Warning(text)
		w.Close()
	}
	if !l.write("warning", text) {
		fmt.Fprintln(os.Stderr, "imans-agent: "+text)
	}
}

// fail leaves an error where managers look for what to tell their users.
func (l runtimeLog) fail(err error) { l.write("error", "imans-agent: "+err.Error()) }

// write reports whether the line is in the runtime's log.
func (l runtimeLog) write(level, text string) bool {
	if l.inv.Log == "" {
		return false
	}
	f, err := os.OpenFile(l.inv.Log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return false
	}
	defer f.Close()
	now := time.Now().Format(time.RFC3339)
	line := fmt.Sprintf("time=%q level=%s msg=%q\n", now, level, text)
	if l.inv.LogJSON {
		b, err := json.Marshal(map[string]string{"time": now, "level": level, "msg": text})
		if err != nil {
			return false
		}
		line = string(b) + "\n"
	}
	_, err = f.WriteString(line)
	return err == nil
}
