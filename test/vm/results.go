package vm

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
)

const (
	// frame precedes each line that the testing package itself writes, when asked for with -test.v=test2json.
	frame = 0x16
	// nameMark says which test the next lines are of; for programs, not for people.
	nameMark = "=== NAME "
	// suiteMark and exitMark are lines of our own around each suite.
	suiteMark = "=== SUITE "
	exitMark  = "=== EXIT "
)

// Results counts the top-level tests of one machine. Names are "SUITE.TEST".
type Results struct {
	Passed, Failed, Skipped []string
}

// Add appends the tests of other.
func (r *Results) Add(other Results) {
	r.Passed = append(r.Passed, other.Passed...)
	r.Failed = append(r.Failed, other.Failed...)
	r.Skipped = append(r.Skipped, other.Skipped...)
}

// ResultWriter reads the output of Payload.Script as it is written to it, and hands it on, line by line and without
// framing, with a prefix. It is not safe for concurrent use.
type ResultWriter struct {
	out     io.Writer
	prefix  string
	line    []byte
	suite   string
	started []string
	results Results
}

// NewResultWriter hands lines on to out.
func NewResultWriter(out io.Writer, prefix string) *ResultWriter {
	return &ResultWriter{out: out, prefix: prefix}
}

// Write takes a piece of output.
func (w *ResultWriter) Write(p []byte) (int, error) {
	for n, b := range p {
		var err error
		switch {
		case b == '\n':
			err = w.endLine()
		case b == frame && len(w.line) > 0:
			err = w.endLine()
			w.line = append(w.line, b)
		default:
			w.line = append(w.line, b)
		}
		if err != nil {
			return n, err
		}
	}
	return len(p), nil
}

// Close ends the output: a test that began and did not report is a failed one. It returns what was counted.
func (w *ResultWriter) Close() (Results, error) {
	var err error
	if len(w.line) > 0 {
		err = w.endLine()
	}
	w.endSuite()
	return w.results, err
}

func (w *ResultWriter) endLine() error {
	line := bytes.TrimSuffix(w.line, []byte("\r"))
	defer func() { w.line = w.line[:0] }()
	if len(line) > 0 && line[0] == frame {
		line = line[1:]
		w.event(string(line))
		if bytes.HasPrefix(line, []byte(nameMark)) {
			return nil
		}
	}
	_, err := fmt.Fprintf(w.out, "%s%s\n", w.prefix, line)
	return err
}

// event takes a framed line.
func (w *ResultWriter) event(line string) {
	if suite, ok := strings.CutPrefix(line, suiteMark); ok {
		w.endSuite()
		w.suite = suite
		return
	}
	if code, ok := strings.CutPrefix(line, exitMark); ok {
		w.endSuite()
		if code != "0" && !slices.ContainsFunc(w.results.Failed, func(t string) bool { return strings.HasPrefix(t, w.suite+".") }) {
			w.results.Failed = append(w.results.Failed, fmt.Sprintf("%s.(exit status %s)", w.suite, code))
		}
		return
	}
	if test, ok := strings.CutPrefix(line, "=== RUN "); ok {
		if test = strings.TrimSpace(test); !strings.Contains(test, "/") {
			w.started = append(w.started, test)
		}
		return
	}
	verdict, rest, ok := strings.Cut(strings.TrimPrefix(line, "--- "), ": ")
	test, _, timed := strings.Cut(rest, " (")
	if !ok || !timed || !strings.HasPrefix(line, "--- ") || strings.Contains(test, "/") {
		return
	}
	list := map[string]*[]string{"PASS": &w.results.Passed, "FAIL": &w.results.Failed, "SKIP": &w.results.Skipped}[verdict]
	if list == nil {
		return
	}
	*list = append(*list, w.suite+"."+test)
	w.started = slices.DeleteFunc(w.started, func(s string) bool { return s == test })
}

// endSuite counts the tests that are still running as failed.
func (w *ResultWriter) endSuite() {
	for _, test := range w.started {
		w.results.Failed = append(w.results.Failed, w.suite+"."+test)
	}
	w.started = nil
}
