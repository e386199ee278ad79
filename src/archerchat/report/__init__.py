"""The training report: what ran, what came of it, and what it took, from journals and results.

    archerchat report d12                  # to reports/d12 in ArcherChat's home
    archerchat report scaling d6 d8 d10    # a law over several runs

Only a run's files are read, so a report can be made at any time and on any machine that has them;
what is missing is left out.
"""
