"""Prints the verdict of a run from its report: perplexity and size before and after, and time."""

import json
import sys
from pathlib import Path

from quantlib.job.report_text import format_summary


def main() -> None:
    """Print the summary of the report whose path is the only argument."""
    print(format_summary(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
