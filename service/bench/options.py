"""The options of `supervit bench`. Imports no HTTP client, so that the command line starts quickly."""

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import CliPositionalArg

from service.simulation.arrivals import Arrivals, Positive

DEFAULT_RATE = 10.0
STDOUT = Path("-")


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL that begins with http:// or https://")
    return url


HttpUrl = Annotated[str, AfterValidator(_checked_url)]


class Bench(Arrivals):
    """Send requests to a server at random times without waiting for earlier answers, and report the figures."""

    url: CliPositionalArg[HttpUrl] = Field(description="URL of the server, e.g. http://127.0.0.1:8000")
    images: tuple[Path, ...] = Field(
        (),
        description="image files or folders of images; class folder names are labels; by default a few that ship",
    )
    duration_s: float = Field(10, gt=0, le=86_400, description="time in which requests are sent")
    budget_ms: tuple[Positive, ...] = Field(
        (1000,), min_length=1, description="latency budgets; from several, each request draws one"
    )
    protocol: Literal["supervit", "v2"] = Field(
        "supervit", description="v2 is the Open Inference Protocol of Triton, KServe and others"
    )
    model: Annotated[str, Field(min_length=1)] | None = Field(None, description="v2: name of the model")
    json_file: Path | None = Field(None, description="JSON file for all figures; - prints them instead of the table")
    plot_file: Path | None = Field(None, description="PNG file for latencies and attainment over time")

    @model_validator(mode="after")
    def _names_a_model(self) -> Self:
        if (self.protocol == "v2") != (self.model is not None):
            raise ValueError("protocol v2 and a model go together: give both or none")
        return self

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates to measure one after the other, in requests per second."""
        return self.rate or (DEFAULT_RATE,)
