package imafs

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"
)

// content returns what makes the text of a file that is not a list.
func content(k kind, t *task, view View) func(ctx context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		switch k {
		case kindActive:
			return flag(view.Active()), nil
		case kindNewNS:
			asked, err := view.Requested(ctx, &t.Caller)
			return flag(asked), err
		case kindHash:
			return view.HashName() + "\n", nil
		case kindTemplate:
			return view.TemplateName() + "\n", nil
		case kindPolicy:
			return view.PolicyText(&t.Caller), nil
		}
		if err := barrier(ctx, view); err != nil {
			return "", err
		}
		list := view.List()
		if list == nil { // ended just now
			return "", ErrEnded
		}
		status := list.Status()
		if k == kindViolations {
			return fmt.Sprintf("%d\n", status.Violations), nil
		}
		return fmt.Sprintf("%d\n", status.Entries), nil
	}
}

func flag(set bool) string {
	if set {
		return "1\n"
	}
	return "0\n"
}

// change returns what a write to a file does. Only files whose mode allows it are written to.
func change(k kind, t *task, view View) func(ctx context.Context, value string) error {
	return func(ctx context.Context, value string) error {
		if k == kindNewNS {
			switch value {
			case "0":
				return view.WithdrawNew(ctx, &t.Caller)
			case "1":
				return view.RequestNew(ctx, &t.Caller)
			}
			return unix.EINVAL
		}
		if view.Active() {
			return unix.EBUSY
		}
		switch k {
		case kindActive:
			if value != "1" {
				return unix.EINVAL
			}
			return view.Activate(ctx)
		case kindHash:
			return refused(view.SetHash(value))
		case kindTemplate:
			return refused(view.SetTemplate(value))
		}
		return unix.EINVAL
	}
}
