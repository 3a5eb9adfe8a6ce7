"""Prefect's environment for the command line."""

import os
from pathlib import Path

import pytest

from flows.prefect_environment import has_server, prepare_prefect


@pytest.fixture
def bare_environment(monkeypatch, tmp_path):
    """No Prefect settings, and a home folder without a profile; the environment is restored afterwards."""
    for name in [name for name in os.environ if name.startswith("PREFECT_") or name == "DO_NOT_TRACK"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def write_profiles(home: Path, text: str) -> None:
    home.mkdir(parents=True, exist_ok=True)
    (home / "profiles.toml").write_text(text)


def test_without_a_server_a_temporary_one_is_allowed_in_a_home_of_its_own(bare_environment):
    assert prepare_prefect(is_verbose=False)
    home = Path(os.environ["PREFECT_HOME"])
    assert home.is_dir()
    assert home != bare_environment / ".prefect"
    assert os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] == "true"
    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] == "CRITICAL"


def test_a_home_of_the_user_is_kept(bare_environment, monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(bare_environment / "mine"))
    assert prepare_prefect(is_verbose=False)
    assert os.environ["PREFECT_HOME"] == str(bare_environment / "mine")


def test_with_a_server_nothing_is_started(bare_environment, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    assert not prepare_prefect(is_verbose=False)
    assert "PREFECT_HOME" not in os.environ
    assert "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE" not in os.environ


@pytest.mark.parametrize(
    ("profiles", "found"),
    [
        ('active = "a"\n[profiles.a]\nPREFECT_API_URL = "http://x/api"\n', True),
        ('active = "b"\n[profiles.a]\nPREFECT_API_URL = "http://x/api"\n[profiles.b]\n', False),
        ("not toml", False),
    ],
)
def test_the_active_profile_counts_as_configured(bare_environment, profiles, found):
    write_profiles(bare_environment / ".prefect", profiles)
    assert has_server() is found


def test_verbose_or_a_chosen_level_leaves_the_log_on_the_terminal(bare_environment, monkeypatch):
    prepare_prefect(is_verbose=True)
    assert "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL" not in os.environ
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "INFO")
    prepare_prefect(is_verbose=False)
    assert "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL" not in os.environ


def test_a_database_of_the_user_is_recorded_in_full(bare_environment, monkeypatch):
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:////data/mine.db")
    assert prepare_prefect(is_verbose=False)
    assert "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED" not in os.environ
    assert "PREFECT_LOGGING_TO_API_ENABLED" not in os.environ
