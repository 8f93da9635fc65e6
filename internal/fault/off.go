//go:build !faults

package fault

// Pass passes the point.
func (Point) Pass() {}

// PassAfter passes the point; if that is the end, last is the last thing that is done.
func (Point) PassAfter(last func()) {}
