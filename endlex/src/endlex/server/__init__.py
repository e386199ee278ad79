"""Endlex's server: a mirror of the journals, with a page to watch them on (`endlex[server]`)."""
