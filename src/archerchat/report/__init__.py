"""Reports from journals and results: what ran, what came of it, and what it took.

Only a run's files are read, so a report can be made at any time and on any machine that has them;
what is missing is left out.
"""
