"""Read the schedule that the TPU compiler reports of a Pallas kernel: loops, regions, unit use.

The report of packed bundles holds one line a VLIW bundle, which is one issue cycle. A branch
backward from A to T is a loop over ``[T, A]``, a branch forward from A to T a region ``[A, T)``
that some steps skip (``pl.when``). The utilisation report has one row a bundle and one column a
unit.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from attnlab.core.errors import DataError

SMALL = 40  # bundles: shorter regions (starting a copy) count as overhead of every step
BUNDLES, USE = "packed-bundles-post-ra.txt", "pre-delay_hlo-static-per-bundle-utilization.txt"

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_BRANCH = re.compile(r"sbr\.rel .*?target bundleno = (\d+)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder [^,]+, (\d+) /\* loop exit test \*/")
_FILE = re.compile(rf"^\d+-(?P<name>.+?)(?:\.\d+)?-\d+-{re.escape(BUNDLES)}$")


@dataclasses.dataclass
class Node:
    """A loop or a predicated region over the bundles ``[start, end)``.

    Args:
        loop: whether it repeats. trips: how often, None where the schedule does not say.
    """

    start: int
    end: int
    loop: bool
    trips: int | None = None
    children: list[Node] = dataclasses.field(default_factory=list)

    @property
    def bundles(self) -> int:
        return self.end - self.start

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The schedule of one kernel.

    Args:
        name: of the kernel. root: the whole kernel. units: column names. capacity: slots of each
            unit in a bundle. sums: unit to running sums of its use, so ranges are two look-ups.
    """

    name: str
    root: Node
    capacity: dict[str, int]
    sums: dict[str, list[int]]

    def use(self, unit: str, node: Node) -> int:
        """How many slots of a unit the bundles of ``node`` use, once through."""
        sums = self.sums.get(unit)
        if sums is None:
            return 0
        last = len(sums) - 1
        return sums[min(node.end, last)] - sums[min(node.start, last)]

    @property
    def matrix_unit(self) -> str:
        """The column of the matrix unit: MATMUL, or MXU in older compilers."""
        return "MATMUL" if "MATMUL" in self.sums else "MXU"

    def grid(self) -> Node | None:
        """The loop over grid steps: the longest outermost loop, None where there is no loop."""
        loops = [node for node in self.root.walk() if node.loop]
        return max(loops, key=lambda node: node.bundles, default=None)


def parse(name: str, bundles: str, use: str) -> Schedule:
    """The schedule in the text of the two reports; DataError where they cannot be read."""
    length, branches, exits = 0, [], []
    for line in bundles.splitlines():
        found = _BUNDLE.match(line)
        if not found:
            continue
        address = int(found[1], 16)
        length = max(length, address + 1)
        target = _BRANCH.search(line)
        if target:
            branches.append((address, int(target[1])))
        test = _EXIT.search(line)
        if test:
            exits.append((address, int(test[1])))
    if not length:
        raise DataError(
            f"schedule of {name}", "holds no bundle", "use the libtpu of the extra aot"
        )
    capacity, sums = _utilisation(name, use)
    return Schedule(name, _tree(length, branches, exits), capacity, sums)


def _tree(length: int, branches, exits) -> Node:
    nodes = [Node(target, at + 1, True) for at, target in branches if target <= at]
    forward = sorted((at, target) for at, target in branches if target > at and target <= length)
    for at, target in forward:
        # The end of an `if` jumps over its `else`: that region starts where the other one ends.
        start = max((t for a, t in forward if a < at < t < target), default=at)
        if target - start > SMALL:
            nodes.append(Node(start, target, False))
    root = Node(0, length, False)
    nodes.sort(key=lambda node: (node.start, -node.end))
    path = [root]
    for node in nodes:
        while not (path[-1].start <= node.start and node.end <= path[-1].end):
            path.pop()
        path[-1].children.append(node)
        path.append(node)
    for at, trips in exits:
        around = [node for node in nodes if node.loop and node.start <= at < node.end]
        if around:
            min(around, key=lambda node: node.bundles).trips = trips
    return root


def _utilisation(name: str, text: str) -> tuple[dict[str, int], dict[str, list[int]]]:
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if "," in line and "VALU" in line), None)
    if head is None:
        raise DataError(
            f"utilisation report of {name}", "names no units", "use the libtpu of the extra aot"
        )
    units = [unit.strip() for unit in lines[head].split(",")]
    capacity = dict(zip(units, map(int, lines[head + 1].split())))
    sums: dict[str, list[int]] = {unit: [0] for unit in units}
    for line in lines[head + 2 :]:
        row = line.split()
        if len(row) != len(units) or not row[0].isdigit():
            continue
        for unit, value in zip(units, row):
            sums[unit].append(sums[unit][-1] + int(value))
    return capacity, sums


def read(folder: Path, names: list[str]) -> list[Schedule]:
    """The schedules of the kernels ``names`` in a folder of reports, in the order of ``names``.

    The compiler puts prefixes before a name (``jvp_``) and numbers behind it; kernels of one name
    are taken in the order they were compiled, the last one again where equal ones were merged.

    Raises:
        DataError: a kernel has no report.
    """
    reports: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"*-{BUNDLES}")):
        match = _FILE.match(path.name)
        if match and "schedule-analysis" not in path.name:
            reports.setdefault(match["name"], []).append(path)
    found, taken = [], dict.fromkeys(names, 0)
    for name in names:
        paths = reports.get(name) or next(
            (paths for label, paths in sorted(reports.items())
             if label.rstrip("_").endswith(f"_{name}")),  # jvp_NAME_ under a gradient
            None,
        )
        if not paths:
            raise DataError(
                f"kernel {name}", "the compiler wrote no schedule of it",
                "use the libtpu of the extra aot",
            )
        path = paths[min(taken[name], len(paths) - 1)]
        taken[name] += 1
        stem = path.name[: -len(BUNDLES)].rsplit("-", 2)[0]
        use = [p for p in sorted(folder.iterdir())
               if p.name.startswith(stem + "-") and p.name.endswith(USE)]
        found.append(parse(name, path.read_text(), use[0].read_text() if use else ""))
    return found
