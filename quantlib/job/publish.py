"""The last writes of a job: side files, report, provenance, the index, and config.json as the very last.

Whoever finds a config.json finds a whole model.
"""

import json
from collections.abc import Mapping
from typing import Any

from quantlib.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint
from quantlib.checkpoint.layout import index_bytes
from quantlib.job.plan import Plan, schemes_of
from quantlib.job.provenance import PROVENANCE_NAME, build_provenance
from quantlib.job.report import HTML_NAME, REPORT_NAME
from quantlib.job.report_html import render_html
from quantlib.packing import FORMATS, gguf_format
from quantlib.packing.outliers import config_with_outliers
from quantlib.storage import Store, join_uri


def publish(
    source_store: Store,
    output_store: Store,
    plan: Plan,
    checkpoint: Checkpoint,
    report: Mapping[str, Any],
) -> None:
    """Make the output a checkpoint that readers recognise."""
    quantization = _quantization(plan)
    config = {**checkpoint.config, "quantization_config": quantization}
    for name, info in checkpoint.side_files.items():
        # As a range, which is pinned to the object that was planned.
        content = source_store.read_ranges(info, [(0, info.size_bytes)])[0]
        output_store.write(join_uri(plan.output, name), bytes(content))
    for name, content in checkpoint.made_files.items():
        output_store.write(join_uri(plan.output, name), content)
    for name, content in _format_files(plan).items():
        output_store.write(join_uri(plan.output, name), content)
    provenance = build_provenance(
        plan, checkpoint, shards=report["shards"], device_kinds=report["device_kinds"]
    )
    for name, content in (
        (REPORT_NAME, json.dumps(report, indent=1, allow_nan=False).encode()),
        (HTML_NAME, render_html(dict(report)).encode()),
        (PROVENANCE_NAME, json.dumps(provenance, indent=1, allow_nan=False).encode()),
        *_index(plan).items(),
        (CONFIG_NAME, json.dumps(config, indent=2).encode()),
    ):
        output_store.write(join_uri(plan.output, name), content)


def published_names(plan: Plan) -> tuple[str, ...]:
    """Every file name that `publish` writes for a plan, in order; shards are not among them."""
    names = (REPORT_NAME, HTML_NAME, PROVENANCE_NAME, *_index(plan), CONFIG_NAME)
    return (*plan.side_files, *_format_files(plan), *names)


def _index(plan: Plan) -> dict[str, bytes]:
    """File name -> content of the index; the parts of a GGUF file say themselves how many they are."""
    return {} if plan.options["format"] == gguf_format.NAME else {INDEX_NAME: index_bytes(plan.units)}


def _quantization(plan: Plan) -> dict[str, Any]:
    packer = FORMATS[plan.options["format"]]
    quantization = packer.quantization_config(schemes_of(plan.blocks), plan.kept_linears)
    quantized = [x for block in plan.blocks for x in block.linears if x.scheme is not None]
    return config_with_outliers(
        quantization,
        num_columns=plan.options["outlier_columns"],
        weights_per_mille=plan.options["outlier_weights"],
        without=[x.name for x in quantized if not x.num_outliers and not x.num_outlier_weights],
    )


def _format_files(plan: Plan) -> dict[str, bytes]:
    return FORMATS[plan.options["format"]].side_files(_quantization(plan))
