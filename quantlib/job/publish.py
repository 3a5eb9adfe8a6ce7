"""The last writes of a job: side files and report, the index, and config.json as the very last object.

Whoever finds a config.json finds a whole model.
"""

import json
from collections.abc import Mapping
from typing import Any

from quantlib.checkpoint.index import Checkpoint
from quantlib.checkpoint.layout import index_bytes
from quantlib.job.plan import Plan, schemes_of
from quantlib.job.report import HTML_NAME, REPORT_NAME
from quantlib.job.report_html import render_html
from quantlib.packing import FORMATS
from quantlib.storage import Store, join_uri


def publish(
    source_store: Store,
    output_store: Store,
    plan: Plan,
    checkpoint: Checkpoint,
    report: Mapping[str, Any],
) -> None:
    """Make the output a checkpoint that readers recognise."""
    packer = FORMATS[plan.options["format"]]
    quantization = packer.quantization_config(schemes_of(plan.blocks), plan.kept_linears)
    config = {**checkpoint.config, "quantization_config": quantization}
    for name, info in checkpoint.side_files.items():
        output_store.write(join_uri(plan.output, name), source_store.read(info.uri))
    for name, content in packer.side_files(quantization).items():
        output_store.write(join_uri(plan.output, name), content)
    output_store.write(
        join_uri(plan.output, REPORT_NAME), json.dumps(report, indent=1, allow_nan=False).encode()
    )
    output_store.write(join_uri(plan.output, HTML_NAME), render_html(dict(report)).encode())
    output_store.write(join_uri(plan.output, "model.safetensors.index.json"), index_bytes(plan.units))
    output_store.write(join_uri(plan.output, "config.json"), json.dumps(config, indent=2).encode())
