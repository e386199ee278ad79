"""The training report: what ran, what came of it, and what it took, from journals and results.

    archerchat report d12                  # under ~/.cache/archerchat/reports/d12
    archerchat report scaling d6 d8 d10    # a law over several runs

`runs` reads the journals and `results` the evaluations; `spending` adds up time and money;
`training_report` and `scaling_report` turn them into a `document`, which `html` and `markdown`
write down. Nothing of a run but its files is needed, so that a report can be made at any time and
on any machine that has them; what is absent is left out.
"""
