package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/backend/all"
	"github.com/memferry/memferry/internal/lifecycle"
)

// app is one run of the command.
type app struct {
	env  Env
	logs logFlags
	sink *logSink
	log  *slog.Logger
	sig  *lifecycle.Signals
}

// Main runs the command that env describes and returns its exit status.
func Main(env Env) int {
	env = env.withDefaults()
	a := &app{env: env, sink: &logSink{w: env.Stderr}, log: slog.New(slog.DiscardHandler)}
	a.sig = env.Watch(context.Background())
	defer a.sig.Stop()
	root := a.rootCmd()
	err := root.ExecuteContext(a.sig.Context())
	if err == nil {
		return exitOK
	}
	if env.Readiness.Background() {
		env.Readiness.Failed(strings.TrimPrefix(line(err), "memferry: "))
	}
	report(env.Stderr, err)
	return statusOf(err)
}

const rootLong = `memferry moves memory between machines.

A region is a fixed-size run of bytes: process memory, a file, a disk. memferry
makes a remote one usable here at once, as a file; pulls the rest in the
background; and pushes writes back.

  serve    offers regions over the NBD protocol
  mount    makes a remote region a local file
  copy     moves one region into another

A region is named by a URL:

  PATH, file:///PATH               a file or block device
  mem:?size=SIZE                   memory
  dir:///PATH?size=SIZE&chunk=SIZE a directory of chunks
  nbd://HOST[:PORT]/EXPORT         an export of an NBD server
  nbd+unix:///EXPORT?socket=PATH   the same over a UNIX socket

Sizes are written as people write them: 512K, 1.5G, 64 MiB; all prefixes are
powers of 1024. Durations are written as 500ms, 30s, 2m.

Exit status: 0 if all went well, 1 if something failed (a URL that can't be
opened is one such thing, whatever is wrong with it), 2 if a command, an
argument or a flag was wrong. Where something fails, the last line on standard
error names the thing, the reason, and what to do next.`

func (a *app) rootCmd() *cobra.Command {
	root := &cobra.Command{
		Use:   "memferry",
		Short: "Move memory between machines",
		Long:  rootLong,
		Example: `  memferry serve disk=/srv/disk.img
  memferry mount nbd://server/disk /mnt/disk
  memferry umount /mnt/disk`,
		Args:          a.subcommandOnly,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
		// As far as one typing error goes.
		SuggestionsMinimumDistance: 2,
		PersistentPreRun: func(*cobra.Command, []string) {
			a.log = a.logs.logger(a.sink)
		},
	}
	root.SetArgs(a.env.Args)
	root.SetIn(a.env.Stdin)
	root.SetOut(a.env.Stdout)
	root.SetErr(a.env.Stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &usageError{cmd.CommandPath(), err}
	})
	a.logs.format = enum{"text", []string{"text", "json"}}
	a.logs.level = enum{"info", []string{"debug", "info", "warn", "error"}}
	pf := root.PersistentFlags()
	pf.Var(&a.logs.format, "log-format", "how log lines are written to standard error")
	pf.Var(&a.logs.level, "log-level", "the least important kind of line to log")
	pf.BoolVarP(&a.logs.verbose, "verbose", "v", false, "the same as --log-level=debug")
	complete(root, "log-format", a.logs.format.allowed)
	complete(root, "log-level", a.logs.level.allowed)
	root.AddCommand(
		a.serveCmd(), a.mountCmd(), a.umountCmd(), a.statusCmd(),
		a.lsCmd(), a.infoCmd(), a.copyCmd(),
		a.doctorCmd(), a.demoCmd(), a.versionCmd(), a.manCmd(), a.uffdHandlerCmd(), a.uffdHelperCmd(),
	)
	root.InitDefaultCompletionCmd(a.env.Args...)
	if c, _, err := root.Find([]string{"completion"}); err == nil {
		c.Args, c.RunE = a.subcommandOnly, root.RunE // cobra's own prints its help, and ends with 0
	}
	root.InitDefaultHelpCmd()
	root.InitDefaultHelpFlag()
	return root
}

// subcommandOnly makes a word that is no command a usage error.
func (a *app) subcommandOnly(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	err := fmt.Errorf("unknown command %q", args[0])
	if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
		err = fmt.Errorf("%w, did you mean %s?", err, orList(s))
	}
	return &usageError{cmd.CommandPath(), err}
}

// positional wraps an argument check so that its failure is a usage error that
// says what the command wants.
func positional(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if check(cmd, args) == nil {
			return nil
		}
		return &usageError{cmd.CommandPath(), fmt.Errorf("%d arguments: want `%s`", len(args), cmd.UseLine())}
	}
}

func usage(cmd *cobra.Command, format string, a ...any) error {
	return &usageError{cmd.CommandPath(), fmt.Errorf(format, a...)}
}

func complete(cmd *cobra.Command, flag string, words []string) {
	// It fails only for a flag that does not exist, and then completes nothing.
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
}

// openTimeout bounds opening a backend where the user gave no other bound.
const openTimeout = 30 * time.Second

func (a *app) backends() *backend.Registry {
	if a.env.Backends != nil {
		return a.env.Backends
	}
	return all.Registry()
}

// open opens the backend at url, within the user's time limit.
func (a *app) open(ctx context.Context, url string, o backend.Options) (memferry.Backend, error) {
	if o.Logger == nil {
		o.Logger = a.log
	}
	limit := o.IOTimeout
	if limit <= 0 {
		limit = openTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %v: %w", limit, memferry.ErrTimeout))
	defer cancel()
	b, err := a.backends().Open(ctx, url, o)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, about(url, err)
	}
	return b, nil
}
