package fleet

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/walfleet/walfleet/receiver"
	"pgregory.net/rapid"
)

func TestDiff(t *testing.T) {
	cluster := func(name string) receiver.Config {
		c := defaultCluster()
		c.Name, c.Dir, c.Conninfo = name, "/archive/"+name, "host="+name
		return c
	}
	changed := func(name string) receiver.Config {
		c := cluster(name)
		c.Synchronous, c.MinFree = !c.Synchronous, c.MinFree+1
		return c
	}
	adjusted := func(name string) receiver.Config {
		c := cluster(name)
		c.StatusInterval += time.Second
		c.OnGap = receiver.GapRecord
		return c
	}
	list := func(cs ...receiver.Config) []receiver.Config { return cs }

	for _, tt := range []struct {
		name     string
		old, new []receiver.Config
		want     Plan
		text     string
	}{
		{
			name: "nothing and nothing",
			text: "kept 0",
		}, {
			name: "first start, sorted",
			new:  list(cluster("b"), cluster("a")),
			want: Plan{Start: []string{"a", "b"}},
			text: "started a, b; kept 0",
		}, {
			name: "another order is no change",
			old:  list(cluster("a"), cluster("b")),
			new:  list(cluster("b"), cluster("a")),
			want: Plan{Keep: []string{"a", "b"}},
			text: "kept 2",
		}, {
			name: "one of each",
			old:  list(cluster("gone"), cluster("changed"), cluster("adjusted"), cluster("same")),
			new:  list(cluster("same"), adjusted("adjusted"), changed("changed"), cluster("new")),
			want: Plan{
				Start: []string{"new"}, Stop: []string{"gone"},
				Restart: []string{"changed"}, Adjust: []string{"adjusted"}, Keep: []string{"same"},
				Changed: map[string][]string{"changed": {"min_free", "synchronous"}, "adjusted": {"on_gap", "status_interval"}},
			},
			text: "started new; restarted changed; adjusted adjusted; stopped gone; kept 1",
		}, {
			name: "a new name is a new cluster",
			old:  list(cluster("a")),
			new:  list(cluster("A")),
			want: Plan{Start: []string{"A"}, Stop: []string{"a"}},
			text: "started A; stopped a; kept 0",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := Diff(tt.old, tt.new)
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("Diff = %+v, want %+v", got, tt.want)
			}
			if got.String() != tt.text {
				t.Errorf("String = %q, want %q", got, tt.text)
			}
		})
	}
}

// Every field of a cluster's configuration counts: a reload that changes any
// one of them restarts that cluster, or adjusts it if the field is one that a running
// receiver can take.
func TestDiffSeesEveryField(t *testing.T) {
	old := defaultCluster()
	old.Name = "a"
	for _, field := range visibleFields[receiver.Config]() {
		if field.Name == "Name" {
			continue
		}
		new := old
		switch v := reflect.ValueOf(&new).Elem().FieldByIndex(field.Index); v.Kind() {
		case reflect.String:
			v.SetString(v.String() + "x")
		case reflect.Bool:
			v.SetBool(!v.Bool())
		case reflect.Int64:
			v.SetInt(v.Int() + 1)
		case reflect.Uint64:
			v.SetUint(v.Uint() + 1)
		case reflect.Struct:
			v.Field(0).SetString("x")
		default:
			t.Fatalf("%s has a kind that this test does not know: %s", field.Name, v.Kind())
		}
		plan := Diff([]receiver.Config{old}, []receiver.Config{new})
		got := plan.Restart
		if _, ok := reflect.TypeFor[receiver.Adjustable]().FieldByName(field.Name); ok {
			got = plan.Adjust
		}
		if !slices.Equal(got, []string{"a"}) {
			t.Errorf("%s changed, plan is %+v", field.Name, plan)
		}
	}
}

// Every name is in exactly one list, the lists are sorted, and doing what the
// plan says turns the old fleet into the new one.
func TestDiffProperty(t *testing.T) {
	fleets := rapid.Custom(func(t *rapid.T) []receiver.Config {
		names := rapid.SliceOfDistinct(rapid.IntRange(0, 12), rapid.ID[int]).Draw(t, "names")
		var clusters []receiver.Config
		for _, n := range names {
			c := receiver.Config{Name: fmt.Sprintf("c%02d", n)}
			c.Slot = rapid.SampledFrom([]string{"x", "y"}).Draw(t, "slot")
			c.Synchronous = rapid.Bool().Draw(t, "synchronous")
			c.MinFree = rapid.Int64Range(0, 1).Draw(t, "min_free")
			clusters = append(clusters, c)
		}
		return clusters
	})
	byName := func(clusters []receiver.Config) map[string]receiver.Config {
		m := make(map[string]receiver.Config)
		for _, c := range clusters {
			m[c.Name] = c
		}
		return m
	}
	rapid.Check(t, func(t *rapid.T) {
		oldList, newList := fleets.Draw(t, "old"), fleets.Draw(t, "new")
		plan := Diff(oldList, newList)
		oldMap, newMap := byName(oldList), byName(newList)

		lists := 0 // how many names the lists hold, repetitions included
		seen := make(map[string]bool)
		for _, names := range [][]string{plan.Start, plan.Stop, plan.Restart, plan.Adjust, plan.Keep} {
			if !slices.IsSorted(names) {
				t.Fatalf("not sorted: %q", names)
			}
			lists += len(names)
			for _, n := range names {
				seen[n] = true
			}
		}
		all := byName(append(slices.Clone(oldList), newList...))
		if lists != len(all) || len(seen) != len(all) {
			t.Fatalf("%d names in the lists, %d of them distinct, want %d", lists, len(seen), len(all))
		}

		fleet := maps.Clone(oldMap)
		for _, n := range append(slices.Clone(plan.Stop), plan.Restart...) {
			if _, ok := fleet[n]; !ok {
				t.Fatalf("%s is stopped but does not run", n)
			}
			delete(fleet, n)
		}
		for _, n := range append(slices.Clone(plan.Start), plan.Restart...) {
			if _, ok := fleet[n]; ok {
				t.Fatalf("%s is started but runs", n)
			}
			fleet[n] = newMap[n]
		}
		for _, n := range plan.Adjust {
			if oldMap[n] == newMap[n] {
				t.Fatalf("%s is adjusted without a change", n)
			}
			c := fleet[n]
			c.Adjustable = newMap[n].Adjustable
			fleet[n] = c
		}
		if !maps.Equal(fleet, newMap) {
			t.Fatalf("the plan leads to %v, want %v", fleet, newMap)
		}
		for _, n := range plan.Restart {
			c := oldMap[n]
			if c.Adjustable = newMap[n].Adjustable; c == newMap[n] {
				t.Fatalf("%s is restarted without need", n)
			}
		}
	})
}
