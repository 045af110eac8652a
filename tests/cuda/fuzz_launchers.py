"""Calls one launcher of a library again and again, mostly with something wrong: it must refuse or do what it can.

    fuzz_launchers.py LIBRARY LAUNCHER FIRST COUNT

Call number i is the same in every process. All buffers lie in one arena between zones that nothing may touch; where
this process runs under AddressSanitizer even reading there is noticed. Complaints are printed, a line each; a crash or
a sanitizer's report ends the process, and the last line then names the call.
"""

from __future__ import annotations

import ctypes
import math
import random
import struct
import sys
from typing import NamedTuple

from launchers import ELEMENT_BYTES, NUMBERS, Kind, Parameter, buffer_type, meaning, signatures

ARENA_BYTES = 48 << 20
GUARD = 1024  # bytes before and behind every buffer
C_TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
HUGE = ((1 << 62) - 1, 1 << 62, (1 << 63) - 1)
WRONG = {  # values that a number of this kind must not have
    "size": (-1, -(1 << 63), *HUGE),
    "offset": (-1, -(1 << 63)),
    "kind": (-1, 99, 2**31 - 1, -(2**31)),
    "dtype": (-1, 3, 99, 2**31 - 1, -(2**31)),
}
ODD = {  # values that it may have, but seldom has
    "size": (0,),
    "offset": HUGE,
    "loose": (-1, 0, 99, 2**31 - 1, -(2**31)),
    "flag": (2, -1, -(2**31)),
    "real": (math.nan, math.inf, -math.inf, -1.0, 0.0, 3e38, 1e-45),
    "bytes": (-1, 0, -(1 << 63)),
}
REFUSALS = range(-6, 0)


class Buffer(NamedTuple):
    parameter: Parameter
    first: int  # in the arena
    nbytes: int


class Sanitizer:
    """AddressSanitizer's switches for memory that must not be touched, where there is one."""

    def __init__(self) -> None:
        self.there = True
        try:
            functions = [ctypes.CDLL(None)[f"__asan_{name}_memory_region"] for name in ("poison", "unpoison")]
        except AttributeError:
            self.there = False
            return
        for function in functions:
            function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._close, self._open = functions

    def close(self, address: int, nbytes: int) -> None:
        if self.there:
            self._close(address, nbytes)

    def open(self, address: int, nbytes: int) -> None:
        if self.there:
            self._open(address, nbytes)


class Fuzzer:
    def __init__(self, path: str, launcher: str) -> None:
        self.library = ctypes.CDLL(path)
        self.launcher = launcher
        self.signatures = signatures()
        self.parameters = self.signatures[launcher].parameters
        self.function = self.library[f"rwkvmpi_cuda_{launcher}"]
        self.function.argtypes = [C_TYPES.get(p.type, ctypes.c_void_p) for p in self.parameters]
        self.arena = ctypes.create_string_buffer(b"\xa5" * ARENA_BYTES, ARENA_BYTES)
        self.base = ctypes.addressof(self.arena)
        self.sanitizer = Sanitizer()
        self.pools = self._pools()

    def call(self, number: int) -> list[str]:
        """One call; what was wrong with how it went."""
        self.chance = random.Random(f"{self.launcher} {number}")
        numbers = self._numbers()
        buffers = self._buffers(numbers)
        passed = {**numbers, **{b.parameter.name: self.base + b.first for b in buffers}}
        end = buffers[-1].first + buffers[-1].nbytes + GUARD
        faults, refusal, codes = [], False, {0, -6}
        if any(_kind(meaning(self.launcher, name)) == "stride" for name in numbers):
            codes.add(-4)  # vectors may need strides of 16 bytes
        for _ in range(self.chance.choice((0, 1, 1, 1, 1, 1, 2, 3))):
            name, fault, required, allowed = self._fault(numbers, buffers, passed)
            faults.append(f"{name} {fault}")
            codes |= allowed
            refusal = required if len(faults) == 1 else False
        arguments = [passed[p.name] for p in self.parameters]
        shown = {p.name: passed[p.name] for p in self.parameters if not p.type.endswith("*")}
        print(f"call {number}: {faults or 'nothing'} wrong; {shown}", flush=True)
        for value in (meaning(self.launcher, name) for name in numbers):
            if isinstance(value, tuple) and value[0] == "bytes":
                self.scratch(str(value[1]), {**numbers, self.chance.choice([*numbers]): self.chance.choice(HUGE)})
        before = bytes(memoryview(self.arena)[:end])
        self.sanitizer.close(self.base, end)
        for buffer in buffers:
            self.sanitizer.open(self.base + buffer.first, buffer.nbytes)
        code = self.function(*arguments)
        self.sanitizer.open(self.base, end)
        wrong = []
        if code not in codes:
            wrong.append(f"returned {code}, expected one of {sorted(codes)}")
        elif refusal and code not in REFUSALS:
            wrong.append(f"returned {code} instead of refusing")
        wrong += self._touched(before, buffers, code)
        ctypes.memset(self.base, 0xA5, end)
        return wrong

    def _numbers(self) -> dict[str, float]:
        """Legal values for all numbers. Those that depend on others come last."""
        numbers: dict[str, float] = {}
        later = []
        for parameter in self.parameters:
            value = meaning(self.launcher, parameter.name)
            if isinstance(value, str) or value is None:
                continue
            kind, *values = value
            if kind in ("stride", "bytes"):
                later.append((parameter.name, kind, str(values[0])))
            else:
                numbers[parameter.name] = self.chance.choice(values)  # type: ignore[assignment]
        for name, kind, formula in later:
            if kind == "stride":
                numbers[name] = eval(formula, {}, dict(numbers)) + self.chance.choice((0, 0, 1, 8, 16))
            else:
                numbers[name] = self.scratch(formula, numbers)
        return numbers

    def scratch(self, function: str, numbers: dict[str, float]) -> int:
        """What a function says of the bytes that are needed."""
        parameters = self.signatures[function].parameters
        called = self.library[f"rwkvmpi_cuda_{function}"]
        called.restype, called.argtypes = ctypes.c_int64, [C_TYPES[p.type] for p in parameters]
        return called(*(int(numbers[p.name]) for p in parameters))

    def _buffers(self, numbers: dict[str, float]) -> list[Buffer]:
        """Filled buffers, one behind the other, each just as long as it must be."""
        buffers, free = [], 0
        wild = self.chance.random() < 0.2
        for parameter in self.parameters:
            value = meaning(self.launcher, parameter.name)
            if not isinstance(value, str):
                continue
            word, _, formula = value.partition(" ")
            kind = buffer_type(self.launcher, word, numbers)
            elements = max(0, int(eval(formula, {"max": max}, dict(numbers))))
            nbytes = elements * ELEMENT_BYTES[kind]
            first = (free + GUARD + 255) // 256 * 256
            free = first + nbytes + GUARD
            content = self._content(parameter.name, word, kind, elements, numbers, wild)
            self.arena[first : first + nbytes] = content
            buffers.append(Buffer(parameter, first, nbytes))
        return buffers

    def _content(self, name: str, word: str, kind: str, elements: int, numbers: dict[str, float], wild: bool) -> bytes:
        letter = {"int32": "i", "int64": "q"}.get(kind)
        if name == "rows" and self.chance.random() < 0.5:
            total = next(int(numbers[name]) for name in ("tokens", "count") if name in numbers)
            cuts = sorted(self.chance.randint(0, total) for _ in range(elements))
            pairs = [(first, end - first) for first, end in zip(cuts[::2], cuts[1::2], strict=True)]
            return struct.pack(f"={elements}i", *(number for pair in pairs for number in pair))
        if letter:
            least, most = (-(2**31), 2**31 - 1) if letter == "i" else (-(2**63), 2**63 - 1)
            odd = (least, -1, 0, 1, 3, 4, 5, 16, 17, 33, 299, 300, most)
            return struct.pack(f"={elements}{letter}", *(self.chance.choice(odd) for _ in range(elements)))
        nbytes = elements * ELEMENT_BYTES[kind]
        if wild or kind == "uint8":
            return self.chance.randbytes(nbytes)
        pool = self.pools[kind]
        start = self.chance.randrange(1000) * ELEMENT_BYTES[kind]
        return (pool[start:] + pool * (nbytes // len(pool) + 1))[:nbytes]

    def _pools(self) -> dict[str, bytes]:
        source = random.Random(1)
        values = [source.gauss(0, 1) for _ in range(20000)]
        single = struct.pack(f"={len(values)}f", *values)
        upper = b"".join(single[i + 2 : i + 4] for i in range(0, len(single), 4))
        return {"float32": single, "bfloat16": upper, "float16": struct.pack(f"={len(values)}e", *values)}

    def _fault(
        self, numbers: dict[str, float], buffers: list[Buffer], passed: dict[str, float]
    ) -> tuple[str, str, bool, set[int]]:
        """Spoils one argument in `passed`: its name, how, whether that alone must be refused, and the codes allowed."""
        refusals = set(REFUSALS)
        parameter = self.chance.choice([p for p in self.parameters if p.name not in ("device", "stream")])
        name, value = parameter.name, meaning(self.launcher, parameter.name)
        empty = any(v == 0 for k, v in numbers.items() if _kind(meaning(self.launcher, k)) == "size")
        if isinstance(value, str):
            buffer = next(b for b in buffers if b.parameter is parameter)
            if self.chance.random() < 0.5:
                passed[name] = 0
                optional = value.split()[0].endswith("?")
                return name, "null", not optional and buffer.nbytes > 0 and not empty, refusals
            word = ELEMENT_BYTES[buffer_type(self.launcher, value.split()[0], numbers)]
            by = self.chance.choice((1, 2, 3, 4, 8, 12))
            passed[name] = self.base + buffer.first - by  # the zone before has a pattern, and is closed
            self.arena[buffer.first - by : buffer.first] = b"\xa5" * by
            buffers[buffers.index(buffer)] = buffer._replace(first=buffer.first - by)
            self.arena[buffer.first - by : buffer.first - by + buffer.nbytes] = self.arena[
                buffer.first : buffer.first + buffer.nbytes
            ]
            odd = bool(by % word) and buffer.nbytes > 0 and not empty
            return name, f"{by} bytes before its boundary", odd and not value.split()[0].endswith("?"), refusals
        kind = _kind(value)
        if kind == "stride":
            formula = int(numbers[name])
            passed[name] = self.chance.choice((0, -1, -formula, -(1 << 63), *HUGE))
            return name, "wrong", False, refusals | {1, 9}
        wrong, odd_values = WRONG.get(kind, ()), ODD.get(kind, ())
        if kind == "size" and self.chance.random() < 0.2:
            passed[name] = self.chance.randint(0, int(numbers[name]))
            return name, "cut", False, refusals
        if kind == "bytes" and numbers[name] > 0:
            odd_values = (*odd_values, int(numbers[name]) - 1)
        if kind == "flag" and not numbers[name]:  # the buffers are those of 0
            odd_values = (0,)
        choice = self.chance.choice((*wrong, *odd_values))
        passed[name] = choice
        return name, "wrong" if choice in wrong else "odd", choice in wrong and not empty, refusals | {1, 9}

    def _touched(self, before: bytes, buffers: list[Buffer], code: int) -> list[str]:
        after = bytes(memoryview(self.arena)[: len(before)])
        if after == before:
            return []
        wrong, end = [], 0
        for buffer in [*buffers, Buffer(Parameter("the end", "", True), len(before), 0)]:
            first, last = buffer.first, buffer.first + buffer.nbytes
            if after[end:first] != before[end:first]:
                wrong.append(f"wrote before {buffer.parameter.name}")
            changed = after[first:last] != before[first:last]
            if changed and buffer.parameter.constant:
                wrong.append(f"changed its input {buffer.parameter.name}")
            elif changed and code:
                wrong.append(f"refused with {code}, but changed {buffer.parameter.name}")
            end = last
        return wrong


def _kind(value: str | Kind | None) -> str:
    return str(value[0]) if isinstance(value, tuple) else ""


def main() -> None:
    path, launcher, first, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    fuzzer = Fuzzer(path, launcher)
    if launcher in NUMBERS:
        raise SystemExit("not a launcher")
    failures = 0
    for number in range(first, first + count):
        for sentence in fuzzer.call(number):
            print(f"WRONG in call {number}: {sentence}", flush=True)
            failures += 1
    print(f"{count} calls, {failures} complaints, guarded by a sanitizer: {fuzzer.sanitizer.there}")


if __name__ == "__main__":
    main()
