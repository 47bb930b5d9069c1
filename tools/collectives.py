"""Reads from a compiled program's HLO text how much its chips send each other.

Loops count as often as they run. The grammar is that of XLA's HLO text
(openxla.org/xla/operation_semantics, "Collective" operations).
"""

import functools
import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

# Bytes that a chip receives in a ring of n chips, as a factor on the bytes of the whole array.
RECEIVED = {
    "all-gather": lambda n: (n - 1) / n,  # of the result
    "reduce-scatter": lambda n: (n - 1) / n,  # of the operand
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
BITS = {"pred": 8, "bf16": 16}  # of types whose name does not end with their bits

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations)="
    r"\{?((?:%[\w.\-]+,? ?)+)"
)
NAME = re.compile(r"%([\w.\-]+)")
ARRAY = re.compile(r"\b(pred|bf16|[suf](\d+))\[([\d,]*)\]")


class Traffic(NamedTuple):
    """Counts one kind of collective in one run of a program.

    calls: how often it runs. received: bytes that arrive at one chip, all calls together.
    """

    calls: int
    received: float


class Instruction(NamedTuple):
    """Holds one line of a program; `rest` is its operands and attributes."""

    name: str
    shape: str
    opcode: str
    rest: str


Body = dict[str, Instruction]  # of a computation, by name and in order; the last one is its result


def collectives(text: str) -> dict[str, Traffic]:
    """Returns the traffic of each kind of collective in one run of a compiled module's text.

    An asynchronous collective that the compiler for TPUs splits over several fusions counts once,
    where it starts. Kinds follow the program: a gather that the compiler writes as a sum counts as
    a sum.

    Raises:
      ValueError: a collective in a loop of unknown length.
    """
    bodies = _computations(text)
    runs = _runs(bodies)
    calls: Counter[str] = Counter()
    received: Counter[str] = Counter()
    for computation, body in bodies.items():
        times = runs[computation]
        if not times or _continues_another(computation, body):
            continue
        for i in body.values():
            kind = i.opcode.removesuffix("-start")
            if kind not in RECEIVED:
                continue
            if math.isnan(times):
                raise ValueError(
                    f"{i.name}: is in a loop, and the program does not say how often it runs"
                )
            chips = 1 if kind == "collective-permute" else _group_size(i.rest)
            calls[kind] += times
            received[kind] += times * _whole_bytes(i, chips) * RECEIVED[kind](chips)
    return {kind: Traffic(calls[kind], received[kind]) for kind in RECEIVED if calls[kind]}


def _computations(text: str) -> dict[str, Body]:
    """Returns the computations of a module by name; the entry's name is ""."""
    found: dict[str, Body] = {}
    body: Body = {}
    for line in text.splitlines():
        start = COMPUTATION.match(line)
        instruction = INSTRUCTION.match(line)
        if start:
            body = found.setdefault("" if start[1] else start[2], {})
        elif instruction:
            body[instruction[1]] = Instruction(*instruction.groups())
    return found


def _continues_another(computation: str, body: Body) -> bool:
    """Tells whether a computation is a later part of a collective that another one starts."""
    is_end = any('"AsyncCollectiveDone"' in i.rest for i in body.values())
    return is_end or computation.startswith("async_collective_fusion")


def _runs(bodies: dict[str, Body]) -> dict[str, float]:
    """Returns how often each computation runs, NaN where unknown; every branch counts as taken."""
    callers = defaultdict(list)
    for computation, body in bodies.items():
        for i in body.values():
            times = _trips(bodies, i) if i.opcode == "while" else 1
            for called in CALLED.findall(i.rest):
                for name in NAME.findall(called):
                    callers[name].append((computation, times))

    @functools.cache
    def count(computation: str) -> float:
        if computation == "":
            return 1
        return sum(count(caller) * times for caller, times in callers[computation])

    return {computation: count(computation) for computation in bodies}


def _trips(bodies: dict[str, Body], loop: Instruction) -> float:
    """Returns how often a loop's body runs; NaN where that depends on data.

    Backends for CPU and GPU write it down. For TPU it follows from a counter that begins at 0: its
    bound in the condition, and its step in the body.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = bodies[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    body = bodies[re.search(r"body=%?([\w.\-]+)", loop.rest)[1]]
    try:
        compared = [i for i in condition.values() if i.opcode == "compare"]
        (test,) = [i for i in compared if "direction=LT" in i.rest]
        counter, bound = _operands(test)
        index = int(re.search(r"index=(\d+)", condition[counter].rest)[1])
        result = list(body.values())[-1]
        advance = body[_operands(result)[index]]
        (step,) = [body[name] for name in _operands(advance) if body[name].opcode == "constant"]
        if advance.opcode != "add":
            return math.nan
        return math.ceil(_constant(condition[bound]) / _constant(step))
    except (KeyError, IndexError, TypeError, ValueError):  # of another form
        return math.nan


def _operands(i: Instruction) -> list[str]:
    return NAME.findall(i.rest.partition("), ")[0])


def _constant(i: Instruction) -> int:
    return int(i.rest.partition(")")[0])


def _group_size(attributes: str) -> int:
    """Returns how many chips are in one group of a collective; the text has three forms."""
    mesh = re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{([^}]*)\}", attributes)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if mesh:
        lengths = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # an axis, or a part of one
        return math.prod(int(part or lengths[axis]) for axis, part in axes)
    if iota:
        return int(iota[1])
    if listed:
        return listed[1].count(",") + 1
    raise ValueError(f"cannot read the groups of a collective: {attributes[:200]}")


def _whole_bytes(i: Instruction, chips: int) -> float:
    """Returns the bytes of the whole array of a collective in groups of some chips.

    Its shape is its result; where it starts an asynchronous one, often a tuple of operands and
    results.
    """
    sizes = _sizes(i.shape)
    match i.opcode:
        case "reduce-scatter":
            return sum(sizes) * chips
        # One of the two is the whole, the other one chip's part.
        case "all-gather-start" | "reduce-scatter-start":
            return sum(sizes) * chips / (chips + 1)
        case "all-to-all-start":
            return sum(sizes) / 2
        case "collective-permute-start":  # operand, result, counters
            return sizes[1]
        case _:  # all-reduce-start too has its result alone
            return sum(sizes)


def _sizes(shape: str) -> list[int]:
    """Returns the bytes of every array in a shape or tuple of shapes."""
    found = []
    for kind, bits, axes in ARRAY.findall(shape):
        lengths = [int(n) for n in axes.split(",") if n]
        found.append(math.prod(lengths) * int(bits or BITS[kind]) // 8)
    return found
