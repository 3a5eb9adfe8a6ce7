"""Environment of Prefect for the command line, set before Prefect is imported.

Prefect reads its settings when it is imported. With a configured server nothing is changed but telemetry.
Without one, Prefect starts a server of its own for the time of the run; it gets a home that is thrown away,
so that two runs on one machine do not share a database and nothing is left behind.
"""

import os
import tomllib
from pathlib import Path

from flows.temporary_home import make_temporary_home
from quantlib.errors import RecipeError

# Seconds a temporary server may take to start; Prefect's own 20 are too few on a busy machine.
_SERVER_START_TIMEOUT_S = 180

# What nobody looks at on a server that ends with its run. The run itself, its state and its artifacts are
# still recorded; events, logs and task runs serve the UI, which this server does not have.
_TEMPORARY_SERVER = {
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
    "PREFECT_SERVER_EVENTS_STREAM_OUT_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
}
_DATABASE_SETTINGS = ("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")


def prepare_prefect(*, is_verbose: bool) -> bool:
    """Set Prefect's environment; call it before anything of Prefect is imported.

    Args:
        is_verbose: Leave Prefect's log on the terminal.

    Returns:
        True when a temporary server will be started.
    """
    _default("DO_NOT_TRACK", "1")
    _default("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    if not is_verbose and "PREFECT_LOGGING_LEVEL" not in os.environ:
        # The terminal belongs to the progress bar, and errors get one line at the end. Loggers keep their
        # level: the run's log in the UI is whole.
        _default("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    if has_server():
        return False
    _default("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")
    _default("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", str(_SERVER_START_TIMEOUT_S))
    _default("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
    if "PREFECT_HOME" not in os.environ:
        _prepare_temporary_home()
    return True


def _prepare_temporary_home() -> None:
    # Before Prefect is imported and registers the end of its server: the home goes after it.
    os.environ["PREFECT_HOME"] = str(make_temporary_home())
    # A database of the user's outlives the server and is to hold all that Prefect records.
    if not any(name.startswith(_DATABASE_SETTINGS) for name in os.environ):
        for name, value in _TEMPORARY_SERVER.items():
            _default(name, value)


def has_server() -> bool:
    """True when a Prefect server is configured: by PREFECT_API_URL or by the active Prefect profile."""
    return bool(os.environ.get("PREFECT_API_URL")) or bool(_profile().get("PREFECT_API_URL"))


def refuse_unreachable_server() -> None:
    """Make sure that the configured server answers; imports Prefect.

    Raises:
        RecipeError: With ``before_work`` set: no server is configured, or it does not answer.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        raise _refusal(
            "a Prefect server is needed and PREFECT_API_URL is not set; start one with"
            " 'prefect server start' and set PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    if problem is not None:
        raise _refusal(
            f"the Prefect server at PREFECT_API_URL={url} does not answer ({problem!r}); start it, or"
            " correct PREFECT_API_URL"
        )


def _refusal(message: str) -> RecipeError:
    error = RecipeError(message, option="PREFECT_API_URL")
    error.before_work = True
    return error


def _profile() -> dict[str, str]:
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    try:
        stored = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError):
        return {}
    name = os.environ.get("PREFECT_PROFILE", stored.get("active", ""))
    return stored.get("profiles", {}).get(name, {})


def _default(name: str, value: str) -> None:
    os.environ.setdefault(name, value)
