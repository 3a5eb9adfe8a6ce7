"""The plan as data: what it names, what its identity depends on, and records that belong to it."""

import dataclasses
import hashlib
import json

import pytest
from safetensors.torch import load_file, save_file

from quantlib.checkpoint.header import read_header
from quantlib.errors import PackingError, PlanMismatchError, UnsupportedModelError
from quantlib.inprocess import quantize
from quantlib.job.bundle import bundle_of
from quantlib.job.estimate import describe_plan, format_plan
from quantlib.job.finished import check_unit
from quantlib.job.manifest import DoneRecord, read_plan, read_records, store_plan, store_record
from quantlib.job.memory import Budgets, Surroundings, plan_memory
from quantlib.job.plan import plan_from_json, plan_to_json
from quantlib.job.planner import build_plan
from quantlib.storage import join_uri, open_store
from tests.support.tiny_jobs import tiny_options, tiny_source, tiny_text


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def plan(root):
    return build_plan(tiny_options(root), 1)[0]


def test_plan_survives_json(plan):
    stored = json.dumps(plan_to_json(plan))
    again = plan_from_json(json.loads(stored))
    assert json.dumps(plan_to_json(again)) == stored
    assert again.blocks == plan.blocks
    assert again.units == plan.units
    assert again.identity() == plan.identity()


def test_plan_whose_inputs_are_rounded_survives_json_and_says_so(root):
    plan, plain = (
        build_plan(tiny_options(root, scheme=scheme, group_size=group_size), 1)[0]
        for scheme, group_size in (("W8A8", None), ("W8A16", -1))
    )
    again = plan_from_json(json.loads(json.dumps(plan_to_json(plan))))
    assert again.blocks == plan.blocks != plain.blocks
    assert again.identity() == plan.identity() != plain.identity()
    words = [reason for account in plan.accounts for reason in account.reason.splitlines()]
    assert "to 8 bits, symmetric, one scale a row, inputs rounded to 8-bit int by token" in words


def test_plan_of_another_schema_is_refused(plan):
    with pytest.raises(PlanMismatchError, match="schema 99"):
        plan_from_json({**plan_to_json(plan), "schema": 99})


@pytest.mark.parametrize(
    "change",
    [
        {"output": "elsewhere"},
        {"work": "elsewhere"},
        {"workers": 3},
        {"runner": "ray"},
        {"evaluation": None},
        {"storage_engine": "s3fs"},
        {"ray_address": "auto"},
    ],
)
def test_plan_identity_does_not_depend_on_where_and_by_whom(root, plan, change):
    assert build_plan(tiny_options(root, **change), 1)[0].identity() == plan.identity()


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "W8A16"},
        {"group_size": 16},
        {"method": "rtn"},
        {"format": "gptq"},
        {"scale_search": "minmax"},
        {"scale_search": "absmax"},
        {"propagation": "quantized"},
        {"sequences": 9},
        {"seed": 1},
        {"threads_per_worker": 2},
        {"rules": [{"match": "*.down_proj", "keep": True}]},
    ],
)
def test_plan_identity_depends_on_whatever_may_change_a_byte(root, plan, change):
    assert build_plan(tiny_options(root, **change), 1)[0].identity() != plan.identity()


def test_plan_shards_are_written_as_promised(root, plan):
    options = tiny_options(root, output=str(root / "written"))
    quantize(options)
    store = open_store(plan.output)
    for unit in plan.units:
        header = read_header(store, store.head(join_uri(f"file://{root}/written", unit.shard)))
        written = [(t.name, t.dtype, tuple(t.shape)) for t in header.tensors.values()]
        assert written == [(t.name, t.dtype, t.shape) for t in unit.tensors]


def test_plan_names_every_source_tensor_once(plan):
    planned = [name for unit in plan.units for name in unit.copied]
    planned += [f"{linear.name}.weight" for b in plan.blocks for linear in b.linears if linear.scheme]
    assert len(planned) == len(set(planned))
    assert {n for b in plan.blocks for n in b.tensors} <= set(planned)


def test_plan_rules_keep_linears_and_mix_schemes(root):
    rules = [
        {"match": "*.down_proj", "scheme": "W8A16"},
        {"match": "re:.*layers\\.0\\..*", "keep": True},
    ]
    mixed, _ = build_plan(tiny_options(root, rules=rules), 1)
    assert all(linear.scheme is None for linear in mixed.blocks[0].linears if "down" not in linear.name)
    bits = {linear.name.rsplit(".", 1)[1]: linear.scheme.bits for linear in mixed.blocks[1].linears}
    assert bits["down_proj"] == 8
    assert bits["q_proj"] == 4


def test_plan_a_mix_the_layout_cannot_say_is_refused_before_work(root):
    rules = [{"match": "*.down_proj", "scheme": "W4A16_ASYM"}]
    with pytest.raises(PackingError, match="symmetric"):
        build_plan(tiny_options(root, rules=rules, format="gptq"), 1)


@pytest.mark.parametrize("scheme", ["W5A16", "W6A16_ASYM"])
def test_plan_widths_that_gptq_readers_know_as_bit_planes_only_are_refused_in_that_format(root, scheme):
    build_plan(tiny_options(root, scheme=scheme), 1)
    with pytest.raises(PackingError, match=r"gptq output holds codes of 2, 3, 4, 8 bits, not [56]; choose"):
        build_plan(tiny_options(root, scheme=scheme, format="gptq"), 1)


@pytest.mark.parametrize("family", ["gpt_oss", "gpt2"])
def test_plan_parts_of_stored_tensors_survive_its_storage(tmp_path, family):
    plan, _ = build_plan(_options_of_family(tmp_path, family, {"num_hidden_layers": 4, "vocab_size": 96}), 1)
    assert any(linear.weight.view is not None for block in plan.blocks for linear in block.linears)
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))).blocks == plan.blocks


def test_plan_refuses_to_part_tensors_that_transformers_transposes_while_it_loads(tmp_path):
    rtn = {"group_size": 8, "method": "rtn", "calibration": None}
    options = _options_of_family(tmp_path, "qwen3_vl_moe", {}, **rtn)
    build_plan(options, 1)
    name = "model.language_model.layers.2.mlp.experts.down_proj"
    for shard in (tmp_path / "source").glob("*.safetensors"):
        held = load_file(shard)
        if name in held:
            save_file({**held, name: held[name].transpose(1, 2).contiguous()}, shard, {"format": "pt"})
    said = r"layers\.2\.mlp\.experts\.0\.down_proj: .* shape \[4, 32, 24\], but .* stored as \[4, 24, 32\]"
    with pytest.raises(UnsupportedModelError, match=said):
        build_plan(options, 1)
    kept = [{"match": "model.language_model.layers.2.mlp.experts.*", "keep": True}]
    plan, _ = build_plan(tiny_options(tmp_path, **rtn, rules=kept), 1)
    assert any(name in unit.copied for unit in plan.units)


def _options_of_family(tmp_path, family, settings, **overrides):
    tiny_source(tmp_path / "source", family, **settings)
    tiny_text(tmp_path / "calibration.jsonl", seed=1)
    tiny_text(tmp_path / "evaluation.jsonl", seed=2)
    return tiny_options(tmp_path, **overrides)


def test_manifest_first_plan_stays(tmp_path, plan):
    store = open_store(f"file://{tmp_path}")
    first = dataclasses.replace(plan, work=f"file://{tmp_path}/work")
    store_plan(store, first)
    store_plan(store, dataclasses.replace(first, output="elsewhere"))
    stored = read_plan(store, first.work)
    assert stored is not None
    assert stored.output == plan.output


def _record(plan, unit, **changes) -> DoneRecord:
    values = {
        "unit": unit.name,
        "identity": plan.identity(),
        "sha256": "0" * 64,
        "size_bytes": 3,
        "etag": "none",
        "linears": (),
    }
    return DoneRecord(**{**values, **changes})


def test_manifest_record_of_another_plan_is_refused_by_name(tmp_path, plan):
    store = open_store(f"file://{tmp_path}")
    here = dataclasses.replace(plan, work=f"file://{tmp_path}/work", output=f"file://{tmp_path}/out")
    store_record(store, here.work, _record(here, here.units[0], identity="f" * 64))
    with pytest.raises(PlanMismatchError, match=here.units[0].name):
        read_records(store, here)


def test_manifest_unit_counts_as_finished_only_while_its_shard_is_what_was_recorded(tmp_path, plan):
    store = open_store(f"file://{tmp_path}")
    here = dataclasses.replace(plan, work=f"file://{tmp_path}/work", output=f"file://{tmp_path}/out")
    unit = here.units[0]
    uri = join_uri(here.output, unit.shard)
    record = _record(here, unit, sha256=hashlib.sha256(b"abc").hexdigest())
    store_record(store, here.work, record)
    assert read_records(store, here) == {unit.name: record}
    assert check_unit(store, here, unit, record)[0] is None, "it is missing"
    info = store.write(uri, b"abc")
    standing, problem = check_unit(store, here, unit, record)
    assert (standing and standing.etag, problem) == (info.etag, "")
    for content, words in ((b"abd", "sha256"), (b"ab", "2 bytes instead of 3")):
        store.write(uri, content)
        assert check_unit(store, here, unit, record)[0] is None
        assert words in check_unit(store, here, unit, record)[1]


def test_estimate_counts_bytes_as_they_are_written(root, plan):
    memory = plan_memory(bundle_of([plan]), Surroundings(workers=1, idle_bytes=0), Budgets())
    described = describe_plan(plan, memory, num_workers=1, flops_per_second=1e9)
    written = sum(path.stat().st_size for path in (root / "written").glob("*.safetensors"))
    assert described["bytes_out"] == written
    assert described["blocks"] == 3
    assert described["linears_quantized"] == 21
    assert described["linears_kept"] == ["lm_head"]
    text = format_plan(described)
    assert "3 blocks" in text
    assert "21 linears to W4A16, group 32, by gptq" in text


def test_manifest_second_plan_on_one_work_prefix_is_refused(tmp_path, plan):
    store = open_store(f"file://{tmp_path}")
    first = dataclasses.replace(plan, work=f"file://{tmp_path}/work")
    store_plan(store, first)
    store_plan(store, first)
    with pytest.raises(PlanMismatchError, match="another run"):
        store_plan(store, dataclasses.replace(first, threads=7))


def test_manifest_record_written_again_keeps_the_newer_etag_and_refuses_other_bytes(tmp_path, plan):
    store = open_store(f"file://{tmp_path}")
    here = dataclasses.replace(plan, work=f"file://{tmp_path}/work", output=f"file://{tmp_path}/out")
    unit = here.units[0]
    store_record(store, here.work, _record(here, unit, etag="old"))
    info = store.write(join_uri(here.output, unit.shard), b"abc")
    store_record(store, here.work, _record(here, unit, etag=info.etag))
    assert read_records(store, here)[unit.name].etag == info.etag
    with pytest.raises(PlanMismatchError, match="other content"):
        store_record(store, here.work, _record(here, unit, sha256="1" * 64))
