"""Recipe files and what their rules mean for a linear."""

from pathlib import Path

import pytest

from quantlib.errors import RecipeError
from quantlib.job.options import options_from
from quantlib.recipe import read_recipe, rule_for
from quantlib.schemes import WeightScheme

RECIPES = Path(__file__).resolve().parents[2] / "infra" / "recipes"
REQUEST = {"source": "a", "output": "b", "calibration": "c.txt"}


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def with_rules(*rules: dict, **options):
    return options_from({**REQUEST, **options, "rules": rules})


def test_read_recipe_gives_plain_option_values(tmp_path):
    path = written(
        tmp_path,
        'scheme = "W8A16"\nsequences = 7\n'
        '[[rules]]\nmatch = "*.o_proj"\nkeep = true\n'
        '[[rules]]\nmatch = "x"\n',
    )
    assert read_recipe(path) == {
        "scheme": "W8A16",
        "sequences": 7,
        "rules": [{"match": "*.o_proj", "keep": True}, {"match": "x"}],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bits = 4\n", "unknown option 'bits'; the options are source, output"),
        ("[quantization]\nbits = 4\n", "unknown option 'quantization'"),
        ('output = "s3://b/x"\n', "names a output; a recipe says how"),
        ("scheme = W4A16\n", "is not valid TOML"),
    ],
)
def test_read_recipe_wrong_file_names_file_and_fault(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(RecipeError, match=said) as raised:
        read_recipe(path)
    assert str(path) in str(raised.value)


def test_read_recipe_missing_file_and_binary_file_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not valid TOML"):
        read_recipe(tmp_path / "binary.toml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path):
    options_from({**REQUEST, **read_recipe(path)})


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"match": "*", "bits": 4}, "unknown key 'bits' in rule 2; a rule has match, scheme, group_size"),
        ({"scheme": "W8A16"}, "rule 2 has no match"),
        ({"match": "*", "scheme": "W7A16"}, "scheme of rule 2 must be one of W2A16"),
        ({"match": "*", "group_size": 7}, "group_size of rule 2 must be at least 8 or -1 or 0, found 7"),
        ({"match": "*", "keep": "yes"}, "keep of rule 2 must be true or false, found 'yes'"),
        ({"match": 3}, "match of rule 2 must be text, found 3"),
        ({"match": "re:layers.(0"}, "match of rule 2 is not a valid regular expression"),
        ({"match": "*", "keep": True, "method": "rtn"}, "rule 2 keeps its linears as they are and also sets"),
    ],
)
def test_wrong_rule_names_its_place_and_fault(rule, said):
    with pytest.raises(RecipeError, match=said):
        with_rules({"match": "*"}, rule)


def scheme(bits: int, group_size: int, *, is_symmetric: bool = True) -> WeightScheme:
    return WeightScheme(bits=bits, is_symmetric=is_symmetric, group_size=group_size)


def test_rule_for_without_rules_gives_the_jobs_defaults():
    options = with_rules(scheme="W4A16_ASYM", group_size=64)
    assert rule_for(options, "model.layers.0.mlp.up_proj") == ("gptq", scheme(4, 64, is_symmetric=False))


def test_rule_for_first_match_wins():
    options = with_rules(
        {"match": "*.down_proj", "scheme": "W8A16"}, {"match": "*", "scheme": "W4A16_ASYM"}, group_size=32
    )
    assert rule_for(options, "model.layers.3.mlp.down_proj") == ("gptq", scheme(8, 32))
    assert rule_for(options, "model.layers.3.mlp.up_proj") == ("gptq", scheme(4, 32, is_symmetric=False))


def test_rule_for_completes_a_rule_from_the_job_and_not_from_later_rules():
    options = with_rules(
        {"match": "*.o_proj", "method": "rtn"}, {"match": "*.o_proj", "group_size": 16}, group_size=-1
    )
    assert rule_for(options, "model.layers.0.self_attn.o_proj") == ("rtn", scheme(4, -1))


def test_rule_for_kept_linear_has_neither_method_nor_scheme():
    options = with_rules({"match": "lm_head", "keep": True})
    assert rule_for(options, "lm_head") == (None, None)
    assert rule_for(options, "model.lm_head")[0] == "gptq"


@pytest.mark.parametrize(
    ("match", "name", "does"),
    [
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", False),
        ("model.layers.1.*", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1.*", "model.layers.11.mlp.up_proj", False),
        ("layers.1.*", "model.layers.1.mlp.up_proj", False),
        ("*.UP_proj", "model.layers.1.mlp.up_proj", False),
        ("experts[0].up", "experts[0].up", True),
        (r"re:.*layers\.[0-3]\..*", "model.layers.3.mlp.up_proj", True),
        (r"re:layers\.3", "model.layers.3.mlp.up_proj", False),
        (r"re:model\.layers\.3", "model.layers.3.mlp.up_proj", False),
    ],
)
def test_match_is_exact_glob_or_regular_expression_over_the_whole_name(match, name, does):
    options = with_rules({"match": match, "keep": True})
    assert (rule_for(options, name) == (None, None)) is does
