"""CORE: 22 in-context tasks, exact and fast (SPEC section 9).

`bundle` reads the tasks, `prompts` renders and tokenizes them, `trees` cuts an example's prompts
into what they share and what they do not, `layout` and `forward` run many trees at once, and
`evaluate` goes through the tasks, keeps what is done and adds it up. `plain` computes the same one
example at a time and is what the rest is checked against.
"""
