"""How fast this machine computes and sends, against what it could do at most: `rwkvmpi bench`."""

from rwkvmpi.bench.roofs import peak_flops

__all__ = ["peak_flops"]
