package policy

import (
	"fmt"
	"slices"
	"strings"
)

// Parse reads a policy. name stands for it in errors, all of which are *SyntaxError; the first one ends the reading.
func Parse(name string, text []byte) (*Policy, error) {
	var rules []*Rule
	number := 0
	for line := range strings.SplitSeq(string(text), "\n") {
		number++
		rule := strings.Trim(line, " \t")
		if rule == "" || rule[0] == '#' {
			continue
		}
		r, err := parseRule(rule)
		if err != nil {
			return nil, &SyntaxError{File: name, Line: number, Rule: rule, Reason: err.Error()}
		}
		r.Line = number
		rules = append(rules, r)
	}
	return newPolicy(rules), nil
}

// parseRule takes one rule. Source: ima_policy.c, ima_parse_rule.
func parseRule(text string) (*Rule, error) {
	for i := range len(text) {
		if c := text[i]; c < ' ' && c != '\t' || c == 0x7f {
			return nil, fmt.Errorf("byte %d is the control byte 0x%02x; remove it (dos2unix does, for a file from Windows)",
				i+1, c)
		}
	}
	r := &Rule{Text: text}
	for word := range strings.FieldsFuncSeq(text, func(c rune) bool { return c == ' ' || c == '\t' }) {
		if err := r.parseWord(word); err != nil {
			return nil, err
		}
	}
	if err := r.validate(); err != nil {
		return nil, err
	}
	return r, nil
}

// parseWord takes one word: an action, an option without value, or KEYWORD and operator and value.
func (r *Rule) parseWord(word string) error {
	if i := slices.Index(actionNames[1:], word); i >= 0 {
		if r.Action != unknown {
			return fmt.Errorf("%s is a second action; write another rule for it, on a line of its own", word)
		}
		r.Action = Action(i + 1)
		return nil
	}
	if word == "permit_directio" {
		r.flags |= flagDirectIO
		return nil
	}
	i := strings.IndexAny(word, "=<>")
	if i < 0 {
		return fmt.Errorf("unknown word %q; write an action (%s), or a condition (%s) with = and a value",
			word, strings.Join(actionNames[1:], " "), keywordNames())
	}
	k, ok := findKeyword(word[:i])
	if !ok {
		return fmt.Errorf("unknown condition or option %q; use one of %s", word[:i], keywordNames())
	}
	op, value := word[i], word[i+1:]
	if op != '=' && !k.compares {
		return fmt.Errorf("%s%c: only numbers of users and groups can be compared; write %s=", k.name, op, k.name)
	}
	if value == "" {
		return fmt.Errorf("%s has no value; give one right behind it, or remove the word", word)
	}
	if err := k.parse(r, op, value); err != nil {
		return fmt.Errorf("%s: %w", word, err)
	}
	return nil
}
