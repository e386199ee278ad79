"""HumanEval: write a Python function that passes its tests, which run in the sandbox.

The program that decides is the imports of the prompt, the code of the answer, and the problem's
tests (SPEC section 9). It must run to its end: an answer that exits early, such as by `sys.exit()`,
fails. The reference's rule takes the first fenced block without a language or in Python as the
code, or the whole answer if there is none. The lenient rule pairs fences line by line, in any
language, accepts an unclosed last fence, and takes the block that defines the function.
"""

from __future__ import annotations

import re

from archerchat.sandbox.executor import SandboxResult, run_sandboxed
from archerchat.tasks.conversation import Conversation, assistant, user
from archerchat.tasks.hub import Row, TableTask

_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"\s*```[`\s]*(\w*)")
_IMPORT = re.compile(r"^(?:import|from)\s.*$", re.MULTILINE)


def extract_code(completion: str) -> str:
    """Return the first fenced block of `completion`, or all of it if there is none."""
    block = _BLOCK.search(completion)
    return (block[1] if block else completion).strip("\n")


def extract_code_leniently(completion: str, entry_point: str) -> str:
    """Return the fenced block that defines `entry_point`, else the first, else all."""
    blocks: list[list[str]] = []
    is_open = False
    for line in completion.split("\n"):
        fence = _FENCE.match(line)
        if fence is None and is_open:
            blocks[-1].append(line)
        elif fence:
            is_open = not is_open or bool(fence[1])  # a fence that names a language begins a block
            if is_open:
                blocks.append([])
    codes = ["\n".join(lines) for lines in blocks] or [completion]
    definition = re.compile(rf"^(?:async )?(?:def|class)\s+{entry_point}\b", re.MULTILINE)
    return next(filter(definition.search, codes), codes[0]).strip("\n")


def extract_imports(prompt: str) -> str:
    """Return the import lines that `prompt` begins with, up to its first definition."""
    head = re.split(r"^(?:def|class|async def)\s", prompt, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join(_IMPORT.findall(head))


class HumanEvalTask(TableTask):
    """164 functions to complete."""

    name = "HumanEval"
    is_lenient = True
    timeout_s = 5.0
    """Seconds that an answer's tests may take."""

    def render(self, row: Row) -> Conversation:
        solution = f"```python\n{row['prompt']}{row['canonical_solution']}\n```"
        return {
            "messages": [user(row["prompt"]), assistant(solution)],
            "entry_point": row["entry_point"],
            "test": row["test"],
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return self.run(conversation, extract_code(completion)).outcome == "completed"

    def evaluate_leniently(self, conversation: Conversation, completion: str) -> bool:
        code = extract_code_leniently(completion, conversation["entry_point"])
        tried = code == extract_code(completion)  # and failed, by `evaluate`
        return not tried and self.run(conversation, code).outcome == "completed"

    def run(self, conversation: Conversation, code: str) -> SandboxResult:
        """Run the tests on `code` and return the result.

        Raises:
            SandboxError: there is no sandbox on this machine.
        """
        imports = extract_imports(conversation["messages"][0]["content"])
        check = f"check({conversation['entry_point']})\n"
        program = "\n\n".join([imports, code, conversation["test"], check])
        return run_sandboxed(program, self.timeout_s)
