package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/archive"
)

// What a drill of a cluster came to is kept as status shows it, also when it failed.
func TestDrillIsRemembered(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "orders"), 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "walfleet.toml")
	if err := os.WriteFile(file, []byte("archive_dir = \""+dir+"\"\n[[cluster]]\nname = \"orders\"\nconninfo = \"host=a\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"--backup", filepath.Join(dir, "no backup")}
	if _, err := execute(t, append([]string{"drill", "--archive", filepath.Join(dir, "orders")}, args...)...); err == nil {
		t.Fatal("a drill without a backup passes")
	}
	var kept fleet.DrillReport
	if err := archive.ReadRecord(filepath.Join(dir, "orders"), archive.DrillRecord, &kept); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("kept for a directory that was named: %v", err)
	}
	if _, err := execute(t, append([]string{"drill", "orders", "-c", file}, args...)...); err == nil {
		t.Fatal("a drill without a backup passes")
	}
	if err := archive.ReadRecord(filepath.Join(dir, "orders"), archive.DrillRecord, &kept); err != nil || kept.OK || kept.Backup != args[1] || !strings.Contains(kept.Error, "has no WAL") {
		t.Errorf("%+v, %v", kept, err)
	}
}
