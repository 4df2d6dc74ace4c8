"""results/gpu.sh, for the hour in which a GPU is there: each piece runs, tiny, on the CPU."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("piece", [1, 2, 3, 4])
def test_each_piece_runs_on_the_cpu(piece, tmp_path):
    environment = {**os.environ, "ACC": "cpu", "PYTHON": sys.executable, "OUT": str(tmp_path)}
    environment |= {"OMP_NUM_THREADS": "1", "DATA": "nowhere"}
    command = ["bash", str(ROOT / "results/gpu.sh"), str(piece)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "torch" in done.stdout


def test_an_unknown_piece_is_refused():
    done = subprocess.run(
        ["bash", str(ROOT / "results/gpu.sh"), "5"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "which piece" in done.stderr
