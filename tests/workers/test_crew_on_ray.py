"""Jobs on a real Ray cluster: the bytes of one process, with one worker or several."""

from pathlib import Path

import pytest

from quantlib.errors import ObjectNotFoundError, RecipeError
from quantlib.inprocess import DirectStages, quantize
from quantlib.job.conversion import convert
from tests.support.tiny_jobs import shard_digests, tiny_options, wide_source
from workers.api import open_crew

pytestmark = pytest.mark.slow


def _convert(options):
    with open_crew(options) as crew:
        return convert([options], crew, DirectStages(), lambda _: None)


def test_crew_without_data_writes_the_same_bytes(tmp_path, ray_cluster):
    given = {"method": "rtn", "calibration": None, "evaluation": None}
    alone = tiny_options(tmp_path, output=str(tmp_path / "alone"), **given)
    shared = tiny_options(tmp_path, output=str(tmp_path / "shared"), workers=2, **given)
    quantize(alone)
    _convert(shared)
    assert shard_digests(Path(shared.output)) == shard_digests(Path(alone.output))


def test_crew_of_tiles_writes_the_same_bytes(tmp_path, ray_cluster):
    given = {
        "source": str(wide_source(tmp_path / "wide")),
        "rules": [{"match": "*.down_proj", "keep": True}],
    }
    alone = tiny_options(tmp_path, output=str(tmp_path / "alone"), **given)
    shared = tiny_options(tmp_path, output=str(tmp_path / "shared"), workers=2, **given)
    quantize(alone)
    _convert(shared)
    assert shard_digests(Path(shared.output)) == shard_digests(Path(alone.output))


def test_crew_error_of_a_worker_arrives_as_it_was_raised(tmp_path, ray_cluster):
    options = tiny_options(tmp_path, source=str(tmp_path / "nowhere"))
    with pytest.raises(ObjectNotFoundError, match="nowhere") as caught:
        _convert(options)
    assert caught.value.before_work


def test_crew_more_workers_than_the_machine_holds_are_refused(tmp_path, ray_cluster):
    with pytest.raises(RecipeError, match="offers"), open_crew(tiny_options(tmp_path, workers=500)):
        pass
