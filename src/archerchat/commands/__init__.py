"""The subcommands: a frozen config and a function each, free of argument parsing.

What stops a command is raised as an `ArcherChatError`, and the command line prints it: a
`UsageError` for arguments that name nothing or contradict each other; a `DataError`,
`TokenizerError` or `CheckpointError` for what is missing or damaged on the disk, or cannot be
downloaded.
"""
