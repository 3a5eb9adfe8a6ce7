"""Seconds and memory of the stages of a block, and of the product's functions inside them.

Functions are watched by standing in for them, wherever the product has imported them. On a GPU every stage,
and every call of a watched function, begins and ends with the device idle: what is launched in one is not
counted in the next.
"""

import functools
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from block_floor import synchronize

# Part -> function of the product: module, and name inside it. Parts are exclusive of the parts inside them.
WATCHED = {
    "forward": "quantlib.model.block_inputs:run_block",
    "look through inputs": "quantlib.calibration.capture:InputObserver._see",
    "statistics": "quantlib.calibration.partials:Partial.add_",
    "exact sums": "quantlib.calibration.totals:Total.add_noting_",
    "Hessian": "quantlib.calibration.moments:moments_from",
    "factor": "quantlib.linalg:factor_hessian",
    "scales": "quantlib.methods.fitted_scales:fitted_scales",
    "columns": "quantlib.methods.column_solver:solve_codes_of_batch",
    "weight energy": "quantlib.methods.measures:weight_energy",
    "error energy": "quantlib.methods.measures:error_energy",
    "pack": "quantlib.packing.outliers:pack_linear",
}
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(slots=True)
class Spent:
    """Of a stage, or of a part of one.

    Attributes:
        seconds: Of a part without those of the parts inside it.
        calls: How often.
        device_bytes: Most memory of the GPU in use during a stage; None on a CPU and of parts.
        host_bytes: Most memory of the process during a stage; None of parts.
    """

    seconds: float = 0.0
    calls: int = 0
    device_bytes: int | None = None
    host_bytes: int | None = None


class Stopwatch:
    """Measures stages one after the other, and parts inside them.

    Args:
        clock: Tells seconds.

    Attributes:
        stages: Stage -> what it took.
        parts: Stage and part -> what it took.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.stages: dict[str, Spent] = {}
        self.parts: dict[tuple[str, str], Spent] = {}
        self._device, self._clock = device, clock
        self._stage: str | None = None
        # Seconds of the parts inside each of the parts under way.
        self._inside: list[float] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Whatever is done inside."""
        synchronize(self._device)
        _forget_peaks(self._device)
        self._stage, started = name, self._clock()
        yield
        synchronize(self._device)
        self._stage, seconds = None, self._clock() - started
        spent = self.stages.setdefault(name, Spent())
        spent.seconds += seconds
        spent.calls += 1
        if self._device.type == "cuda":
            spent.device_bytes = max(spent.device_bytes or 0, torch.cuda.max_memory_allocated(self._device))
        spent.host_bytes = max(spent.host_bytes or 0, _host_peak())

    @contextmanager
    def watching(self, functions: Mapping[str, str] = WATCHED) -> Iterator[None]:
        """Measure calls of functions as parts of the stage that is under way.

        Args:
            functions: As `WATCHED`.
        """
        with ExitStack() as stack:
            for part, place in functions.items():
                module, _, path = place.partition(":")
                owner, name = _owner(import_module(module), path)
                function = getattr(owner, name)
                stand_in = self._watched(part, function)
                for holder in [owner] if isinstance(owner, type) else _importers(function):
                    for known in [known for known, value in vars(holder).items() if value is function]:
                        stack.enter_context(patch.object(holder, known, stand_in))
            yield

    def rest(self, stage: str) -> float:
        """Seconds of a stage in none of its parts."""
        inside = sum(spent.seconds for (name, _), spent in self.parts.items() if name == stage)
        return self.stages[stage].seconds - inside

    def _watched(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if self._stage is None:
                return function(*arguments, **named)
            synchronize(self._device)
            self._inside.append(0.0)
            started = self._clock()
            try:
                return function(*arguments, **named)
            finally:
                synchronize(self._device)
                seconds = self._clock() - started
                inside = self._inside.pop()
                if self._inside:
                    self._inside[-1] += seconds
                spent = self.parts.setdefault((self._stage, part), Spent())
                spent.seconds += seconds - inside
                spent.calls += 1

        return call


def _owner(module: Any, path: str) -> tuple[Any, str]:
    *classes, name = path.split(".")
    return functools.reduce(getattr, classes, module), name


def _importers(function: Callable[..., Any]) -> list[Any]:
    modules = [module for name, module in sys.modules.items() if name.startswith("quantlib")]
    return [module for module in modules if any(value is function for value in vars(module).values())]


def _forget_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # Where the kernel does not let it, the peak is that since the process began.
    if _CLEAR.exists():
        try:
            _CLEAR.write_text("5")
        except OSError:
            return


def _host_peak() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    return int(found[1]) * 1024 if found else 0
