package receiver

import (
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// Source says which servers of a cluster may be archived.
const (
	SourcePrimary = "primary" // only a server that is not in recovery
	SourceAny     = "any"     // standbys too
)

// What to do about WAL that the server no longer has.
const (
	GapHalt   = "halt"   // wait for a person
	GapRecord = "record" // write the gap down in the archive and go on behind it
)

// Config is what one cluster's receiver needs to know. It is a plain value:
// two equal Configs describe the same receiver, and a reload that finds them
// equal does not touch the one that runs.
type Config struct {
	Name            string // the cluster's name, for logs and status
	Dir             string // the cluster's own directory, created when missing
	Conninfo        string // libpq keywords or URI; may name several hosts
	PasswordFile    string // file that holds the password, read at each connect; empty: libpq's places
	ApplicationName string // empty: the conninfo's, then PGAPPNAME, then "walfleet"
	Slot            string // physical replication slot; empty: none, and no flush position is sent unless Synchronous

	CreateSlot  bool                // create Slot when the server does not have it
	SlotAsIs    bool                // do not ask about Slot over an ordinary connection, nor make it anew, whatever became of it
	Synchronous bool                // flush as soon as nothing more waits to be read
	Source      string              // SourcePrimary or SourceAny
	Compress    archive.Compression // of sealed segments
	NoSync      bool                // sync nothing; what is acknowledged then survives no crash of the machine

	Monitor bool // watch what Slot retains on each host, over ordinary connections

	EndPos wal.LSN // RunOnce returns once WAL beyond it has come; 0: never

	Adjustable
}

// Adjustable are the settings of a Config that a running receiver takes at once,
// without a reconnect: see [Receiver.Adjust].
type Adjustable struct {
	OnGap   string // GapHalt or GapRecord
	MinFree int64  // bytes of the archive's file system that are left free; below 0: a full disk ends the session
	MaxRate int64  // bytes of WAL a second that are received at most; 0: no limit

	StatusInterval time.Duration // longest time between two status updates; 0: only when there is a reason
	ReceiveTimeout time.Duration // longest silence of a server before the connection counts as dead; a command or a write that is under way keeps the one of before
	FlushInterval  time.Duration // longest time that received WAL stays unsynced when not Synchronous; 0: until its segment ends

	MonitorInterval time.Duration // time between two looks at Slot, with Monitor; a change counts after the next one
	MaxSlotRetained int64         // bytes of WAL that Slot may retain on a host before there is a warning; 0: any

	Retention // of the archive
}
