//go:build !linux

package pgrepl

import "syscall"

// queuedBytes asks with ioctl how much waits in a socket: FIONREAD of the BSDs
// and macOS.
const queuedBytes = 0x4004667f

// tcpUserTimeout has no effect where the system has no TCP_USER_TIMEOUT, as in
// libpq.
func tcpUserTimeout(int) func(network, address string, c syscall.RawConn) error {
	return nil
}
