"""Calls launchers with arguments as they should be: race_calls.py LIBRARY LAUNCHER...

Meant for a library compiled for ThreadSanitizer, which reports in its own words what it finds; so only Python's own
library is imported. The calls are the same in every process. A line before each launcher tells its name.
"""

from __future__ import annotations

import random
import struct
import sys

from fuzz_launchers import Fuzzer
from launchers import meaning

CALLS = 3  # of a launcher, and two for each of its bodies with heads of 64
FEW_ROWS = 5  # where every row is a block: of the blocks two or three already show what races


class Caller(Fuzzer):
    def run(self, number: int, **forced: float) -> int:
        """One call; its code."""
        self.chance = random.Random(f"{self.launcher} {number}")
        self.forced = forced
        numbers = self._numbers()
        buffers = self._buffers(numbers)
        passed = {**numbers, **{b.parameter.name: self.base + b.first for b in buffers}}
        code = self.function(*(passed[parameter.name] for parameter in self.parameters))
        print(f"call {number}: code {code} for {numbers}", flush=True)
        return code

    def _numbers(self) -> dict[str, float]:
        numbers = super()._numbers()
        for name, value in self.forced.items():
            if name in numbers:
                numbers[name] = value
        if "heads" not in numbers:
            for name in ("tokens", "rows", "states", "count"):
                kind = meaning(self.launcher, name)
                if name in numbers and isinstance(kind, tuple) and max(kind[1:]) < 100:  # type: ignore[type-var]
                    numbers[name] = min(numbers[name], FEW_ROWS)
        if "scratch_bytes" in numbers:
            numbers["scratch_bytes"] = self.scratch(str(meaning(self.launcher, "scratch_bytes")[1]), numbers)
        return numbers

    def _content(self, name: str, word: str, kind: str, elements: int, numbers: dict[str, float], wild: bool) -> bytes:
        if name != "rows":
            return super()._content(name, word, kind, elements, numbers, wild=False)
        # segments that share a row would be a race of the caller's
        total = int(numbers.get("tokens", numbers.get("count", 0)))
        bounds = sorted([0, total, *(self.chance.randint(0, total) for _ in range(elements // 2 - 1))])
        pairs = [(bounds[i], bounds[i + 1] - bounds[i]) for i in range(elements // 2)]
        return struct.pack(f"={elements}i", *(number for pair in pairs for number in pair))

    def bodies(self) -> list[int]:
        kind = meaning(self.launcher, "body")
        has_body = any(parameter.name == "body" for parameter in self.parameters)
        if has_body and isinstance(kind, tuple):
            return [int(str(value)) for value in kind[1:]]
        return [0] if any(parameter.name == "heads" for parameter in self.parameters) else []


def main() -> None:
    for launcher in sys.argv[2:]:
        print(f"launcher {launcher}", flush=True)
        caller = Caller(sys.argv[1], launcher)
        codes = [caller.run(number) for number in range(CALLS)]
        for body in caller.bodies():
            shape = {"body": body, "n": 64, "size": 64, "tokens": 33, "every": 16, "heads": 1}
            codes += [caller.run(CALLS + dtype, dtype=dtype, **shape) for dtype in (1, 2)]
        print(f"{codes.count(0)} of {len(codes)} calls ran", flush=True)


if __name__ == "__main__":
    main()
