package check

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

const (
	mb       = int64(1 << 20)
	gb       = int64(1 << 30)
	systemID = 7000000000000000001
)

// healthy are the facts of a cluster that nothing is wrong with.
func healthy() *facts {
	h := host{
		name: "db1:5432", sslMode: "verify-full", connected: true, tls: "TLS 1.3, TLS_AES_128_GCM_SHA256", auth: pgrepl.AuthSCRAM,
		id: pgrepl.Identity{SystemID: systemID, Timeline: 1, XLogPos: 0x5000000, SegmentSize: 16 << 20, Major: 17, Version: "17.5"},
		settings: pgrepl.Settings{WALLevel: "replica", MaxWALSenders: 10, MaxSlots: 10, MaxSlotKeep: -1,
			SyncNames: "walfleet", SyncCommit: "on"},
		watch: pgrepl.SlotWatch{Exists: true, RestartLSN: 0x4000000, Retained: 16 * mb, Status: "reserved", SafeWALSize: -1,
			ActivePID: 4711, Application: "walfleet", State: "streaming", SyncState: "sync"},
		database: "postgres",
		use:      pgrepl.ServerUse{Senders: 2, Slots: 2, SyncSenders: 1, ClockError: 3 * time.Millisecond},
	}
	return &facts{
		cfg: receiver.Config{Name: "orders", Dir: "/archive/orders", Slot: "walfleet", CreateSlot: true, Synchronous: true,
			Source: receiver.SourcePrimary, Monitor: true, Adjustable: receiver.Adjustable{MinFree: 100 * mb, FlushInterval: 10 * time.Second}},
		asked: true, app: "walfleet", user: "archiver", hosts: []host{h},
		dir: directory{
			path: "/archive/orders", parent: "/archive/orders", exists: true, mode: fs.ModeDir | 0o700, writable: true,
			holdings: archive.Holdings{Identity: archive.Identity{SystemID: systemID, SegmentSize: 16 << 20}, Bound: true, Segments: 4,
				Last: wal.Segment{Timeline: 1, Start: 0x4000000, Size: 16 << 20}, Timeline: 1},
			device: 1, free: 100 * gb, total: 200 * gb, grown: 24 * gb, over: 24 * time.Hour,
		},
	}
}

// second adds a standby.
func (f *facts) second() *host {
	h := f.hosts[0]
	h.name, h.id.InRecovery, h.watch = "db2:5432", true, pgrepl.SlotWatch{SafeWALSize: -1}
	f.hosts = append(f.hosts, h)
	return &f.hosts[1]
}

// find is the result of a test, on a host where there are several.
func find(results []Result, test, host string) (found Result, n int) {
	for _, r := range results {
		if r.Test == test && (host == "" || r.Host == host) {
			found = r
			n++
		}
	}
	return found, n
}

func judged(f *facts) []Result {
	return f.judge(disksOf([]facts{*f})[f.dir.device])
}

func TestNothingIsWrongWithAHealthyCluster(t *testing.T) {
	results := judged(healthy())
	for _, test := range []string{testConnection, testTLS, testAuthentication, testHBA, testRight, testVersion, testRole, testWALLevel, testSenders,
		testSlots, testSlot, testSlotKeep, testSynchronous, testClock, testMonitor, testArchive, testDirectory, testSpace, testTime} {
		if r, n := find(results, test, ""); n != 1 || r.Level != OK || r.Text == "" || r.Hint != "" || r.Host != "" {
			t.Errorf("%s: %d times: %+v", test, n, r)
		}
	}
	if len(results) != 19 {
		t.Errorf("%d results: %+v", len(results), results)
	}
}

func serverError(code string) error {
	return &pgrepl.ServerError{Doing: "connecting", Severity: "FATAL", Code: code, Message: "as the server says"}
}

// TestEachFinding changes one fact of a healthy cluster at a time.
func TestEachFinding(t *testing.T) {
	refused := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	unreached := func(err error) func(*facts) {
		return func(f *facts) { f.hosts[0].connected, f.hosts[0].err = false, err }
	}
	on := func(change func(h *host)) func(*facts) { return func(f *facts) { change(&f.hosts[0]) } }
	for _, test := range []struct {
		name   string
		change func(f *facts)
		test   string
		level  Level
		text   string
		hint   string
	}{
		{"conninfo", func(f *facts) { f.err, f.hosts = errors.New("conninfo: no"), nil }, testConfiguration, Failed, "conninfo: no", "correct"},
		{"passfile", func(f *facts) { f.warning = "passfile ignored" }, testConfiguration, Warning, "passfile ignored", "chmod 600"},

		{"refused", unreached(refused), testConnection, Failed, "connection refused", "listen_addresses"},
		{"no name", unreached(&net.DNSError{Err: "no such host", Name: "db1"}), testConnection, Failed, "no such host", "correct the host"},
		{"silent", unreached(context.DeadlineExceeded), testConnection, Failed, "deadline", "firewall"},
		{"broken", unreached(errors.New("unexpected EOF")), testConnection, Failed, "unexpected EOF", "sslmode"},
		{"starting", unreached(serverError("57P03")), testConnection, Failed, "as the server says", "see its log"},
		{"no password", unreached(errors.Join(pgrepl.ErrNoPassword, serverError("28P01"))), testAuthentication, Failed, "", "password_file"},
		{"wrong password", unreached(serverError("28P01")), testAuthentication, Failed, "as the server says", `\password archiver`},
		{"password file", unreached(&fs.PathError{Op: "open", Path: "/pw", Err: syscall.ENOENT}), testAuthentication, Failed, "/pw", "readable"},
		{"pg_hba", unreached(serverError("28000")), testHBA, Failed, "as the server says", "hostssl replication archiver"},
		{"no right", unreached(serverError("42501")), testRight, Failed, "as the server says", "ALTER ROLE archiver REPLICATION"},
		{"too many", unreached(serverError("53300")), testSenders, Failed, "as the server says", "max_wal_senders"},
		{"authority", unreached(x509.UnknownAuthorityError{}), testTLS, Failed, "unknown authority", "sslrootcert"},
		{"name in certificate", unreached(x509.HostnameError{Certificate: &x509.Certificate{}, Host: "db1"}), testTLS, Failed, "", "name"},
		{"alert", unreached(tls.AlertError(42)), testTLS, Failed, "certificate", "sslcert"},

		{"not encrypted", on(func(h *host) { h.tls, h.sslMode = "", "prefer" }), testTLS, Warning, "not encrypted", "verify-full"},
		{"not encrypted here", on(func(h *host) { h.tls, h.local = "", true }), testTLS, OK, "does not leave", ""},
		{"socket", on(func(h *host) { h.tls, h.local, h.socket = "", true, true }), testTLS, OK, "unix socket", ""},
		{"not verified", on(func(h *host) { h.sslMode = "require" }), testTLS, Warning, "whose server", "require_auth"},
		{"not verified, but", on(func(h *host) { h.sslMode, h.requires = "require", true }), testTLS, Warning, "whose server", "verify-full"},
		{"by authority alone", on(func(h *host) { h.sslMode = "verify-ca" }), testTLS, OK, "verify-ca", ""},

		{"md5", on(func(h *host) { h.auth = pgrepl.AuthMD5 }), testAuthentication, Warning, "md5", "scram-sha-256"},
		{"clear text", on(func(h *host) { h.auth = pgrepl.AuthPassword }), testAuthentication, Warning, "as it is", "scram-sha-256"},
		{"trust", on(func(h *host) { h.auth = pgrepl.AuthNone }), testAuthentication, Warning, "trust", "scram-sha-256"},
		{"certificate", on(func(h *host) { h.auth, h.cert = pgrepl.AuthNone, true }), testAuthentication, OK, "certificate", ""},
		{"peer", on(func(h *host) { h.auth, h.socket = pgrepl.AuthNone, true }), testAuthentication, OK, "operating system", ""},

		{"too old", on(func(h *host) { h.err = &pgrepl.UnusableError{Reason: "12 is too old"} }), testVersion, Failed, "12 is too old", "upgrade"},
		{"cannot be identified", on(func(h *host) { h.err = errors.New("closed") }), testConnection, Failed, "closed", "log"},
		{"PolarDB", func(f *facts) {
			f.dir.holdings = archive.Holdings{}
			f.hosts[0].id.PolarDB, f.hosts[0].id.SegmentSize = "2.0.15", 1<<30
		}, testVersion, OK, "PolarDB 2.0.15; segments of 1 GB", ""},

		{"standby", on(func(h *host) { h.id.InRecovery = true }), testRole, Failed, "no host is a primary", `source = "any"`},
		{"any", func(f *facts) { f.hosts[0].id.InRecovery, f.cfg.Source = true, receiver.SourceAny }, testRole, OK, "is a standby", ""},
		{"two primaries", func(f *facts) { f.second().id.InRecovery = false }, testRole, Warning, "db1:5432, db2:5432", "stop the old"},

		{"minimal", on(func(h *host) { h.settings.WALLevel = "minimal" }), testWALLevel, Failed, "minimal", "wal_level = replica"},
		{"logical", on(func(h *host) { h.settings.WALLevel = "logical" }), testWALLevel, OK, "logical", ""},
		{"settings", on(func(h *host) { h.settingsErr = errors.New("no") }), testWALLevel, Failed, "cannot be read", "log"},

		{"senders in use", on(func(h *host) { h.use.Senders, h.watch.ActivePID = 10, 0 }), testSenders, Failed, "all 10", "max_wal_senders = 14"},
		{"senders in use, one by us", on(func(h *host) { h.use.Senders = 10 }), testSenders, Warning, "all 10", "max_wal_senders = 14"},
		{"senders unknown", on(func(h *host) { h.sqlErr = errors.New("no") }), testSenders, OK, "not known", ""},
		{"no slot left", on(func(h *host) { h.use.Slots, h.watch = 10, pgrepl.SlotWatch{} }), testSlots, Failed, "all 10", "max_replication_slots = 14"},
		{"last slot is ours", on(func(h *host) { h.use.Slots = 10 }), testSlots, OK, "0 of 10", ""},

		{"slot missing", func(f *facts) { f.hosts[0].watch, f.dir.holdings = pgrepl.SlotWatch{}, archive.Holdings{} }, testSlot, OK, "does not exist yet", ""},
		{"slot missing, not made", func(f *facts) { f.hosts[0].watch, f.cfg.CreateSlot = pgrepl.SlotWatch{}, false }, testSlot, Failed, "create_slot is false", "pg_create_physical_replication_slot('walfleet', true)"},
		{"slot gone", on(func(h *host) { h.watch = pgrepl.SlotWatch{} }), testSlot, Warning, "nothing keeps the WAL", "start walfleet"},
		{"logical slot", on(func(h *host) { h.watch.Logical = true }), testSlot, Failed, "logical", "another name"},
		{"lost", on(func(h *host) { h.watch.Status = "lost" }), testSlot, Failed, "lost", "pg_drop_replication_slot('walfleet')"},
		{"invalidated", on(func(h *host) { h.watch.Invalid = "idle_timeout" }), testSlot, Failed, "idle_timeout", "accept-gap orders"},
		{"unreserved", on(func(h *host) { h.watch.Status = "unreserved" }), testSlot, Warning, "about to be", "max_slot_wal_keep_size"},
		{"retains much", func(f *facts) { f.cfg.MaxSlotRetained = 15 * mb }, testSlot, Warning, "16 MB of WAL, more than max_slot_retained = 15 MB", "walfleet status orders"},
		{"retains as much as it may", func(f *facts) { f.cfg.MaxSlotRetained = 16 * mb }, testSlot, OK, "retains 16 MB", ""},
		{"slot not in use", on(func(h *host) { h.watch.ActivePID = 0 }), testSlot, OK, "not in use", ""},
		{"slot unknown", on(func(h *host) { h.watchErr = pgrepl.ErrSlotUnreadable }), testSlot, Warning, "nothing is known", "database"},
		{"slot on an old primary", func(f *facts) {
			f.second().watch = pgrepl.SlotWatch{Exists: true, Retained: 3 * gb}
		}, testSlot + "@db2:5432", Warning, "3 GB of WAL on a host that is not archived", "pg_drop_replication_slot"},
		{"slot on a standby that keeps up", func(f *facts) {
			f.second().watch = pgrepl.SlotWatch{Exists: true, Retained: 16 * mb}
		}, testSlot + "@db2:5432", OK, "retains 16 MB", ""},

		{"keep nothing", on(func(h *host) { h.settings.MaxSlotKeep = 15 * mb }), testSlotKeep, Failed, "less than one segment", "max_slot_wal_keep_size = '1024MB'"},
		{"keep little", on(func(h *host) { h.settings.MaxSlotKeep = 63 * mb }), testSlotKeep, Warning, "only 3 segments", "max_slot_wal_keep_size"},
		{"keep enough", on(func(h *host) { h.settings.MaxSlotKeep = 64 * mb }), testSlotKeep, OK, "4 segments", ""},
		{"keep little of 1 GB", func(f *facts) {
			f.dir.holdings = archive.Holdings{}
			f.hosts[0].settings.MaxSlotKeep, f.hosts[0].id.SegmentSize = 2*gb, 1<<30
		}, testSlotKeep, Warning, "only 2 segments of 1 GB", "max_slot_wal_keep_size = '4096MB'"},

		{"asynchronous", on(func(h *host) { h.settings.SyncNames = "" }), testSynchronous, OK, "no standby", ""},
		{"others", on(func(h *host) { h.settings.SyncNames = "db2" }), testSynchronous, OK, "for others", ""},
		{"others, who are not there", on(func(h *host) { h.settings.SyncNames, h.use.SyncSenders = "db2", 0 }), testSynchronous, Warning, `do not wait for "walfleet"`, "synchronous_standby_names"},
		{"others, who knows", on(func(h *host) { h.settings.SyncNames, h.use.Hidden = "db2", true }), testSynchronous, Warning, `do not wait for "walfleet"`, "application_name"},
		{"names that are none", on(func(h *host) { h.settings.SyncNames = "ANY 1 (" }), testSynchronous, Warning, "not understood", "SHOW"},
		{"remote_apply", on(func(h *host) { h.settings.SyncCommit = "remote_apply" }), testSynchronous, Failed, "for ever", "synchronous_commit = 'on'"},
		{"remote_apply for a role", on(func(h *host) { h.use.RemoteApply = true }), testSynchronous, Failed, "for ever", "drds"},
		{"remote_apply, and we are second", on(func(h *host) { h.settings.SyncCommit, h.settings.SyncNames = "remote_apply", "db2, walfleet" }), testSynchronous, Warning, "once another standby is gone", ""},
		{"remote_apply, and not for us", on(func(h *host) { h.settings.SyncCommit, h.settings.SyncNames = "remote_apply", "db2" }), testSynchronous, OK, "others", ""},
		{"commits that do not wait", on(func(h *host) { h.settings.SyncCommit = "local" }), testSynchronous, Warning, "wait for no standby", ""},
		{"flushes now and then", func(f *facts) { f.cfg.Synchronous = false }, testSynchronous, Warning, "up to flush_interval = 10s", "synchronous = true"},

		{"clock ahead", on(func(h *host) { h.use.ClockAhead = 3 * time.Second }), testClock, Warning, "3s ahead of", "chrony"},
		{"clock behind", on(func(h *host) { h.use.ClockAhead = -time.Hour }), testClock, Warning, "1h0m0s behind", "chrony"},
		{"clock, on a slow network", on(func(h *host) { h.use.ClockAhead, h.use.ClockError = 3*time.Second, 2*time.Second }), testClock, OK, "", ""},

		{"SQL refused", on(func(h *host) { h.sqlErr = serverError("28000") }), testMonitor, Warning, "cannot be watched", "hostssl postgres archiver"},
		{"SQL not allowed", on(func(h *host) { h.sqlErr = serverError("42501") }), testMonitor, Warning, "may not", "GRANT"},
		{"details hidden", on(func(h *host) { h.use.Hidden = true }), testMonitor, Warning, "does not see", "GRANT pg_monitor TO archiver"},

		{"new archive", func(f *facts) { f.dir.holdings = archive.Holdings{} }, testArchive, OK, "nothing is archived yet", ""},
		{"other cluster", on(func(h *host) { h.id.SystemID++ }), testArchive, Failed, "7000000000000000002", "correct the conninfo"},
		{"other segment size", on(func(h *host) { h.id.SegmentSize = 1 << 30 }), testArchive, Failed, "segments of 16 MB", "correct the conninfo"},
		{"one host of another cluster", func(f *facts) { f.second().id.SystemID++ }, testArchive + "@db2:5432", Warning, "db2:5432 has 7000000000000000002", "correct the conninfo"},
		{"archive.json", func(f *facts) { f.dir.damaged = &archive.FileError{Path: "/a/archive.json", Reason: "is damaged"} }, testArchive, Failed, "is damaged", "archive-format"},
		{"newer timeline", func(f *facts) { f.dir.holdings.Timeline = 2 }, testArchive, Failed, "timeline 2", "old one"},
		{"server is behind", func(f *facts) { f.hosts[0].id.XLogPos = 0x3FFFFFF }, testArchive, Failed, "only 0/3FFFFFF", "right server"},
		{"gap", func(f *facts) { f.dir.holdings.Gaps = []archive.Gap{{To: 0x3000000}} }, testArchive, OK, "1 accepted gap", ""},

		{"no directory yet", func(f *facts) { f.dir.exists, f.dir.parent = false, "/archive" }, testDirectory, OK, "does not exist yet", ""},
		{"not writable", func(f *facts) { f.dir.writable = false }, testDirectory, Failed, "not writable", "chown"},
		{"open to all", func(f *facts) { f.dir.mode |= 0o005 }, testDirectory, Warning, "0705", "chmod o= /archive/orders"},
		{"open to the group", func(f *facts) { f.dir.mode |= 0o050 }, testDirectory, OK, "0750", ""},
		{"not readable", func(f *facts) { f.dir.err = &fs.PathError{Op: "stat", Path: "/archive", Err: syscall.EACCES} }, testDirectory, Failed, "permission denied", "user that runs"},
		{"no such disk", func(f *facts) { f.dir.err = errors.New("the disk does not answer") }, testDirectory, Failed, "does not answer", "mounted"},

		{"below min_free", func(f *facts) { f.dir.free = 99 * mb }, testSpace, Failed, "blocked", "min_free"},
		{"no room for a segment", func(f *facts) { f.dir.free = 115 * mb }, testSpace, Failed, "next segment needs 16 MB", "make room"},
		{"just room", func(f *facts) { f.dir.free = 116 * mb }, testSpace, OK, "116 MB", ""},
		{"full tomorrow", func(f *facts) { f.dir.free = 23*gb + 100*mb }, testTime, Warning, "full in 23 hours", "make room"},
		{"full the day after", func(f *facts) { f.dir.free = 25*gb + 100*mb }, testTime, OK, "25 hours", ""},
		{"young archive", func(f *facts) { f.dir.over = leastWindow - time.Second }, testTime, OK, "not known", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := healthy()
			test.change(f)
			name, at, _ := strings.Cut(test.test, "@")
			results := judged(f)
			r, n := find(results, name, at)
			if n != 1 || r.Level != test.level || !strings.Contains(r.Text, test.text) || !strings.Contains(r.Hint, test.hint) || (r.Hint == "") != (r.Level == OK) {
				t.Errorf("%d times %+v, want %s, %q, hint %q", n, r, test.level, test.text, test.hint)
			}
			for _, other := range results {
				if other != r && other.Level == Failed && test.level != Failed {
					t.Errorf("another test failed: %+v", other)
				}
			}
		})
	}
}

// TestAHostThatIsDownIsAWarningWhileAnotherCanBeArchived has a standby that is down, and then its primary too.
func TestAHostThatIsDownIsAWarningWhileAnotherCanBeArchived(t *testing.T) {
	f := healthy()
	h := f.second()
	h.connected, h.err = false, syscall.ECONNREFUSED
	if r, n := find(judged(f), testConnection, "db2:5432"); n != 1 || r.Level != Warning {
		t.Errorf("%+v", r)
	}
	if r, n := find(judged(f), testConnection, "db1:5432"); n != 1 || r.Level != OK {
		t.Errorf("%+v", r)
	}
	f.hosts[0].connected, f.hosts[0].err = false, syscall.ECONNREFUSED
	for _, name := range []string{"db1:5432", "db2:5432"} {
		if r, n := find(judged(f), testConnection, name); n != 1 || r.Level != Failed {
			t.Errorf("%+v", r)
		}
	}
}

// TestSpaceIsForTheWholeFleet has three clusters on one file system, one of them with segments of 1 GB, and another one
// elsewhere.
func TestSpaceIsForTheWholeFleet(t *testing.T) {
	all := []facts{*healthy(), *healthy(), *healthy(), *healthy()}
	all[1].hosts[0].id.SegmentSize = 1 << 30
	all[1].dir.holdings.Identity.SegmentSize = 1 << 30
	all[2].hosts, all[2].dir.holdings, all[2].asked = nil, archive.Holdings{}, false // not known: 16 MB
	all[3].dir.device = 2
	free := 100*mb + 1024*mb + 32*mb
	for i := range all {
		all[i].dir.free = free
	}
	r := report(all)
	if len(r.Clusters) != 3 {
		t.Fatalf("%d clusters", len(r.Clusters))
	}
	for i := range 2 {
		if got, _ := find(r.Clusters[i].Results, testSpace, ""); got.Level != OK || !strings.Contains(got.Text, "next segments of 3 clusters") {
			t.Errorf("%+v", got)
		}
	}
	for i := range all {
		all[i].dir.free--
	}
	r = report(all)
	for i, want := range []Level{Warning, Warning, OK} {
		if got, _ := find(r.Clusters[i].Results, testSpace, ""); got.Level != want {
			t.Errorf("%+v, want %s", got, want)
		}
	}
}

func TestSyncNames(t *testing.T) {
	for _, test := range []struct {
		names string
		place int  // of walfleet; -2: not understood
		needs bool // commits wait for it while all others are there
	}{
		{"", -1, false},
		{"walfleet", 0, true},
		{"WalFleet", 0, true},
		{`"walfleet"`, 0, true},
		{`"wal""fleet"`, -1, false},
		{"db2, walfleet", 1, false},
		{"2 (db2, walfleet)", 1, true},
		{"FIRST 2 (db2,walfleet)", 1, true},
		{"first 1 (db2, walfleet)", 1, false},
		{"ANY 1 (db2, walfleet)", 1, false},
		{"any 2(db2,walfleet)", 1, true},
		{"ANY 1 (*)", 0, false},
		{"*", 0, true},
		{"walfleet_2", -1, false},
		{"ANY 1 (db2", -2, false},
		{"ANY x (db2)", -2, false},
		{`"walfleet`, -2, false},
		{"a b", -2, false},
		{"a,,b", -2, false},
		{"a,", -2, false},
		{"0 (walfleet)", -2, false},
	} {
		n, err := parseSyncNames(test.names)
		place := -2
		if err == nil {
			place = n.place("walfleet")
		}
		if place != test.place || place >= 0 && n.needs(place) != test.needs {
			t.Errorf("%q: %+v, %v: place %d", test.names, n, err, place)
		}
	}
}

func TestReportIsPrinted(t *testing.T) {
	down := healthy()
	down.cfg.Name = "billing"
	down.hosts[0].connected, down.hosts[0].err = false, syscall.ECONNREFUSED
	slow := healthy()
	slow.cfg.Name = "polar"
	slow.hosts[0].auth = pgrepl.AuthMD5
	r := report([]facts{*healthy(), *down, *slow})
	var b strings.Builder
	if err := r.Print(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"orders: OK\n", "billing: FAILED\n", "\n  connection              FAILED   connection refused\n", "\n                                   → start the server;", "polar: WARNING\n",
		"\n3 clusters: 1 OK, 1 WARNING, 1 FAILED\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
	line, status := r.Nagios()
	want := "WALFLEET CRITICAL - 3 clusters: 1 OK, 1 WARNING, 1 FAILED; billing: connection; polar: authentication | clusters=3 ok=1 warning=1 failed=1 " +
		"'orders slot_retained'=16777216B 'orders free'=107374182400B "
	if !strings.HasPrefix(line, want) || status != 2 || strings.Count(line, "|") != 1 {
		t.Errorf("exit status %d: %s\nwant %s…", status, line, want)
	}
}
