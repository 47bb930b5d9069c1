"""What a compiled program sends between chips: read from its HLO text, loops counted as often as they run.

The grammar is that of XLA's HLO text (openxla.org/xla/operation_semantics, "Collective" operations).
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

# Bytes that a chip receives, as a factor on the bytes of the whole array, for a group of n chips that uses a ring.
RECEIVED = {
    "all-gather": lambda n: (n - 1) / n,  # of the result
    "reduce-scatter": lambda n: (n - 1) / n,  # of the operand
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
WIDTH = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
WIDTH |= {"s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?((?:%[\w.\-]+,? ?)+)"
)


class Traffic(NamedTuple):
    """calls: how often in one run of the program. received: bytes that arrive at one chip, all calls together."""

    calls: int
    received: float


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


def collectives(text: str) -> dict[str, Traffic]:
    """Kind of collective -> its traffic in one run of a compiled module's text.

    An asynchronous collective that the compiler for TPUs put into several fusions counts once, where it starts. Kinds
    follow the program: where the compiler writes a gather as a sum, or a reduce-scatter as a ring of permutes, it
    stands under that name.

    Raises:
      ValueError: a collective in a loop of which the text does not say how often it runs.
    """
    bodies = computations(text)
    runs = _runs(bodies)
    calls: Counter[str] = Counter()
    received: Counter[str] = Counter()
    for name, body in bodies.items():
        if name.startswith("async_collective_fusion") or any('"AsyncCollectiveDone"' in i.rest for i in body):
            continue
        for i in body:
            kind = i.opcode.removesuffix("-start")
            if kind not in RECEIVED or not runs[name]:
                continue
            if math.isnan(runs[name]):
                raise ValueError(f"{i.name}: is in a loop of which the program does not say how often it runs")
            n = 1 if kind == "collective-permute" else _group(i.rest)
            calls[kind] += runs[name]
            received[kind] += runs[name] * _whole(i, n) * RECEIVED[kind](n)
    return {kind: Traffic(calls[kind], received[kind]) for kind in RECEIVED if calls[kind]}


def _whole(i: Instruction, n: int) -> float:
    """Returns the bytes of the whole array of a collective in groups of n: from its result, or, where it starts an
    asynchronous one, from a tuple of operands and results."""
    sizes = _sizes(i.shape)
    match i.opcode:
        case "reduce-scatter":
            return sum(sizes) * n
        case "all-gather-start" | "reduce-scatter-start":  # one of the two is the whole, the other an n-th of it
            return sum(sizes) * n / (n + 1)
        case "all-to-all-start":
            return sum(sizes) / 2
        case "collective-permute-start":  # counters stand behind the two
            return sizes[1]
        case _:  # all-reduce-start too has its result alone
            return sum(sizes)


def computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every computation by its name; the entry's name is ""."""
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            body = found.setdefault("" if start[1] else start[2], [])
        elif instruction := _INSTRUCTION.match(line):
            body.append(Instruction(*instruction.groups()))
    return found


def _runs(bodies: dict[str, list[Instruction]]) -> dict[str, float]:
    """How often each computation is run, NaN where that is not known; a branch counts as taken."""
    callers: dict[str, list[tuple[str, float]]] = {name: [] for name in bodies}
    for name, body in bodies.items():
        for i in body:
            times = _trips(bodies, i) if i.opcode == "while" else 1
            for called in _called(i.rest):
                callers[called].append((name, times))
    runs: dict[str, float] = {"": 1}

    def count(name: str) -> float:
        if name not in runs:
            runs[name] = sum(count(caller) * times for caller, times in callers[name])
        return runs[name]

    for name in bodies:
        count(name)
    return runs


def _called(rest: str) -> Iterator[str]:
    for group in _CALLED.finditer(rest):
        yield from re.findall(r"%([\w.\-]+)", group[1])


def _trips(bodies: dict[str, list[Instruction]], loop: Instruction) -> float:
    """How often a loop's body runs. Backends for CPU and GPU write it down; for TPU, it follows from the bound in the
    condition and the step in the body of a counter that begins at 0. NaN where it depends on data."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition, body = (bodies[re.search(rf"{part}=%?([\w.\-]+)", loop.rest)[1]] for part in ("condition", "body"))
    try:
        (test,) = (i for i in condition if i.opcode == "compare" and "direction=LT" in i.rest)
        counter, bound = _operands(test)
        index = int(re.search(r"index=(\d+)", _named(condition, counter).rest)[1])
        advance = _named(body, _operands(body[-1])[index])
        step = next(i for name in _operands(advance) if (i := _named(body, name)).opcode == "constant")
        assert advance.opcode == "add"
        return math.ceil(_value(_named(condition, bound)) / _value(step))
    except (AssertionError, StopIteration, TypeError, ValueError):
        return math.nan


def _named(body: list[Instruction], name: str) -> Instruction:
    return next(i for i in body if i.name == name)


def _operands(i: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", i.rest.partition("), ")[0])


def _value(constant: Instruction) -> int:
    return int(constant.rest.partition(")")[0])


def _sizes(shape: str) -> list[int]:
    """Bytes of every array in a shape or tuple of shapes."""
    arrays = re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", shape)
    return [WIDTH[kind] * math.prod(int(n) for n in axes.split(",") if n) for kind, axes in arrays if kind in WIDTH]


def _group(rest: str) -> int:
    """How many chips take part in one group of a collective, in the three forms that the text has for groups."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # an axis, or a part of one
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    raise ValueError(f"cannot read the groups of a collective: {rest[:200]}")
