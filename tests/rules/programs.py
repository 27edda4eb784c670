"""Reading compiled programs: how many matrix products wait for one another."""

import re
from typing import Any

import jax

HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")


def longest_chain(function: Any, *args: Any) -> int:
    """The most matrix products that one of them waits for, itself included, when compiled.

    The body of a loop counts once, so what is asked about must not loop over time.
    """
    text = jax.jit(function).lower(*args).compile().as_text()
    bodies: dict[str, list[tuple[str, str]]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            current = head[1]
            bodies[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current and (found := LINE.match(line)):
            bodies[current].append((found[1], found[2]))
    known: dict[str, int] = {}

    def through(name: str) -> int:
        """The longest chain inside a computation."""
        if name not in known:
            depth: dict[str, int] = {}
            for value, said in bodies[name]:
                read = (depth[word] for word in re.findall(r"[\w.\-]+", said) if word in depth)
                waits = max(read, default=0)
                own = 1 if is_product(said) else 0
                inside = max((through(called) for called in CALLED.findall(said)), default=0)
                depth[value] = waits + own + inside
            known[name] = max(depth.values(), default=0)
        return known[name]

    return through(entry)


def is_product(said: str) -> bool:
    """Whether an instruction multiplies matrices, by XLA itself or by a library it calls."""
    library = "custom-call(" in said and re.search(r"matmul|dot|gemm", said)
    return bool(re.search(r"\bdot\(", said) or library)
