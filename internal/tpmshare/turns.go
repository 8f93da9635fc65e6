package tpmshare

import (
	"context"
	"slices"
	"sync"
)

// agentRow is how many commands of the agent run in a row while a client waits; then one client has a turn.
const agentRow = 16

// turns lets one command at a time pass: the agent's before any client's, each side's in the order in which they came. A client waits
// for one turn at a time, so that in the clients' row each client is once: one that floods has its turn as often as its neighbour.
type turns struct {
	mu      sync.Mutex
	held    bool
	agent   []chan struct{} // who waits; closed when it is its turn
	clients []chan struct{}
	row     int // turns of the agent since the last of a client
}

// take waits for a turn; give ends it. The error is the context's: there is no turn then.
func (t *turns) take(ctx context.Context, agent bool) error {
	t.mu.Lock()
	if !t.held {
		t.held = true
		t.mu.Unlock()
		return nil
	}
	mine := make(chan struct{})
	row := t.rowOf(agent)
	*row = append(*row, mine)
	t.mu.Unlock()
	select {
	case <-mine:
		return nil
	case <-ctx.Done():
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if i := slices.Index(*row, mine); i >= 0 {
		*row = slices.Delete(*row, i, i+1)
	} else {
		t.next() // it came at the same moment
	}
	return ctx.Err()
}

func (t *turns) rowOf(agent bool) *[]chan struct{} {
	if agent {
		return &t.agent
	}
	return &t.clients
}

// give ends a turn.
func (t *turns) give() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next()
}

// next gives the turn that has ended to who waits for one. t.mu is held.
func (t *turns) next() {
	agent := len(t.agent) > 0 && (t.row < agentRow || len(t.clients) == 0)
	row := t.rowOf(agent)
	if len(*row) == 0 {
		t.held, t.row = false, 0
		return
	}
	if agent {
		t.row++
	} else {
		t.row = 0
	}
	close((*row)[0])
	*row = slices.Delete(*row, 0, 1)
}
