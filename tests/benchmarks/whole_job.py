"""A whole job in this process, from a checkpoint to a quantized one, as a row of the table of variants."""

import statistics
import tempfile
from collections.abc import Mapping
from typing import Any

from quantlib.inprocess import quantize
from quantlib.job.options import options_from


def run_job(values: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job with evaluation; its output is thrown away.

    Args:
        values: The job's options, all but output and runner.

    Returns:
        The columns of a row. The errors are those that the methods report, each weighted by the Hessian its
        linear was solved with; the seconds are those of the stage ``solve``, packing included. The report
        has no losses by row, so there is no standard error.
    """
    with tempfile.TemporaryDirectory(prefix="quantmill-") as output:
        report = quantize(options_from({**values, "output": f"{output}/model", "runner": "inprocess"}))
    linears = [linear for block in report["blocks"] for linear in block["linears"]]
    return {
        "mean_relative_error": statistics.fmean(linear["relative_error"] for linear in linears),
        "solve_cpu_seconds": report["stages"]["solve"]["cpu_seconds"],
        "fallbacks": len(report["fallbacks"]),
        "perplexity": report["evaluation"]["perplexity_quantized"],
        "kl_divergence": report["evaluation"]["kl_divergence"],
        "ratio": report["evaluation"]["ratio"],
        "ratio_standard_error": None,
    }
