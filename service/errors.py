"""What can go wrong with a request, as types. Knows nothing of HTTP; `http.error_responses` maps each to a status.

A server raises them, and a client raises them anew from what the server has said; the last are the client's own.

ServiceError
├── RequestError              the client's to mend
│   ├── InvalidParameterError     a parameter is outside its range
│   ├── InvalidTensorError        a tensor whose shape, datatype or bytes are not what its name takes
│   ├── UnknownModelError         it asks for a model, or a version, that is not served
│   ├── UnknownRequestError       it speaks of a request to which no answer is remembered
│   ├── BudgetTooSmallError       no sub-network is cheap enough
│   ├── UnauthorizedError         it came without a key that this server knows
│   ├── UnsupportedMediaError     the declared type is no image, or a format that is not decoded here
│   ├── ForeignOriginError        a page of another site sent it
│   ├── UnknownHostError          it is addressed to a name that is not the server's
│   ├── BodyTooLargeError         more bytes than the server reads
│   ├── UploadTimeoutError        the body does not arrive in time
│   ├── ClientGoneError           the client has closed its connection
│   ├── ImageTooLargeError        more pixels than the server decodes
│   └── InvalidImageError         bytes that are no image that the server reads
├── OverloadedError           too much is waiting already
├── DeadlineError             admitted, but its deadline cannot be met any more
├── OutOfMemoryError          the machine has no memory left for it
├── NotReadyError             the model has not answered its first batch yet, or the server is stopping
├── ModelChangeError          the model is not changed: another change is under way, or the new one is not fit
├── ModelError                the model failed on this batch
└── NoAnswerError             the client has no answer of a SuperViT server
    ├── ConnectionFailedError     nothing listens there (UnreachableError), or the connection broke off
    └── UnexpectedAnswerError     what answered is no SuperViT server; ResponseTimeoutError where nothing did
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

OverloadReason = Literal["no_time", "backlog", "preprocessing", "shed", "full", "address", "key"]


class ServiceError(Exception):
    """A request fails.

    Attributes:
        code: machine-readable, stable; the outcome label of the metrics.
        message: one sentence for a person.
        details: values that a program may want, such as the smallest possible budget.
    """

    code = "internal_error"

    def __init__(self, message: str, /, **details: Any) -> None:  # noqa: ANN401 - any JSON value
        super().__init__(message)
        self.message = message
        self.details = details


class RequestError(ServiceError):
    """The request must change before it can succeed."""


class InvalidParameterError(RequestError):
    """A parameter is outside its range or contradicts another."""

    code = "invalid_parameter"


class InvalidTensorError(RequestError):
    """A tensor's shape, datatype, bytes or values are not what its name takes."""

    code = "invalid_tensor"


class UnknownModelError(RequestError):
    """It asks for a model, or a version of it, that is not served here."""

    code = "unknown_model"


class UnknownRequestError(RequestError):
    """It speaks of another request, to which no answer is remembered."""

    code = "unknown_request"


class BudgetTooSmallError(RequestError):
    """No sub-network, or not the one asked for, fits the budget."""

    code = "budget_too_small"


class UnauthorizedError(RequestError):
    """It came without a key that this server knows."""

    code = "unauthorized"


class UnsupportedMediaError(RequestError):
    """The content type is no image, the encoding is not undone here, or the image's format is not installed."""

    code = "unsupported_media_type"


class ForeignOriginError(RequestError):
    """A page of another site sent it, and no setting admits that site."""

    code = "foreign_origin"


class UnknownHostError(RequestError):
    """It is addressed to a name that is not the server's."""

    code = "unknown_host"


class BodyTooLargeError(RequestError):
    """The body has more bytes than the server reads."""

    code = "body_too_large"


class UploadTimeoutError(RequestError):
    """The body did not arrive in the time that the server waits for it."""

    code = "upload_timeout"


class ClientGoneError(RequestError):
    """The client closed its connection before it had its answer.

    Attributes:
        deadline_passed: whether it had not left, had it been answered in time.
    """

    code = "client_gone"

    def __init__(self, message: str, *, deadline_passed: bool = False) -> None:
        super().__init__(message)
        self.deadline_passed = deadline_passed


class ImageTooLargeError(RequestError):
    """The image's header announces more pixels, passes over them or bytes than the server decodes."""

    code = "image_too_large"


class InvalidImageError(RequestError):
    """The bytes are no image, or a broken one."""

    code = "invalid_image"


class OverloadedError(ServiceError):
    """Too much is waiting already; `details` has retry_after_s and the reason."""

    code = "overloaded"

    def __init__(self, message: str, /, reason: OverloadReason, retry_after_s: float, **details: Any) -> None:  # noqa: ANN401 - any JSON value
        """Say why, in a sentence and in a word.

        Args:
            message: for a person.
            reason: `no_time`, the budget is shorter than an answer takes at this moment even if nothing else waits;
                `backlog`, what waits already leaves no time; `preprocessing`, too many are being read and decoded;
                `shed`, for the sake of others; `full`, as many requests are in the server as may be; `address`, as many
                as may be of one address, or as much is to be decoded for it; `key`, its key's rate of work is used up,
                or as many as may be of that key are in the server.
            retry_after_s: when it may be worth another try.
            details: what a server of another version says beside it.
        """
        self.reason = reason
        self.retry_after_s = round(retry_after_s, 3)
        super().__init__(message, reason=reason, retry_after_s=self.retry_after_s, **details)


class DeadlineError(ServiceError):
    """The request was admitted, but it can no longer be answered in time."""

    code = "deadline_exceeded"


class OutOfMemoryError(ServiceError):
    """The machine lacks the memory for it, which is no fault of the request's."""

    code = "out_of_memory"


class NotReadyError(ServiceError):
    """The server cannot answer yet, or no longer."""

    code = "not_ready"


class ModelChangeError(ServiceError):
    """The model that is served stays: another change is under way, none may be asked for, or the new one is not fit."""

    code = "model_change_refused"


class ModelError(ServiceError):
    """The model failed on a batch."""

    code = "model_error"


class NoAnswerError(ServiceError):
    """The client has no answer of a SuperViT server."""

    code = "no_answer"


class ConnectionFailedError(NoAnswerError):
    """Nothing listens at the address, or the connection broke off before the answer."""

    code = "connection_failed"


class UnreachableError(ConnectionFailedError):
    """Nothing listens at the address."""


class ResponseTimeoutError(NoAnswerError):
    """The server was silent for longer than the client waits."""

    code = "response_timeout"


class UnexpectedAnswerError(NoAnswerError):
    """What answered is no SuperViT server, or one of another version."""

    code = "unexpected_answer"


class CommandError(Exception):
    """A command cannot do what it was asked; the message says why."""


class WrongUsageError(CommandError):
    """The words of a command make no sense; the message says which."""


def rebuild_error(code: str, message: str, details: Mapping[str, Any]) -> ServiceError:
    """Make the error anew that a server has described; one of a code that is not known here keeps that code."""
    try:
        error = _by_code(ServiceError).get(code, ServiceError)(message, **details)
    except TypeError:  # the details of another version
        error = ServiceError(message, **details)
    error.code = code
    return error


def _by_code(base: type[ServiceError]) -> dict[str, type[ServiceError]]:
    found = {base.code: base} if "code" in vars(base) else {}
    for kind in base.__subclasses__():
        found |= _by_code(kind)
    return found


# What pydantic finds wrong with a value, by its own name for it, in our words; `%(name)` is a bound of the field's.
PROBLEMS = {
    "bool_parsing": "true or false is wanted",
    "dict_type": "an object is wanted",
    "extra_forbidden": "there is no parameter of that name",
    "finite_number": "a finite number is wanted",
    "float_parsing": "a number is wanted",
    "float_type": "a number is wanted",
    "greater_than": "more than %(gt)g is wanted",
    "greater_than_equal": "at least %(ge)g is wanted",
    "int_from_float": "a whole number is wanted",
    "int_parsing": "a whole number is wanted",
    "int_parsing_size": "a smaller number is wanted",
    "int_type": "a whole number is wanted",
    "json_invalid": "the body is no JSON",
    "json_type": "the body is no JSON",
    "less_than": "less than %(lt)g is wanted",
    "less_than_equal": "at most %(le)g is wanted",
    "list_type": "a list is wanted",
    "literal_error": "%(expected)s is wanted",
    "missing": "it is missing",
    "model_type": "an object is wanted",
    "string_pattern_mismatch": "a text of another form is wanted",
    "string_too_short": "a longer text is wanted",
    "string_type": "a text is wanted",
    "too_long": "at most %(max_length)d values are wanted",
    "too_short": "at least %(min_length)d values are wanted",
}


def first_problem(problems: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """Return where pydantic found the first problem, and what it is."""
    problem = problems[0]
    known = PROBLEMS.get(problem["type"])
    # pydantic puts a prefix to our own sentences.
    what = str(problem["msg"]).removeprefix("Value error, ") if known is None else known % problem.get("ctx", {})
    return [str(part) for part in problem["loc"]], what


def invalid_parameter(problems: Sequence[Mapping[str, Any]]) -> InvalidParameterError:
    """Make an error of what pydantic found wrong with the parameters of a request."""
    path, what = first_problem(problems)
    where = ".".join(path)
    return InvalidParameterError(f"{where}: {what}", parameter=where) if where else InvalidParameterError(what)
