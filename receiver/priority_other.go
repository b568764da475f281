//go:build !linux

package receiver

// lowerPriority does nothing here: a priority is the whole process's.
func lowerPriority() {}
