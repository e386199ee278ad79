"""CORE: 22 in-context tasks, exact and fast (SPEC section 9).

`bundle` finds and reads the tasks, `prompts` renders and tokenizes them and cuts an example's
prompts into what they share and what they do not, `layout` and `forward` run many examples at once,
`scoring` turns losses into outcomes, and `evaluate` goes through the tasks, keeps what is done and
adds it up. The tests check all of it against one whole prompt at a time.
"""
