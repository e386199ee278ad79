"""Readers of other tools' files: each makes run directories, which `endlex sync` ships."""
