"""What is asked of a target that is drafted for: code to go on with, and code to write once more with one name changed.

All of it comes from files that the demo models never saw. An edit request is a whole function, then the same function
with one of its names changed, begun: enough of it stands there that going on means copying. It ends where the copy
would. Code requests end nowhere in particular; nothing in them need be copied.

Knows: held-out functions, a tokenizer. Does not know: who answers, or how fast.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples" / "models"
SPAN_TOKENS = (
    200,
    340,
)  # of a function: it, its copy and the answer fit what the demo models were trained on
SPAN_CHARACTERS = (2 * SPAN_TOKENS[0], 8 * SPAN_TOKENS[1])  # what is not even encoded lies outside
BEGUN_SHARE = 0.4  # of the edited copy that is given
CODE_PROMPT_SHARE = 0.6  # of a function that is given where the rest is to be made up
LEAST_USES = 3  # of the name that is changed: some before the answer, some in it
MAX_PERIOD_TOKENS = 63
REPEATED_TOKENS = 24  # of a period that must have come twice over so many tokens to count as a loop
WORKLOADS = ("code", "edit")

_NAME = re.compile(r"\b[a-z_][A-Za-z_0-9]{3,}\b")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `most_tokens`: where its answer has to end to be what the workload is called."""

    workload: str
    prompt: str
    temperature: float
    most_tokens: int


def requests(tokenizer: Tokenizer, count: int, temperatures: Sequence[float], tokens: int) -> list[Asked]:
    """`count` of each workload and temperature, no two from the same function."""
    wanted = len(WORKLOADS) * len(temperatures) * count
    functions = list(_functions(tokenizer))
    chosen = iter(functions[:: max(1, len(functions) // wanted)][:wanted])
    found: list[Asked] = []
    for _ in range(count):
        for temperature in temperatures:
            found.append(_code(next(chosen), temperature, tokens))
            found.append(_edit(tokenizer, next(chosen), temperature, tokens))
    return sorted(found, key=lambda asked: WORKLOADS.index(asked.workload))


def loops(ids: Sequence[int]) -> bool:
    """Whether the end of `ids` repeats itself with a period below 64 tokens: a looping model flatters every drafter."""
    for period in range(1, MAX_PERIOD_TOKENS + 1):
        length = max(period, REPEATED_TOKENS)
        if len(ids) >= length + period and list(ids[-length:]) == list(ids[-length - period : -period]):
            return True
    return False


def renamed(function: str) -> str:
    """`function` with its most used name changed, everywhere."""
    name = _most_used_name(function)
    return re.sub(rf"\b{re.escape(name)}\b", f"new_{name}", function)


def _code(function: str, temperature: float, tokens: int) -> Asked:
    return Asked("code", function[: int(CODE_PROMPT_SHARE * len(function))], temperature, tokens)


def _edit(tokenizer: Tokenizer, function: str, temperature: float, tokens: int) -> Asked:
    edited = renamed(function)
    lines = edited.splitlines(keepends=True)
    # Without the last line's end: this tokenizer has one id for it and the next line's indentation, and after a bare
    # end the target takes up unindented text of its own.
    begun = "".join(lines[: max(1, int(BEGUN_SHARE * len(lines)))]).rstrip("\n")
    left = len(tokenizer.encode(edited[len(begun) :]).ids)
    return Asked("edit", f"{function}\n\n\n{begun}", temperature, min(left, tokens))


def _functions(tokenizer: Tokenizer) -> Iterator[str]:
    """Whole functions of the right length in held-out files, one of each file at most, in a fixed order."""
    sys.path.insert(0, str(EXAMPLES))
    from text import standard_library  # type: ignore[import-not-found]

    for file in standard_library():
        found = _function(tokenizer, file.text) if file.is_held_out else None
        if found is not None:
            yield found


def _function(tokenizer: Tokenizer, text: str) -> str | None:
    try:
        module = ast.parse(text)
    except SyntaxError:
        return None
    lines = text.splitlines(keepends=True)
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            source = "".join(lines[node.lineno - 1 : node.end_lineno]).rstrip()
            if not _within(len(source), SPAN_CHARACTERS) or not _most_used_name(source):
                continue
            if _within(len(tokenizer.encode(source).ids), SPAN_TOKENS):
                return source
    return None


def _within(count: int, limits: tuple[int, int]) -> bool:
    return limits[0] <= count <= limits[1]


def _most_used_name(function: str) -> str:
    """ "" where no name is used often enough."""
    names = Counter(_NAME.findall(function))
    for name, uses in names.most_common():
        if not keyword.iskeyword(name) and not hasattr(builtins, name) and name != "self":
            return name if uses >= LEAST_USES else ""
    return ""
