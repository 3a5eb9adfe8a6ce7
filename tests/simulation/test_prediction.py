"""What ``plan --cluster`` prints, and what it refuses."""

import json

import pytest

from quantlib.__main__ import main
from quantlib.errors import RecipeError
from quantlib.job.command_line import build_parser, requests_of
from quantlib.schemes import scheme_from_name
from quantlib.simulation.config_shapes import shape_of_config, shipped_config
from quantlib.simulation.costs import Costs, Workload
from quantlib.simulation.hardware import parse_cluster
from quantlib.simulation.memory import gpu_memory, node_sums_bytes
from quantlib.simulation.prediction import CELL_TOKENS
from tests.support.tiny_jobs import tiny_source


def predicted(line: str, capsys) -> dict:
    assert main([*line.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_shipped_model_is_predicted_without_a_checkpoint(capsys):
    found = predicted("plan shapes:llama-3.1-70b --cluster 2x8xH100 --price 2.5", capsys)
    assert (found["model"], found["gpus"], found["nodes"]) == ("llama-3.1-70b", 16, 2)
    assert found["gpu_hours"] == pytest.approx(found["seconds"] * 16 / 3600)
    assert found["cost"] == pytest.approx(found["gpu_hours"] * 2.5)
    assert sum(found["seconds_by_cause"].values()) == pytest.approx(found["seconds"])
    assert found["bottleneck"] == max(found["seconds_by_cause"], key=found["seconds_by_cause"].get)
    assert found["storage_bytes_read"] == 2 * 70_553_706_496


def test_text_is_short_and_states_what_it_rests_on(capsys):
    assert (
        main(["plan", "shapes:llama-3.1-70b", "--cluster", "8xH200", "--network", "400Gbps", "--price", "3"])
        == 0
    )
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 16
    for said in (
        "llama-3.1-70b on 8 x H200 (1 node), predicted, not measured",
        "GPU-hours, cost",
        "bottleneck: ",
        "of 141.0 GB",
        "256 sequences of 2048 tokens, 8 a cell, original activations",
        "500 of 989.4 peak TFLOP/s in bf16",
        "storage 2.0 GB/s and network 50.0 GB/s",
        "not counted",
    ):
        assert said in shown


def test_options_change_what_is_predicted(capsys):
    plain, three_bits, held_out = (
        predicted(f"plan shapes:llama-3.1-70b --cluster 8xH100 {options}", capsys)
        for options in ("", "--scheme W3A16", "--evaluation held-out.txt")
    )
    # At 3 bits targets are corrected: a second stream, a product more, and the quantized stream goes on.
    assert three_bits["seconds"] > 1.5 * plain["seconds"]
    assert "targets corrected" in three_bits["assumptions"][0]
    assert held_out["seconds"] > plain["seconds"]
    assert "32 held out" in held_out["assumptions"][0]


def test_checkpoint_is_predicted_from_its_headers(tmp_path, capsys):
    source = tiny_source(tmp_path / "source")
    line = f"plan {source} --cluster 8xH100 --group-size 32 --sequence-length 64"
    found = predicted(line, capsys)
    stored = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert 0.9 * stored < found["storage_bytes_read"] < 1.1 * stored
    assert found["model"] == f"file://{source}"
    rounded = predicted(f"{line} --method rtn", capsys)
    assert rounded["computing_share"] == 0


def test_what_does_not_fit_a_gpu_is_said(capsys):
    assert (
        main(["plan", "shapes:deepseek-v3", "--cluster", "H100", "--sequences", "8", "--network", "1Tbps"])
        == 0
    )
    assert "more than its 80.0 GB" in capsys.readouterr().out


def test_memory_follows_the_design():
    shape = shape_of_config(
        "llama-3.1-405b", shipped_config("llama-3.1-405b"), scheme_from_name("W4A16", 128)
    )
    cluster = parse_cluster("8xH100", network="100Gbps", storage="2GB/s")
    costs = Costs(shape=shape, workload=Workload(sequences=512), rates=cluster.rates)
    memory = gpu_memory(costs, cluster.num_workers)
    assert memory["block"] == pytest.approx(6.4e9, rel=0.01)
    assert memory["activations"] == pytest.approx(34.4e9 / 8, rel=0.01)
    # Lower halves in int64 and a cell's part in fp32: 14.6 GB each.
    assert memory["sums"] == pytest.approx(2 * 14.6e9, rel=0.01)
    assert node_sums_bytes(costs, cluster) == pytest.approx((8 + 1) * 14.6e9, rel=0.01)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan shapes:llama-4 --cluster 8xH100", "there are no shapes of 'llama-4'"),
        ("plan shapes:llama-3.1-70b --cluster 8", "cluster must be GPUs"),
        ("plan shapes:llama-3.1-70b --cluster 8xH100 --network fast", "network must be a rate"),
        ("plan shapes:llama-3.1-70b --cluster 8xH100 --storage 2GB", "storage must be a rate"),
        ("plan shapes:llama-3.1-70b --cluster 8xH100 --price free", "price must be"),
        ("plan shapes:llama-3.1-70b --cluster 8xH100 --rates /none.json", "cannot be read"),
        ("plan shapes:llama-3.1-70b --cluster 8xH100 --workers 4", "workers of a cluster are its GPUs"),
        ("plan shapes:llama-3.1-70b --gpu-memory much", "gpu_memory must be an amount such as 24GB"),
        ("plan shapes:llama-4 --gpu-memory 80GB", "there are no shapes of 'llama-4'"),
        ("plan a b --method rtn --price 2", "price is about a cluster and none is named"),
        ("plan shapes:llama-3.1-70b b --method rtn", "shapes:llama-3.1-70b has no weights"),
    ],
)
def test_nonsense_is_refused_with_2(line, said, capsys):
    assert main(line.split()) == 2
    assert said in capsys.readouterr().err


def test_without_a_cluster_output_and_text_are_still_needed():
    for line in ("plan a", "plan a b", "quantize a b"):
        with pytest.raises(RecipeError):
            requests_of(build_parser("quantmill").parse_args(line.split()))


def test_cells_hold_as_many_tokens_as_the_prediction_says(capsys):
    found = predicted("plan shapes:llama-3.1-70b --cluster 8xH100 --sequence-length 4096", capsys)
    assert f"{CELL_TOKENS // 4096} a cell" in found["assumptions"][0]
