"""What S3 answered, in our errors: one table from S3 error codes to class and advice.

Messages carry the code and never the server's text, which may repeat credentials.
"""

from quantlib.errors import NoSpaceError, ObjectNotFoundError, StorageError, TransientStorageError

_ADVICE = {
    "NoSuchBucket": (
        ObjectNotFoundError,
        "the bucket {bucket!r} does not exist at {place}; check its name and AWS_ENDPOINT_URL",
    ),
    "NoSuchKey": (ObjectNotFoundError, "{uri} does not exist at {place}"),
    "InvalidAccessKeyId": (
        StorageError,
        "{place} does not know the access key id used for {uri}; check AWS_ACCESS_KEY_ID or the profile",
    ),
    "SignatureDoesNotMatch": (
        StorageError,
        "the secret key used for {uri} does not belong to its access key id;"
        " check AWS_SECRET_ACCESS_KEY or the profile",
    ),
    "AccessDenied": (
        StorageError,
        "the credentials in use may not {action} {uri}; ask for that right or use other credentials",
    ),
    "ExpiredToken": (StorageError, "the session token used for {uri} has expired; log in again"),
    "InvalidToken": (StorageError, "the session token used for {uri} is not valid; check AWS_SESSION_TOKEN"),
    "RequestTimeTooSkewed": (
        StorageError,
        "this machine's clock differs from that of {place}; set the clock",
    ),
}
_WRONG_REGION = (
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
)
_FULL = (
    "InsufficientStorage",
    "QuotaExceeded",
    "XMinioAdminBucketQuotaExceeded",
    "XMinioStorageFull",
)
# BadDigest and the four after it: what was sent arrived damaged or cut off.
_MAY_PASS = (
    "BadDigest",
    "IncompleteBody",
    "InvalidDigest",
    "MalformedXML",
    "XAmzContentSHA256Mismatch",
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
)
_CODE_OF_STATUS = {403: "AccessDenied", 404: "NoSuchKey", 507: "InsufficientStorage"}


def s3_error(code: str, *, action: str, uri: str, place: str) -> StorageError:
    """The error that an S3 code means.

    Args:
        code: ``<Code>`` of the answer, or an HTTP status as text where the answer had no body.
        action: ``read``, ``list``, ``write`` or ``delete``.
        uri: The object or prefix asked for.
        place: The endpoint in words.
    """
    if code.isdigit():
        status = int(code)
        code = _CODE_OF_STATUS.get(status, "ServiceUnavailable" if status >= 500 or status == 429 else code)
    bucket = uri.removeprefix("s3://").partition("/")[0]
    if code in _ADVICE:
        kind, text = _ADVICE[code]
        message = text.format(bucket=bucket, uri=uri, place=place, action=action)
        return kind(message, uri=uri, code=code)
    if code in _WRONG_REGION:
        return StorageError(
            f"the bucket {bucket!r} lies in another region ({code}); set AWS_REGION to the bucket's region",
            uri=uri,
            code=code,
        )
    if code in _FULL:
        return NoSpaceError(
            f"{place} has no room for {uri} ({code}); free space or raise the quota of the bucket {bucket!r},"
            " then run the same command again",
            uri=uri,
            code=code,
        )
    kind = TransientStorageError if code in _MAY_PASS else StorageError
    return kind(f"{place} would not {action} {uri} ({code})", uri=uri, code=code)


def check_upload_gone(error: StorageError, uri: str) -> None:
    """For the error that ended a streamed upload: one that the server no longer knows may be begun again.

    Raises:
        TransientStorageError: The upload is gone.
    """
    if error.facts.get("code") == "NoSuchUpload":
        raise TransientStorageError(
            f"the unfinished upload of {uri} is gone, given up by another run or finished with its answer"
            " lost; write the object again",
            uri=uri,
        ) from error


def unreachable(*, action: str, uri: str, place: str, cause: str) -> TransientStorageError:
    """The error for a request that never got an answer, after the engine's retries."""
    return TransientStorageError(
        f"{place} could not be reached to {action} {uri} ({cause}); check that it runs, and AWS_ENDPOINT_URL",
        uri=uri,
    )
