"""Runs a planted kernel: run_planted.py LIBRARY NAME WRONG ORDER...; prints a sum of its result for each order.

Only Python's own library is imported, as this process may run under ThreadSanitizer.
"""

from __future__ import annotations

import ctypes
import hashlib
import random
import struct
import sys

COUNT = 1024  # floats in and out


def main() -> None:
    path, name, wrong = sys.argv[1], sys.argv[2], int(sys.argv[3])
    library = ctypes.CDLL(path)
    source = random.Random(1)
    given = struct.pack(f"{COUNT}f", *(source.gauss(0, 1) for _ in range(COUNT)))
    memory = ctypes.create_string_buffer(2 * len(given) + 16)
    first = -(-ctypes.addressof(memory) // 16) * 16
    for order in sys.argv[4:]:
        library.rwkvmpi_cuda_emulation_order(ctypes.c_uint(int(order)))
        ctypes.memmove(first, given, len(given))
        ctypes.memset(first + len(given), 0, len(given))
        function = library[f"planted_{name}"]
        code = function(ctypes.c_void_p(first), ctypes.c_void_p(first + len(given)), wrong)
        if code:
            raise SystemExit(f"{name} returned {code}")
        print(hashlib.sha256(ctypes.string_at(first + len(given), len(given))).hexdigest(), flush=True)


if __name__ == "__main__":
    main()
