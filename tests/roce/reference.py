"""What the scores in the laboratory must agree with: the results of one rank, on this machine without the laboratory.

python tests/roce/reference.py FOLDER
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LENGTHS = [60_000, 33, 1024, 20_000, 1]
SETTINGS = ("--chunk", "256", "--commit-every", "30c")


@dataclass(frozen=True)
class Reference:
    """A folder with model, documents and the run of one rank."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Reference:
        """Fill the folder."""
        self = cls(folder)
        self.documents.mkdir(parents=True)
        for number, length in enumerate(LENGTHS):
            letters = random.Random(number)
            text = bytes(letters.choice(b"abcdefghij   \n,.") for _ in range(length))
            (self.documents / f"d{number}.txt").write_bytes(text)
        shape = ["--layers", "4", "--width", "64", "--vocab", "256", "--head-size", "32", "--seed", "3"]
        _rwkvmpi("random-model", "7", *shape, "-o", self.model)
        _rwkvmpi("score", self.model, self.documents, "-o", folder / "run", *SETTINGS)
        return self

    @property
    def model(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def documents(self) -> Path:
        return self.folder / "documents"

    @property
    def digest(self) -> str:
        """Of the results' content; see rwkvmpi.store.digest."""
        return str(json.loads((self.folder / "run" / "SUCCESS").read_text())["content_sha256"])


def _rwkvmpi(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "rwkvmpi", *map(str, arguments)], check=True)


if __name__ == "__main__":
    Reference.make(Path(sys.argv[1]))
