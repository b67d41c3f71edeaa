"""The options of `supervit simulate`. Imports no torch, so that the command line starts quickly."""

from pathlib import Path

from pydantic import Field

from service.simulation.arrivals import Traffic


class Simulate(Traffic):
    """Replay arrivals against a profile in virtual time, to find the machines that they need and the accuracy."""

    policy: str = Field("level", description="policy that chooses sub-network and batch, as for `serve`")
    compare: tuple[str, ...] = Field((), description="other policies to replay the same arrivals with")
    cascades: bool = Field(False, description="look again if a first look was unsure, as for `serve`")
    machines: int = Field(1, ge=1, le=1000, description="number of identical machines, which get requests in turn")
    max_batch_size: int | None = Field(
        None, ge=1, le=64, description="maximum number of requests in a batch; by default as for `serve`"
    )
    overhead_ms: float = Field(0, ge=0, description="time that each batch takes beyond its profile")
    noise: float = Field(
        0, ge=0, le=10, description="each batch takes longer by the absolute value of a normal draw times this"
    )
    checkpoint: str | None = Field(None, description="SuperViT checkpoint; by default the one that `serve` uses")
    json_file: Path | None = Field(None, description="JSON file for all figures")
    plot_file: Path | None = Field(
        None, description="PNG file for a plot over time, of all policies or of several rates"
    )
