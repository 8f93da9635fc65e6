package vm

import (
	"context"
	"fmt"
	"go/build/constraint"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	// buildTag marks the test files that run in a machine.
	buildTag = "vm"
	// agentPackage and probeFolder hold the programs that every payload has.
	agentPackage = "cmd/imans-agent"
	probeFolder  = "test/vm/probe"
	// faultAgent is the agent with its fault points (package fault), which tests with faultTests in their names take.
	faultAgent = "imans-agent-faults"
	faultTag   = "faults"
	faultTests = "CrashPoints"
	// guestTests is where Payload.Script puts the tests, on the root disk: what they run must not be a file of the share.
	guestTests = "/usr/local/lib/imans-test"
)

// PayloadOptions chooses what BuildPayload compiles.
type PayloadOptions struct {
	// Tests adds the test binaries.
	Tests bool
	// Run restricts the tests as go test -run does; empty means all.
	Run string
	// NoPrograms leaves the agent and the probe programs out, for tests of one package while the agent does not compile.
	NoPrograms bool
	// Cover instruments the programs and tests, so that a run leaves coverage counters in the share's folder cover.
	Cover bool
	// Cache keeps programs that are not this repository's and that some tests take; nil leaves them out.
	Cache *Cache
}

// Payload is a folder to show to machines: the agent and the probe programs (guest.sh installs what is executable in
// /usr/local/bin), test/ with a folder for each test binary, and containerd/ with its programs for the tests that take them.
type Payload struct {
	// Dir is the folder.
	Dir string
	// Suites are the test binaries, in order of their names.
	Suites []Suite
}

// Suite is the vm-tagged tests of one package.
type Suite struct {
	// Name is the package's folder in the repository.
	Name string
	// Tests are the names of its tests that were chosen.
	Tests []string
	// sub chooses among what is below them, as the rest of a go test -run expression does; "" is all.
	sub string
}

// slug is the suite's folder name in the payload.
func (s Suite) slug() string { return strings.ReplaceAll(s.Name, "/", "-") }

// pattern is the suite's -test.run expression.
func (s Suite) pattern() string {
	pattern := "^(" + strings.Join(s.Tests, "|") + ")$"
	if s.sub != "" {
		pattern += "/" + s.sub
	}
	return pattern
}

// BuildPayload compiles the programs, and the tests if asked to, of the repository into dir. All are static.
func BuildPayload(ctx context.Context, repo, dir string, o PayloadOptions) (*Payload, error) {
	p := &Payload{Dir: dir}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the payload: %w", err)
	}
	if !o.NoPrograms {
		if err := buildPrograms(ctx, repo, dir, o.Cover); err != nil {
			return nil, err
		}
	}
	if !o.Tests {
		return p, nil
	}
	suites, err := findSuites(repo, o.Run)
	if err != nil {
		return nil, err
	}
	for _, s := range suites {
		to := filepath.Join(dir, "test", s.slug())
		if err := os.MkdirAll(to, 0o755); err != nil {
			return nil, fmt.Errorf("make the payload: %w", err)
		}
		args := []string{"test", "-c", "-tags", buildTag, "-o", filepath.Join(to, "suite.test")}
		if o.Cover {
			args = append(args, "-cover", "-coverpkg=./...")
		}
		if err := goBuild(ctx, repo, append(args, "./"+s.Name)...); err != nil {
			return nil, fmt.Errorf("compile the tests of %s: %w", s.Name, err)
		}
		data := filepath.Join(repo, s.Name, "testdata")
		if _, err := os.Stat(data); err == nil {
			if err := os.CopyFS(filepath.Join(to, "testdata"), os.DirFS(data)); err != nil {
				return nil, fmt.Errorf("copy the test data of %s: %w", s.Name, err)
			}
		}
	}
	p.Suites = suites
	if !o.NoPrograms && takes(suites, faultTests) {
		args := []string{"build", "-trimpath", "-tags", faultTag, "-o", filepath.Join(dir, faultAgent), "./" + agentPackage}
		if err := goBuild(ctx, repo, args...); err != nil {
			return nil, fmt.Errorf("compile the agent with fault points: %w", err)
		}
	}
	if o.Cache != nil && takes(suites, containerdTests) {
		if err := p.addContainerd(ctx, o.Cache); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// Script is the command that runs every suite in a machine. Each suite starts in a folder of its own that holds its test
// data; its output is for ParseResults. A suite that takes longer than limit ends with the stacks of its goroutines.
func (p *Payload) Script(limit time.Duration) string {
	var b strings.Builder
	b.WriteString("status=0\n")
	for _, s := range p.Suites {
		fmt.Fprintf(&b, "mkdir -p %[1]s && cp -r /payload/test/%[2]s %[1]s/ && cd %[1]s/%[2]s || exit 1\n", guestTests, s.slug())
		fmt.Fprintf(&b, "printf '%s%s%%s\\n' %s\n", `\026`, suiteMark, Quote(s.Name))
		fmt.Fprintf(&b, "./suite.test -test.v=test2json -test.count=1 -test.timeout=%s -test.run=%s ${GOCOVERDIR:+-test.gocoverdir=$GOCOVERDIR}\n",
			limit, Quote(s.pattern()))
		fmt.Fprintf(&b, "code=$?; [ $code = 0 ] || status=1\nprintf '%s%s%%s\\n' $code\n", `\026`, exitMark)
	}
	b.WriteString("exit $status\n")
	return b.String()
}

// takes reports whether a test among these has a word in its name.
func takes(suites []Suite, word string) bool {
	return slices.ContainsFunc(suites, func(s Suite) bool {
		return slices.ContainsFunc(s.Tests, func(test string) bool { return strings.Contains(test, word) })
	})
}

// Without is the payload without the tests that passed or were skipped.
func (p *Payload) Without(done Results) *Payload {
	left := *p
	left.Suites = nil
	for _, s := range p.Suites {
		tests := slices.DeleteFunc(slices.Clone(s.Tests), func(t string) bool {
			name := s.Name + "." + t
			return slices.Contains(done.Passed, name) || slices.Contains(done.Skipped, name)
		})
		if len(tests) > 0 {
			left.Suites = append(left.Suites, Suite{s.Name, tests, s.sub})
		}
	}
	return &left
}

// buildPrograms compiles the agent and each main package below the probe folder; those that are not there are passed over.
func buildPrograms(ctx context.Context, repo, dir string, cover bool) error {
	args := []string{"build", "-trimpath", "-o", dir + string(filepath.Separator)}
	if cover {
		args = append(args, "-cover", "-coverpkg=./...")
	}
	var packages []string
	for _, name := range []string{agentPackage, probeFolder} {
		if _, err := os.Stat(filepath.Join(repo, name)); err == nil {
			packages = append(packages, "./"+name+"/...")
		}
	}
	if packages == nil {
		return nil
	}
	if err := goBuild(ctx, repo, append(args, packages...)...); err != nil {
		return fmt.Errorf("compile the programs: %w", err)
	}
	return nil
}

// goBuild runs the go command without cgo, so that what it makes runs on any root file system.
func goBuild(ctx context.Context, repo string, args ...string) error {
	_, err := command(ctx, repo, "env", append([]string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "go"}, args...)...)
	return err
}

// findSuites looks for test files with the build tag that have a test which run selects.
func findSuites(repo, run string) ([]Suite, error) {
	top, rest, _ := strings.Cut(run, "/")
	wanted, err := regexp.Compile(top)
	if err != nil {
		return nil, fmt.Errorf("choose tests: %w", err)
	}
	found := make(map[string][]string)
	err = filepath.WalkDir(repo, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := e.Name()
		if e.IsDir() && path != repo && (name == "testdata" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_")) {
			return filepath.SkipDir
		}
		if e.IsDir() || !strings.HasSuffix(name, "_test.go") {
			return nil
		}
		tests, err := taggedTests(path)
		if err != nil {
			return err
		}
		folder, err := filepath.Rel(repo, filepath.Dir(path))
		for _, t := range tests {
			if wanted.MatchString(t) {
				found[folder] = append(found[folder], t)
			}
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("look for tests: %w", err)
	}
	var suites []Suite
	for folder, tests := range found {
		slices.Sort(tests)
		suites = append(suites, Suite{filepath.ToSlash(folder), tests, rest})
	}
	slices.SortFunc(suites, func(a, b Suite) int { return strings.Compare(a.Name, b.Name) })
	return suites, nil
}

// taggedTests returns the names of the tests in a file that is compiled with the build tag only.
func taggedTests(path string) ([]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if !tagged(string(text)) {
		return nil, nil
	}
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^func (Test[A-Z_0-9]\w*)\(\w+ \*testing\.T\)`).FindAllSubmatch(text, -1) {
		names = append(names, string(m[1]))
	}
	return names, nil
}

// tagged reports whether a Go file has a build constraint that the tag decides.
func tagged(text string) bool {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "package ") {
			return false
		}
		if !constraint.IsGoBuild(line) {
			continue
		}
		expr, err := constraint.Parse(strings.TrimSpace(line))
		if err != nil {
			return false
		}
		with := expr.Eval(func(tag string) bool { return tag == buildTag || tag == "linux" || tag == "amd64" })
		without := expr.Eval(func(tag string) bool { return tag == "linux" || tag == "amd64" })
		return with && !without
	}
	return false
}

// CopyFile copies a file with its permission bits. The target must not exist.
func CopyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	st, err := src.Stat()
	if err != nil {
		return err
	}
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, st.Mode().Perm())
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		return fmt.Errorf("copy %s to %s: %w", from, to, err)
	}
	return dst.Close()
}
