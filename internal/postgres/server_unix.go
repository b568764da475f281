//go:build unix

package postgres

import (
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/user"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Owner is the user that server processes run as; nil is this process's own.
type Owner struct {
	Name     string
	uid, gid uint32
}

// ServerOwner is nil unless this process is root's, as which PostgreSQL
// refuses to run (check_root in main.c).
func ServerOwner() (*Owner, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	var errs []error
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("user %s: %w", name, err)
		}
		return &Owner{Name: name, uid: uint32(uid), gid: uint32(gid)}, nil
	}
	return nil, fmt.Errorf("PostgreSQL does not run as root, and there is no other user for it: %w", errors.Join(errs...))
}

// OwnerOf is nil unless this process is root's. Then it is the owner of path, who
// can read it; the error says so where that is root too.
func OwnerOf(path string) (*Owner, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	var info syscall.Stat_t
	if err := syscall.Stat(path, &info); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if info.Uid == 0 {
		return nil, fmt.Errorf("PostgreSQL does not run as root, and %s belongs to root", path)
	}
	name := strconv.FormatUint(uint64(info.Uid), 10)
	if u, err := user.LookupId(name); err == nil {
		name = u.Username
	}
	return &Owner{Name: name, uid: info.Uid, gid: info.Gid}, nil
}

// Give makes o the owner of path, which may be a symbolic link.
func (o *Owner) Give(path string) error {
	if o == nil {
		return nil
	}
	return os.Lchown(path, int(o.uid), int(o.gid))
}

// Credential is what a child process needs to run as o.
func (o *Owner) Credential() *syscall.Credential {
	if o == nil {
		return nil
	}
	return &syscall.Credential{Uid: o.uid, Gid: o.gid}
}

// FreeSpace is how many bytes the file system of dir has for this user.
func FreeSpace(dir string) (int64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(fs.Bavail) * int64(fs.Bsize), nil
}

// FreePort finds a port of 127.0.0.1 that nothing listens on. It lies below
// the ephemeral ports of the usual systems: a client that keeps connecting to
// one of those while the server is down may reach itself (TCP's simultaneous
// open), and then holds the port that the server needs.
func FreePort(taken ...int) (int, error) {
	var err error
	for range 100 {
		port := 15432 + mathrand.IntN(10000)
		if slices.Contains(taken, port) {
			continue
		}
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("no free port on 127.0.0.1: %w", err)
}
