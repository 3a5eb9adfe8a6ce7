"""The figures of a block, against one made up."""

from quantlib.job.block_figures import block_figures, block_words


def linear(name: str, **values):
    return {"name": name, "relative_error": None, "damping_fraction": None, "fallback": None, **values}


ROW = {
    "index": 16,
    "relative_error": 0.0123,
    "cosine": 0.99987,
    "linears": [
        linear("model.layers.16.mlp.experts.3.up_proj", relative_error=0.02, damping_fraction=0.01),
        linear("model.layers.16.self_attn.q_proj", relative_error=0.05, fallback="more_damping"),
        linear("model.layers.16.self_attn.k_proj", damping_fraction=0.1, fallback="more_damping"),
        linear("model.layers.16.self_attn.v_proj", fallback="float64_factor"),
    ],
    "seconds": {"capture": 1.25, "solve": 2.5},
}


def test_figures_are_the_worst_of_the_linears():
    found = block_figures(ROW)
    assert (found.worst_error, found.worst_linear, found.damping) == (0.05, "self_attn.q_proj", 0.1)
    assert found.fallbacks == {"more_damping": 2, "float64_factor": 1}
    assert found.seconds == 3.75
    assert block_words(found) == (
        "relative error 0.0123, cosine 0.99987, worst linear self_attn.q_proj 0.05, 3.8 s"
    )


def test_block_without_figures_has_none():
    found = block_figures({"index": 0, "linears": [], "seconds": {}})
    assert (found.worst_error, found.damping, found.cosine, found.fallbacks) == (None, None, None, {})
    assert block_words(found) == ""
