"""Compiles the kernels for GPUs that need not be there, and prints what the assembler says as JSON."""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantlib.kernels import column_batch, fixed_point

_ASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


def column_variants() -> dict[str, dict[str, Any]]:
    """What `column_batch._columns` is compiled for: number formats, with and without entries kept."""
    found = {}
    for number, has_kept in product((0, 1, 2), (False, True)):
        found[f"columns-{number}-{has_kept}"] = {
            "NUMBER": number,
            "STEP": 0.125,
            "SMALLEST": 2.0**-6,
            "LARGEST": 448.0,
            "MIDDLES": 15 if number == 2 else 0,
            "HAS_KEPT": has_kept,
            "KEPT_STEP": 2.0**-7,
            "KEPT_SMALLEST": 2.0**-126,
            "KEPT_LARGEST": 3.38e38,
            "WIDTH": 128,
            "ROWS": column_batch._ROWS,
        }
    return found


def column_types(constants: dict[str, Any]) -> dict[str, str]:
    types = dict.fromkeys(column_batch._columns.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    floats = ["target", "error", "offset", "feedback", "scale", "lowest", "highest"]
    types |= dict.fromkeys(floats, "*fp32") | {"group": "*i64"}
    types |= dict.fromkeys(("middles", "entries"), "*fp32" if constants["NUMBER"] == 2 else "constexpr")
    kept = ("*u8", "*fp32") if constants["HAS_KEPT"] else ("constexpr", "constexpr")
    return types | dict(zip(("is_kept", "kept"), kept, strict=True))


def total_types() -> dict[str, str]:
    """Arguments of `fixed_point._add`."""
    types = dict.fromkeys(fixed_point._add.arg_names, "i32") | {"ENTRIES": "constexpr"}
    return types | {"total": "*i64", "partial": "*fp32", "refused": "*i32"}


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, num_warps: int
) -> dict[str, int]:
    """Registers, and bytes that did not fit them."""
    values = {(place,): constants.get(name) for place, name in enumerate(types) if types[name] == "constexpr"}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(types) if types[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=aligned)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "enable_fp_fusion": False},
    )
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        words = [_ASSEMBLER, "-v", f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}", file.name]
        said = subprocess.run([*words, "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", said)
    used = re.search(r"Used (\d+) registers", said)
    assert spilled and used, said
    return {
        "registers": int(used[1]),
        "spilled": int(spilled[1]),
        "fused": len(re.findall(r"fma\.rn\.f(?:32|64)", made.asm["ptx"])),
    }


def all_compiled(capability: int) -> dict[str, dict[str, int]]:
    """Of every variant of every kernel."""
    found = {
        name: compiled(column_batch._columns, column_types(constants), constants, capability, num_warps=1)
        for name, constants in column_variants().items()
    }
    for entries in (1, 1024):
        found[f"total-{entries}"] = compiled(
            fixed_point._add, total_types(), {"ENTRIES": entries}, capability, num_warps=4
        )
    return found


if __name__ == "__main__":
    found = {
        f"{name}-sm{capability}": said
        for capability in (80, 90)
        for name, said in all_compiled(capability).items()
    }
    json.dump(found, sys.stdout)
