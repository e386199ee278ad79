"""Chat evaluation: what a model that converses answers rightly, and ChatCORE (SPEC section 9).

`evaluate` runs a task's share of a rank and adds the ranks up; letters are chosen there by their
logits. `generative` lets the engine write answers, with the calculator, many at a time; `results`
holds the figures, their intervals and ChatCORE.
"""
