"""The doctor's checks of the arithmetic: torch, the compiled operators, matrix products, a model and its tokenizer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rwkvmpi.cluster.affinity import threads_per_rank
from rwkvmpi.doctor.diagnosis import Finding

SOURCE_TREE = Path(__file__).parents[2]
TOLERANCE = 1e-5  # relative to the largest number of the result
CHUNK = 1024
MATRICES = ((768, 768), (768, 3072), (3072, 768), (768, 96))


def torch_library() -> Iterator[Finding]:
    """torch's version, what it makes of this processor, and GPUs."""
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "fail", f"cannot be imported: {error}", "pip install torch==2.13.0")
        return
    torch.set_num_threads(threads_per_rank())  # as the ranks of a run do
    value = f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        value += f", GPUs: {', '.join(names)}"
    yield Finding("torch", "ok", value)


def operators() -> Iterator[Finding]:
    """The compiled operators are there, not older than their sources, and right in every variant that runs here."""
    from rwkvmpi.errors import UserError
    from rwkvmpi.ops import library

    rebuild = _rebuild if (SOURCE_TREE / "setup.py").exists() else None
    remedy = "compile them: python setup.py build_ext --inplace" if rebuild else "install rwkvmpi again"
    try:
        facts = library.info()
        runnable = library.runnable()
    except UserError as error:
        yield Finding("operators", "fail", str(error), remedy, rebuild)
        return
    if (newer := _newer_source(Path(str(facts["path"])))) is not None:
        yield Finding("operators", "warn", f"{facts['path']} is older than {newer.name}", remedy, rebuild)
    wrong = []
    for variant in runnable:
        with library.use(variant):
            wrong += [f"{name} ({variant}, off by {error:.1e})" for name, error in _errors() if not error < TOLERANCE]
    if wrong:
        yield Finding("operators", "fail", f"wrong results: {', '.join(wrong)}", remedy, rebuild)
        return
    value = f"{facts['isa']} in use, {', '.join(runnable)} right against the reference, compiler {facts['compiler']}"
    yield Finding("operators", "ok", value)


def matrix_rows() -> Iterator[Finding]:
    """A row's product has the same bits wherever the row stands in a chunk and whatever its neighbours are."""
    import torch

    from rwkvmpi import ops

    generator = torch.Generator().manual_seed(1)
    wrong = []
    for kind in ("float32", "bfloat16", "int8"):
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        for width, out in MATRICES:
            x = torch.randn(CHUNK, width, generator=generator).to(dtype)
            weight = ops.pack(torch.randn(out, width, generator=generator), kind)
            result = ops.product(x, weight)
            for shift in (32, 416, 1023):  # as another document before this one would move it
                moved = torch.randn(CHUNK, width, generator=generator).to(dtype)
                moved[shift:] = x[: CHUNK - shift]
                if not torch.equal(ops.product(moved, weight)[shift:], result[: CHUNK - shift]):
                    wrong.append(f"{kind} {width}x{out} moved by {shift}")
    if wrong:
        value = f"the bits of a row depend on its place: {', '.join(wrong[:3])}"
        remedy = "build the operators anew with another compiler (CXX=...) and report this"
        yield Finding("matrix products", "fail", value, remedy)
    else:
        threads = torch.get_num_threads()
        value = (
            f"rows keep their bits wherever they stand ({CHUNK} rows, float32, bfloat16 and int8, {threads} threads)"
        )
        yield Finding("matrix products", "ok", value)


def model_and_tokenizer(model: str, tokenizer: str) -> Iterator[Finding]:
    """The model file can be read, its weights are numbers, the tokenizer fits it, and memory holds it."""
    import psutil

    from rwkvmpi.corpus.tokenizers import load_tokenizer
    from rwkvmpi.errors import UserError
    from rwkvmpi.models.checkpoint import bundled_path, check_finite, open_checkpoint

    try:
        with open_checkpoint(bundled_path() if model == "bundled" else model) as checkpoint:
            shape = checkpoint.shape
            nbytes = sum(file.stat().st_size for file in checkpoint.files)
            check_finite(checkpoint)
            value = f"RWKV-{checkpoint.version}, {shape.n_layer} layers x {shape.n_embd}, {shape.vocab_size} tokens, "
            value += f"{checkpoint.parameters() / 1e6:,.1f} M parameters, {checkpoint.dtype_name}"
    except UserError as error:
        yield Finding("model", "fail", str(error), "name another file with --model")
        return
    available = psutil.virtual_memory().available
    if nbytes > available:
        value += f"; {nbytes / 2**30:.1f} GiB of weights, {available / 2**30:.1f} GiB of memory free"
        yield Finding("model", "warn", value, "split it over more nodes: --stages")
    else:
        yield Finding("model", "ok", value)
    try:
        words = load_tokenizer(tokenizer, shape.vocab_size)
    except UserError as error:
        yield Finding("tokenizer", "fail", str(error), "name the tokenizer that belongs to the model with --tokenizer")
        return
    sample = "Grüße, 你好\n".encode() + b"\xff\x00"
    if words.decode(words.encode(sample)) == sample:
        yield Finding("tokenizer", "ok", f"{words.name} fits, and gives any bytes back as they were")
    else:
        yield Finding("tokenizer", "warn", f"{words.name} fits, but does not give all bytes back", "see the README")


def _errors() -> Iterator[tuple[str, float]]:
    """(operator, largest difference from the fp64 reference relative to the largest result) of the variant in use."""
    import torch

    from rwkvmpi import ops
    from rwkvmpi.ops import reference

    generator = torch.Generator().manual_seed(2)
    tokens, heads, size = 67, 3, 64
    channels = heads * size

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    r, k, v = (normal(tokens, heads, size) for _ in range(3))
    decay = torch.rand(tokens, heads, size, generator=generator) * 0.45 + 0.55
    kk = torch.nn.functional.normalize(normal(tokens, heads, size), dim=-1)
    gate = torch.rand(tokens, heads, size, generator=generator)
    state, bonus = normal(heads, size, size), normal(heads, size)
    x, weight, bias = normal(tokens, channels), normal(channels), normal(channels)
    old = torch.stack([normal(channels), normal(channels).exp(), normal(channels)])
    cases: list[tuple[str, Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = [
        ("wkv7", ops.wkv7, reference.wkv7, (r, decay, k, v, -kk, kk * gate, state)),
        ("wkv6", ops.wkv6, reference.wkv6, (r, decay, k, v, bonus, state)),
        ("wkv5", ops.wkv5, reference.wkv5, (r, decay[0].contiguous(), k, v, bonus, state)),
        ("wkv4", ops.wkv4, reference.wkv4, (x, normal(tokens, channels), -weight.exp(), bias, old)),
        ("layer_norm", ops.layer_norm, reference.layer_norm, (x, weight, bias)),
    ]
    for name, operator, truth, arguments in cases:
        found, expected = operator(*arguments), truth(*arguments)
        if torch.is_tensor(found):
            found, expected = (found,), (expected,)
        yield name, max(_distance(a, b) for a, b in zip(found, expected, strict=True))
    head = normal(300, channels)
    targets = torch.arange(tokens, dtype=torch.int64)
    wanted = torch.log_softmax(x.double() @ head.double().T, -1)[torch.arange(tokens), targets]
    yield "head_logprobs", _distance(ops.head_logprobs(x, ops.pack(head, "float32"), targets), wanted)


def _distance(found: Any, expected: Any) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def _newer_source(library: Path) -> Path | None:
    """A source of the operators that was changed after they were compiled, where the sources are at hand."""
    sources = [path for pattern in ("*.cpp", "*.h") for path in (SOURCE_TREE / "cuda/host").glob(pattern)]
    return next((path for path in sources if path.stat().st_mtime > library.stat().st_mtime), None)


def _rebuild() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=SOURCE_TREE,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise RuntimeError(f"the compiler ended with exit code {done.returncode}: {lines[-1]}")
