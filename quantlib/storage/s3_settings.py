"""Where S3 is and who asks: the standard AWS environment variables, then the AWS profile chain.

The two S3 engines are told the same endpoint, region and credentials, so that they behave alike. This is the
one place of the library that reads AWS variables; there are no options of our own for them.
"""

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import botocore.credentials
import botocore.exceptions
import botocore.session

from quantlib.errors import StorageError

DEFAULT_REGION = "us-east-1"
CONNECT_TIMEOUT_S = 10
# Silence within one answer; a server may need long to put the parts of a large object together.
READ_TIMEOUT_S = 60
# One attempt as a whole: a part of 32 MiB at 270 KiB/s.
REQUEST_TIMEOUT_S = 120
MAX_RETRIES = 12
# No attempt begins later than this after the first: long enough for a server to restart.
RETRY_TIMEOUT_S = 90
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 10.0
# Finding out whether anybody answers at all: two attempts of this length.
CONTACT_TIMEOUT_S = 30
CONTACT_LIMIT_S = 2 * CONTACT_TIMEOUT_S + MAX_BACKOFF_S
# The longest that one request takes, with all its attempts.
REQUEST_LIMIT_S = RETRY_TIMEOUT_S + MAX_BACKOFF_S + REQUEST_TIMEOUT_S
# The longest that any call on one small object takes: head, read, read_with_info, write, put_if_absent,
# replace_if_match, delete. The last attempt may be a write and two reads to settle it.
CALL_LIMIT_S = CONTACT_LIMIT_S + RETRY_TIMEOUT_S + MAX_BACKOFF_S + 3 * REQUEST_LIMIT_S
# The longest that each page of a listing, span of a read or part of an upload takes.
PIECE_LIMIT_S = RETRY_TIMEOUT_S + MAX_BACKOFF_S + REQUEST_LIMIT_S
_TRUE = ("1", "true", "yes", "on")
# Botocore's credentials renew themselves; they are asked again this often.
_ASK_AGAIN_AFTER = timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """How to reach S3.

    Attributes:
        endpoint: None for Amazon's own.
        region: Region name.
        credentials: Botocore's, which renew themselves; None when requests are not to be signed.
        sends_checksums: Whether uploads carry a checksum for the server to check. As with Amazon's own tools
            it is left out with AWS_REQUEST_CHECKSUM_CALCULATION=when_required, for servers that know none.
    """

    endpoint: str | None
    region: str
    credentials: botocore.credentials.Credentials | None
    sends_checksums: bool

    @property
    def place(self) -> str:
        """The endpoint in words, for messages."""
        return self.endpoint or f"Amazon S3 in {self.region}"


def read_s3_settings() -> S3Settings:
    """Look the settings up in the environment, the profile and the machine's role, in this order.

    Raises:
        StorageError: A profile that does not exist, or no credentials anywhere.
    """
    try:
        session = botocore.session.Session()
        profile: dict[str, Any] = session.get_scoped_config()
        credentials = None if _is_unsigned() else session.get_credentials()
        checksums = session.get_config_variable("request_checksum_calculation")
    except botocore.exceptions.BotoCoreError as error:
        raise StorageError(f"the AWS configuration cannot be used: {error}") from error
    if credentials is None and not _is_unsigned():
        raise StorageError(
            "no AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE,"
            " or AWS_SKIP_SIGNATURE=true for a public bucket"
        )
    return S3Settings(
        endpoint=_first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") or profile.get("endpoint_url"),
        region=_first("AWS_REGION", "AWS_DEFAULT_REGION") or profile.get("region") or DEFAULT_REGION,
        credentials=credentials,
        sends_checksums=checksums != "when_required",
    )


def frozen_credentials(credentials: botocore.credentials.Credentials) -> dict[str, Any]:
    """The keys to sign with now, in the form obstore's credential providers return."""
    now = credentials.get_frozen_credentials()
    return {
        "access_key_id": now.access_key,
        "secret_access_key": now.secret_key,
        "token": now.token,
        "expires_at": datetime.now(UTC) + _ASK_AGAIN_AFTER,
    }


def _is_unsigned() -> bool:
    return os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in _TRUE


def _first(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)
