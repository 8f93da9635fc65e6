package vm

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

const (
	archiveKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	// debootstrapScript names Debian's own mirror; used where the host's apt has no Debian source (on Ubuntu).
	debootstrapScript = "/usr/share/debootstrap/scripts/sid"
	mirrorVariable    = "IMANS_DEBIAN_MIRROR"
)

// errNoSuite says that the mirror does not carry a suite.
var errNoSuite = errors.New("the archive has no such suite")

// archive is apt with sources and state of its own, so that the host's stay as they are.
type archive struct {
	options []string
}

// openArchive sets up apt in dir for the given suites and fetches their package lists.
func openArchive(ctx context.Context, dir string, suites []string) (*archive, error) {
	sources, err := sourceLines(ctx, suites)
	if err != nil {
		return nil, err
	}
	for _, sub := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, fmt.Errorf("make apt's folders: %w", err)
		}
	}
	list := filepath.Join(dir, "sources.list")
	if err := os.WriteFile(list, []byte(strings.Join(sources, "\n")+"\n"), 0o644); err != nil {
		return nil, fmt.Errorf("write apt's sources: %w", err)
	}
	a := &archive{options: []string{
		"-q", "-o", "Dir::Etc::SourceList=" + list, "-o", "Dir::Etc::SourceParts=/dev/null",
		"-o", "Dir::State=" + filepath.Join(dir, "state"), "-o", "Dir::Cache=" + filepath.Join(dir, "cache"),
		"-o", "Dir::State::status=/dev/null",
		"-o", "APT::Architecture=amd64", "-o", "APT::Architectures=amd64", "-o", "APT::Sandbox::User=",
		"-o", "APT::Update::Error-Mode=any", "-o", "Acquire::Languages=none", "-o", "Acquire::Retries=3",
	}}
	if out, err := command(ctx, "", "apt-get", append(a.options, "update")...); err != nil {
		if bytes.Contains(out, []byte("does not have a Release file")) {
			return nil, fmt.Errorf("fetch package lists of %s: %w", strings.Join(suites, " "), errNoSuite)
		}
		return nil, fmt.Errorf("fetch package lists of %s: %w", strings.Join(suites, " "), err)
	}
	return a, nil
}

// find returns the newest package whose name matches the pattern, or "" if there is none.
func (a *archive) find(ctx context.Context, pattern string) (string, error) {
	out, err := command(ctx, "", "apt-cache", append(a.options, "search", "--names-only", pattern)...)
	if err != nil {
		return "", fmt.Errorf("search packages %s: %w", pattern, err)
	}
	newest := ""
	for line := range strings.Lines(string(out)) {
		name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name != "" && compareNumbers(name, newest) > 0 {
			newest = name
		}
	}
	return newest, nil
}

// download fetches a package into dir and returns the file's path.
func (a *archive) download(ctx context.Context, dir, pkg string) (string, error) {
	if _, err := command(ctx, dir, "apt-get", append(a.options, "download", pkg)...); err != nil {
		return "", fmt.Errorf("download package %s: %w", pkg, err)
	}
	found, err := filepath.Glob(filepath.Join(dir, pkg+"_*.deb"))
	if err != nil || len(found) != 1 {
		return "", fmt.Errorf("download package %s: found %d files, want one", pkg, len(found))
	}
	return found[0], nil
}

// sourceLines gives an apt source line for each suite.
func sourceLines(ctx context.Context, suites []string) ([]string, error) {
	main, security, err := mirrors(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(archiveKeyring); err != nil {
		return nil, fmt.Errorf("find Debian's archive keys: %w; install debian-archive-keyring", err)
	}
	lines := make([]string, 0, len(suites))
	for _, suite := range suites {
		uri := main
		if strings.HasSuffix(suite, "-security") {
			uri = security
		}
		lines = append(lines, fmt.Sprintf("deb [signed-by=%s] %s %s main", archiveKeyring, uri, suite))
	}
	return lines, nil
}

// mirrors finds Debian's archive and its security archive: from the environment, else the ones that this host's apt
// already uses, else the one that debootstrap uses.
func mirrors(ctx context.Context) (main, security string, err error) {
	if main = os.Getenv(mirrorVariable); main == "" {
		out, err := command(ctx, "", "apt-get", "indextargets", "--format", "$(ORIGIN) $(SUITE) $(SITE)", "Created-By: Packages")
		if err != nil {
			return "", "", fmt.Errorf("ask apt for its sources: %w", err)
		}
		for line := range strings.Lines(string(out)) {
			f := strings.Fields(line)
			switch {
			case len(f) != 3 || f[0] != "Debian":
			case strings.HasSuffix(f[1], "-security"):
				security = f[2]
			default:
				main = f[2]
			}
		}
	}
	if main == "" {
		main = debootstrapMirror()
	}
	if main == "" {
		return "", "", fmt.Errorf("no mirror of Debian is known; set %s to one", mirrorVariable)
	}
	main = strings.TrimSuffix(main, "/")
	if security == "" {
		security = main + "-security"
	}
	return main, security, nil
}

// debootstrapMirror reads the default mirror that debootstrap's script names, or returns "".
func debootstrapMirror() string {
	text, err := os.ReadFile(debootstrapScript)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if uri, ok := strings.CutPrefix(strings.TrimSpace(line), "default_mirror "); ok {
			return uri
		}
	}
	return ""
}

// compareNumbers orders names with runs of digits compared as numbers: "a-9" < "a-10".
func compareNumbers(a, b string) int {
	return slices.CompareFunc(splitNumbers(a), splitNumbers(b), func(x, y string) int {
		if isDigit(x[0]) && isDigit(y[0]) {
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if c := cmp.Compare(len(x), len(y)); c != 0 {
				return c
			}
		}
		return cmp.Compare(x, y)
	})
}

// splitNumbers cuts a name into runs of digits and runs of other bytes.
func splitNumbers(s string) []string {
	var parts []string
	for len(s) > 0 {
		n := 1
		for n < len(s) && isDigit(s[n]) == isDigit(s[0]) {
			n++
		}
		parts, s = append(parts, s[:n]), s[n:]
	}
	return parts
}

func isDigit(b byte) bool { return b >= '0' && b <= '9' }

// command runs a program to its end and returns its standard output. For one that fails it returns all that was printed,
// and an error that ends with the last lines of it.
func command(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	tieToUs(cmd)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		said := stdout.String() + stderr.String()
		return []byte(said), fmt.Errorf("%s: %w\n%s", name, err, lastLines(said, 15))
	}
	return stdout.Bytes(), nil
}
