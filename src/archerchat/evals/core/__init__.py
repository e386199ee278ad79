"""CORE: 22 in-context tasks, exact and fast (SPEC section 9).

`bundle` finds and reads the tasks, `prompts` renders and tokenizes them and cuts an example's
prompts into what they share and what they do not, `layout` says which of their tokens run and see
each other, `scoring` runs many examples through the model at once and turns losses into outcomes,
and `evaluate` goes through the tasks, keeps what is done and adds it up. The tests check all
of it against one whole prompt at a time.
"""
