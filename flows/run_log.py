"""Has the log of a flow run hold what this project logs, wherever in the process that happens."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run

_LOGGERS = ("quantlib", "workers")


@contextmanager
def logs_in_run() -> Iterator[None]:
    """Send records of the project's loggers, from INFO up, to the log of the flow run that is active here.

    Prefect's own setting for other libraries' loggers, PREFECT_LOGGING_EXTRA_LOGGERS, finds the run in the
    context of whoever logs; threads of Ray and of this project have none.
    """
    run_id = str(flow_run.id)
    handler = APILogHandler(logging.INFO)

    def belongs_to_run(record: logging.LogRecord) -> bool:
        record.flow_run_id = run_id
        return True

    handler.addFilter(belongs_to_run)
    with ExitStack() as stack:
        for name in _LOGGERS:
            stack.enter_context(_heard_by(logging.getLogger(name), handler))
        yield


@contextmanager
def _heard_by(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logging.INFO, before or logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
