"""What will lie beside the shards of an output: side files, provenance, index and config.json.

It is all made when the shards are done, and waits in the work prefix until the output is published.
"""

import json
from collections.abc import Mapping
from typing import Any

from quantlib.checkpoint.index import CONFIG_NAME, INDEX_NAME, STAGED_NAME, Checkpoint
from quantlib.checkpoint.layout import index_bytes
from quantlib.job.plan import Plan
from quantlib.job.provenance import PROVENANCE_NAME, build_provenance
from quantlib.job.report import HTML_NAME, REPORT_NAME
from quantlib.job.staged_output import store_staged
from quantlib.packing import FORMATS, gguf_format
from quantlib.packing.outliers import config_with_outliers
from quantlib.storage import Store


def stage(
    source_store: Store,
    output_store: Store,
    work_store: Store,
    plan: Plan,
    checkpoint: Checkpoint,
    report: Mapping[str, Any],
) -> None:
    """Have everything wait that makes the output a checkpoint that readers recognise.

    Args:
        source_store: Where the source lies, whose side files are copied.
        output_store: Where the shards are.
        work_store: Where the rest waits.
        checkpoint: The source.
        report: Of the run; ``shards`` are those that are there.
    """
    files: dict[str, bytes] = {}
    quantization = _quantization(plan)
    config = {**checkpoint.config, "quantization_config": quantization}
    for name, info in checkpoint.side_files.items():
        # As a range, which is pinned to the object that was planned.
        files[name] = bytes(source_store.read_ranges(info, [(0, info.size_bytes)])[0])
    files |= {**checkpoint.made_files, **_format_files(plan)}
    provenance = build_provenance(
        plan, checkpoint, shards=report["shards"], device_kinds=report["device_kinds"]
    )
    files[PROVENANCE_NAME] = json.dumps(provenance, indent=1, allow_nan=False).encode()
    files |= {**_index(plan), CONFIG_NAME: json.dumps(config, indent=2).encode()}
    store_staged(output_store, work_store, plan, files, report)


def names_beside_shards(plan: Plan) -> tuple[str, ...]:
    """Every file name that may lie beside the shards of a plan, staged or published."""
    names = (STAGED_NAME, REPORT_NAME, HTML_NAME, PROVENANCE_NAME, *_index(plan), CONFIG_NAME)
    return (*plan.side_files, *_format_files(plan), *names)


def _index(plan: Plan) -> dict[str, bytes]:
    """File name -> content of the index; the parts of a GGUF file say themselves how many they are."""
    return {} if plan.options["format"] == gguf_format.NAME else {INDEX_NAME: index_bytes(plan.units)}


def _quantization(plan: Plan) -> dict[str, Any]:
    packer = FORMATS[plan.options["format"]]
    quantization = packer.quantization_config(plan.schemes, plan.kept_linears)
    quantized = [x for block in plan.blocks for x in block.linears if x.scheme is not None]
    return config_with_outliers(
        quantization,
        num_columns=plan.options["outlier_columns"],
        weights_per_mille=plan.options["outlier_weights"],
        without=[x.name for x in quantized if not x.num_outliers and not x.num_outlier_weights],
    )


def _format_files(plan: Plan) -> dict[str, bytes]:
    return FORMATS[plan.options["format"]].side_files(_quantization(plan))
