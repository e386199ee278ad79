"""HumanEval: write a Python function that passes its tests, which run in the sandbox.

The program that decides is the imports of the prompt, the code of the answer (its first fenced
block, or all of it), and the problem's tests (SPEC section 9). It must run to its end: an answer
that leaves early, by `sys.exit()` say, has passed no test.
"""

from __future__ import annotations

import re

from archerchat.sandbox.executor import SandboxResult, run_sandboxed
from archerchat.tasks.base import Task
from archerchat.tasks.conversation import Conversation, assistant, user
from archerchat.tasks.hub import HUMANEVAL, TaskFiles

_FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
_IMPORT = re.compile(r"^(?:import|from)\s.*$", re.MULTILINE)


def extract_code(completion: str) -> str:
    """Return the first fenced block of `completion`, or all of it where there is none."""
    block = _FENCE.search(completion)
    return (block[1] if block else completion).strip("\n")


def extract_imports(prompt: str) -> str:
    """Return the import lines that `prompt` begins with, up to its first definition."""
    head = re.split(r"^(?:def|class|async def)\s", prompt, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join(_IMPORT.findall(head))


class HumanEvalTask(Task):
    """164 functions to complete.

    Args:
        timeout_s: seconds that an answer's tests may take.
    """

    name = "HumanEval"

    def __init__(self, files: TaskFiles, split: str = "test", timeout_s: float = 5.0) -> None:
        self.split = split
        self._timeout_s = timeout_s
        self._rows = files.rows(HUMANEVAL, split)

    def num_examples(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Conversation:
        row = self._rows[index]
        solution = f"```python\n{row['prompt']}{row['canonical_solution']}\n```"
        return {
            "messages": [user(row["prompt"]), assistant(solution)],
            "entry_point": row["entry_point"],
            "test": row["test"],
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return self.run(conversation, completion).outcome == "completed"

    def run(self, conversation: Conversation, completion: str) -> SandboxResult:
        """Run the tests on `completion` and return how that went.

        Raises:
            SandboxError: there is no sandbox on this machine.
        """
        return run_sandboxed(self.build_program(conversation, completion), self._timeout_s)

    def build_program(self, conversation: Conversation, completion: str) -> str:
        """Return the program that ends normally if `completion` passes the tests."""
        return "\n\n".join(
            [
                extract_imports(conversation["messages"][0]["content"]),
                extract_code(completion),
                conversation["test"],
                f"check({conversation['entry_point']})\n",
            ]
        )
