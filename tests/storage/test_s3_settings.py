"""What the environment decides about S3."""

import pytest

from quantlib.storage import s3_settings


@pytest.mark.parametrize(
    ("value", "sends"), [(None, True), ("when_supported", True), ("when_required", False)]
)
def test_checksums_are_left_out_where_amazons_tools_leave_them_out(monkeypatch, value, sends):
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION", raising=False)
    if value is not None:
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", value)
    assert s3_settings.read_s3_settings().sends_checksums is sends


def test_limits_of_a_call_cover_its_attempts():
    last_attempt_begins = s3_settings.RETRY_TIMEOUT_S + s3_settings.MAX_BACKOFF_S
    assert last_attempt_begins + s3_settings.REQUEST_TIMEOUT_S <= s3_settings.REQUEST_LIMIT_S
    assert last_attempt_begins + s3_settings.REQUEST_LIMIT_S <= s3_settings.PIECE_LIMIT_S
    assert s3_settings.PIECE_LIMIT_S + s3_settings.CONTACT_LIMIT_S <= s3_settings.CALL_LIMIT_S
