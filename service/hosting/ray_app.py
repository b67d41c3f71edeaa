"""The same app on Ray Serve: every replica is a whole server, with a queue, a monitor and a profile of its own.

`build` is the `import_path` of a Serve config; its arguments are the server's settings.
"""

import math
import os
import time

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from models.checkpoint import load_checkpoint
from service.app import create_app
from service.engines.factory import engine_threads
from service.errors import InvalidParameterError
from service.hosting.interpreter import configure_interpreter
from service.machine.monitor import Monitor
from service.runtime import ServerRuntime
from service.settings import Settings, named_settings
from service.telemetry.logs import configure_logging
from service.telemetry.reports import find_tracer

# Settings that Ray Serve decides.
NOT_FOR_RAY = {"host", "port", "fd", "workers"}
# Requests that Ray passes to a replica beyond the replica's own limit, so that the replica rejects them itself, with a
# reason and a time to retry.
EXTRA_ONGOING_REQUESTS = 64
NO_CHANGES = "the model cannot be changed in one of several replicas; deploy the app with another checkpoint"


@serve.ingress()
class Replica:
    """One server of the app.

    Ray routes no request to it before it is ready, and replaces it once its model cannot run.
    """

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.log_level, settings.log_format)
        self._has_failed = False
        self._decode_threads = settings.decode_threads
        checkpoint = load_checkpoint(settings.checkpoint)
        threads = settings.threads or min(engine_threads(checkpoint, Monitor().latest.cores), _assigned_cpus())
        settings = settings.model_copy(update={"threads": threads, "workers": 1})  # Ray runs replicas instead
        tracer = find_tracer(os.environ)
        runtime = ServerRuntime(settings, checkpoint, on_failure=self._fail, changes_refused=NO_CHANGES, tracer=tracer)
        self._app = create_app(runtime, ready_first=True, sends_request_id=False)  # Ray's proxy assigns the request IDs
        self._read_totals = runtime.metrics.totals
        self._totals, self._told_at = self._read_totals(), time.monotonic()
        configure_interpreter()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def _fail(self) -> None:
        self._has_failed = True

    def check_health(self) -> None:
        """Tell Ray whether this replica can serve.

        Raises:
            RuntimeError: the model cannot run.
        """
        if self._has_failed:
            raise RuntimeError("the model cannot run; see the log")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the rates per second since the last call, for the autoscaling policy."""
        before, last_at = self._totals, self._told_at
        self._totals, self._told_at = self._read_totals(), time.monotonic()
        elapsed_s = self._told_at - last_at
        rates = {name: (total - before[name]) / elapsed_s for name, total in self._totals.items()}
        # The factor by which inference would have cost more if the most accurate sub-network had run for every image.
        costlier = 1 + rates["saved_gflops"] / rates["spent_gflops"] if rates["spent_gflops"] else 1
        return {
            "requests_per_s": rates["met"] + rates["missed"],
            "accuracy_loss_per_s": rates["accuracy_loss"] + rates["missed"],
            "engines_wanted": max(rates["taken_s"] * costlier, rates["decode_s"] / self._decode_threads),
        }


def build(settings: Settings) -> Application:
    """Build the application of a Serve config.

    Args:
        settings: `args` of the config; what is left out comes from SUPERVIT_ variables or the defaults.

    Raises:
        InvalidParameterError: a setting is one that Ray decides.
        CheckpointError: the checkpoint cannot be served.
    """
    # Only those of the config: a container image that also serves without Ray sets some as environment variables.
    for name in NOT_FOR_RAY & named_settings(settings):
        raise InvalidParameterError(
            f"{name} is not supported on Ray Serve; set it in the config's http_options or deployments"
        )
    load_checkpoint(settings.checkpoint)  # here, so that `serve deploy` reports what is wrong with it
    as_deployment = serve.deployment(
        name="supervit",
        max_ongoing_requests=settings.max_in_flight + EXTRA_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_s,
    )
    application: Application = as_deployment(Replica).bind(settings)
    return application


def _assigned_cpus() -> int:
    """Return the number of cores that Ray has assigned to this replica, at least 1."""
    resources: dict[str, float] = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call] # by Ray
    return max(1, math.floor(resources.get("CPU", 1)))
