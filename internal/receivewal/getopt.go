package receivewal

import (
	"fmt"
	"strings"
)

// option is one that the command line may have.
type option struct {
	long     string
	short    byte // 0: none
	argument bool // whether it takes one
	set      func(o *Options, argument string) error
}

// getopt goes over a command line as GNU's getopt_long does, and sets what the
// options say, in their order. It returns the arguments that are no options, and in
// error what getopt_long would complain about, in its words. (pflag reads
// "-D=/dir" and "--no-loop=0" another way, and knows no abbreviations.)
func getopt(table []option, args []string, o *Options) (rest []string, err error) {
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		switch {
		case arg == "--":
			return append(rest, args...), nil
		case strings.HasPrefix(arg, "--"):
			args, err = longOption(table, arg, args, o)
		case len(arg) > 1 && arg[0] == '-':
			args, err = shortOptions(table, arg[1:], args, o)
		default:
			rest = append(rest, arg)
		}
		if err != nil {
			return nil, err
		}
	}
	return rest, nil
}

// longOption sets the option of arg, which begins with "--", and returns the
// arguments that follow it.
func longOption(table []option, arg string, args []string, o *Options) ([]string, error) {
	name, value, given := strings.Cut(arg[2:], "=")
	found, err := findLong(table, name, arg)
	switch {
	case err != nil:
		return nil, err
	case given && !found.argument:
		return nil, complaint("option '--%s' doesn't allow an argument", found.long)
	case !found.argument || given:
		return args, found.set(o, value)
	case len(args) == 0:
		return nil, complaint("option '--%s' requires an argument", found.long)
	}
	return args[1:], found.set(o, args[0])
}

// findLong finds a long option by its name or a unique beginning of it.
func findLong(table []option, name, arg string) (option, error) {
	var candidates []option
	for _, opt := range table {
		if opt.long == name {
			return opt, nil
		}
		if strings.HasPrefix(opt.long, name) {
			candidates = append(candidates, opt)
		}
	}
	switch len(candidates) {
	case 0:
		return option{}, complaint("unrecognized option '%s'", arg)
	case 1:
		return candidates[0], nil
	}
	text := fmt.Sprintf("option '%s' is ambiguous; possibilities:", arg)
	for _, opt := range candidates {
		text += fmt.Sprintf(" '--%s'", opt.long)
	}
	return option{}, complaint("%s", text)
}

// shortOptions sets a cluster of options, of which the last may have an argument,
// and returns the arguments that follow it.
func shortOptions(table []option, cluster string, args []string, o *Options) ([]string, error) {
	for ; cluster != ""; cluster = cluster[1:] {
		found, ok := findShort(table, cluster[0])
		switch {
		case !ok:
			return nil, complaint("invalid option -- '%c'", cluster[0])
		case !found.argument:
			if err := found.set(o, ""); err != nil {
				return nil, err
			}
		case len(cluster) > 1:
			return args, found.set(o, cluster[1:])
		case len(args) == 0:
			return nil, complaint("option requires an argument -- '%c'", cluster[0])
		default:
			return args[1:], found.set(o, args[0])
		}
	}
	return args, nil
}

func findShort(table []option, short byte) (option, bool) {
	for _, opt := range table {
		if opt.short == short {
			return opt, true
		}
	}
	return option{}, false
}
