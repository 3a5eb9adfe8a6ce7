"""What a job may ask of the nodes its workers stand on, as text for a command line, a recipe and a form.

Custom resources are written ``name=amount`` and labels ``key=value``, several of them with commas between, as
Ray writes labels. A label's value may be any selector of Ray's: ``a``, ``!a``, ``in(a,b)``, ``!in(a,b)``.
Parsed here, without Ray, so that what is wrong is refused before anything starts.

Source: docs.ray.io "Use labels to control scheduling" and ``ray/_private/label_utils.py`` of Ray 2.60.0.
"""

import re
from collections.abc import Iterator, Mapping

from quantlib.errors import RecipeError

# Ray gives it to every node whose GPU it knows; the model is that of the node's first GPU.
GPU_MODEL_LABEL = "ray.io/accelerator-type"

# Of these a worker takes what other options, or Ray, say.
_OWN_OPTIONS = ("CPU", "GPU", "memory", "object_store_memory")
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"(?:{_WORD}/)?{_WORD}")
_LABEL_SELECTOR = re.compile(rf"!?(?:{_WORD}|in\({_WORD}(?:,{_WORD})*\))")
_COMMA_OUTSIDE_PARENTHESES = re.compile(r",(?![^(]*\))")


def resources_from(text: str | None) -> dict[str, float]:
    """Custom resource -> how much of it a worker takes.

    Raises:
        RecipeError: Not ``name=amount``, a resource that has an option of its own, or an amount that Ray does
            not share out: it takes fractions below 1 and whole numbers.

    >>> resources_from("quant=1, slots=0.5")
    {'quant': 1.0, 'slots': 0.5}
    """
    return {name: _amount(name, value) for name, value in _pairs("worker_resources", text)}


def labels_from(text: str | None, gpu_model: str | None = None) -> dict[str, str]:
    """Label key -> selector that a worker's node must match.

    Args:
        text: Labels.
        gpu_model: Model of GPU the node must have, which is a label too.

    Raises:
        RecipeError: Not ``key=value``, what Ray takes for no label, or the model of GPU given twice.

    >>> labels_from("region=eu,pool=!in(spot, batch)", "H100")
    {'region': 'eu', 'pool': '!in(spot,batch)', 'ray.io/accelerator-type': 'H100'}
    """
    # Ray 2.60.0 allows blanks between the values, and takes them for part of the values.
    labels = {key: re.sub(", +", ",", selector) for key, selector in _pairs("worker_labels", text)}
    for key, selector in labels.items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_SELECTOR.fullmatch(selector):
            raise RecipeError(
                f"worker_labels has {key}={selector}, which is no label of Ray's; write key=value,"
                " key=!value, key=in(a,b) or key=!in(a,b), of letters, digits, dots, dashes and underscores",
                option="worker_labels",
            )
    if gpu_model is None:
        return labels
    if GPU_MODEL_LABEL in labels:
        raise RecipeError(
            f"gpu_model and the label {GPU_MODEL_LABEL} of worker_labels say the same; give one of them",
            option="gpu_model",
        )
    if not re.fullmatch(_WORD, gpu_model):
        raise RecipeError(
            f"gpu_model must be one model as Ray names it, such as H100, found {gpu_model!r};"
            f" several are named by worker_labels: {GPU_MODEL_LABEL}=in(H100,H200)",
            option="gpu_model",
        )
    return {**labels, GPU_MODEL_LABEL: gpu_model}


def does_match(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a node with these labels has those that are wanted; without a key only ``!`` is met.

    >>> does_match({"pool": "a"}, {"pool": "in(a,b)", "zone": "!x"})
    True
    """
    return all(_meets(labels.get(key), selector) for key, selector in wanted.items())


def _meets(value: str | None, selector: str) -> bool:
    word = selector.removeprefix("!")
    allowed = word[3:-1].split(",") if word.endswith(")") else [word]
    return (value in allowed) != selector.startswith("!")


def _pairs(option: str, text: str | None) -> Iterator[tuple[str, str]]:
    seen = set()
    for pair in _COMMA_OUTSIDE_PARENTHESES.split(text) if text else ():
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals and value) or name in seen:
            raise RecipeError(
                f"{option} must be name=value, each name once, with commas between, found {text!r}",
                option=option,
            )
        seen.add(name)
        yield name, value


def _amount(name: str, text: str) -> float:
    if name in _OWN_OPTIONS:
        raise RecipeError(
            f"worker_resources takes custom resources only, found {name}; say CPU with threads_per_worker and"
            " GPU with device",
            option="worker_resources",
        )
    amount = float(text) if re.fullmatch(r"\d+(\.\d{1,4})?", text) else 0.0
    if amount <= 0 or (amount > 1 and not amount.is_integer()):
        raise RecipeError(
            f"worker_resources must give {name} a whole number or a fraction below 1 with up to four digits,"
            f" found {text!r}",
            option="worker_resources",
        )
    return amount
