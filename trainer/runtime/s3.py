"""The S3 client of the storage: names are taken literally, waiting is limited, and errors say what happened."""

import contextlib
import http
import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.core import set_custom_error_handler

from trainer.runtime.errors import InputError, JobError, UnreachableError

# s3fs retries each request and waits 0.1 x 1.7**n seconds, at most 15; botocore's own retry adds jitter. A storage that
# has never answered is probably misspelled, so it gets 3 s; one that has answered gets two minutes.
_TRIES_BEFORE_FIRST_ANSWER = 6
_TRIES = 16
# The most that stores give at once.
_OBJECTS_PER_PAGE = 1000
_KEYS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE"
# Errors of the store, or of the connection to it.
_ERRORS = (OSError, BotoCoreError, ClientError, ResponseParserError, aiohttp.ClientError)


class NoAnswerError(OSError):
    """The store did not answer a request; the cause says why."""


class S3(S3FileSystem):
    """s3fs with literal names, and with errors that distinguish an answer of the store from no answer.

    Paths are ``bucket/key``. Use only the methods of s3fs that take one name, such as `pipe_file` and `rm_file`, and
    the listing `ls`: all others expand ``*``, ``?`` and ``[``, and raise an error here.
    """

    cachable = False

    def __init__(self, *, has_answered: bool = False, **options: Any) -> None:
        retries = {"mode": "standard", "max_attempts": 2}
        config = {"retries": retries, "connect_timeout": 5, "read_timeout": 60}
        session = AioSession()
        # A job asks for nothing. Private name: botocore/credentials.py of 1.43, line 1615;
        # test_storage.py: test_nobody_is_asked_for_the_code_of_an_mfa_device.
        session.get_component("credential_provider").get_provider("assume-role")._prompter = _refuse_prompt
        super().__init__(**{"use_listings_cache": False, "config_kwargs": config, "session": session, **options})
        set_custom_error_handler(_is_transient)
        # These loggers only repeat what the error says.
        for name in ("credentials", "tokens"):
            logging.getLogger(f"aiobotocore.{name}").setLevel(logging.CRITICAL)
        self.has_answered = has_answered
        self.retries = _TRIES if has_answered else _TRIES_BEFORE_FIRST_ANSWER

    def split_path(self, path: str) -> tuple[str, str, None]:
        """Return bucket and key; s3fs would read ``?versionId=`` in a key as a version of another key."""
        bucket, _, key = path.partition("/")
        return bucket, key, None

    async def _expand_path(self, path: str, *arguments: Any, **options: Any) -> list[str]:
        raise NotImplementedError(f"{path}: names are taken as they are")

    _glob = _expand_path

    async def _call_s3(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return await super()._call_s3(method, *arguments, **options)
        # Credentials and endpoint may come from files, processes and requests, which raise other errors.
        except (*_ERRORS, ValueError, EOFError) as error:
            if _is_answer(error, method):
                raise
            raise NoAnswerError(str(error)) from error

    call_s3 = sync_wrapper(_call_s3)

    def has(self, path: str) -> bool:
        """Return whether the path is an object, or a prefix with at least one object below it."""
        try:
            self.info(path)
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise
            return False
        return True

    def read(self, path: str, start: int, end: int | None) -> bytes:
        """Read one object from ``start`` to ``end``; as with a file, reading past its end returns less."""
        try:
            content: bytes = self.cat_file(path, start=start, end=end)
        except OSError as error:
            # For an empty object even the range from 0 is invalid.
            if error_code(error) == "InvalidRange":
                return b""
            raise
        return content

    def write(self, path: str, content: bytes, *, create: bool = False) -> bool:
        """Write one object and return whether it was written; with ``create``, an existing one is not replaced."""
        try:
            self.pipe_file(path, content, mode="create" if create else "overwrite")
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            # A write does not need an existing object, so what is missing is the bucket.
            raise OSError(*error.args) from error.__cause__
        except OSError as error:
            # Ceph's answer has no message, so s3fs raises a plain OSError.
            if error_code(error) == "PreconditionFailed":
                return False
            raise
        return True

    def list_page(self, path: str, after: str = "") -> tuple[list[tuple[str, int]], str | None]:
        """Return a page of the objects below a prefix, and what to give as `after` for the next; None after the last.

        Each object is its name without the prefix, and its size. `find` would keep a dictionary for each of them.
        """
        bucket, key, _ = self.split_path(path)
        prefix = f"{key}/" if key else ""
        request = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": _OBJECTS_PER_PAGE}
        page = self.call_s3("list_objects_v2", **request, **({"ContinuationToken": after} if after else {}))
        objects = [(one["Key"].removeprefix(prefix), one["Size"]) for one in page.get("Contents", [])]
        return objects, page["NextContinuationToken"] if page.get("IsTruncated") else None

    def write_in_parts(self, path: str, content: bytes) -> None:
        """Write one object as a multipart upload of a single part, which is how `pipe_file` writes a large one."""
        bucket, key, _ = self.split_path(path)
        place = {"Bucket": bucket, "Key": key}
        place["UploadId"] = self.call_s3("create_multipart_upload", **place)["UploadId"]
        try:
            tag = self.call_s3("upload_part", **place, PartNumber=1, Body=content)["ETag"]
            parts = {"Parts": [{"PartNumber": 1, "ETag": tag}]}
            self.call_s3("complete_multipart_upload", **place, MultipartUpload=parts)
        except OSError:
            with contextlib.suppress(OSError):
                self.call_s3("abort_multipart_upload", **place)
            raise

    def try_briefly(self) -> None:
        """Retry for seconds instead of minutes until the store answers again."""
        self.retries = _TRIES_BEFORE_FIRST_ANSWER

    def forget_answers(self) -> None:
        """Treat the store as one that has never answered."""
        self.has_answered = False
        self.try_briefly()

    @contextlib.contextmanager
    def clear_errors(self, uri: str) -> Iterator[None]:
        """Turn errors into one line with the URI and what to check, without secrets.

        Raises:
            FileNotFoundError: there is no such object.
            InputError: the store refused, or has no such bucket.
            UnreachableError: no request could be made, or none was ever answered.
            JobError: the store answered before, but not for the last two minutes.
        """
        try:
            yield
            self._note_answer()
        except FileNotFoundError as error:
            self._note_answer()
            if error_code(error) == "NoSuchBucket":
                raise InputError(self._describe_answer(uri, error)) from error
            raise FileNotFoundError(f"{uri}: not found") from error
        except _ERRORS as error:
            silent = isinstance(error, NoAnswerError)
            message = self._describe_no_answer(uri, error) if silent else self._describe_answer(uri, error)
            if self.has_answered and _is_transient(_reason(error)):
                # This has waited long enough: what follows, such as cleanup, should not.
                self.try_briefly()
                raise JobError(f"{message}; when it is back, the same command continues") from error
            raise (UnreachableError if silent else InputError)(message) from error

    def _note_answer(self) -> None:
        self.has_answered = True
        self.retries = _TRIES

    def _describe_answer(self, uri: str, error: Exception) -> str:
        bucket = self.split_path(uri.removeprefix("s3://"))[0]
        text = f"{uri}: bucket {bucket!r} at {self._endpoint} answered {_first_line(error)!r}"
        return f"{text}; check AWS_ENDPOINT_URL_S3, {_KEYS} on every node"

    def _describe_no_answer(self, uri: str, error: Exception) -> str:
        reason = _reason(error)
        if isinstance(reason, BotoConnectionError | HTTPClientError):
            return self.describe_silence(uri, *_describe_connection(reason))
        text = f"{uri}: no request was made: {_first_line(reason)}"
        return f"{text}; check {_KEYS}, and the files in ~/.aws, on every node"

    def describe_silence(self, uri: str, reason: str, server: str = "") -> str:
        """Return one line about a store, or a server of credentials, that does not answer."""
        text = f"{uri}: no answer from {server or self._endpoint}: {reason}"
        return f"{text}; check AWS_ENDPOINT_URL_S3 and AWS_PROFILE on every node, and the network"

    @property
    def _endpoint(self) -> str:
        """The endpoint in use, from a variable, a file or the region."""
        return str(self._s3.meta.endpoint_url) if self._s3 else "its endpoint"


def _refuse_prompt(prompt: str) -> str:
    raise ValueError(
        "the profile has an mfa_serial, and a job asks for no code; use a profile without one, or temporary keys from "
        "'aws sts get-session-token' (with AWS_SESSION_TOKEN)"
    )


def _is_transient(error: BaseException) -> bool:
    """Return whether s3fs should retry a failed request; it handles some of these errors itself."""
    if isinstance(error, ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return status >= 500 and status != http.HTTPStatus.NOT_IMPLEMENTED
    if isinstance(error, BotoCoreError):
        return isinstance(error, BotoConnectionError | HTTPClientError)
    return isinstance(error, TimeoutError | ConnectionError)


def _is_answer(error: BaseException, method: str) -> bool:
    """Return whether an error is an answer of the store to a method of the client, such as ``list_objects_v2``."""
    reason = _reason(error)
    if isinstance(reason, ClientError):
        # An answer of another service, such as one that gives credentials, has another operation.
        return bool(reason.operation_name.lower() == method.replace("_", ""))
    return isinstance(reason, ResponseParserError)


def _reason(error: BaseException) -> BaseException:
    """Return the error of botocore that s3fs or this module has translated, or the error itself."""
    cause = error.__cause__
    if isinstance(cause, ClientError) or (cause and isinstance(error, NoAnswerError)):
        return _reason(cause)
    return error


def error_code(error: BaseException) -> str:
    """Return the code of an S3 answer, such as AccessDenied; empty for other errors."""
    response = getattr(_reason(error), "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _first_line(error: BaseException) -> str:
    reason = _reason(error)
    if error_code(reason) == "NoSuchBucket":
        return "no such bucket"
    if isinstance(reason, ClientError):
        # Ceph sends no message with its codes.
        message = reason.response.get("Error", {}).get("Message")
        text = str(message) if message and message != "None" else error_code(reason)
    else:
        text = str(reason)
    return text.strip().partition("\n")[0] or type(reason).__name__


def _describe_connection(error: BotoCoreError) -> tuple[str, str]:
    """Return why there is no connection, and the server."""
    server = urlsplit(error.kwargs.get("endpoint_url") or "")
    # Name the server only, not the path of the object.
    reason = str(error.kwargs.get("error") or "") or type(error).__name__
    return reason.partition("\n")[0], f"{server.scheme}://{server.netloc}" if server.netloc else ""
