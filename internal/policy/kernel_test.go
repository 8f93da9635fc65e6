package policy

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/ima"
)

// lines calls f with each line of a file of testdata, split into its first word and the rest.
func lines(t *testing.T, file string, f func(number int, word, rest string)) {
	t.Helper()
	r, err := os.Open("testdata/" + file)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	s := bufio.NewScanner(r)
	n := 0
	for s.Scan() {
		n++
		word, rest, _ := strings.Cut(s.Text(), " ")
		f(n, word, rest)
	}
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
}

// TestKernelRules: what the kernel's own functions take and refuse, and how they print.
func TestKernelRules(t *testing.T) {
	var last *Policy
	taken, refused := 0, 0
	lines(t, "kernel-rules.txt", func(n int, word, rest string) {
		switch word {
		case "taken":
			p, err := Parse("rule", []byte(rest))
			if err != nil {
				t.Errorf("line %d: the kernel takes this: %v", n, err)
			}
			last = p
			taken++
		case "refused":
			if p, err := Parse("rule", []byte(rest)); err == nil {
				t.Errorf("line %d: the kernel refuses %q, got %q", n, rest, p)
			}
			refused++
		case "printed":
			if last != nil && last.String() != rest+"\n" {
				t.Errorf("line %d: the kernel prints %q, got %q", n, rest+"\n", last)
			}
		default:
			t.Errorf("line %d: unknown word %q", n, word)
		}
	})
	if taken < 300 || refused < 300 {
		t.Errorf("only %d rules to take and %d to refuse", taken, refused)
	}
}

// TestKernelDecisions: what the kernel's own ima_match_policy decides.
func TestKernelDecisions(t *testing.T) {
	var rules []string
	var p *Policy
	var q *Query
	events := 0
	lines(t, "kernel-decisions.txt", func(n int, word, rest string) {
		switch word {
		case "rule":
			rules, p = append(rules, rest), nil
		case "event":
			if p == nil {
				var err error
				if p, err = Parse("rules", []byte(strings.Join(rules, "\n"))); err != nil {
					t.Fatalf("line %d: %v", n, err)
				}
			}
			q = scanQuery(t, rest)
			events++
		case "want":
			d := p.Match(q)
			if got := kernelForm(d); got != rest {
				t.Errorf("line %d: kernel %s, got %s\nevent %+v\nrules\n%s", n, rest, got, *q, p)
			}
			if asks := p.Asks(q.Func, q.Mask); d.Actions&^asks != 0 {
				t.Errorf("line %d: Match gives %b, Asks only %b\nevent %+v\nrules\n%s", n, d.Actions, asks, *q, p)
			}
		case "":
			rules = nil
		}
	})
	if events < 300 {
		t.Errorf("only %d events", events)
	}
}

func scanQuery(t *testing.T, s string) *Query {
	t.Helper()
	var q Query
	var function, uuid, data string
	var caps int
	args := []any{
		&function, &q.Mask, &q.FSMagic, &q.FSName, &uuid, &q.UID, &q.EUID, &q.SUID, &q.GID, &q.EGID, &q.SGID,
		&q.FOwner, &q.FGroup, &caps,
	}
	for i := range q.Labels {
		args = append(args, &q.Labels[i])
	}
	if _, err := fmt.Sscanf(s, "%s %d %x"+strings.Repeat(" %v", len(args)-2), append(args, &data)...); err != nil {
		t.Fatalf("%q: %v", s, err)
	}
	for i, l := range q.Labels {
		q.Labels[i] = strings.TrimPrefix(l, "-")
	}
	for f := ima.FileCheck; f <= ima.SetxattrCheck; f++ {
		if f.String() == function {
			q.Func = f
		}
	}
	q.FSUUID = mustParse(t, "measure fsuuid="+uuid).Rules()[0].fsUUID
	q.CapSetUID, q.CapSetGID = caps&1 != 0, caps&2 != 0
	data = strings.TrimPrefix(data, "-")
	q.Keyring, q.DataName = data, data
	return &q
}

// kernelForm writes a decision as the kernel's test vectors have it. Source: ima.h, IMA_*.
func kernelForm(d Decision) string {
	a := map[AppraiseClass]uint32{
		NoAppraise: 0, FileAppraise: 0x1000, MmapAppraise: 0x4000, BPRMAppraise: 0x10000, ReadAppraise: 0x40000,
		CredsAppraise: 0x100000,
	}[d.Appraisal.Class]
	for _, f := range []struct {
		on  bool
		bit uint32
	}{
		{d.Actions&ima.Measure != 0, 0x1}, {d.Actions&ima.Appraise != 0, 0x4}, {d.Actions&ima.Audit != 0, 0x40},
		{d.Actions&ima.Hash != 0, 0x100}, {d.Appraisal.Signature, 0x01000000}, {d.DirectIO, 0x02000000},
		{d.Appraisal.FailUnverifiable, 0x10000000}, {d.Appraisal.Modsig, 0x20000000},
		{d.Appraisal.Blacklist, 0x40000000}, {d.Verity, 0x80000000},
	} {
		if f.on {
			a |= f.bit
		}
	}
	template := d.Template
	if template == "" {
		template = "-"
	}
	return fmt.Sprintf("%08x %d %s %x", a, d.PCR, template, uint32(d.Appraisal.Algos))
}

func mustParse(t *testing.T, text string) *Policy {
	t.Helper()
	p, err := Parse("test", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}
