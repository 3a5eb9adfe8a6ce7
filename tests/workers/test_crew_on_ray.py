"""Jobs on a real Ray cluster: the bytes of one process, with one worker or several."""

from pathlib import Path

import pytest

from quantlib.errors import ObjectNotFoundError, RecipeError
from quantlib.inprocess import DirectStages, quantize
from quantlib.job.conversion import convert
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source
from workers.api import open_crew

pytestmark = pytest.mark.slow


def _convert(options):
    with open_crew(options) as crew:
        return convert(options, crew, DirectStages(), lambda _: None)


def test_crew_without_data_writes_the_same_bytes(tmp_path, ray_cluster):
    given = {"method": "rtn", "calibration": None, "evaluation": None}
    alone = tiny_options(tmp_path, output=str(tmp_path / "alone"), **given)
    shared = tiny_options(tmp_path, output=str(tmp_path / "shared"), workers=2, **given)
    quantize(alone)
    _convert(shared)
    assert shard_digests(Path(shared.output)) == shard_digests(Path(alone.output))


def test_crew_reads_each_source_tensor_once_whatever_the_number_of_workers(tmp_path, ray_cluster):
    wide = {"hidden_size": 256, "intermediate_size": 512, "max_shard_size": "100MB"}
    source = tiny_source(tmp_path / "wide", **wide)
    for workers in (1, 2):
        output = str(tmp_path / f"read{workers}")
        given = {"source": str(source), "output": output, "workers": workers, "evaluation": None}
        report = _convert(tiny_options(tmp_path, **given))
        size, read = report["bytes"]["source"], report["bytes"]["read"]
        # The header is read once by the plan and once by each worker, in one request of 100 kB; side files
        # and token rows are small. A tensor read twice would show: a block has 1.3 MB.
        assert size < read < size + (1 + workers) * 110_000, workers


def test_crew_error_of_a_worker_arrives_as_it_was_raised(tmp_path, ray_cluster):
    options = tiny_options(tmp_path, source=str(tmp_path / "nowhere"))
    with pytest.raises(ObjectNotFoundError, match="nowhere") as caught:
        _convert(options)
    assert caught.value.before_work


def test_crew_more_workers_than_the_machine_holds_are_refused(tmp_path, ray_cluster):
    with pytest.raises(RecipeError, match="offers"), open_crew(tiny_options(tmp_path, workers=500)):
        pass
