"""Files that decide on a publication, and are not what they should be: refused by name, before any work."""

import json

import pytest

from quantlib.errors import PlanMismatchError, QuantError, RecipeError
from quantlib.inprocess import quantize
from quantlib.job.command_hooks import CommandHooks
from quantlib.job.hook import configured_hooks
from quantlib.job.publish_later import publish_later
from tests.support.tiny_jobs import tiny_options


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"smoke = ", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
        (b"smoke = 1", "must map names to commands"),
        (b"[smoke]\ncommand = 'true'", "must map names to commands"),
        (b"'two words' = 'true'", "must map names to commands"),
        (b"'' = 'true'", "must map names to commands"),
        (b"smoke = ''", "names no command"),
        (b'smoke = "echo \'a"', "is no command"),
    ],
)
def test_a_file_of_hooks_that_is_none_is_refused(tmp_path, content, words):
    path = tmp_path / "hooks.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        configured_hooks(str(path))


def test_a_file_of_hooks_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"QUANTMILL_HOOKS: .*none\.toml cannot be read"):
        configured_hooks(str(tmp_path / "none.toml"))
    assert configured_hooks(None) == configured_hooks("") == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"{", b"[]", b"null", b"{}", b'{"shards": 1}', b'{"shards": [1]}', b'{"shards": [{}]}'],
)
def test_a_staged_report_that_is_none_is_refused_by_name(tmp_path, content):
    options = tiny_options(tmp_path, method="rtn", evaluation=None, publish="staged")
    quantize(options)
    path = tmp_path / "output.quantmill" / "staged" / "quantmill_report.json"
    path.write_bytes(content)
    with pytest.raises(PlanMismatchError, match=r"quantmill_report\.json"):
        _publish(options)
    with pytest.raises(PlanMismatchError, match=r"quantmill_report\.json"):
        quantize(options)


@pytest.mark.parametrize("name", ["options", "evaluation", "blocks", "fallbacks", "identity"])
def test_a_staged_report_that_lacks_a_part_is_refused(tmp_path, name):
    options = tiny_options(tmp_path, method="rtn", evaluation=None, publish="staged")
    quantize(options)
    path = tmp_path / "output.quantmill" / "staged" / "quantmill_report.json"
    report = json.loads(path.read_text())
    del report[name]
    path.write_text(json.dumps(report))
    with pytest.raises(QuantError):
        _publish(options)
    assert not (tmp_path / "output" / "config.json").exists()


def _publish(options) -> dict:
    return publish_later(options.output, work=None, storage_engine="obstore", wishes={}, hooks=CommandHooks())
