#!/usr/bin/env bash
# Sets everything up in .venv, then reads real text with the bundled model on two ranks:
# the files of this machine's Python that were held out from the model's training.
#
#     scripts/quickstart.sh [RUN]        the run folder; without it runs/quickstart
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

RUN=${1:-$ROOT/runs/quickstart}
case $RUN in /*) ;; *) RUN=$PWD/$RUN ;; esac # set_up changes the folder
TEXT=$ROOT/runs/quickstart-text

set_up mpi

say "collecting text: files of $(python --version) that the model was not trained on"
python - "$TEXT" <<'PYTHON'
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, "scripts")
from train_bundled_model import is_held_out, is_test, sources

folder = Path(sys.argv[1])
for name, path in sources(Path(sysconfig.get_paths()["stdlib"])).items():
    if is_held_out(name) and not is_test(name) and path.stat().st_size:
        target = folder / f"{name}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
PYTHON

RUN=${RUN#"$ROOT/"}
TEXT=${TEXT#"$ROOT/"}
say "mpirun -n 2 rwkvmpi score bundled $TEXT -o $RUN"
code=0
mpirun -n 2 rwkvmpi score bundled "$TEXT" -o "$RUN" || code=$?
[ -e "$RUN/SUCCESS" ] || die "the run did not finish (exit code $code); the same command goes on where it stopped"

cat <<END

More of it:   source ${VENV#"$ROOT/"}/bin/activate
              rwkvmpi inspect $RUN --check
              rwkvmpi doctor
END
