"""Logits against the public `rwkv` package on the same .pth files, for all versions and shapes it supports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_cases import CASES, TOLERANCE, difference, model, model_file, tokens

# The package chooses between RWKV-7 and the older versions when it is imported: one process for each.
READ = """
import contextlib, io, json, sys
import numpy as np, torch
torch.set_num_threads(1)
files, folder = json.loads(sys.argv[1]), sys.argv[2]
with contextlib.redirect_stdout(io.StringIO()):
    from rwkv.model import RWKV
    for name, (path, ids) in files.items():
        logits, _ = RWKV(path.removesuffix(".pth"), "cpu fp32").forward(ids, None, full_output=True)
        np.save(f"{folder}/{name}.npy", logits.numpy())
"""
COUNT = 100


@pytest.mark.parametrize("seven", [False, True], ids=["4-to-6", "7"])
def test_same_logits_as_the_rwkv_package(seven: bool, tmp_path: Path) -> None:
    pytest.importorskip("rwkv")
    cases = [case for case in CASES if (case.version == "7") == seven]
    files = {case.id: (str(model_file(case)), tokens(case, COUNT).tolist()) for case in cases}
    environment = os.environ | {"RWKV_V7_ON": "1" if seven else "0", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    command = [sys.executable, "-c", READ, json.dumps(files), str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    for case in cases:
        logits, _ = model(case).forward(tokens(case, COUNT))
        assert difference(logits, np.load(tmp_path / f"{case.id}.npy").astype(np.float64)) <= TOLERANCE, case.id
