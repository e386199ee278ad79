"""What each subcommand of `endlex` does; arguments come parsed from `endlex.cli`."""
