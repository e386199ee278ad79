"""Chat evaluation: what a model that converses answers rightly, and ChatCORE (SPEC section 9).

`categorical` compares the logits of a question's letters, many questions in a batch; `generative`
lets the engine write answers, with the calculator, many at a time; `evaluate` runs a task's share
of a rank and adds the ranks up; `results` holds the figures, their intervals and ChatCORE.
"""
