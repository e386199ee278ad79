"""Other projects' model formats, read and written."""
