"""Each package imports where the packages it must not need are not installed, in a fresh interpreter.

``sys.modules[name] = None`` makes Python treat a package as absent, also for those who merely look for it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.test_layers import HIGHEST_TORCH_FREE, ROOT, layer, module_name, source_files

PROGRAM = """
import importlib, sys
absent, modules = sys.argv[1].split(","), sys.argv[2:]
for name in absent:
    sys.modules[name] = None
for name in modules:
    importlib.import_module(name)
print(*(name for name in absent if sys.modules[name] is not None))
"""


def import_without(absent: tuple[str, ...], modules: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(absent), *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def importable(paths: list[Path]) -> list[str]:
    """Names to import; an entry point is one only as ``__main__``."""
    names = (module_name(path).removesuffix(".__init__") for path in paths)
    return [name for name in names if not name.endswith("__main__")]


def torch_free_files() -> list[Path]:
    layers = ((path, layer(module_name(path))) for path in source_files("quantlib"))
    return [path for path, found in layers if found is not None and found <= HIGHEST_TORCH_FREE]


@pytest.mark.parametrize(
    ("absent", "modules"),
    [
        (("ray", "prefect", "pydantic"), importable(source_files("quantlib"))),
        (("torch", "transformers", "ray", "prefect", "pydantic"), importable(torch_free_files())),
        (("prefect",), importable(source_files("workers"))),
        (("torch", "transformers"), importable(source_files("flows"))),
    ],
    ids=["quantlib", "quantlib-torch-free", "workers", "flows"],
)
def test_package_imports_without_what_it_must_not_need(absent, modules):
    assert modules
    done = import_without(absent, modules)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_absent_package_is_noticed():
    done = import_without(("json",), ["json.decoder"])
    assert done.returncode != 0
