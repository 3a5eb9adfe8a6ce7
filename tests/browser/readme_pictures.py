"""Takes screenshots for a README: the demo's model, converted from the Prefect UI.

    python tests/browser/readme_pictures.py FOLDER

Takes the model and the text that ``infra/demo_source.py .demo`` makes, and some minutes. Writes form.png,
running.png and verdict.png.
"""

import argparse
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.flows.conftest import running_prefect_server  # noqa: E402
from tests.support.prefect_ui import PrefectUi, open_page  # noqa: E402
from tests.support.serving import running_serve  # noqa: E402

_RUN_S = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--demo", type=Path, default=REPOSITORY / ".demo")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "prefect"
        home.mkdir()
        # Served runs begin here: what is typed into the form tells nothing of this machine.
        (home / ".demo").symlink_to(given.demo.resolve())
        with (
            running_prefect_server(home) as (server, _),
            running_serve(server, home),
            open_page() as page,
        ):
            ui = PrefectUi(page, server.api_url.removesuffix("/api"), given.folder)
            take(ui)


def take(ui: PrefectUi) -> None:
    """Fill in the form, watch the run, read its verdict; a picture of each."""
    ui.open_form("quantize-model")
    ui.fill(
        {
            "Source": ".demo/source/SmolLM2-135M-Instruct",
            "Output": "quantized/SmolLM2-135M-Instruct-W4A16",
            "Calibration": ".demo/text/calibration.jsonl",
            "Evaluation": ".demo/text/evaluation.jsonl",
            "Group size": 64,
            "Sequences": 16,
            "Sequence length": 256,
        }
    )
    ui.show("Source")
    ui.picture("form")
    ui.submit()
    run_id = ui.view_run()
    ui.back(run_id)
    # So far that the table has rows and the bar knows how long the rest takes.
    ui.wait_for(r"block 1\d/\d+: \w+, about .* left", _RUN_S)
    ui.wait_for("quantize-blocks", _RUN_S)
    ui.picture("running")
    ui.wait_for("^Completed$", _RUN_S)
    ui.back(run_id)
    ui.open_artifact("quantize-summary")
    ui.wait_for("KL divergence", _RUN_S)
    # Below it are the addresses, in a folder that is gone by then.
    ui.picture("verdict", height=592)


if __name__ == "__main__":
    main()
