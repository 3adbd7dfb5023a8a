// Command memferry moves memory between machines; see `memferry help`.
package main

import (
	"os"

	"github.com/memferry/memferry/internal/cli"
)

func main() { os.Exit(cli.Main(cli.OSEnv())) }
