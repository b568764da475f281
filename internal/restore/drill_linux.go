package restore

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// endsWithParent makes a child get the signal when the thread that starts it ends: a
// drill that is killed leaves files, and no server.
func endsWithParent(attr *syscall.SysProcAttr, sig syscall.Signal) *syscall.SysProcAttr {
	attr.Pdeathsig = sig
	return attr
}

// Landlock's rights to change a file system (linux/landlock.h). The kernel's second
// version has the right to move files between directories, without which nothing may
// be moved; the third has truncating.
const (
	changes = unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE |
		unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_REG |
		unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_MAKE_FIFO | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK |
		unix.LANDLOCK_ACCESS_FS_MAKE_SYM | unix.LANDLOCK_ACCESS_FS_REFER
	truncating = unix.LANDLOCK_ACCESS_FS_TRUNCATE
)

// confine lets the calling thread, and every process that it starts from now on,
// change files below dir and /dev alone, and use no TCP, for ever. WAL can name any directory: replaying
// a CREATE TABLESPACE uses the one that the primary had, which is the primary's own where
// that runs on this machine. It is false where the kernel cannot do that.
func confine(dir string) bool {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 || abi < 2 {
		return false
	}
	// A kernel refuses what it does not know, so it gets no more.
	handled := unix.LandlockRulesetAttr{Handled_access_fs: changes}
	size := unsafe.Offsetof(handled.Handled_access_net)
	if abi >= 3 {
		handled.Handled_access_fs |= truncating
	}
	if abi >= 4 {
		handled.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
		size = unsafe.Offsetof(handled.Scoped)
	}
	ruleset, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&handled)), size, 0)
	if errno != 0 {
		return false
	}
	defer func() { _ = unix.Close(int(ruleset)) }()
	for _, path := range []string{dir, "/dev"} {
		below, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return false
		}
		rule := unix.LandlockPathBeneathAttr{Allowed_access: handled.Handled_access_fs, Parent_fd: int32(below.Fd())}
		_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, ruleset, unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
		_ = below.Close()
		if errno != 0 {
			return false
		}
	}
	if unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != nil {
		return false
	}
	_, _, errno = unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0, 0)
	return errno == 0
}
