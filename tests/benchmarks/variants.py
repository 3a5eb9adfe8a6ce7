"""How well every form of the solver quantizes: perplexity and error by variant, model, bits and calibration.

    python tests/benchmarks/variants.py --models smollm2 control --bits 4 3 2 --seeds 0 1 --output table.md

For each model and seed the Hessians of all input groups are gathered once, from the activations of the
original model in fp32, and kept in a cache folder. Every variant then solves all blocks from them, and the
levels it chose are evaluated inside the plain transformers model (`dense_evaluation`). Beside the table,
``table.jsonl`` receives each row as soon as it is known; started again, only missing rows are made.

What calibrates on quantized activations has Hessians of its own at every bit width: the variants named
``job-`` are whole jobs in this process (`whole_job`).

Left out: models with activations that are not finite.

B sequences, T positions, D hidden, R rows (out features), C columns (in features).
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parent))
from captured_hessians import block_file, gather_hessians
from dense_evaluation import evaluate
from variant_rows import COLUMNS, Rows
from whole_job import run_job

from quantlib.calibration.corpus import load_tokenizer, rows_digest, token_rows
from quantlib.calibration.documents import read_documents
from quantlib.checkpoint.index import open_checkpoint
from quantlib.checkpoint.reader import read_tensors
from quantlib.grids.affine import nearest_codes, with_codes
from quantlib.grids.fit import search_scales
from quantlib.methods import METHODS
from quantlib.model.skeleton import load_skeleton
from quantlib.packing import FORMATS
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import SolverSettings
from quantlib.storage import normalize_uri, open_store

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / ".demo"
MODELS = {
    "smollm2": DEMO / "source" / "SmolLM2-135M-Instruct",
    "control": DEMO / "control" / "SmolLM2-135M-Instruct",
    "biased": DEMO / "biased" / "SmolLM2-135M-Instruct",
}
# Bits -> symmetry of the grids tried; of the four levels of 2 bits a symmetric grid wastes one.
SYMMETRIES = {4: (True, False), 3: (True, False), 2: (False,)}
GRIDS = ("symmetric", "asymmetric")
# Options that all rows of a section of the table have in common.
SETTING = ("group_size", "sequences", "sequence_length", "evaluation_sequences")
# No method of the product: nearest levels on scales weighted by diag(H).
WEIGHTED_ROUNDING = "rtn-weighted"
# No method either: a job from checkpoint to checkpoint.
WHOLE_JOB = "job"
_SOLVER_SOURCES = ("linalg.py", "column_order.py", "grids/*.py", "methods/*.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One form of the solver on one kind of grid.

    Attributes:
        name: As in the table.
        method: A name of `METHODS`, ``WEIGHTED_ROUNDING`` or ``WHOLE_JOB``.
        is_symmetric: Symmetry of the scheme; bits and group size come from the command line.
        choices: Those left to the method that are not at their default; of a job, its options.
    """

    name: str
    method: str
    is_symmetric: bool
    choices: Mapping[str, Any]

    @property
    def reads_data(self) -> bool:
        """Whether calibration has any influence on what is chosen."""
        return self.method != "rtn"


def _job(propagation: str, *, correct: bool, passes: int) -> dict[str, Any]:
    """Options of a job, none left to follow the bits; passes go with a refit."""
    solver = {"descent_passes": passes, "refit_scales": passes > 0, "scale_search": "hessian"}
    return {"propagation": propagation, "correct_targets": correct, **solver}


SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn-minmax": ("rtn", {"scale_search": "minmax"}),
    "rtn-mse": ("rtn", {"scale_search": "mse"}),
    "rtn-hessian": (WEIGHTED_ROUNDING, {}),
    "natural-minmax": ("gptq", {"column_order": "natural", "scale_search": "minmax"}),
    "activation-minmax": ("gptq", {"scale_search": "minmax"}),
    "activation-mse": ("gptq", {"scale_search": "mse"}),
    "activation-hessian": ("gptq", {}),
    "activation-inverse-hessian": ("gptq", {"scale_search": "inverse-hessian"}),
    "group-aware-hessian": ("gptq", {"column_order": "group-aware"}),
    "hessian-descent-1": ("gptq", {"descent_passes": 1}),
    "hessian-descent-2": ("gptq", {"descent_passes": 2}),
    "hessian-descent-4": ("gptq", {"descent_passes": 4}),
    "hessian-refit": ("gptq", {"refits_scales": True}),
    "hessian-descent-2-refit": ("gptq", {"descent_passes": 2, "refits_scales": True}),
    "inverse-hessian-descent-2-refit": (
        "gptq",
        {"scale_search": "inverse-hessian", "descent_passes": 2, "refits_scales": True},
    ),
    "job-original": (WHOLE_JOB, _job("original", correct=False, passes=0)),
    "job-original-biases": (WHOLE_JOB, _job("original", correct=False, passes=0) | {"correct_biases": True}),
    "job-quantized": (WHOLE_JOB, _job("quantized", correct=False, passes=0)),
    "job-corrected": (WHOLE_JOB, _job("quantized", correct=True, passes=0)),
    "job-original-descent-2-refit": (WHOLE_JOB, _job("original", correct=False, passes=2)),
    "job-quantized-descent-2-refit": (WHOLE_JOB, _job("quantized", correct=False, passes=2)),
    "job-corrected-descent-2-refit": (WHOLE_JOB, _job("quantized", correct=True, passes=2)),
    "job-corrected-inverse-hessian-descent-2-refit": (
        WHOLE_JOB,
        _job("quantized", correct=True, passes=2) | {"scale_search": "inverse-hessian"},
    ),
}


def variants_for(bits: int, names: Sequence[str], grids: Sequence[str] = GRIDS) -> Iterator[Variant]:
    """All variants of these names at a bit width, on those of the grids that are tried there."""
    for is_symmetric in SYMMETRIES[bits]:
        if GRIDS[not is_symmetric] not in grids:
            continue
        for name in names:
            method, choices = SOLVERS[name]
            yield Variant(name=name, method=method, is_symmetric=is_symmetric, choices=choices)


class Bench:
    """One model: its source opened block by block for the solver, and whole for the evaluation."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self.arguments = name, arguments
        self.folder = MODELS.get(name, Path(name))
        if not self.folder.is_dir():
            raise SystemExit(
                f"{name}: {self.folder} is no folder; README.md beside this file tells what makes it"
            )
        uri = normalize_uri(str(self.folder))
        self.store = open_store(uri)
        self.checkpoint = open_checkpoint(self.store, uri)
        self.skeleton = load_skeleton(self.checkpoint.config, list(self.checkpoint.tensors))
        self.evaluation_BT = self._rows(arguments.evaluation, arguments.evaluation_sequences, 0)
        self.calibration_rows = cache(lambda s: self._rows(arguments.calibration, arguments.sequences, s))

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The model that variants put their levels into; after the first it is never again the source."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def inputs_digest(self, *rows: torch.Tensor) -> str:
        """Names the checkpoint's objects and these token rows."""
        shards = {name: (info.size_bytes, info.etag) for name, info in self.checkpoint.shards.items()}
        named = [self.checkpoint.config, shards, [rows_digest(rows_BT) for rows_BT in rows]]
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:12]

    def hessians(self, seed: int) -> Path:
        """Folder of the Hessians, ``block-000.safetensors`` and so on; gathered unless they are there."""
        rows_BT = self.calibration_rows(seed)
        folder = self.arguments.cache / f"{Path(self.name).name}-seed{seed}-{self.inputs_digest(rows_BT)}"
        if not block_file(folder, self.skeleton.num_blocks - 1).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            started = time.process_time()
            with torch.inference_mode():
                gather_hessians(self.store, self.checkpoint, self.skeleton, rows_BT, folder)
            print(f"{self.name}, seed {seed}: Hessians in {time.process_time() - started:.1f} CPU seconds")
        return folder

    def _rows(self, text: Path, count: int, seed: int) -> torch.Tensor:
        tokenizer = load_tokenizer(self.store, self.checkpoint)
        length = self.arguments.sequence_length
        documents = read_documents(str(text))
        return token_rows(documents, tokenizer, num_sequences=count, sequence_length=length, seed=seed)


def solve_variant(bench: Bench, variant: Variant, scheme: WeightScheme, hessians: Path) -> dict[str, Any]:
    """Solve all blocks and put the levels into the bench's dense model.

    Returns:
        ``mean_relative_error`` over the linears, ``solve_cpu_seconds`` (of the method's calls alone) and
        ``fallbacks``, how many linears did not get the first choice.
    """
    cpu_seconds, fallbacks, errors = 0.0, 0, []
    num_tokens = bench.arguments.sequences * bench.arguments.sequence_length
    for index in range(bench.skeleton.num_blocks):
        spec = bench.skeleton.block_spec(index)
        names = [f"{linear.name}.weight" for linear in spec.linears]
        tensors = read_tensors(bench.store, bench.checkpoint, names)
        hessian_of = load_file(block_file(hessians, index))
        for group in spec.input_groups:
            weights, hessian_CC = {n: tensors[f"{n}.weight"].float() for n in group}, hessian_of[group[0]]
            started = time.process_time()
            solved = _solved(variant, weights, scheme, hessian_CC, num_tokens, tensors[names[0]].dtype)
            cpu_seconds += time.process_time() - started
            for name, (quantized, fallback) in solved.items():
                levels_RC = quantized.dequantize()
                bench.dense.get_parameter(f"{name}.weight").copy_(levels_RC)
                errors.append(_relative_error(weights[name], levels_RC, hessian_CC))
                fallbacks += fallback is not None
    error = statistics.fmean(errors)
    return {"mean_relative_error": error, "solve_cpu_seconds": cpu_seconds, "fallbacks": fallbacks}


def _solved(
    variant: Variant,
    weights: Mapping[str, torch.Tensor],
    scheme: WeightScheme,
    hessian_CC: torch.Tensor,
    num_tokens: int,
    stored: torch.dtype,
) -> dict[str, tuple[QuantizedLinear, str | None]]:
    """Linear -> its codes on their grid, and what was done instead of the first choice."""
    scale_dtype = FORMATS["compressed-tensors"].scale_dtype(stored)
    if variant.method == WEIGHTED_ROUNDING:
        rounded, importance_C = {}, hessian_CC.diagonal()
        for name, weight_RC in weights.items():
            grid = search_scales(weight_RC, scheme, scale_dtype=scale_dtype, importance_C=importance_C)
            rounded[name] = with_codes(grid, nearest_codes(weight_RC, grid)[0]), None
        return rounded
    results = METHODS[variant.method](
        weights,
        dict.fromkeys(weights, scheme),
        hessian_CC=hessian_CC,
        num_tokens=num_tokens,
        scale_dtype=scale_dtype,
        solver=SolverSettings(**variant.choices),
    )
    return {name: (result.quantized, result.report.fallback) for name, result in results.items()}


def _relative_error(weight_RC: torch.Tensor, levels_RC: torch.Tensor, hessian_CC: torch.Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - levels; taken here, so that no method measures itself."""
    matrices = (weight_RC - levels_RC, weight_RC)
    error, whole = (torch.sum((m @ hessian_CC).mul_(m), dtype=torch.float64).item() for m in matrices)
    return error / whole


def solver_digest() -> str:
    """Names the state of the solver's source files."""
    found = (path for pattern in _SOLVER_SOURCES for path in sorted((REPOSITORY / "quantlib").glob(pattern)))
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()[:12]


def _key(bench: Bench, name: str, inputs: str, **values: Any) -> dict[str, Any]:
    setting = {option: getattr(bench.arguments, option) for option in SETTING}
    return {"variant": name, "model": bench.name, **values, "setting": setting, "inputs": inputs}


def _variant_key(bench: Bench, variant: Variant, bits: int, seed: int) -> dict[str, Any]:
    """What decides a row. Settings at their default do not show: a new one leaves old rows valid."""
    read = [bench.calibration_rows(seed)] if variant.reads_data else []
    return _key(
        bench,
        variant.name,
        bench.inputs_digest(*read, bench.evaluation_BT),
        method=variant.method,
        solver=dict(variant.choices),
        bits=bits,
        is_symmetric=variant.is_symmetric,
        seed=seed if variant.reads_data else None,
    )


def _source_row(bench: Bench, rows: Rows) -> dict[str, Any]:
    """The source's losses; asked for before the first variant touches the dense model."""
    key = _key(bench, "source", bench.inputs_digest(bench.evaluation_BT))
    found = rows.find(key)
    if found is None:
        loss = evaluate(bench.dense, bench.evaluation_BT)
        found = {"key": key, "perplexity": loss.perplexity, "row_losses": loss.row_losses}
        rows.add(found)
    return found


def _variant_row(bench: Bench, variant: Variant, bits: int, hessians: Path, source_losses: list[float]):
    """A row of the table, but for its key."""
    group_size, digest = bench.arguments.group_size, solver_digest()
    scheme = WeightScheme(bits=bits, is_symmetric=variant.is_symmetric, group_size=group_size)
    with torch.no_grad():
        solved = solve_variant(bench, variant, scheme, hessians)
    started = time.process_time()
    loss = evaluate(bench.dense, bench.evaluation_BT)
    differences = [mine - its for mine, its in zip(loss.row_losses, source_losses, strict=True)]
    ratio = math.exp(statistics.fmean(differences))
    deviation = statistics.stdev(differences) if len(differences) > 1 else math.nan
    return solved | {
        "perplexity": loss.perplexity,
        "ratio": ratio,
        # Of the mean over the evaluation rows, each compared with the source on the same row.
        "ratio_standard_error": ratio * deviation / math.sqrt(len(differences)),
        "evaluation_cpu_seconds": time.process_time() - started,
        "solver_digest": digest,
        "row_losses": loss.row_losses,
    }


def _job_row(bench: Bench, variant: Variant, bits: int, seed: int) -> dict[str, Any]:
    """A row of a whole job, but for its key."""
    arguments, digest = bench.arguments, solver_digest()
    job = {option: getattr(arguments, option) for option in SETTING}
    job |= {"calibration": str(arguments.calibration), "evaluation": str(arguments.evaluation)}
    scheme = f"W{bits}A16" if variant.is_symmetric else f"W{bits}A16_ASYM"
    job |= {"source": str(bench.folder), "scheme": scheme, "seed": seed, **variant.choices}
    return run_job(job | {"threads_per_worker": arguments.threads}) | {"solver_digest": digest}


def measure_model(bench: Bench, rows: Rows) -> None:
    """Make all missing rows of one model."""
    arguments, source = bench.arguments, _source_row(bench, rows)
    for seed in arguments.seeds:
        wanted = [
            (variant, b)
            for b in arguments.bits
            for variant in variants_for(b, arguments.variants, arguments.grids)
        ]
        keys = [_variant_key(bench, variant, bits, seed) for variant, bits in wanted]
        missing = [number for number, key in enumerate(keys) if rows.find(key) is None]
        print(f"{bench.name}, seed {seed}: {len(missing)} of {len(keys)} rows to make", flush=True)
        for number in missing:
            if wanted[number][0].method == WHOLE_JOB:
                found = _job_row(bench, *wanted[number], seed)
            else:
                found = _variant_row(bench, *wanted[number], bench.hessians(seed), source["row_losses"])
            row = {"key": keys[number], **found}
            rows.add(row)
            print("  " + ", ".join(cell(row) for cell in COLUMNS.values()), flush=True)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS)[:2], help="smollm2, control, biased, or folders"
    )
    parser.add_argument("--bits", nargs="+", type=int, choices=list(SYMMETRIES), default=list(SYMMETRIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration rows")
    parser.add_argument("--variants", nargs="+", choices=list(SOLVERS), default=list(SOLVERS), metavar="NAME")
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=GRIDS)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=64, help="of calibration")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--evaluation-sequences", type=int, default=32)
    parser.add_argument("--calibration", type=Path, default=DEMO / "text" / "calibration.jsonl")
    parser.add_argument("--evaluation", type=Path, default=DEMO / "text" / "evaluation.jsonl")
    parser.add_argument("--cache", type=Path, default=DEMO / "hessians", help="where Hessians are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, required=True, help="the table; its rows go to *.jsonl beside it"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parsed_arguments()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    rows = Rows(arguments.output.with_suffix(".md"), list(SOLVERS))
    for name in arguments.models:
        measure_model(Bench(name, arguments), rows)
    rows.write_table()


if __name__ == "__main__":
    main()
