"""The settings of the server, each also an environment variable `SUPERVIT_<NAME>`.

Only `assembly`, `candidate`, `runtime`, `hosting` and `commands` read them; all other modules receive values.
"""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import CommandError, first_problem

DEFAULT_CHECKPOINT = "supervit-small-caltech101"  # one of the checkpoints that ship
CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "supervit"
# For commands that call a server: their arguments are visible to all users of the machine.
API_KEY_VARIABLE = "SUPERVIT_API_KEY"
PILLOW_LIMIT_PIXELS = 89_000_000  # above it, Pillow itself objects to the size of an image


class Settings(BaseSettings):
    """Serve a checkpoint over HTTP. Each option is an environment variable, too: --log-level is SUPERVIT_LOG_LEVEL."""

    model_config = SettingsConfigDict(env_prefix="SUPERVIT_", extra="forbid", frozen=True)

    checkpoint: str = Field(
        DEFAULT_CHECKPOINT,
        description="SuperViT checkpoint to serve: a path, the name of one that ships, or hf-hub:owner/name[@revision]",
    )
    watch_checkpoint: bool = Field(
        False, description="serve what is put in the place of the checkpoint's file, once it is compared with the old"
    )
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 for any free one")
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="TCP port for gRPC; 0 for any free one; by default there is none"
    )
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="TCP port for metrics, the machine, the page and documentation, which --port has then not; "
        "by default they are there",
    )
    tls_certificate: Path | None = Field(
        None, description="PEM file with the certificate of every port, read again when it changes; no TLS by default"
    )
    tls_key: Path | None = Field(None, description="PEM file with the certificate's private key, without a password")
    keep_alive_s: int = Field(75, ge=1, description="how long an idle connection is kept for its next request")
    cors_origins: str | None = Field(
        None, description="origins whose pages may ask, separated by commas; * for any; by default none but its own"
    )
    allowed_hosts: str | None = Field(
        None, description="names that requests may be addressed to, separated by commas; any by default, IPs always"
    )
    keys: Path | None = Field(
        None,
        description="file of API keys and of what each of them allows, read again when it changes; none by default",
    )
    forwarded_allow_ips: str | None = Field(
        None, description="proxies whose X-Forwarded-For is believed, separated by commas; none by default"
    )
    fd: int | None = Field(None, ge=0, description="inherited socket to listen on instead of host and port")
    workers: int = Field(1, ge=1, description="servers behind the one port, each on a share of the cores")
    engine: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="what runs the model; auto takes OpenVINO on a CPU and PyTorch on a GPU"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto")
    precision: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto",
        description="of the products; auto takes int8 where the checkpoint is prepared for it, this CPU gains by it "
        "and a sub-network's accuracy bears it, and else the fastest of the other two",
    )
    threads: int | None = Field(
        None, ge=1, description="threads of the engine on a CPU; every core by default, or all but one"
    )
    policy: str = Field("level", description="what chooses the sub-network and the batch; others are for comparison")
    cascades: bool = Field(
        False, description="look again, at a larger sub-network, where the first look at an image was unsure"
    )
    audit: bool = Field(
        True, description="run some answered images again at the best sub-network when idle, and count agreement"
    )
    default_budget_ms: float = Field(
        1000, gt=0, allow_inf_nan=False, description="time granted to a request that names no budget_ms"
    )
    max_utilization: float | None = Field(
        None, gt=0, le=1, description="fraction of the machine's compute that this server may use; all of it by default"
    )
    profile_folder: Path = Field(CACHE_FOLDER, description="where measured latencies are kept")
    monitor_interval_s: float = Field(
        0.25, gt=0, allow_inf_nan=False, description="time between two looks at the machine's utilization"
    )
    max_batch_size: int = Field(16, ge=1, le=64, description="requests that may run together")
    max_in_flight: int = Field(1024, ge=1, description="requests in the server at once; more are rejected")
    max_in_flight_per_address: int = Field(
        512,
        ge=1,
        description="requests in the server at once from one address, and bodies on their way from one client",
    )
    max_decode_s_per_address: float = Field(
        30,
        gt=0,
        allow_inf_nan=False,
        description="seconds of decoding that the large images of an address may wait for beside others'",
    )
    max_connections: int = Field(
        4096, ge=1, description="connections at once; of those that wait, the oldest is closed for a new one"
    )
    max_connections_per_address: int = Field(2048, ge=1, description="connections at once from one address")
    drain_s: float = Field(
        30, gt=0, allow_inf_nan=False, description="longest time to answer those admitted once told to stop"
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
        640_000_000, ge=1, description="most memory that decoding an image may take, and all large ones together"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least serious log lines shown")
    log_format: Literal["text", "json"] = Field("text", description="of the log's lines, on stderr")
    log_requests: bool = Field(False, description="log a line per request, and sparingly that some were rejected")

    @model_validator(mode="after")
    def _ports_of_their_own(self) -> "Settings":
        ports = [port for port in (self.port, self.admin_port, self.grpc_port) if port]
        if len(set(ports)) < len(ports):
            raise ValueError("port, admin_port and grpc_port differ, unless they are 0")
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
