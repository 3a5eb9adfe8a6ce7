"""Hooks as processes: what they are given, what becomes of them, and what a run makes of their end."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from quantlib.__main__ import main
from quantlib.checkpoint.index import CONFIG_NAME, STAGED_NAME
from quantlib.errors import HookError, NoSpaceError, RecipeError
from quantlib.inprocess import quantize, quantize_all
from quantlib.job.command_hooks import OUTPUT_END_BYTES, CommandHooks
from quantlib.job.hook import HOOKS_VARIABLE
from quantlib.job.options import JobOptions
from quantlib.job.staged_output import StagedOutput, read_staged_report
from quantlib.storage import open_store
from tests.support.tiny_jobs import tiny_options

STORE = open_store("file:///")
# Starts something that would stay, tells its number and waits for it.
LINGERS = "sh -c 'sleep 300 & echo $! > {file}; wait'"

# Tells how many shards in a folder, none of them a link, are those of a report.
COUNTS = """
import hashlib, json, pathlib, sys
shards = json.load(open(sys.argv[2]))["shards"]
paths = [pathlib.Path(sys.argv[1], shard["name"]) for shard in shards]
digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if not path.is_symlink()]
print(digests == [shard["sha256"] for shard in shards] and len(digests))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hooks")
    tiny_options(folder)
    return folder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """Where temporary files of the test lie, and nothing else."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / "temporary"


@pytest.fixture(scope="module")
def staged(root) -> StagedOutput:
    """Nothing of it is changed by what only asks a hook."""
    options = _options(root, root / "staged", publish="staged")
    report = quantize(options)
    uri = f"file://{root}/staged"
    given = {"storage_engine": "obstore", "publish": "staged"}
    return StagedOutput(output=uri, work=f"{uri}.quantmill", options=given, report=report)


def _options(root: Path, output: Path | str, **given) -> JobOptions:
    return tiny_options(root, output=str(output), method="rtn", **given)


def _python(program: str, *words: str) -> str:
    return shlex.join([sys.executable, "-c", program, *words])


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _wait_until(holds, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _pid_in(path: Path) -> int:
    _wait_until(lambda: path.exists() and path.read_text().strip())
    return int(path.read_text())


def test_the_local_model_is_a_checkpoint_with_the_figures_of_the_report(root, tmp_path, capsys):
    line = f"{sys.executable} -m quantlib evaluate {{model}} --json --device cpu --threads-per-worker 1"
    hook = f"{line} --text {root}/evaluation.jsonl --evaluation-sequences 5 --sequence-length 32"
    report = quantize(_options(root, tmp_path / "output", hook=hook))
    outcome = report["publication"]["hook"]
    assert (outcome["hook"], outcome["exit_code"]) == (hook, 0)
    assert outcome["seconds"] > 0
    found = json.loads(outcome["output_end"][outcome["output_end"].index("{\n") :])
    assert found["perplexity"] == pytest.approx(report["evaluation"]["perplexity_quantized"], rel=1e-6)
    assert "Hook" in (tmp_path / "output" / "quantmill_report.html").read_text()


def test_a_hook_is_told_of_model_output_and_report_and_nothing_of_it_stays(staged, temporary, monkeypatch):
    monkeypatch.setenv("OF_THE_CALLER", "inherited")
    program = (
        "import json, os, sys; model, output, report = sys.argv[1:];"
        "print(json.dumps([sorted(os.listdir(model)), output, json.load(open(report))['identity'],"
        " os.environ['OF_THE_CALLER'], sys.stdin.read()]))"
    )
    outcome = CommandHooks().run(_python(program, "{model}", "{output}", "{report}"), 60, staged)
    names, output, identity, variable, read = json.loads(outcome["output_end"])
    assert {CONFIG_NAME, "model.safetensors.index.json", "tokenizer.json"} <= set(names)
    assert {shard["name"] for shard in staged.report["shards"]} <= set(names)
    assert STAGED_NAME not in names
    assert (output, identity) == (staged.output, staged.report["identity"])
    assert (variable, read) == ("inherited", "")
    assert not list(temporary.iterdir())


def test_a_command_is_no_shell_and_words_stay_whole(staged, tmp_path):
    given = ("two words", "$HOME; touch x", "{output}!{output}", "{}")
    hook = _python("import sys; print(sys.argv[1:])", *given)
    uri = staged.output
    words = ["two words", "$HOME; touch x", f"{uri}!{uri}", "{}"]
    assert CommandHooks().run(hook, 60, staged)["output_end"] == f"{words}\n"


def test_a_hook_that_does_not_agree_keeps_the_output_staged_and_is_asked_again(root, tmp_path):
    asked = tmp_path / "asked"
    hook = f"sh -c 'echo once >> {asked}; echo model is no good; exit $(cat {tmp_path}/verdict)'"
    (tmp_path / "verdict").write_text("3")
    options = _options(root, tmp_path / "output", hook=hook)
    with pytest.raises(HookError, match="ended with 3, not 0") as caught:
        quantize(options)
    assert not caught.value.before_work
    assert str(caught.value).endswith("it wrote:\nmodel is no good")
    assert asked.read_text() == "once\n"
    assert not (tmp_path / "output" / CONFIG_NAME).exists()
    kept = read_staged_report(STORE, f"file://{tmp_path}/output.quantmill")
    assert kept is not None
    assert (kept["publication"]["state"], kept["publication"]["hook"]["exit_code"]) == ("staged", 3)
    (tmp_path / "verdict").write_text("0")
    labels: list[str] = []
    quantize(options, lambda progress: labels.append(progress.label))
    assert "hook" in labels and not any("block" in label for label in labels)
    assert asked.read_text() == "once\nonce\n"
    assert (tmp_path / "output" / CONFIG_NAME).exists()


def test_the_end_of_a_long_output_is_told(staged):
    outcome = CommandHooks().run(_python("print('x' * 100_000); print('the last line')"), 60, staged)
    assert len(outcome["output_end"]) == OUTPUT_END_BYTES
    assert outcome["output_end"].endswith("x\nthe last line\n")


def test_output_that_is_no_text_is_told_all_the_same(staged):
    outcome = CommandHooks().run(_python("import os; os.write(1, bytes([255, 65]))"), 60, staged)
    assert outcome["output_end"] == "\ufffdA"


def test_a_hook_that_takes_too_long_is_ended_with_what_it_started(root, tmp_path):
    file = tmp_path / "pid"
    options = _options(root, tmp_path / "output", hook=LINGERS.format(file=file), hook_timeout=1)
    with pytest.raises(HookError, match="took more than 1 seconds"):
        quantize(options)
    assert not _is_running(_pid_in(file))
    assert (tmp_path / "output" / STAGED_NAME).exists()


def test_what_a_hook_leaves_behind_is_ended(staged, tmp_path):
    outcome = CommandHooks().run(f"sh -c 'sleep 300 & echo $! > {tmp_path}/pid'", 60, staged)
    assert outcome["exit_code"] == 0
    _wait_until(lambda: not _is_running(_pid_in(tmp_path / "pid")))


def test_a_hook_that_ignores_being_asked_to_end_is_ended(staged, tmp_path):
    program = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True)"
    hook = _python(f"{program}; time.sleep(300)")
    outcome = CommandHooks().run(hook, 2, staged)
    assert outcome["exit_code"] is None
    assert not _is_running(int(outcome["output_end"]))


def test_stopping_ends_the_hook_and_removes_what_was_laid_out(staged, tmp_path, temporary):
    hooks, raised = CommandHooks(), []

    def run() -> None:
        with pytest.raises(HookError, match="stopped with the run") as caught:
            hooks.run(LINGERS.format(file=tmp_path / "pid"), 60, staged)
        raised.append(caught.value)

    thread = threading.Thread(target=run)
    thread.start()
    pid = _pid_in(tmp_path / "pid")
    hooks.stop()
    assert not _is_running(pid)
    assert not list(temporary.iterdir())
    thread.join(10)
    assert len(raised) == 1
    with pytest.raises(HookError, match="stopped"):
        hooks.run("true", 60, staged)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["quantize", "publish"])
def test_an_interrupted_command_takes_its_hook_with_it(root, tmp_path, temporary, command, sent):
    output = tmp_path / "output"
    hook = LINGERS.format(file=tmp_path / "pid")
    words = [str(root / "source"), str(output), "--method=rtn", "--group-size=32", "--runner=inprocess"]
    if command == "publish":
        quantize(_options(root, output, publish="staged"))
        words = [str(output)]
    line = [sys.executable, "-m", "quantlib", command, *words, "--hook", f"{hook[:-1]} # {{model}}'"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    pid = _pid_in(tmp_path / "pid")
    process.send_signal(sent)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 130, told
    assert "the same command continues the job" in told
    assert not _is_running(pid)
    assert not list(temporary.glob("quantmill-hook-*"))
    assert not (output / CONFIG_NAME).exists()
    assert main(["publish", str(output), "--hook", "true"]) == 0


def test_a_hook_that_cannot_be_started_says_so(root, tmp_path):
    with pytest.raises(HookError, match="/nowhere/smoke cannot be started: No such file"):
        quantize(_options(root, tmp_path / "output", hook="/nowhere/smoke {report}"))
    assert (tmp_path / "output" / STAGED_NAME).exists()


def test_the_hook_of_one_output_keeps_no_other_from_being_published(root, tmp_path):
    both = [_options(root, tmp_path / "a", hook="false"), _options(root, tmp_path / "b", scheme="W8A16")]
    with pytest.raises(HookError, match=r"staged, not published: a \(its hook ended with 1.*published: b"):
        quantize_all(both)
    assert not (tmp_path / "a" / CONFIG_NAME).exists()
    assert (tmp_path / "b" / CONFIG_NAME).exists()


def test_a_hook_that_cannot_be_started_keeps_no_other_from_being_asked(root, tmp_path):
    first = _options(root, tmp_path / "a", hook="/nowhere/smoke")
    second = _options(root, tmp_path / "b", scheme="W8A16", hook=f"touch {tmp_path}/asked")
    with pytest.raises(HookError, match=r"a \(its hook cannot be started: .*published: b"):
        quantize_all([first, second])
    assert (tmp_path / "asked").exists()


def test_a_hook_is_not_asked_where_a_gate_is_broken_or_publication_is_for_later(root, tmp_path):
    hook = f"touch {tmp_path}/asked"
    with pytest.raises(Exception, match="max_kl allows"):
        quantize(_options(root, tmp_path / "broken", hook=hook, max_kl=0.0))
    quantize(_options(root, tmp_path / "later", hook=hook, publish="staged"))
    assert not (tmp_path / "asked").exists()
    assert main(["publish", str(tmp_path / "later")]) == 0
    assert (tmp_path / "asked").exists(), "the hook of the run"


def test_a_name_stands_for_the_command_that_the_operator_wrote_down(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "hooks.toml").write_text(f"smoke = \"sh -c 'touch {tmp_path}/asked'\"\n")
    words = ["quantize", str(root / "source"), str(tmp_path / "output"), "--method=rtn", "--group-size=32"]
    words += ["--runner=inprocess", "--threads-per-worker=1", "--hook", "@smoke"]
    monkeypatch.delenv(HOOKS_VARIABLE, raising=False)
    assert main(words) == 2
    assert "hook @smoke is not among those that QUANTMILL_HOOKS names" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
    monkeypatch.setenv(HOOKS_VARIABLE, str(tmp_path / "hooks.toml"))
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["publication"]["hook"]["hook"] == "@smoke"
    assert (tmp_path / "asked").exists()


def test_a_hook_nobody_knows_is_refused_before_anything_is_written(root, tmp_path):
    with pytest.raises(RecipeError, match="hook @other is not among") as caught:
        quantize_all([_options(root, tmp_path / "o", hook="@other")], hooks=CommandHooks({"smoke": "true"}))
    assert caught.value.before_work
    assert "@smoke" in str(caught.value)
    assert not (tmp_path / "o").exists()


_Usage = namedtuple("_Usage", "total used free")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_a_hook_reads_a_copy_of_an_output_in_s3(
    root, tmp_path, temporary, s3_environment, monkeypatch, engine
):
    output = s3_environment.uri(f"hooks-{engine}/output")
    options = _options(root, output, storage_engine=engine, hook=_python(COUNTS, "{model}", "{report}"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: _Usage(100, 90, 10))
        with pytest.raises(NoSpaceError, match="has 10 B; name a larger place by TMPDIR"):
            quantize(options)
    assert f"hooks-{engine}/output/{CONFIG_NAME}" not in s3_environment.keys(f"hooks-{engine}/output")
    report = quantize(options)
    assert report["publication"]["hook"]["output_end"] == "5\n"
    assert f"hooks-{engine}/output/{CONFIG_NAME}" in s3_environment.keys(f"hooks-{engine}/output")
    assert not list(temporary.glob("quantmill-hook-*"))


@pytest.mark.slow
def test_a_hook_that_reads_the_address_only_has_nothing_fetched(root, s3_environment, monkeypatch):
    output = s3_environment.uri("addressed/output")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(100, 90, 10))
    report = quantize(_options(root, output, hook="echo {output}"))
    assert report["publication"]["hook"]["output_end"] == f"{output}\n"


def test_deployment_is_no_hook_without_prefect():
    hooks = CommandHooks({"elsewhere": "deployment:smoke-test/here"})
    for hook in ("deployment:smoke-test/here", "@elsewhere"):
        with pytest.raises(RecipeError, match="a run on a Prefect server"):
            hooks.refuse_unknown(hook)
