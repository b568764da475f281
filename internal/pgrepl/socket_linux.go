package pgrepl

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// queuedBytes asks with ioctl how much waits in a socket.
const queuedBytes = unix.TIOCINQ

// tcpUserTimeout sets TCP_USER_TIMEOUT, in milliseconds, before connecting.
func tcpUserTimeout(ms int) func(network, address string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		if network == "unix" {
			return nil
		}
		var err error
		if cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, ms)
		}); cerr != nil {
			return cerr
		}
		return err
	}
}
