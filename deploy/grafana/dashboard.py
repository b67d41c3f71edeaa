"""Builds the dashboard: `python -m deploy.grafana.dashboard` rewrites dashboards/supervit.json.

Four rows, from what operators promise to the machine they have: the promise, the choice, the load, the machine.
"""

from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panels import ONES, THIRD, each, growth, lines, mean, number, quantile, rate, variable

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
    "The promise: is every request answered in time?": [
        number(
            "Answered in time",
            "Share of all requests that were answered before their deadline; those turned away count as missed.",
            ATTAINMENT,
        ),
        number(
            "Accuracy of the answers",
            "Top-1 accuracy that the sub-networks which answered have on their test images, averaged over answers.",
            ACCURACY,
        ),
        number(
            "Accuracy loss",
            "What the most accurate sub-network would have had more. Small budgets give it up by choice, load by "
            "need: if it is the load, more hardware would buy this back.",
            ACCURACY_LOSS,
        ),
        number(
            "Engines that are ready",
            "Engines that welcome requests: warmed up, profiled, not stopping. Each worker or replica has one.",
            f"sum(supervit_ready{ONES}) or vector(0)",
            "short",
            0,
        ),
        lines(
            "Outcomes",
            "Requests per second by what became of them: ok, or the code of the error that was answered.",
            "reqps",
            {"{{outcome}}": rate("supervit_requests_total", by="outcome")},
            stacked=True,
            span=THIRD,
        ),
        lines(
            "Time to the answer",
            "From a request's arrival to its finished answer, over those answered. Budgets are used: under load "
            "the server takes the time it is given.",
            "s",
            {f"{100 * share:g} %": quantile(share, "supervit_request_duration_seconds") for share in (0.5, 0.95, 0.99)},
            span=THIRD,
        ),
        lines(
            "Alerts",
            "Alerts of Prometheus that fire, by name and how many times: once for each server that is concerned.",
            "short",
            {"{{alertname}}": 'sum by (alertname) (ALERTS{alertstate="firing", job=~"$job"})'},
            span=THIRD,
        ),
    ],
    "The choice: what is lost, and why?": [
        lines(
            "Accuracy",
            "Of the answers, and of the most accurate sub-network; what lies between is lost. And how sure the answers "
            "are of themselves: where that is much less than their accuracy, the images are harder than those that it "
            "was measured on.",
            "percentunit",
            {
                "of the answers": ACCURACY,
                "best": f"max(supervit_best_accuracy_ratio{ONES})",
                "how sure they are": CONFIDENCE,
            },
        ),
        lines(
            "Sub-networks",
            "Answers per second by the sub-network that ran: patch grid and keep rate.",
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
            "Billions of multiply-accumulates per second: spent on answers, and what the most accurate sub-network "
            "would have cost more.",
            "short",
            {"spent": rate("supervit_spent_gflops_total"), "saved": rate("supervit_saved_gflops_total")},
            stacked=True,
        ),
        lines(
            "Second looks",
            "Of the answers, how many took another look at the image, in how many of these it gave the answer of the "
            "first, and how many were unsure and got no other look, by what forbade it.",
            "percentunit",
            {
                "looked again": f"{rate('supervit_looks_total')} / {rate('supervit_last_looks_total')} - 1",
                "of these agreed": f"{rate('supervit_second_look_agreements_total')}"
                f" / {rate('supervit_last_looks_total')}",
                "not again: {{reason}}": rate("supervit_last_looks_total", 'reason!="sure"', by="reason")
                + f" / on() group_left() {rate('supervit_last_looks_total')}",
            },
        ),
        lines(
            "Agreement with the best sub-network",
            "Of the images that were run again in idle moments over six hours, how many got the same answer, by the "
            "sub-network that had looked first, and how many of them must, at least, by the accuracies of both.",
            "percentunit",
            beside_promise(
                "supervit_audits_total", "supervit_audit_agreements_total", "supervit_audit_promised_agreements_total"
            ),
        ),
        lines(
            "Accuracy by feedback",
            "Of the answers of which clients have said over six hours what was right, how many were, by the "
            "sub-network that had looked first, and how many of them should be by its accuracy.",
            "percentunit",
            beside_promise(
                "supervit_feedback_total",
                "supervit_feedback_correct_total",
                "supervit_feedback_promised_correct_total",
            ),
        ),
        lines(
            "Dropped requests",
            "Requests per second without an answer, by reason. no_time: the budget is shorter than an answer takes "
            "now; backlog: what waits leaves no time; preprocessing: too many are being read and decoded; shed: for "
            "the sake of others; expired: admitted, then too late; full: as many in the server as may be; not_ready: "
            "warming up or stopping.",
            "reqps",
            {"{{reason}}": rate("supervit_dropped_requests_total", by="reason")},
            stacked=True,
        ),
    ],
    "The load: what arrives, and where does it wait?": [
        lines(
            "Requests in the server",
            "In flight: from arrival to answer. Queued: decoded, waiting for the engine.",
            "short",
            {
                "in flight": f"sum(supervit_requests_in_flight{ONES})",
                "queued": f"sum(supervit_queued_requests{ONES})",
            },
        ),
        lines(
            "Time by stage",
            "Mean of answered requests: decoding the image, waiting in queues, in the engine.",
            "s",
            {"{{stage}}": mean("supervit_stage_duration_seconds", by="stage")},
            stacked=True,
        ),
        lines(
            "Batch size",
            "Images that run together: the mean, and the size that 95 % of the batches stay within.",
            "short",
            {"mean": mean("supervit_batch_size_images"), "95 %": quantile(0.95, "supervit_batch_size_images")},
        ),
        lines(
            "Time of a batch",
            "Mean time in the engine, and what the policy had expected of those very batches.",
            "s",
            {
                "took": mean("supervit_batch_duration_seconds"),
                "expected": f"{rate('supervit_predicted_inference_seconds_total')} / "
                f"{rate('supervit_batch_duration_seconds_count')}",
            },
        ),
    ],
    "The machine: what is there, and what uses it?": [
        lines(
            "Utilization",
            "Share of the usable cores, by this server and by other processes, and of the GPU where there is one.",
            "percentunit",
            {
                "CPU, {{by}}, {{instance}} {{pid}}": f"supervit_cpu_utilization_ratio{ONES}",
                "GPU {{gpu}}, {{instance}}": f"supervit_gpu_utilization_ratio{ONES}",
            },
            span=THIRD,
        ),
        lines(
            "Pressure",
            "Share of the time in which a process had to wait for it (Linux PSI); cpu_quota: in which it had run out.",
            "percentunit",
            each("supervit_pressure_ratio", "{{resource}}, "),
            span=THIRD,
        ),
        lines(
            "Slowdown and safety factor",
            "Slowdown: how many times slower batches are than in the profile. Safety factor: by how much more the "
            "levels above the cheapest count, because deadlines were missed of late.",
            "short",
            {
                "slowdown, {{instance}} {{pid}}": f"supervit_slowdown_ratio{ONES}",
                "safety factor, {{instance}} {{pid}}": f"supervit_safety_factor_ratio{ONES}",
            },
            span=THIRD,
        ),
        lines(
            "Delay of the event loop",
            "How late the loop that reads requests and writes answers comes to what is due: above some 50 ms it has "
            "more to do than it can.",
            "s",
            {f"{100 * share:g} %": quantile(share, "supervit_event_loop_delay_seconds") for share in (0.5, 0.99)},
            span=THIRD,
        ),
        lines(
            "Memory",
            "Memory that the server holds, and what its CUDA graphs take of a GPU's; without one, nothing.",
            "bytes",
            each("supervit_resident_memory_bytes") | each("supervit_cuda_graph_memory_bytes", "CUDA graphs, "),
            span=THIRD,
        ),
        lines(
            "Age of the profile",
            "Time since the latencies that the policy works with were measured on this machine.",
            "s",
            each("time() - supervit_profile_timestamp_seconds"),
            span=THIRD,
        ),
        lines(
            "Measured part of the profile",
            "How much of these latencies is measured; the rest is estimated until the engine has nothing else to do.",
            "percentunit",
            each("supervit_profile_measured_ratio"),
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
