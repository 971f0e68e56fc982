"""What a compiled program says of itself: its loops, its collectives, its memory traffic.

XLA's own cost analysis counts the body of a loop once, so that a model whose layers are scanned
seems to have one. Here the program's text is read, and a body counts as often as its loop runs.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Ends the names of those that go over the slower network.
BETWEEN_SLICES = " between slices"
# They move nothing, or what they contain is counted by itself.
FREE = {
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "parameter",
    "tuple",
    "while",
}
SLICES = {"dynamic-slice", "gather", "slice"}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|called_computations|"
    r"true_computation|false_computation)=\{?((?:%[\w.\-]+(?:, )?)+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: Its own.
        opcode: What it does.
        shape: Its result, an array or a tuple, as text.
        operands: The names of what it reads.
        attributes: What follows them, as text.
        root: Whether it is what the computation returns.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in one run of a program, on each device.

    Attributes:
        count: How often one is begun.
        bytes: What they work on: the gathered, reduced or exchanged arrays, whole.
        sent: Bytes that a device sends where they run along a ring.
    """

    count: int
    bytes: float
    sent: float


class Program:
    """A compiled program's text, taken apart.

    Args:
        text: What `jax.stages.Compiled.as_text` returns.

    Example:
        >>> import jax
        >>> text = jax.jit(lambda x: 2 * x).lower(1.0).compile().as_text()
        >>> Program(text).collectives()
        {}
    """

    def __init__(self, text: str) -> None:
        self.devices = int(_first(r"num_partitions=(\d+)", text, "1"))
        self._computations: dict[str, Computation] = {}
        self._entry = ""
        name, body = "", {}
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                name, body = header[2], {}
                self._entry = name if header[1] else self._entry
            elif line == "}":
                self._computations[name] = body
            elif name and (instruction := _instruction(line)):
                body[instruction.name] = instruction

    @functools.cached_property
    def endless(self) -> int:
        """Loops whose number of runs the text does not tell; their bodies count once."""
        return sum(
            self._trips(name, instruction) is None
            for name, instruction in self._instructions()
            if instruction.opcode == "while"
        )

    @functools.cached_property
    def runs(self) -> Mapping[str, int]:
        """How often each computation runs; every branch of a conditional counts."""
        runs: collections.Counter[str] = collections.Counter({self._entry: 1})
        # Callers stand after what they call.
        for name in reversed(self._computations):
            for instruction in self._computations[name].values():
                trips = self._trips(name, instruction) if instruction.opcode == "while" else 1
                for _, called in _calls(instruction):
                    runs[called] += runs[name] * (trips or 1)
        return runs

    def collectives(self) -> dict[str, Traffic]:
        """The collectives by kind.

        A TPU cuts one into steps, between which it computes; those of a chain count as one. Those
        between slices, which the hosts take care of, have kinds of their own, such as "all-reduce
        between slices".

        Returns:
            Kind to traffic, of the kinds that occur.
        """
        found: dict[str, Traffic] = {}
        chains = set()
        for name, instruction in self._instructions():
            chain = _first(r'chain_id="(\w+)"', instruction.attributes, "")
            kind, group = _collective(name, instruction, self.devices)
            if not kind or chain in chains or not self.runs[name]:
                continue
            chains |= {chain} - {""}
            size = self._operand_bytes(self._computations[name], instruction)
            size *= group if kind.startswith("all-gather") else 1
            sent = size * {"collective-permute": 1, "all-reduce": 2 * (group - 1) / group}.get(
                kind.removesuffix(BETWEEN_SLICES), (group - 1) / group
            )
            times, old = self.runs[name], found.get(kind, Traffic(0, 0, 0))
            found[kind] = Traffic(
                old.count + times, old.bytes + times * size, old.sent + times * sent
            )
        return dict(sorted(found.items()))

    def memory_bytes(self) -> float:
        """Bytes that a device reads from and writes to its memory, on-chip memory left out.

        What is fused is counted at the edges of the fusion, of a slice that part alone.

        Returns:
            An estimate.
        """
        return sum(
            self.runs[name] * self._moved(self._computations[name], instruction)
            for name in self._top_level()
            for instruction in self._computations[name].values()
            if instruction.opcode not in FREE
        )

    def _instructions(self) -> Iterator[tuple[str, Instruction]]:
        for name, computation in self._computations.items():
            for instruction in computation.values():
                yield name, instruction

    def _top_level(self) -> set[str]:
        """The computations that are not inside a fusion or a reduction."""
        found, waiting = set(), [self._entry]
        while waiting:
            found.add(name := waiting.pop())
            for instruction in self._computations[name].values():
                if instruction.opcode in ("while", "conditional", "call"):
                    waiting += [called for _, called in _calls(instruction)]
        return found

    def _trips(self, name: str, loop: Instruction) -> int | None:
        """How often a loop of this computation runs: as noted, or as its counter tells."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        calls = dict(_calls(loop))
        condition, body = (self._computations[calls[part]] for part in ("condition", "body"))
        test, carry = _root(condition), self._computations[name].get(loop.operands[0])
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter = _first(r"index=(\d+)", condition[test.operands[0]].attributes, "")
        if not counter or carry is None or {carry.opcode, _root(body).opcode} != {"tuple"}:
            return None
        following = body.get(_root(body).operands[int(counter)])
        if following is None or following.opcode != "add":
            return None
        limit = _constant(condition, test.operands[1])
        start = _constant(self._computations[name], carry.operands[int(counter)])
        step = _constant(body, following.operands[1])
        if limit is None or start is None or not step:
            return None
        return -(-(limit - start) // step)

    def _operand_bytes(self, computation: Computation, instruction: Instruction) -> float:
        return sum(
            shape_bytes(computation[operand].shape)
            for operand in instruction.operands
            if operand in computation
        )

    def _moved(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes between a device's memory and one instruction."""
        operands = [
            shape_bytes(computation[name].shape, off_chip=True) if name in computation else 0.0
            for name in instruction.operands
        ]
        result = shape_bytes(instruction.shape, off_chip=True)
        opcode = instruction.opcode
        if opcode.endswith("-start"):
            return sum(operands)
        if opcode.endswith("-done"):
            return result
        if opcode in SLICES:
            return 2 * min(result, operands[0])
        if opcode == "dynamic-update-slice":
            return 2 * operands[1]
        if opcode == "fusion":
            fused = self._computations[dict(_calls(instruction))["calls"]]
            return sum(map(min, operands, _read_in_fusion(fused))) + min(
                result, _written_in_fusion(fused)
            )
        return sum(operands) + result


def shape_bytes(shape: str, *, off_chip: bool = False) -> float:
    """The bytes of an array or of all arrays of a tuple, padding of tiles left out.

    Args:
        shape: As the program has it.
        off_chip: Only of arrays that lie in the device's main memory.

    Returns:
        The number.

    Example:
        >>> shape_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[])")
        16.0
        >>> shape_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[])", off_chip=True)
        4.0
    """
    total = 0.0
    for kind, sizes, layout in _ARRAY.findall(shape):
        if off_chip and re.search(r"S\([1-9]\)", layout):
            continue
        bits = 8 if kind == "pred" else int(_first(r"^[a-z]+(\d+)", kind, "0"))
        total += bits / 8 * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not match:
        return None
    rest = match[3]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside = rest[len(opcode) : end]
    attributes = inside + rest[end:] if opcode in ("constant", "parameter") else rest[end:]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(match[2], opcode, shape, operands, attributes, bool(match[1]))


def _closing(text: str, start: int) -> int:
    """One past the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    return len(text)


def _calls(instruction: Instruction) -> list[tuple[str, str]]:
    """How an instruction calls which computations."""
    return [
        (how, name)
        for how, names in _CALLED.findall(instruction.attributes)
        for name in re.findall(r"%([\w.\-]+)", names)
    ]


def _collective(name: str, instruction: Instruction, devices: int) -> tuple[str, int]:
    """Its kind, empty if it is none, and how many take part with each other."""
    kind, attributes = instruction.opcode.removesuffix("-start"), instruction.attributes
    slices = _first(r'_xla_megascale_target="\{([\d,:]+)\}', attributes, "")
    if kind == "send" and slices:
        first, _, last = slices.partition(":")
        count = int(last) - int(first) + 1 if last else len(slices.split(","))
        kind = _first(r'_xla_megascale_transfer_type="(\w+)"', attributes, "send")
        return kind.lower().replace("_", "-") + BETWEEN_SLICES, count
    if kind not in COLLECTIVES:
        return "", 1
    if name.startswith("all-reduce-scatter"):  # what a TPU calls it
        kind = "reduce-scatter"
    return kind, _group_size(attributes, devices)


def _group_size(attributes: str, devices: int) -> int:
    """The devices that take part in a collective with each other."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(tiled[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    return devices


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def _constant(computation: Computation, name: str) -> int | None:
    """The value of an integer that may be copied before it is used."""
    found = computation.get(name)
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = computation.get(found.operands[0])
    value = _first(r"^\((\d+)\)", found.attributes, "") if found is not None else ""
    return int(value) if value and found is not None and found.opcode == "constant" else None


def _read_in_fusion(fused: Computation) -> list[float]:
    """The most that a fusion reads of each operand: of one that it slices, the slices."""
    read = {}
    for parameter in fused.values():
        if parameter.opcode != "parameter":
            continue
        users = [use for use in fused.values() if parameter.name in use.operands]
        first = bool(users) and all(use.operands[0] == parameter.name for use in users)
        most = math.inf
        if first and all(use.opcode in SLICES for use in users):
            most = sum(shape_bytes(use.shape) for use in users)
        elif first and all(use.opcode == "dynamic-update-slice" for use in users):
            most = 0.0
        read[int(_first(r"^\((\d+)\)", parameter.attributes, "0"))] = most
    return [read[number] for number in sorted(read)]


def _written_in_fusion(fused: Computation) -> float:
    """The most that it writes: of an array that it updates, the update."""
    root = _root(fused)
    if root.opcode == "dynamic-update-slice":
        return shape_bytes(fused[root.operands[1]].shape)
    return math.inf


def _first(pattern: str, text: str, otherwise: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else otherwise
