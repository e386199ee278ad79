"""The subcommands: a frozen config and a function each, free of argument parsing."""
