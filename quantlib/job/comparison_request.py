"""What is to be compared: entries, and options that hold for all of them; checked before anything is read."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlib.errors import RecipeError
from quantlib.job.option_table import check_value
from quantlib.job.options import (
    JobOptions,
    default_of,
    groups_of_layout,
    option_fields,
    options_from,
    refuse_unknown,
)
from quantlib.job.scheme_entries import FORM, SchemeEntry, entry_from
from quantlib.job.several_formats import only_format
from quantlib.job.staged_output import PUBLICATION_OPTIONS
from quantlib.job.targets import ENGINES
from quantlib.storage.uris import join_uri

SCHEMES_HELP = (
    f"What to compare, each as {FORM}: W4A16, rtn:W8A16, gptq:W3A16_ASYM@64. What is left out, method and"
    " group_size say."
)
OUTPUT_HELP = (
    "Where the outputs are kept, a folder each, beside comparison.json, comparison.md and comparison.svg. By"
    " default they are removed at the end, whatever comes of it: until then all of them lie below work, or"
    " else in the folder for temporary files, and take as much room there as if they were kept."
)
# Options of a job that a comparison has not -> why.
NOT_COMPARED = {
    "scheme": "its schemes say it",
    "replay": "that repeats one run",
    **dict.fromkeys(PUBLICATION_OPTIONS, "it shows what entries cost, and holds them to nothing"),
}
_OWN = ("schemes", "output")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRequest:
    """A validated comparison.

    Attributes:
        entries: In the order in which they were named; no two are equal.
        output: Below which the outputs are kept; None when they are not.
        conversions: Of every entry the request, whose output is only the entry's folder name yet.
    """

    entries: tuple[SchemeEntry, ...]
    output: str | None
    conversions: tuple[JobOptions, ...]

    @property
    def options(self) -> JobOptions:
        """Those of the first entry: what is the same for all can be read there."""
        return self.conversions[0]

    def placed(self, place: str) -> tuple[JobOptions, ...]:
        """The requests with their outputs below an address, and work prefixes below the one that was named.

        Work prefixes of outputs that are not kept lie beside them.
        """
        work = self.options.work if self.output is not None else None
        return tuple(
            dataclasses.replace(
                options,
                output=join_uri(place, options.output),
                work=None if work is None else join_uri(work, options.output),
            )
            for options in self.conversions
        )


def comparison_request(values: Mapping[str, Any]) -> ComparisonRequest:
    """Validate plain values from any front end: ``schemes``, and options of a job.

    Outputs that are made from one reading need propagation ``original``: it is taken unless another is named,
    for entries of 3 bits too, which would choose ``quantized`` by themselves.

    Raises:
        RecipeError: An entry is wrong or is there twice, there is no held-out text, or see `options_from`.
    """
    words, output = values.get("schemes"), values.get("output")
    common = {name: value for name, value in values.items() if name not in _OWN}
    refuse_unknown(common)
    for name, reason in NOT_COMPARED.items():
        if common.pop(name, None) is not None:
            raise RecipeError(f"a comparison takes no {name}, {reason}; leave it out", option=name)
    if not words or not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise RecipeError(
            f"schemes must be a list of entries of the form {FORM}, found {words!r}", option="schemes"
        )
    if common.get("propagation") is None:
        common["propagation"] = "original"
    table = option_fields()
    if output is not None:
        check_value("output", output, table["output"][0])
    by_default = {name: common.get(name, table[name][0].default) for name in ("method", "group_size")}
    if by_default["group_size"] is None:
        by_default["group_size"] = _groups_of_layout(common)
    entries = tuple(entry_from(word, **by_default) for word in words)
    _refuse_twice(entries)
    conversions = tuple(
        options_from({**common, **dataclasses.asdict(entry), "output": entry.folder} | _without_data(entry))
        for entry in entries
    )
    if conversions[0].evaluation is None:
        raise RecipeError(
            "a comparison needs held-out text and none was given; name it with evaluation",
            option="evaluation",
        )
    only_format(conversions[0], "a comparison")
    _refuse_out_of_reach(conversions[0], output)
    return ComparisonRequest(entries=entries, output=output, conversions=conversions)


def _groups_of_layout(common: Mapping[str, Any]) -> int | None:
    """Of the layout that is named, or that the target reads best; what is no name is refused elsewhere."""
    target, layout = common.get("target"), common.get("format")
    if layout is None and isinstance(target, str) and target in ENGINES:
        layout = ENGINES[target].default_format
    return groups_of_layout(layout) if isinstance(layout, str) else None


def _without_data(entry: SchemeEntry) -> dict[str, Any]:
    """What an entry that needs no data has no use for, though others do; by itself it would be refused."""
    return {"outlier_columns": 0, "outlier_weights": 0} if entry.method == "rtn" else {}


def _refuse_twice(entries: tuple[SchemeEntry, ...]) -> None:
    twice = next((entry for entry in entries if entries.count(entry) > 1), None)
    if twice is not None:
        raise RecipeError(f"schemes: {twice} is there twice; leave one out", option="schemes")


def _refuse_out_of_reach(options: JobOptions, output: str | None) -> None:
    if options.ray_address is not None and output is None and options.work is None:
        raise RecipeError(
            "workers of a cluster must reach the outputs, and neither output nor work is named; name output"
            " to keep them, or work to have them there for as long as it takes",
            option="work",
        )


def departs_from_default(options: JobOptions) -> bool:
    """Whether a conversion by itself would choose another propagation."""
    return options.propagation != default_of(options, "propagation")
