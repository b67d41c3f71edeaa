"""The settings of the server, each also an environment variable `SUPERVIT_<NAME>`.

Only `assembly`, `candidate`, `runtime`, `hosting` and `commands` read them; all other modules receive values.
"""

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import CommandError, first_problem

EngineKind = Literal["auto", "torch", "openvino"]
Precision = Literal["auto", "float32", "bfloat16", "int8"]

DEFAULT_CHECKPOINT = "supervit-small-caltech101"  # one of the checkpoints that ship
CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "supervit"
# For commands that call a server: their arguments are visible to all users of the machine.
API_KEY_VARIABLE = "SUPERVIT_API_KEY"
PILLOW_LIMIT_PIXELS = 89_000_000  # above it, Pillow itself objects to the size of an image


class Settings(BaseSettings):
    """Serve a checkpoint over HTTP. Each option is also an environment variable: --log-level is SUPERVIT_LOG_LEVEL."""

    model_config = SettingsConfigDict(env_prefix="SUPERVIT_", extra="forbid", frozen=True)

    checkpoint: str = Field(
        DEFAULT_CHECKPOINT,
        description="SuperViT checkpoint to serve: a path, the name of one that ships, or hf-hub:owner/name[@revision]",
    )
    watch_checkpoint: bool = Field(
        False, description="when the checkpoint's file is replaced, compare both models and serve the new one"
    )
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 for any free one")
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="TCP port for gRPC; 0 for any free one; no gRPC by default"
    )
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="separate TCP port for metrics, utilization, model changes, the web page and API documentation; "
        "by default --port serves them",
    )
    tls_certificate: Path | None = Field(
        None, description="PEM file with the TLS certificate of every port, reloaded when it changes; no TLS by default"
    )
    tls_key: Path | None = Field(None, description="PEM file with the certificate's private key, without a password")
    keep_alive_s: int = Field(75, ge=1, description="how long an idle connection is kept for its next request")
    cors_origins: str | None = Field(
        None, description="origins whose pages may send requests, comma-separated; * for any; by default only its own"
    )
    allowed_hosts: str | None = Field(
        None,
        description="host names that requests may be addressed to, comma-separated; any by default; "
        "IP addresses are always allowed",
    )
    keys: Path | None = Field(
        None,
        description="file of API keys and what each allows, reloaded when it changes; no keys are required by default",
    )
    forwarded_allow_ips: str | None = Field(
        None, description="proxies whose X-Forwarded-For is trusted, comma-separated; none by default"
    )
    fd: int | None = Field(None, ge=0, description="inherited socket to listen on instead of host and port")
    workers: int = Field(1, ge=1, description="servers behind one port, each on a share of the cores")
    engine: EngineKind = Field(
        "auto", description="inference engine; auto selects OpenVINO on a CPU and PyTorch on a GPU"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto")
    precision: Precision = Field(
        "auto",
        description="precision of the matrix products; auto selects int8 if the checkpoint is prepared for it, the CPU "
        "is faster with it and the sub-network loses little accuracy, otherwise the faster of the other two",
    )
    threads: int | None = Field(
        None, ge=1, description="threads of the engine on a CPU; by default one per core, or one less for a small model"
    )
    policy: str = Field("level", description="policy that chooses sub-network and batch; others are for comparison")
    cascades: bool = Field(
        False, description="look again, with a larger sub-network, if the first look at an image was unsure"
    )
    audit: bool = Field(
        True, description="when idle, run some answered images again at the best sub-network and count agreements"
    )
    default_budget_ms: float = Field(
        1000, gt=0, allow_inf_nan=False, description="latency budget of a request without budget_ms"
    )
    max_utilization: float | None = Field(
        None, gt=0, le=1, description="fraction of the machine's compute that this server may use; all of it by default"
    )
    profile_folder: Path = Field(CACHE_FOLDER, description="folder for measured latencies")
    monitor_interval_s: float = Field(
        0.25, gt=0, allow_inf_nan=False, description="time between two readings of the machine's utilization"
    )
    max_batch_size: int = Field(16, ge=1, le=64, description="maximum number of requests in a batch")
    max_in_flight: int = Field(1024, ge=1, description="maximum number of requests in the server; more are rejected")
    max_in_flight_per_address: int = Field(
        512,
        ge=1,
        description="maximum number of requests in the server from one address, and of bodies being sent by one client",
    )
    max_decode_s_per_address: float = Field(
        30,
        gt=0,
        allow_inf_nan=False,
        description="seconds of decoding that the large images of an address may need while other addresses have some",
    )
    max_connections: int = Field(
        4096, ge=1, description="maximum number of connections; beyond it, the one idle longest is closed for a new one"
    )
    max_connections_per_address: int = Field(2048, ge=1, description="maximum number of connections from one address")
    drain_s: float = Field(
        30, gt=0, allow_inf_nan=False, description="longest time to answer admitted requests once told to stop"
    )
    decode_threads: int = Field(2, ge=1, description="threads that decode images")
    max_body_bytes: int = Field(20_000_000, ge=1, description="largest request body that is read")
    max_upload_s: float = Field(
        30, gt=0, allow_inf_nan=False, description="longest time that a request's body may take to arrive"
    )
    max_image_pixels: int = Field(
        50_000_000, ge=1, le=PILLOW_LIMIT_PIXELS, description="largest image that is decoded, width times height"
    )
    max_decode_bytes: int = Field(
        640_000_000, ge=1, description="most memory that decoding an image, or all large images together, may take"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="minimum log level")
    log_format: Literal["text", "json"] = Field("text", description="format of log lines, on stderr")
    log_requests: bool = Field(False, description="log a line per request, and occasionally a line about rejected ones")

    @field_validator("allowed_hosts", "cors_origins")
    @classmethod
    def _in_lower_case(cls, names: str | None) -> str | None:
        return None if names is None else names.lower()  # as browsers send them

    @model_validator(mode="after")
    def _ports_of_their_own(self) -> "Settings":
        ports = [port for port in (self.port, self.admin_port, self.grpc_port) if port]
        if len(set(ports)) < len(ports):
            raise ValueError("port, admin_port and grpc_port must differ, unless they are 0")
        return self

    @model_validator(mode="after")
    def _origins_and_hosts(self) -> "Settings":
        for origin in comma_separated(self.cors_origins) or ():
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/]+", origin, re.IGNORECASE):
                raise ValueError(f"cors_origins: {origin!r} must be an origin such as https://example.org, or *")
        for host in comma_separated(self.allowed_hosts) or ():
            if not re.fullmatch(r"[\w.-]+", host):
                raise ValueError(f"allowed_hosts: {host!r} must be a host name such as example.org, without a port")
        return self

    @model_validator(mode="after")
    def _certificate_and_key(self) -> "Settings":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both or none")
        return self


def read_settings(**given: Any) -> Settings:  # noqa: ANN401 - whatever the fields are
    """Read the settings from the environment, except those given, which are within their ranges.

    Raises:
        CommandError: a setting from the environment is invalid.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        where, what = first_problem(error.errors())
        name = "".join(f"{Settings.model_config['env_prefix']}{part.upper()}: " for part in where[:1])
        raise CommandError(f"{name}{what}") from error


def comma_separated(names: str | None) -> tuple[str, ...] | None:
    """Split a setting of several names; None stays None."""
    return None if names is None else tuple(name.strip() for name in names.split(",") if name.strip())


def worker_environment(settings: Settings) -> dict[str, str]:
    """Return the environment in which `supervit serve --fd` runs as one of the workers of these settings."""
    given = settings.model_dump(exclude_unset=True, exclude_none=True, mode="json")
    prefix = Settings.model_config["env_prefix"]
    return {**os.environ, **{f"{prefix}{name.upper()}": str(value) for name, value in given.items()}}


def named_settings(settings: Settings) -> set[str]:
    """Return the names of the settings given explicitly; those that are environment variables as well do not count."""
    prefix = Settings.model_config["env_prefix"]
    return {name for name in settings.model_fields_set if f"{prefix}{name.upper()}" not in os.environ}


def environment_variable(name: str) -> str | None:
    """Read an environment variable that is not one of the settings."""
    return os.environ.get(name)


def unknown_variables() -> list[str]:
    """List environment variables that look like settings but are none: a misspelt one would be ignored silently."""
    prefix = str(Settings.model_config["env_prefix"])
    known = {API_KEY_VARIABLE, *(f"{prefix}{name.upper()}" for name in Settings.model_fields)}
    return sorted(name for name in os.environ if name.upper().startswith(prefix) and name.upper() not in known)
