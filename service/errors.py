"""The ways in which a request can fail, as types. Knows nothing of HTTP; `http.error_responses` maps each to a status.

A server raises these errors, and a client rebuilds them from the server's answer; the last group is the client's own.

ServiceError
├── RequestError              the client must change the request
│   ├── InvalidParameterError     a parameter is outside its range
│   ├── InvalidTensorError        a tensor's shape, datatype, bytes or values do not fit its name
│   ├── UnknownModelError         it asks for a model, or a version, that is not served
│   ├── UnknownRequestError       it refers to a request whose answer is not remembered
│   ├── BudgetTooSmallError       no sub-network is cheap enough
│   ├── UnauthorizedError         it carries no key that this server knows
│   ├── UnsupportedMediaError     the declared type is no image, or a format that is not decoded here
│   ├── ForeignOriginError        a page of another site sent it
│   ├── UnknownHostError          it is addressed to a name that is not the server's
│   ├── BodyTooLargeError         the body has more bytes than the server reads
│   ├── UploadTimeoutError        the body does not arrive in time
│   ├── ClientGoneError           the client has closed its connection
│   ├── ImageTooLargeError        the image has more pixels than the server decodes
│   └── InvalidImageError         the bytes are no image that the server can decode
├── OverloadedError           too much is waiting already
├── DeadlineError             its deadline cannot be met any more
├── OutOfMemoryError          the machine has no memory left for it
├── NotReadyError             the model has not answered its first batch yet, or the server is stopping
├── ModelChangeError          the model is not changed: another change is under way, or the new one is not fit
├── ModelError                the model failed on this batch
└── NoAnswerError             the client received no answer from a SuperViT server
    ├── ConnectionFailedError     nothing listens there (UnreachableError), or the connection broke off
    ├── ResponseTimeoutError      the server was silent for too long
    └── UnexpectedAnswerError     what answered is no SuperViT server
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

OverloadReason = Literal["no_time", "backlog", "preprocessing", "shed", "full", "address", "key"]


class ServiceError(Exception):
    """A request failed.

    Attributes:
        code: machine-readable and stable; also the outcome label of the metrics.
        message: one sentence for a person.
        details: values for programs, such as the smallest possible budget.
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
    """A tensor's shape, datatype, bytes or values do not fit its name."""

    code = "invalid_tensor"


class UnknownModelError(RequestError):
    """The request asks for a model, or a version of it, that is not served here."""

    code = "unknown_model"


class UnknownRequestError(RequestError):
    """The request refers to another one whose answer is not remembered."""

    code = "unknown_request"


class BudgetTooSmallError(RequestError):
    """No sub-network, or not the one requested, fits the budget."""

    code = "budget_too_small"


class UnauthorizedError(RequestError):
    """The request carries no key that this server knows."""

    code = "unauthorized"


class UnsupportedMediaError(RequestError):
    """The content type is no image, the encoding is not supported, or the image's format is not installed."""

    code = "unsupported_media_type"


class ForeignOriginError(RequestError):
    """A page of another site sent the request, and no setting admits that site."""

    code = "foreign_origin"


class UnknownHostError(RequestError):
    """The request is addressed to a name that is not the server's."""

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
        deadline_passed: whether it left only after the deadline, so that an answer in time would have reached it.
    """

    code = "client_gone"

    def __init__(self, message: str, *, deadline_passed: bool = False) -> None:
        super().__init__(message)
        self.deadline_passed = deadline_passed


class ImageTooLargeError(RequestError):
    """The image's header declares more pixels, passes over them or bytes than the server decodes."""

    code = "image_too_large"


class InvalidImageError(RequestError):
    """The bytes are no image, or a broken one."""

    code = "invalid_image"


class OverloadedError(ServiceError):
    """Too much is waiting already; `details` has retry_after_s and the reason."""

    code = "overloaded"

    def __init__(self, message: str, /, reason: OverloadReason, retry_after_s: float, **details: Any) -> None:  # noqa: ANN401 - any JSON value
        """Create the error with its reason.

        Args:
            message: for a person.
            reason: `no_time`, the budget is too short now, even if nothing else waits; `backlog`, the queue leaves no
                time; `preprocessing`, too many are being read and decoded; `shed`, dropped in favour of others; `full`,
                the server has its maximum of requests; `address`, the client's address has its maximum of requests or
                decoding; `key`, the key has used up its rate of work or has its maximum of requests.
            retry_after_s: seconds after which a retry may succeed.
            details: further values from a server of another version.
        """
        self.reason = reason
        self.retry_after_s = round(retry_after_s, 3)
        super().__init__(message, reason=reason, retry_after_s=self.retry_after_s, **details)


class DeadlineError(ServiceError):
    """The request can no longer be answered in time."""

    code = "deadline_exceeded"


class OutOfMemoryError(ServiceError):
    """The machine lacks the memory for the request, which is not the request's fault."""

    code = "out_of_memory"


class NotReadyError(ServiceError):
    """The server cannot answer yet, or no longer."""

    code = "not_ready"


class ModelChangeError(ServiceError):
    """The served model stays: another change is under way, no change may be requested, or the new model is not fit."""

    code = "model_change_refused"


class ModelError(ServiceError):
    """The model failed on a batch."""

    code = "model_error"


class NoAnswerError(ServiceError):
    """The client received no answer from a SuperViT server."""

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
    """The arguments of a command are invalid; the message says which."""


def rebuild_error(code: str, message: str, details: Mapping[str, Any]) -> ServiceError:
    """Rebuild the error that a server has described; an unknown code becomes a ServiceError with that code."""
    try:
        error = _by_code(ServiceError).get(code, ServiceError)(message, **details)
    except TypeError:  # the server is of another version and has other details
        error = ServiceError(message, **details)
    error.code = code
    return error


def _by_code(base: type[ServiceError]) -> dict[str, type[ServiceError]]:
    found = {base.code: base} if "code" in vars(base) else {}
    for kind in base.__subclasses__():
        found |= _by_code(kind)
    return found


# Messages by pydantic's name of the problem; `%(name)` stands for a bound of the field.
PROBLEMS = {
    "bool_parsing": "must be true or false",
    "dict_type": "must be an object",
    "extra_forbidden": "unknown parameter",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be greater than %(gt)g",
    "greater_than_equal": "must be at least %(ge)g",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "int_parsing_size": "has too many digits",
    "int_type": "must be an integer",
    "json_invalid": "the body is not valid JSON",
    "json_type": "the body is not valid JSON",
    "less_than": "must be less than %(lt)g",
    "less_than_equal": "must be at most %(le)g",
    "list_type": "must be a list",
    "literal_error": "must be %(expected)s",
    "missing": "is required",
    "model_type": "must be an object",
    "string_pattern_mismatch": "must match the pattern %(pattern)s",
    "string_too_short": "must have at least %(min_length)d characters",
    "string_type": "must be a string",
    "too_long": "must have at most %(max_length)d values",
    "too_short": "must have at least %(min_length)d values",
}


def first_problem(problems: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """Return the location and the description of the first problem that pydantic found."""
    problem = problems[0]
    known = PROBLEMS.get(problem["type"])
    # pydantic puts a prefix before the messages of our own validators.
    what = str(problem["msg"]).removeprefix("Value error, ") if known is None else known % problem.get("ctx", {})
    return [str(part) for part in problem["loc"]], what


def invalid_parameter(problems: Sequence[Mapping[str, Any]]) -> InvalidParameterError:
    """Create an error from the problems that pydantic found in the parameters of a request."""
    path, what = first_problem(problems)
    where = ".".join(path)
    return InvalidParameterError(f"{where}: {what}", parameter=where) if where else InvalidParameterError(what)
