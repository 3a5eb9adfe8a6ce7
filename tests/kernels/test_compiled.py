"""Beyond the interpreter: kernels compile for a GPU, into its registers, without fused operations."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("compile_program.py")
REPOSITORY = PROGRAM.parents[2]


def test_kernels_compile_into_registers_and_fuse_nothing(tmp_path):
    # Without the interpreter, which is on in this process.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, PROGRAM],
        env=kept | {"PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout)
    assert len(found) == 16
    assert {name: said for name, said in found.items() if said["spilled"] or said["fused"]} == {}
