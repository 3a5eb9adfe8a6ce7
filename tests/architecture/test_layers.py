"""The import direction holds: read from the source, so that lazy imports inside functions count too.

The table below is the one in the design: a module imports only from its own layer and from lower ones.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Longest matching name wins. A package that only holds others is at the bottom, because importing any of its
# modules runs its __init__ first.
LAYERS = {
    "quantlib": 0,
    "quantlib.errors": 0,
    "quantlib.names": 0,
    "quantlib.grids": 3,
    "quantlib.grids.__init__": 0,
    "quantlib.grids.formats": 1,
    "quantlib.grids.granularity": 1,
    "quantlib.storage": 1,
    "quantlib.schemes": 2,
    "quantlib.recipe": 2,
    "quantlib.solver_settings": 2,
    "quantlib.simulation": 2,
    "quantlib.simulation.__init__": 0,
    "quantlib.job": 2,
    "quantlib.job.__init__": 0,
    "quantlib.checkpoint": 5,
    "quantlib.checkpoint.__init__": 0,
    "quantlib.checkpoint.decoded": 2,
    "quantlib.checkpoint.header": 2,
    "quantlib.checkpoint.index": 2,
    "quantlib.checkpoint.layout": 2,
    "quantlib.checkpoint.stated_quantization": 2,
    "quantlib.checkpoint.dtypes": 3,
    "quantlib.cholesky": 3,
    "quantlib.cholesky_check": 3,
    "quantlib.column_order": 3,
    "quantlib.linalg": 3,
    "quantlib.fresh_bytes": 3,
    "quantlib.grouping": 3,
    "quantlib.quantized": 3,
    "quantlib.outlier_columns": 3,
    "quantlib.outlier_weights": 3,
    "quantlib.outliers": 3,
    "quantlib.machine": 3,
    "quantlib.cells": 3,
    "quantlib.tokens": 3,
    "quantlib.stage_clock": 3,
    "quantlib.device_copies": 3,
    "quantlib.weights_ahead": 3,
    "quantlib.stream_shelf": 3,
    "quantlib.memory_watch": 1,
    "quantlib.units": 1,
    "quantlib.panels": 1,
    "quantlib.row_tiles": 1,
    "quantlib.readers": 1,
    "quantlib.strided_view": 1,
    "quantlib.methods": 4,
    "quantlib.packing": 4,
    "quantlib.calibration": 4,
    "quantlib.kernels": 4,
    "quantlib.model": 5,
    "quantlib.steps": 6,
    "quantlib.evaluation": 6,
    "quantlib.verification": 6,
    "quantlib.stated_inputs": 6,
    "quantlib.cell_store": 6,
    "quantlib.batches": 6,
    "quantlib.block_runner": 6,
    "quantlib.block_statistics": 6,
    "quantlib.group_solver": 6,
    "quantlib.memory_ladder": 6,
    "quantlib.unit_converter": 6,
    "quantlib.rounded_ends": 6,
    "quantlib.worker_cells": 6,
    "quantlib.worker_output": 6,
    "quantlib.rail_group": 6,
    "quantlib.sum_exchange": 6,
    "quantlib.job.planned_ends": 6,
    "quantlib.job.planner": 6,
    "quantlib.job.accounting": 6,
    "quantlib.job.fused_sets": 6,
    "quantlib.job.target_check": 6,
    "quantlib.job.texts": 6,
    "quantlib.job.finished": 6,
    "quantlib.job.staging": 6,
    "quantlib.job.publish_later": 6,
    "quantlib.job.clean": 6,
    "quantlib.inprocess": 7,
    "quantlib.__main__": 7,
}
HIGHEST_TORCH_FREE = 2
# They meet in quantlib.quantized; none may know another.
STRANGERS = ("quantlib.methods", "quantlib.packing", "quantlib.calibration")
NOT_IN_QUANTLIB = ("ray", "prefect", "pydantic", "workers", "flows")


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    """``quantlib.job.plan``; a package's own code is ``quantlib.job.__init__``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def target_name(name: str) -> str:
    """The file an imported name stands for: a module, or a package's ``__init__``."""
    place = ROOT.joinpath(*name.split("."))
    return f"{name}.__init__" if place.is_dir() else name


def is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def imported_names(path: Path) -> Iterator[str]:
    """Every module a file imports anywhere; ``from p import x`` means ``p.x`` where that is a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if is_module(full) else str(node.module)


def layer(name: str) -> int | None:
    if name in LAYERS:
        return LAYERS[name]
    parts = name.removesuffix(".__init__").split(".")
    for length in range(len(parts), 1, -1):
        if (prefix := ".".join(parts[:length])) in LAYERS:
            return LAYERS[prefix]
    return 0 if name == "quantlib.__init__" else None


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", source_files("quantlib"), ids=module_name)
def test_module_has_a_layer(path):
    assert layer(module_name(path)) is not None, f"give {module_name(path)} a line in LAYERS"


@pytest.mark.parametrize("path", source_files("quantlib"), ids=module_name)
def test_module_imports_only_from_its_own_and_lower_layers(path):
    own = layer(module_name(path))
    if own is None:
        pytest.skip("has no layer yet; another test says so")
    targets = [target_name(name) for name in imported_names(path) if is_within(name, "quantlib")]
    upward = {name: found for name in targets if (found := layer(name)) is not None and found > own}
    assert not upward, f"{module_name(path)} is in layer {own} and imports {upward}"


@pytest.mark.parametrize("path", source_files("quantlib"), ids=module_name)
def test_methods_packing_and_calibration_do_not_know_each_other(path):
    own = next((package for package in STRANGERS if is_within(module_name(path), package)), None)
    others = [package for package in STRANGERS if package != own] if own else []
    known = [name for name in imported_names(path) if any(is_within(name, other) for other in others)]
    assert not known


@pytest.mark.parametrize("path", source_files("quantlib"), ids=module_name)
def test_quantlib_names_no_orchestration(path):
    found = [name for name in imported_names(path) if name.split(".")[0] in NOT_IN_QUANTLIB]
    assert not found


@pytest.mark.parametrize("path", source_files("workers"), ids=module_name)
def test_workers_name_neither_prefect_nor_flows(path):
    found = [name for name in imported_names(path) if name.split(".")[0] in ("prefect", "flows")]
    assert not found


@pytest.mark.parametrize("path", source_files("flows"), ids=module_name)
def test_flows_reach_workers_by_their_api_and_only_torch_free_quantlib(path):
    for name in imported_names(path):
        assert name.split(".")[0] not in ("torch", "transformers"), name
        if is_within(name, "workers"):
            assert is_within(name, "workers.api") or name == "workers", name
        if is_within(name, "quantlib"):
            found = layer(target_name(name))
            assert found is not None and found <= HIGHEST_TORCH_FREE, name


@pytest.mark.parametrize("path", source_files("flows"), ids=module_name)
def test_flows_keep_annotations_as_objects(path):
    # Prefect builds a flow's form from its annotations; as strings they break `flow.serve`.
    assert "__future__" not in imported_names(path)
