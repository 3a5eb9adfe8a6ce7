"""The command line made from the table of options."""

import pytest

from quantlib.errors import RecipeError
from quantlib.job.command_line import COMMANDS, build_parser, requests_of, values_of
from quantlib.job.options import option_fields, options_from
from tests.support.provenance_example import write_provenance


def parsed(line: str):
    return build_parser("quantmill").parse_args(line.split())


def options_of(arguments):
    (options,) = requests_of(arguments)
    return options


def test_options_of_command_line_equals_plain_values():
    options = options_of(
        parsed(
            "quantize s3://m/a out --method rtn --group-size -1 --workers 2 --device cpu --work w --seed 3"
        )
    )
    assert options == options_from(
        {
            "source": "s3://m/a",
            "output": "out",
            "method": "rtn",
            "group_size": -1,
            "workers": 2,
            "device": "cpu",
            "work": "w",
            "seed": 3,
        }
    )


def test_calibration_given_several_times_is_a_mix():
    given = "plan a b --calibration a.jsonl=0.7 --calibration s3://texts/chat.parquet=0.3"
    assert options_of(parsed(given)).calibration == "a.jsonl=0.7, s3://texts/chat.parquet=0.3"
    assert options_of(parsed("plan a b --calibration year=2024")).calibration == "year=2024"
    with pytest.raises(RecipeError, match="'b.jsonl' has no weight above zero") as raised:
        options_of(parsed("plan a b --calibration a.jsonl=0.7 --calibration b.jsonl"))
    assert raised.value.before_work


def test_of_several_formats_there_is_a_request_for_each(tmp_path):
    line = "quantize a b --work w --method rtn --format"
    found = requests_of(parsed(f"{line} gptq,awq"))
    assert [(x.format, x.output, x.work) for x in found] == [
        ("gptq", "b/gptq", "w/gptq"),
        ("awq", "b/awq", "w/awq"),
    ]
    # Both have scales in fp16; beside those of the model's dtype they must be exact in both.
    assert not any(options.portable_scales for options in found)
    assert all(x.portable_scales for x in requests_of(parsed(f"{line} gptq,compressed-tensors")))
    recipe = tmp_path / "four.toml"
    recipe.write_text('format = "gptq,awq"\n')
    (tmp_path / "eight.toml").write_text('scheme = "W8A16"\n')
    both = requests_of(parsed(f"plan a b --method rtn --recipe {recipe} --recipe {tmp_path}/eight.toml"))
    assert [options.output for options in both] == ["b/four/gptq", "b/four/awq", "b/eight"]
    with pytest.raises(RecipeError, match="a prediction has one format, found gptq, awq") as raised:
        requests_of(parsed("plan a --format gptq,awq --cluster 8xH100"))
    assert raised.value.before_work


def test_addresses_and_options_may_alternate():
    options = options_of(parsed("plan a --json --method rtn b"))
    assert (options.source, options.output) == ("a", "b")
    options = options_of(parsed("quantize --json a --method rtn b --seed 3"))
    assert (options.source, options.output, options.seed) == ("a", "b", 3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("quantize --method rtn", "source is required: give the address of the source"),
        ("plan a --method rtn", "output is required: give the address of the output"),
        ("quantize a --replay {file}", "takes both source and output, or neither .*; output is missing"),
        ("quantize --replay {file}.json", "there is no file://"),
        ("quantize --replay {file} --storage-engine ftp", "storage_engine must be one of"),
    ],
)
def test_missing_addresses_are_refused_before_work(line, said, tmp_path):
    file = write_provenance(tmp_path)
    with pytest.raises(RecipeError, match=said) as raised:
        options_of(parsed(line.format(file=file)))
    assert raised.value.before_work


def test_replay_needs_no_address_and_the_command_line_wins_over_recipe_and_recorded_run(tmp_path):
    file = write_provenance(tmp_path)
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'replay = "{file}"\nevaluation_sequences = 6\nseed = 4\n')
    recorded = options_of(parsed(f"quantize --replay {file}"))
    assert (recorded.source, recorded.output) == ("s3://models/tiny", "s3://models/tiny-w8")
    assert (recorded.scheme, recorded.evaluation_sequences, recorded.seed) == ("W8A16", 5, 0)
    both = options_of(parsed(f"quantize --recipe {recipe} a b --seed 0"))
    assert (both.source, both.output, both.work) == ("a", "b", None)
    assert (both.scheme, both.evaluation_sequences, both.seed) == ("W8A16", 6, 0)


def test_recipe_is_read_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('method = "rtn"\ngroup_size = 32\nseed = 5\n[[rules]]\nmatch = "x"\nkeep = true\n')
    options = options_of(parsed(f"quantize a b --recipe {recipe} --group-size 128"))
    assert (options.method, options.group_size, options.seed) == ("rtn", 128, 5)
    assert options.rules == ({"match": "x", "keep": True},)


def test_a_default_given_on_the_command_line_wins_over_the_recipe(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('method = "rtn"\ngroup_size = 32\n')
    assert options_of(parsed(f"quantize a b --group-size 128 --recipe {recipe}")).group_size == 128


@pytest.mark.parametrize(
    "line",
    [
        "quantize a b",
        "quantize a b --method rtn --scheme W5",
        "quantize a b --method rtn --recipe /nonexistent.toml",
        "plan a b --method rtn --sequences 0",
    ],
)
def test_options_of_wrong_request_is_refused_before_work(line):
    with pytest.raises(RecipeError) as raised:
        options_of(parsed(line))
    assert raised.value.before_work


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "required: COMMAND"),
        ("convert a b", "invalid choice: 'convert'"),
        ("clean", "required: OUTPUT"),
        ("quantize a b c", "unrecognized arguments: c"),
        ("quantize a b --group_size 64", "unrecognized arguments: --group_size 64"),
        ("quantize a b --seq 64", "unrecognized arguments: --seq 64"),
        ("quantize --group_size 64", "unrecognized arguments: --group_size"),
        ("quantize a b --sequences many", "argument --sequences: invalid int value: 'many'"),
        ("quantize a b --rules x", "unrecognized arguments: --rules x"),
        ("evaluate m", "required: --text"),
        ("plan a b --calibration c --calibration d", "needs a weight each time, as in d=0.5"),
    ],
)
def test_wrong_line_is_one_line_and_exits_with_2(line, said, capsys):
    with pytest.raises(SystemExit) as raised:
        parsed(line)
    assert raised.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("quantmill: error: ")
    assert said in shown
    assert shown.count("\n") == 1


def test_values_of_other_commands_have_defaults_and_are_checked():
    values = values_of(parsed("evaluate m --text t.txt --sequence-length 64"))
    assert values == {
        "text_column": None,
        "sequence_length": 64,
        "evaluation_sequences": 32,
        "threads_per_worker": None,
        "device": None,
        "storage_engine": "obstore",
    }
    with pytest.raises(RecipeError, match="sequence_length must be at least 8") as raised:
        values_of(parsed("evaluate m --text t.txt --sequence-length 1"))
    assert raised.value.before_work


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_help_shows_every_option_with_text_and_default(command, capsys):
    with pytest.raises(SystemExit) as raised:
        parsed(f"{command} --help")
    assert raised.value.code == 0
    # Lines may break at spaces and after hyphens.
    shown = "".join(capsys.readouterr().out.split())
    for name, (found, option) in option_fields().items():
        if name == "rules":
            continue
        assert "".join(option.help.split()) in shown, name
        if isinstance(found.default, str | int):
            assert f"(default:{found.default})" in shown, name


def test_every_command_knows_verbose_and_json():
    for name, command in COMMANDS.items():
        line = [name, *command.addresses, "--json", "--verbose"] + ["--text", "t"] * (name == "evaluate")
        arguments = build_parser("quantmill").parse_args(line)
        assert (arguments.command, arguments.json, arguments.verbose) == (name, True, True)
