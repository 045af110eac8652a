"""Train the bundled model: a byte-level RWKV-7 on the Python standard library's sources.

    python scripts/train_bundled_model.py --minutes 75 -o model.safetensors

Runs on one CPU core: bfloat16 matrix products, everything else in float32. The learning rate follows the time that
is left, so a run ends when it should on any machine; time in which the process was stopped does not count. The file
is written every few minutes, and the same command with --resume goes on from the last CHECKPOINT.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rwkvmpi.ops.training import wkv7_training

VOCABULARY = 256
LIMIT_BYTES = 4_000_000
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
Params = dict[str, Tensor]


# ---------------------------------------------------------------- the text


def is_held_out(relative: str) -> bool:
    """One file in sixteen, by its path inside the standard library, so that the split is the same everywhere."""
    return hashlib.sha256(relative.encode()).hexdigest().endswith("0")


def sources(folder: Path) -> dict[str, Path]:
    """Every .py file of the standard library in `folder`, by its path inside it (installed packages left out)."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    return {name: path for name, path in found.items() if not SKIPPED_FOLDERS & set(name.split("/"))}


def is_test(relative: str) -> bool:
    """Whether the file belongs to a test package; many distributions do not install those."""
    return bool(TEST_FOLDERS & set(relative.split("/")))


def training_texts(folder: Path) -> tuple[list[bytes], list[bytes]]:
    """The training files' bytes: (the library itself, its test packages). Copies of held-out files are left out."""
    files = sources(folder)
    held_out = {files[name].read_bytes() for name in files if is_held_out(name)}
    library: list[bytes] = []
    tests: list[bytes] = []
    for name, path in files.items():
        text = path.read_bytes()
        if text and not is_held_out(name) and text not in held_out:
            (tests if is_test(name) else library).append(text)
    return library, tests


def held_out_texts(folder: Path) -> list[bytes]:
    """The held-out files' bytes, test packages left out."""
    return [path.read_bytes() for name, path in sources(folder).items() if is_held_out(name) and not is_test(name)]


class Streams:
    """Endless rows of documents laid end to end, from which windows of [rows, length] tokens are cut in turn.

    Each pass over the text takes every file of the library and a third of the (smaller) test files. One join in
    four goes on without a new beginning, so the state also learns to live through long documents.
    """

    def __init__(self, library: list[bytes], tests: list[bytes], rows: int, length: int, seed: int) -> None:
        self.length = length
        self.random = np.random.default_rng(seed)
        self.library, self.tests = library, [text for text in tests if len(text) < 100_000]
        self.documents = self._documents()
        self.passes = 0
        self.rows = [(np.empty(0, np.uint8), np.empty(0, bool)) for _ in range(rows)]  # text and beginnings not yet cut
        self.last = [0] * rows

    def _documents(self) -> Iterator[bytes]:
        while True:
            chosen = self.random.random(len(self.tests)) < 1 / 3
            texts = self.library + [text for text, take in zip(self.tests, chosen, strict=True) if take]
            for i in self.random.permutation(len(texts)):
                yield texts[i]
            self.passes += 1

    def window(self) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens [B, T] int64, begins [B, T] bool, targets [B, T] int64); begins marks a document's position 0."""
        tokens, begins, targets = [], [], []
        for row in range(len(self.rows)):
            text, starts = self.rows[row]
            while len(text) < self.length:
                document = np.frombuffer(next(self.documents), np.uint8)
                start = np.zeros(len(document), bool)
                start[0] = self.random.random() >= 0.25
                text, starts = np.concatenate([text, document]), np.concatenate([starts, start])
            target, start = text[: self.length], starts[: self.length]
            self.rows[row] = text[self.length :], starts[self.length :]
            token = np.concatenate([[self.last[row]], target[:-1]])
            self.last[row] = int(target[-1])
            tokens.append(np.where(start, 0, token))
            begins.append(start)
            targets.append(target)
        as_long = [torch.from_numpy(np.stack(x).astype(np.int64)) for x in (tokens, targets)]
        return as_long[0], torch.from_numpy(np.stack(begins)), as_long[1]


# ---------------------------------------------------------------- the model


def initial_parameters(layers: int, width: int, size: int, ffn: int, ranks: dict[str, int], seed: int) -> Params:
    """RWKV-7 parameters under their checkpoint names, all float32, initialised as RWKV-7 is: outputs zero, decays
    spread over the channels, token-shift mixes that grow with depth."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(rows: int, columns: int, scale: float) -> Tensor:
        return torch.empty(rows, columns).uniform_(-scale, scale, generator=generator)

    def orthogonal(rows: int, columns: int, gain: float) -> Tensor:
        return torch.nn.init.orthogonal_(torch.empty(rows, columns), gain=gain, generator=generator)

    channel = torch.arange(width) / width
    ramp = torch.arange(width) / (width - 1)
    within = (torch.arange(width) % size) / (size - 1) * 2 - 1  # -1 to 1 over a head's channels
    zigzag = within * within.abs()
    root = width**-0.5
    p: Params = {"emb.weight": uniform(VOCABULARY, width, 1e-2), "head.weight": orthogonal(VOCABULARY, width, 0.5)}
    for name in ("blocks.0.ln0", "ln_out"):
        p[f"{name}.weight"], p[f"{name}.bias"] = torch.ones(width), torch.zeros(width)
    for i in range(layers):
        depth, rest = i / max(1, layers - 1), 1 - i / layers
        block, att = f"blocks.{i}.", f"blocks.{i}.att."
        for name in ("ln1", "ln2", "att.ln_x"):
            p[f"{block}{name}.weight"], p[f"{block}{name}.bias"] = torch.ones(width), torch.zeros(width)
        p[f"{att}ln_x.weight"] *= ((1 + i) / layers) ** 0.7
        for name, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
            p[f"{att}x_{name}"] = 1 - channel ** (power * rest)
        p[f"{block}ffn.x_k"] = 1 - channel ** (rest**4)
        p[f"{att}w0"] = -6.5 + 5 * ramp ** (1 + depth**0.3) + 2.5 * zigzag
        p[f"{att}a0"] = -0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5)
        p[f"{att}k_k"] = 0.71 - 0.1 * (ramp - 0.5)
        p[f"{att}k_a"] = torch.full((width,), 1.02)
        p[f"{att}r_k"] = torch.full((width // size, size), -0.04)
        if i > 0:
            p[f"{att}v0"] = 0.73 - 0.4 * (ramp - 0.5)
        for name, rank in ranks.items():
            if name != "v" or i > 0:
                p[f"{att}{name}1"] = torch.zeros(width, rank)
                p[f"{att}{name}2"] = orthogonal(rank, width, 0.1)
        p[f"{att}g2"] *= 10  # the gate has no bias: sigmoid(0) g2 alone must let something through
        p[f"{att}receptance.weight"] = uniform(width, width, 0.5 * root)
        p[f"{att}key.weight"] = uniform(width, width, 0.05 * root)
        p[f"{att}value.weight"] = uniform(width, width, 0.5 * root)
        p[f"{att}output.weight"] = torch.zeros(width, width)
        p[f"{block}ffn.key.weight"] = uniform(ffn, width, 0.5 * root)
        p[f"{block}ffn.value.weight"] = torch.zeros(width, ffn)
    return {name: x.requires_grad_() for name, x in p.items()}


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight in bfloat16, float32 out."""
    return (x.to(torch.bfloat16) @ weight.to(torch.bfloat16)).float()


def forward(p: Params, tokens: Tensor, begins: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, T, V] and the state after the window: per layer wkv [B, H, N, N] and two shifts [B, C].

    tokens [B, T]; begins [B, T] marks tokens at which the state and the token shift start from nothing.
    """
    rows, length = tokens.shape
    width = p["emb.weight"].shape[1]
    heads, size = p["blocks.0.att.r_k"].shape
    keep = (~begins).float().unsqueeze(-1)
    split = (rows, length, heads, size)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def shifted(u: Tensor, last: Tensor) -> Tensor:
        return torch.cat([last.unsqueeze(1), u[:, :-1]], 1) * keep - u

    after: list[Tensor] = []
    x = norm(F.embedding(tokens, p["emb.weight"]), "blocks.0.ln0")
    v_first = x
    for i in range(len(state) // 3):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        wkv, att_last, ffn_last = state[3 * i : 3 * i + 3]
        u = norm(x, f"blocks.{i}.ln1")
        d = shifted(u, att_last)
        x_r, x_w, x_k, x_v, x_a, x_g = (u + d * p[f"{att}x_{name}"] for name in "rwkvag")
        r = product(x_r, p[f"{att}receptance.weight"].t())
        k = product(x_k, p[f"{att}key.weight"].t())
        v = product(x_v, p[f"{att}value.weight"].t())
        a = torch.sigmoid(p[f"{att}a0"] + product(product(x_a, p[f"{att}a1"]), p[f"{att}a2"]))
        g = product(torch.sigmoid(product(x_g, p[f"{att}g1"])), p[f"{att}g2"])
        w_raw = p[f"{att}w0"] + product(torch.tanh(product(x_w, p[f"{att}w1"])), p[f"{att}w2"])
        w = torch.exp(-0.6065306597126334 * torch.sigmoid(w_raw)) * keep
        kk = (k * p[f"{att}k_k"]).view(split)
        kk = kk * torch.rsqrt(kk.square().sum(-1, keepdim=True) + 1e-24)
        k = k * (1 + (a - 1) * p[f"{att}k_a"])
        if i == 0:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(p[f"{att}v0"] + product(product(x_v, p[f"{att}v1"]), p[f"{att}v2"]))
        removal, replacement = -kk * keep.unsqueeze(-1), kk * a.view(split)
        y, wkv = wkv7_training(r.view(split), w.view(split), k.view(split), v.view(split), removal, replacement, wkv)
        mean = y.mean(-1, keepdim=True)
        y = (y - mean) * torch.rsqrt((y - mean).square().mean(-1, keepdim=True) + 64e-5)
        y = y.view(rows, length, width) * p[f"{att}ln_x.weight"] + p[f"{att}ln_x.bias"]
        bonus = ((r * k).view(split) * p[f"{att}r_k"]).sum(-1, keepdim=True) * v.view(split)
        x = x + product((y + bonus.view(rows, length, width)) * g, p[f"{att}output.weight"].t())
        after += [wkv, u[:, -1]]
        u = norm(x, f"blocks.{i}.ln2")
        hidden = product(u + shifted(u, ffn_last) * p[f"{ffn}x_k"], p[f"{ffn}key.weight"].t())
        x = x + product(torch.relu(hidden).square(), p[f"{ffn}value.weight"].t())
        after.append(u[:, -1])
    return product(norm(x, "ln_out"), p["head.weight"].t()), after


def empty_state(p: Params, rows: int) -> list[Tensor]:
    """The state of `rows` documents of which nothing has been read."""
    heads, size = p["blocks.0.att.r_k"].shape
    width = heads * size
    layers = sum(name.endswith("att.r_k") for name in p)
    shapes = ((rows, heads, size, size), (rows, width), (rows, width))
    return [torch.zeros(shape) for _ in range(layers) for shape in shapes]


def loss_of(
    p: Params, tokens: Tensor, begins: Tensor, targets: Tensor, state: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Mean nats per byte over the window, and the state after it."""
    logits, after = forward(p, tokens, begins, state)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), after


@torch.no_grad()
def bits_per_byte(p: Params, texts: list[bytes], length: int = 1024) -> float:
    """Bits per byte of the texts, each a document of its own, read side by side."""
    rows = len(texts)
    state, total = empty_state(p, rows), 0.0
    for begin in range(0, max(map(len, texts)), length):
        cut = [np.frombuffer(text, np.uint8)[begin : begin + length] for text in texts]
        targets = torch.tensor(np.stack([np.pad(x, (0, length - len(x))) for x in cut]).astype(np.int64))
        before = torch.tensor([text[begin - 1] if 0 < begin <= len(text) else 0 for text in texts])
        tokens = torch.cat([before.unsqueeze(1), targets[:, :-1]], 1)
        logits, state = forward(p, tokens, torch.zeros(rows, length, dtype=torch.bool), state)
        real = torch.tensor([[j < len(x) for j in range(length)] for x in cut])
        total += float(F.cross_entropy(logits[real], targets[real], reduction="sum"))
    return total / math.log(2) / sum(map(len, texts))


# ---------------------------------------------------------------- the optimiser


def orthogonalised(g: Tensor) -> Tensor:
    """About the nearest matrix with all singular values 1, by five Newton-Schulz steps in bfloat16 (as Muon does)."""
    x = g.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.t()
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.t() if tall else x).float()


class Optimiser:
    """Muon for the large matrices of the layers, Adam for everything else; weight decay on matrices only."""

    def __init__(self, p: Params, matrix_rate: float, rate: float, decay: float) -> None:
        self.p, self.matrix_rate, self.rate, self.decay = p, matrix_rate, rate, decay
        endings = ("receptance.weight", "key.weight", "value.weight", "output.weight")
        self.matrices = [n for n in p if n.endswith(endings)]
        self.others = [n for n in p if n not in self.matrices]
        self.moments = {f"first.{n}": torch.zeros_like(x, requires_grad=False) for n, x in p.items()}
        self.moments |= {f"second.{n}": torch.zeros_like(p[n], requires_grad=False) for n in self.others}

    @torch.no_grad()
    def step(self, scale: float, count: int) -> float:
        """One update at `scale` times the peak rates; returns the gradient's norm (clipped to 1)."""
        gradients = {n: x.grad for n, x in self.p.items() if x.grad is not None}
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite at step {count}")
        for g in gradients.values():
            g.mul_(min(1.0, 1.0 / (norm + 1e-6)))
        for n in self.matrices:
            x, g, first = self.p[n], gradients[n], self.moments[f"first.{n}"]
            first.lerp_(g, 0.05)
            rate = scale * self.matrix_rate
            x.mul_(1 - rate * self.decay)
            x.add_(orthogonalised(g.lerp(first, 0.95)), alpha=-rate * max(1.0, x.shape[0] / x.shape[1]) ** 0.5)
        for n in self.others:
            x, g = self.p[n], gradients[n]
            first, second = self.moments[f"first.{n}"], self.moments[f"second.{n}"]
            first.lerp_(g, 0.1)
            second.lerp_(g.square(), 0.02)
            rate = scale * self.rate * (2.0 if n.endswith("att.w0") else 1.0)
            if x.dim() == 2 and not n.endswith("r_k"):
                x.mul_(1 - rate * self.decay)
            x.addcdiv_(first / (1 - 0.9**count), (second / (1 - 0.98**count)).sqrt().add_(1e-10), value=-rate)
        for x in self.p.values():
            x.grad = None
        return norm


# ---------------------------------------------------------------- files


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside `path`, then rename, so that a stop leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def export(p: Params, path: Path, description: str) -> None:
    """The model as one bfloat16 safetensors file under the names and shapes of RWKV-7's .pth files."""
    tensors = {}
    for name, x in p.items():
        short = name.rsplit(".", 1)[-1]
        per_channel = short in ("w0", "a0", "v0", "k_k", "k_a") or short.startswith("x_")
        shaped = x.detach().view(1, 1, -1) if per_channel else x.detach()
        tensors[name] = shaped.to(torch.bfloat16).contiguous()
    metadata = {"format": "pt", "version": "7", "tokenizer": "bytes", "license": "PSF-2.0", "trained_on": description}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    path.chmod(0o644)
    if path.stat().st_size > LIMIT_BYTES:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes, over {LIMIT_BYTES}; choose a smaller shape")


def save_checkpoint(path: Path, p: Params, optimiser: Optimiser, progress: dict[str, float]) -> None:
    """Everything that --resume needs, as safetensors."""
    tensors = {f"parameter.{n}": x.detach() for n, x in p.items()} | optimiser.moments
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {"progress": json.dumps(progress)}))


def load_checkpoint(path: Path, p: Params, optimiser: Optimiser) -> dict[str, float]:
    """Fill parameters and moments from a checkpoint of the same shape; returns its progress."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, x in [(f"parameter.{n}", x) for n, x in p.items()] + list(optimiser.moments.items()):
            x.copy_(file.get_tensor(name))
        progress: dict[str, float] = json.loads(file.metadata()["progress"])
    return progress


# ---------------------------------------------------------------- the run


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the model, as safetensors")
    add("--minutes", type=float, default=75, help="length of the run in minutes of this process being awake (75)")
    add("--until", metavar="HH:MM", help="end at this time of day at the latest, with the learning rate decayed")
    add("--checkpoint", type=Path, help="where the whole training state is kept (OUTPUT with .checkpoint appended)")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--save-every", type=float, default=4, metavar="MINUTES", help="between two checkpoints (4)")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    add("--sources", type=Path, default=stdlib, help="the standard library's folder (this Python's)")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=192, help="channels C (192)")
    add("--head-size", type=int, default=64)
    add("--ffn", type=int, default=768, help="feed-forward width (768)")
    add("--rank", action="append", default=[], metavar="NAME=R", help="LoRA rank of w, a, v or g (16, 16, 8, 32)")
    add("--rows", type=int, default=8, help="documents read side by side (8)")
    add("--length", type=int, default=1024, help="tokens of each that gradients flow back through (1024)")
    add("--matrix-rate", type=float, default=0.02, help="peak learning rate of the layers' matrices, by Muon (0.02)")
    add("--rate", type=float, default=3e-3, help="peak learning rate of everything else, by Adam (0.003)")
    add("--decay", type=float, default=0.05, help="weight decay (0.05)")
    add("--seed", type=int, default=7)
    add("--threads", type=int, default=1)
    add("--no-compile", action="store_true", help="no torch.compile: slower, but needs no C++ compiler")
    return parser.parse_args(argv)


def seconds_until(clock: str | None) -> float:
    """Seconds to the next HH:MM of this machine's clock; infinity for None."""
    if clock is None:
        return math.inf
    now = time.localtime()
    hours, minutes = map(int, clock.split(":"))
    left = (hours - now.tm_hour) * 3600 + (minutes - now.tm_min) * 60 - now.tm_sec
    return left if left > -43200 else left + 86400


def rate_at(fraction: float) -> float:
    """Learning rate relative to its peak: a short rise, a cosine down to nothing."""
    return min(1.0, fraction / 0.01 + 0.02) * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))


def main() -> None:
    """Train, with a line of progress every few steps."""
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    ranks = {"w": 16, "a": 16, "v": 8, "g": 32} | {n: int(r) for n, r in (text.split("=") for text in options.rank)}
    p = initial_parameters(options.layers, options.width, options.head_size, options.ffn, ranks, options.seed)
    optimiser = Optimiser(p, options.matrix_rate, options.rate, options.decay)
    progress: dict[str, float] = {"step": 0, "fraction": 0.0, "seconds": 0.0}
    checkpoint = options.checkpoint or options.output.with_name(options.output.name + ".checkpoint")
    if options.resume:
        progress = load_checkpoint(checkpoint, p, optimiser)
    library, tests = training_texts(options.sources)
    held_out = sorted(held_out_texts(options.sources), key=len)[-9:-1]
    streams = Streams(library, tests, options.rows, options.length, options.seed + int(progress["step"]))
    sizes = sum(x.numel() for x in p.values()), sum(map(len, library)), sum(map(len, tests))
    print("{:,} parameters; {:,} bytes of library files, {:,} of test files".format(*sizes), flush=True)
    description = f"Python {options.sources.name.removeprefix('python')} standard library sources"
    compute = loss_of if options.no_compile else torch.compile(loss_of, dynamic=False)
    state = empty_state(p, options.rows)
    recent: list[float] = []
    shown, saved = 0.0, time.monotonic()
    mean_loss, since = 0.0, 0
    while progress["fraction"] < 1:
        begun = time.monotonic()
        progress["step"] += 1
        loss, state = compute(p, *streams.window(), state)
        loss.backward()
        norm = optimiser.step(rate_at(progress["fraction"]), int(progress["step"]))
        state = [x.detach() for x in state]
        took = time.monotonic() - begun
        # A stopped process is not training: a step counts for at most three times the usual.
        usual = float(np.median(recent)) if len(recent) >= 5 else took
        recent = [*recent[-49:], took]
        counted = min(took, 3 * usual) if recent[1:] else 0.0  # the first step compiles
        progress["seconds"] += counted
        left = min(options.minutes * 60 - progress["seconds"] + counted, seconds_until(options.until) + took)
        progress["fraction"] += (1 - progress["fraction"]) * (counted / left if left > counted else 1.0)
        mean_loss, since = mean_loss + loss.item(), since + 1
        ended = progress["fraction"] >= 1
        if time.monotonic() - shown > 30 or ended:
            speed = options.rows * options.length / float(np.median(recent))
            print(f"{progress['fraction']:6.1%} step {progress['step']:.0f} pass {streams.passes + 1} "
                  f"{mean_loss / since / math.log(2):.4f} bits/byte, gradient {norm:.2f}, {speed:,.0f} tokens/s, "
                  f"{progress['seconds'] / 60:.1f} min", flush=True)  # fmt: skip
            shown, mean_loss, since = time.monotonic(), 0.0, 0
        if time.monotonic() - saved > options.save_every * 60 or ended:
            save_checkpoint(checkpoint, p, optimiser, progress)
            export(p, options.output, description)
            rounded = {n: x.detach().bfloat16().float() for n, x in p.items()}
            print(f"       held out: {bits_per_byte(rounded, [text[:8192] for text in held_out]):.4f} bits/byte "
                  f"over the first 8 KiB of {len(held_out)} files", flush=True)  # fmt: skip
            saved = time.monotonic()
    print(f"wrote {options.output}: {options.output.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
