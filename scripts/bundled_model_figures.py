"""Bits per byte of the bundled model on files held out from its training, against xz -9e on each file alone.

    python scripts/bundled_model_figures.py

Scores the held-out files of this Python's standard library with `rwkvmpi score` and prints both figures. The files
are chosen by a hash of their path, so every machine holds out the same ones (test packages, which many distributions
leave out, come in with --tests). Exits 1 when the model's mean is not below that of xz.
"""

from __future__ import annotations

import argparse
import lzma
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import h5py
import numpy as np
from train_bundled_model import is_held_out, is_test, sources

WHOLE = "all-as-one-document.txt"


def copy_held_out(library: Path, folder: Path, with_tests: bool, whole: bool) -> dict[str, bytes]:
    """Write every held-out file that is not empty into `folder` as .txt, if `whole` also all of them laid end to end;
    returns their bytes by document id."""
    texts: dict[str, bytes] = {}
    for name, path in sources(library).items():
        if is_held_out(name) and (with_tests or not is_test(name)) and path.stat().st_size:
            texts[f"{name}.txt"] = path.read_bytes()
    if whole:
        texts[WHOLE] = b"".join(texts.values())
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return texts


def score(model: str, folder: Path, run: Path, *options: str) -> dict[str, float]:
    """Bits per byte by document id, as `rwkvmpi score` with these options finds them."""
    command = [sys.executable, "-m", "rwkvmpi", "score", model, str(folder), "-o", str(run), *options]
    subprocess.run(command, check=True)
    with h5py.File(run / "results.h5") as file:
        names = file["documents/id"].asstr()[:]
        return dict(zip(names, file["documents/bits_per_byte"][:].tolist(), strict=True))


def xz_bits_per_byte(text: bytes) -> float:
    """Of the file that `xz -9e` writes."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def main() -> int:
    """Print the table; 0 when the model is better, 1 when it is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="another model file (the bundled one)")
    parser.add_argument("--sources", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), metavar="FOLDER")
    parser.add_argument("--tests", action="store_true", help="also the held-out files of the test packages")
    parser.add_argument("--whole", action="store_true", help="also all of them laid end to end, as one document")
    parser.add_argument("--each", action="store_true", help="print every file's figures too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "held-out")
        texts = copy_held_out(options.sources, folder, options.tests, options.whole)
        if not texts:
            raise SystemExit(f"{options.sources} holds no source of the standard library; name its folder by --sources")
        found = score(options.model, folder, Path(temporary, "run"))
    whole = texts.pop(WHOLE, None)
    names = sorted(texts)
    sizes = np.array([len(texts[name]) for name in names])
    model = np.array([found[name] for name in names])
    xz = np.array([xz_bits_per_byte(texts[name]) for name in names])
    if options.each:
        for row in zip(model, xz, sizes, names, strict=True):
            print("{:8.4f} {:8.4f} {:9,d}  {}".format(*row))
    print(f"{len(names)} held-out files, {sizes.sum():,} bytes, of {options.sources}")
    print("bits per byte                      model   xz -9e")
    print(f"mean over the files              {model.mean():7.4f}  {xz.mean():7.4f}")
    weighted = [np.average(x, weights=sizes) for x in (model, xz)]
    print("weighted by bytes                {:7.4f}  {:7.4f}".format(*weighted))
    print(f"files on which it is the better  {int((model < xz).sum()):7d}  {int((xz <= model).sum()):7d}")
    if whole is not None:
        print(f"all of them as one document      {found[WHOLE]:7.4f}  {xz_bits_per_byte(whole):7.4f}")
    return 0 if model.mean() < xz.mean() else 1


if __name__ == "__main__":
    sys.exit(main())
