"""A recorded list of operator calls that one C call carries out again: what CUDA graphs are to a GPU.

A single-token step is some two hundred operators of a few microseconds each; called from Python, the calls alone would
take a tenth of the time.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

import numpy as np
import torch

from rwkvmpi.ops import library

_replay = library.bind("replay", "pl")


class Program:
    """The calls that `body` makes, recorded once.

    The tensors of `bound` may be exchanged before each run for others of the same layout (`rebind`); every other
    tensor that a call was given belongs to the program from then on. `body` must do all its work through operators'
    `_into` functions. RuntimeError when one of its calls cannot be recorded.
    """

    def __init__(self, body: Callable[[], None], bound: Sequence[torch.Tensor]) -> None:
        with library.recording() as calls:
            body()
        self._build = library.current()
        self._addresses = [tensor.data_ptr() for tensor in bound]
        self._sizes = [_span(tensor) for tensor in bound]
        slots: list[int] = []
        starts: list[int] = []
        self._kept: list[torch.Tensor] = []  # alive as long as the program
        self._places: list[tuple[list[int], list[int]]] = [([], []) for _ in bound]  # slots, offsets
        for call in calls:
            starts.append(len(slots))
            for letter, argument in zip(call.signature, call.arguments, strict=True):
                if letter == "p":
                    self._note_place(len(slots), argument)
                slots.append(_slot(letter, argument))
        self._slots = np.array(slots, dtype=np.uint64)
        library_in_use = library.load()
        table = np.empty((len(calls), 2), dtype=np.uint64)
        for row, call, start in zip(table, calls, starts, strict=True):
            try:
                entry = getattr(library_in_use, f"rwkvmpi_{call.name}_slots")
            except AttributeError:
                raise RuntimeError(f"the operator {call.name} cannot be recorded") from None
            row[0] = ctypes.cast(entry, ctypes.c_void_p).value or 0
            row[1] = self._slots.ctypes.data + 8 * start
        self._table = table
        self._where = [(np.array(at, dtype=np.intp), np.array(by, dtype=np.uint64)) for at, by in self._places]

    def _note_place(self, slot: int, argument: object) -> None:
        if not isinstance(argument, torch.Tensor):
            return
        address = argument.data_ptr()
        for place, first, size in zip(self._places, self._addresses, self._sizes, strict=True):
            if first <= address < first + size:
                place[0].append(slot)
                place[1].append(address - first)
                return
        self._kept.append(argument)

    def rebind(self, tensors: Sequence[torch.Tensor]) -> None:
        """Use these tensors in the place of `bound` from the next run on; the caller keeps them alive."""
        for i, tensor in enumerate(tensors):
            address = tensor.data_ptr()
            if address != self._addresses[i]:
                at, offsets = self._where[i]
                self._slots[at] = offsets + np.uint64(address)
                self._addresses[i] = address

    def run(self) -> None:
        """Carry out all calls once more."""
        if library.current() != self._build:
            raise RuntimeError(f"recorded with the operators' build {self._build}, but {library.current()} is in use")
        _replay(self._table.ctypes.data, len(self._table))


def _span(tensor: torch.Tensor) -> int:
    return 1 if not tensor.numel() else tensor.numel() * tensor.element_size()


def _slot(letter: str, argument: object) -> int:
    """An argument as the 8 bytes that record.h reads."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if argument is None:
        return 0
    if letter == "f":
        return int.from_bytes(struct.pack("=d", argument), "little")
    return int(argument) & 0xFFFFFFFFFFFFFFFF  # type: ignore[call-overload, no-any-return]
