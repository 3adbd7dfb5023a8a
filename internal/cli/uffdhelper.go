package cli

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/frontend/uffd"
)

// uffdHelperCmd serves the memory of another program, which uses the package
// frontend/uffd and has no helper of its own.
func (a *app) uffdHelperCmd() *cobra.Command {
	return &cobra.Command{
		Use:   uffd.HelperCommand,
		Short: "Serve the memory of the program that started this",
		Long: `Serve the memory of the program that started this. Programs that use the
package frontend/uffd start it themselves, and it ends with them.`,
		Hidden: true,
		Args:   positional(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			helped, err := uffd.Helper(func(ctx context.Context, url string) (memferry.Backend, error) {
				return a.open(ctx, url, backend.Options{})
			})
			if !helped {
				return &usageError{cmd.CommandPath(), errors.New("this is not for people: programs that use memory start it themselves")}
			}
			return err
		},
	}
}
