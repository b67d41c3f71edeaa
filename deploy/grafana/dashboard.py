"""Builds the dashboard: `python -m deploy.grafana.dashboard` rewrites dashboards/supervit.json.

Four rows: the service level, the adaptation, the load and the machine.
"""

from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panels import ONES, THIRD, each, growth, lines, mean, number, of_served, quantile, rate, variable

OUTPUT = Path(__file__).with_name("dashboards") / "supervit.json"
MET, ALL = rate("supervit_deadlines_total", 'result="met"'), rate("supervit_deadlines_total")
ANSWERS = rate("supervit_requests_total", 'outcome="ok"')
EXPECTED = rate("supervit_expected_accuracy_total")
# Without traffic these queries return nothing; without a measured accuracy, those about accuracy return nothing.
ATTAINMENT = f"{MET} / ({ALL} > 0)"
ACCURACY = f"({EXPECTED} > 0) / ({ANSWERS} > 0)"
CONFIDENCE = f"({rate('supervit_confidence_total')} and {EXPECTED} > 0) / ({ANSWERS} > 0)"
ACCURACY_LOSS = f"({rate('supervit_accuracy_loss_total')} and {EXPECTED} > 0) / ({ANSWERS} > 0)"


def beside_promise(total: str, held: str, promised: str) -> dict[str, str]:
    """Write queries for the share of a total that held, by sub-network, and for the share that was promised."""
    by = "patch_grid, keep_rate"
    return {
        f"{legend}{{{{patch_grid}}}} at {{{{keep_rate}}}}": f"{growth(metric, by)} / ({growth(total, by)} > 0)"
        for legend, metric in (("", held), ("promised: ", promised))
    }


ROWS: dict[str, list[stat.Panel | timeseries.Panel]] = {
    "Service level: is every request answered in time?": [
        number(
            "Answered in time",
            "Share of all requests that were answered before their deadline; rejected requests count as missed, unless "
            "their client was over a limit of its own.",
            ATTAINMENT,
        ),
        number(
            "Accuracy of the answers",
            "Top-1 accuracy, on the test images, of the sub-networks that answered, averaged over answers.",
            ACCURACY,
        ),
        number(
            "Accuracy loss",
            "Top-1 accuracy that the most accurate sub-network would have had more, averaged over answers. Either the "
            "clients chose small budgets, or the load is high: only then would more hardware recover it.",
            ACCURACY_LOSS,
        ),
        number(
            "Ready engines",
            "Engines that accept requests: warmed up, profiled, not stopping. Each worker or replica has one.",
            f"sum(supervit_ready{ONES}) or vector(0)",
            "short",
            0,
        ),
        lines(
            "Outcomes",
            "Requests per second by outcome: ok, or the error code of the answer.",
            "reqps",
            {"{{outcome}}": rate("supervit_requests_total", by="outcome")},
            stacked=True,
            span=THIRD,
        ),
        lines(
            "Latency",
            "Percentiles of the time from arrival to the finished answer, of answered requests. Under load, the server "
            "uses the whole latency budget.",
            "s",
            {f"{100 * share:g} %": quantile(share, "supervit_request_duration_seconds") for share in (0.5, 0.95, 0.99)},
            span=THIRD,
        ),
        lines(
            "Alerts",
            "Number of firing Prometheus alerts by name; an alert fires once for each server that it concerns.",
            "short",
            {"{{alertname}}": 'sum by (alertname) (ALERTS{alertstate="firing", job=~"$job"})'},
            span=THIRD,
        ),
    ],
    "Adaptation: what is lost, and why?": [
        lines(
            "Accuracy",
            "Top-1 accuracy of the answers and of the most accurate sub-network; the difference is the accuracy loss. "
            "A mean confidence far below the accuracy of the answers shows that the images are harder than those that "
            "the accuracy was measured on.",
            "percentunit",
            {
                "answers": ACCURACY,
                "best sub-network": f"max{of_served('supervit_best_accuracy_ratio')}",
                "mean confidence": CONFIDENCE,
            },
        ),
        lines(
            "Sub-networks",
            "Answers per second by sub-network: patch grid and keep rate.",
            "reqps",
            {
                "{{patch_grid}} at {{keep_rate}}": rate(
                    "supervit_subnetwork_requests_total", by="patch_grid, keep_rate"
                )
                + " > 0"
            },
            stacked=True,
        ),
        lines(
            "Compute",
            "Billions of multiply-accumulates per second: spent on answers, and saved compared with the most accurate "
            "sub-network.",
            "short",
            {"spent": rate("supervit_spent_gflops_total"), "saved": rate("supervit_saved_gflops_total")},
            stacked=True,
        ),
        lines(
            "Second looks",
            "Shares of the answers: with a second look at the image, with a second look that agreed with the first, "
            "and unsure but without a second look, by reason.",
            "percentunit",
            {
                "second look": f"{rate('supervit_looks_total')} / {rate('supervit_last_looks_total')} - 1",
                "second look that agreed": f"{rate('supervit_second_look_agreements_total')}"
                f" / {rate('supervit_last_looks_total')}",
                "no second look: {{reason}}": rate("supervit_last_looks_total", 'reason!="sure"', by="reason")
                + f" / on() group_left() {rate('supervit_last_looks_total')}",
            },
        ),
        lines(
            "Agreement with the best sub-network",
            "Share of the images audited over six hours, that is run again at the best sub-network in idle moments, "
            "that got the same answer; promised: the least share that both accuracies imply. By the sub-network of the "
            "first look.",
            "percentunit",
            beside_promise(
                "supervit_audits_total", "supervit_audit_agreements_total", "supervit_audit_promised_agreements_total"
            ),
        ),
        lines(
            "Accuracy by feedback",
            "Share of the answers with feedback of clients over six hours that were correct; promised: the share that "
            "the accuracy implies. By the sub-network of the first look.",
            "percentunit",
            beside_promise(
                "supervit_feedback_total",
                "supervit_feedback_correct_total",
                "supervit_feedback_promised_correct_total",
            ),
        ),
        lines(
            "Dropped requests",
            "Requests per second without an answer, by reason. no_time: the budget is shorter than the current "
            "latency; backlog: the queue leaves no time; preprocessing: too many requests are being read and decoded; "
            "shed: dropped to answer others in time; expired: admitted, but past the deadline; full: the limit on "
            "requests in the server is reached; key, address: a client is over its own limit, which counts as no "
            "missed deadline; not_ready: warming up or stopping.",
            "reqps",
            {"{{reason}}": rate("supervit_dropped_requests_total", by="reason")},
            stacked=True,
        ),
    ],
    "Load: what arrives, and where does it wait?": [
        lines(
            "Requests in the server",
            "In flight: between arrival and answer. Queued: decoded and waiting for the engine.",
            "short",
            {
                "in flight": f"sum(supervit_requests_in_flight{ONES})",
                "queued": f"sum(supervit_queued_requests{ONES})",
            },
        ),
        lines(
            "Time by stage",
            "Mean time that an answered request spends in each stage: decoding, queues, inference.",
            "s",
            {"{{stage}}": mean("supervit_stage_duration_seconds", by="stage")},
            stacked=True,
        ),
        lines(
            "Batch size",
            "Images per batch: the mean and the 95th percentile.",
            "short",
            {"mean": mean("supervit_batch_size_images"), "95 %": quantile(0.95, "supervit_batch_size_images")},
        ),
        lines(
            "Batch latency",
            "Mean time of a batch in the engine, and the mean that the policy expected of the same batches.",
            "s",
            {
                "took": mean("supervit_batch_duration_seconds"),
                "expected": f"{rate('supervit_predicted_inference_seconds_total')} / "
                f"{rate('supervit_batch_duration_seconds_count')}",
            },
        ),
    ],
    "Machine: what is used, and by what?": [
        lines(
            "Utilization",
            "Share of the usable cores that this server and other processes use, and utilization of the GPUs, if any.",
            "percentunit",
            {
                "CPU, {{by}}, {{instance}} {{pid}}": f"supervit_cpu_utilization_ratio{ONES}",
                "GPU {{gpu}}, {{instance}}": f"supervit_gpu_utilization_ratio{ONES}",
            },
            span=THIRD,
        ),
        lines(
            "Pressure",
            "Share of the time in which a process waited for the resource (Linux PSI); cpu_quota: share of the quota's "
            "periods in which it ran out.",
            "percentunit",
            each("supervit_pressure_ratio", "{{resource}}, "),
            span=THIRD,
        ),
        lines(
            "Slowdown and safety factor",
            "Slowdown: how many times slower batches are than in the profile. Safety factor: factor on the latencies "
            "of the levels above the cheapest, raised after missed deadlines.",
            "short",
            {
                "slowdown, {{instance}} {{pid}}": f"supervit_slowdown_ratio{ONES}",
                "safety factor, {{instance}} {{pid}}": f"supervit_safety_factor_ratio{ONES}",
            },
            span=THIRD,
        ),
        lines(
            "Event loop delay",
            "How late the event loop, which reads requests and writes answers, runs a timer that is due: above about "
            "50 ms, it is overloaded.",
            "s",
            {f"{100 * share:g} %": quantile(share, "supervit_event_loop_delay_seconds") for share in (0.5, 0.99)},
            span=THIRD,
        ),
        lines(
            "Memory",
            "Resident memory of the server, and GPU memory of its CUDA graphs, if it uses a GPU.",
            "bytes",
            each("supervit_resident_memory_bytes") | each("supervit_cuda_graph_memory_bytes", "CUDA graphs, "),
            span=THIRD,
        ),
        lines(
            "Profile age",
            "Time since the latencies that the policy uses were measured on this machine.",
            "s",
            {"{{instance}}": f"time() - {of_served('supervit_profile_timestamp_seconds')}"},
            span=THIRD,
        ),
        lines(
            "Measured share of the profile",
            "Share of these latencies that is measured; the rest is estimated, and measured when the engine is idle.",
            "percentunit",
            {"{{instance}}": of_served("supervit_profile_measured_ratio")},
            span=THIRD,
        ),
    ],
}


def build() -> dashboard.Dashboard:
    """Build the dashboard from its rows."""
    built = (
        dashboard.Dashboard("SuperViT Serve")
        .uid("supervit")
        .tags(["supervit"])
        .refresh("5s")
        .time("now-15m", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(variable("job", "Service", "supervit_ready"))
        .with_variable(variable("instance", "Server", 'supervit_ready{job=~"$job"}'))
    )
    for title, panels in ROWS.items():
        built = built.with_row(dashboard.Row(title))
        for panel in panels:
            built = built.with_panel(panel)
    return built


if __name__ == "__main__":
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(JSONEncoder(sort_keys=True, indent=2).encode(build().build()) + "\n")
