package demo

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
)

// A server is one throwaway primary: child processes of ours, or a container.
// psql and openWAL may be called at any time, the others by one goroutine.
type server interface {
	// start starts it, and creates it the first time. It returns once
	// connections are accepted, on the same port each time.
	start(ctx context.Context) error

	// kill sends SIGKILL to every process of the server and returns when they
	// are gone.
	kill(ctx context.Context) error

	// stop ends it. WAL that was flushed is in pg_wal afterwards, and no
	// process writes there any more.
	stop(ctx context.Context) error

	// remove ends it if it still runs and leaves nothing behind outside its
	// directory. It may be called more than once, and without a start.
	remove() error

	// psql is the command that runs psql as the server's superuser.
	psql(ctx context.Context) *exec.Cmd

	// openWAL opens a file of the server's pg_wal.
	openWAL(ctx context.Context, name string) (io.ReadCloser, error)
}

// primary says what a server is to be.
type primary struct {
	name     string // the cluster's name in walfleet
	size     wal.SegmentSize
	port     int    // on 127.0.0.1
	password string // of the superuser and of the role walfleet
	dir      string // the server's own below the demo's, exists
}

// startTimeout bounds a start with its creation, on a slow disk too: initdb
// fills the first segment with zeros before PostgreSQL 16.
const startTimeout = 2 * time.Minute

// settings are the server's, as NAME=VALUE for its command line, where they
// also hold after a restart.
func (p primary) settings() []string {
	return []string{
		"wal_level=replica",
		"max_wal_senders=10",
		"max_replication_slots=10",
		"fsync=on",
		// All WAL stays for the comparison, in the files it was written to.
		"wal_keep_size=64GB",
		"wal_recycle=off",
		"wal_init_zero=off",
		"min_wal_size=" + strconv.Itoa(2*int(p.size)>>20) + "MB", // at least two segments, checked by the server
		"max_wal_size=" + strconv.Itoa(max(8*int(p.size)>>20, 1024)) + "MB",
		"checkpoint_timeout=1h",
	}
}

// flags are the settings as arguments of postgres.
func (p primary) flags() []string {
	var flags []string
	for _, s := range p.settings() {
		flags = append(flags, "-c", s)
	}
	return flags
}

// psqlArgs make psql a pipe: no startup file, unaligned rows alone, the end at
// the first error.
func psqlArgs(port int) []string {
	return []string{
		"--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--no-password", "-v", "ON_ERROR_STOP=1",
		"-d", fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=postgres sslmode=disable connect_timeout=5", port),
	}
}

// environment is this process's without libpq's variables, which may point
// elsewhere, and with the password. Messages are English.
func (p primary) environment() []string {
	var env []string
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "PG") && !strings.HasPrefix(v, "LC_") {
			env = append(env, v)
		}
	}
	return append(env, "PGPASSWORD="+p.password, "PGAPPNAME=walfleet demo", "LC_ALL=C", "TZ=UTC")
}

// awaitConnections returns when the server answers a query. exited is closed
// when the server ended instead.
func awaitConnections(ctx context.Context, s server, exited <-chan struct{}) error {
	for {
		db, err := connect(ctx, s)
		if err == nil {
			_ = db.close()
			return nil
		}
		select {
		case <-exited:
			return errors.New("it exited")
		case <-ctx.Done():
			return fmt.Errorf("it accepts no connections: %w (%w)", err, context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// newPassword is random: on a machine with other users, a server that trusts
// loopback is a door.
func newPassword() string {
	b := make([]byte, 16)
	rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}
