"""The manifests agree with the published schemas, and with the server's settings, routes and metrics."""

import copy
import importlib
import os
import re
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped] # it publishes no types
import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from models.checkpoint import load_checkpoint
from service.app import create_app
from service.engines.torch_engine import TorchEngine
from service.runtime import ServerRuntime
from service.settings import DEFAULT_CHECKPOINT, Settings, unknown_variables
from service.telemetry.metrics import Metrics

Manifest = dict[str, Any]

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
FOLDERS = ("base", "autoscaled")
OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()  # the oldest supports `sleep` in a preStop hook
# Imported by name: these modules have megabytes, which the type checker need not read.
RESOURCE_MODELS = {
    "ScaledObject": "cloudcoil.models.keda.v1alpha1",
    "ServiceMonitor": "cloudcoil.models.prometheus_operator.v1",
    "PrometheusRule": "cloudcoil.models.prometheus_operator.v1",
}
KINDS = (
    "Namespace",
    "Deployment",
    "Service",
    "PodDisruptionBudget",
    "NetworkPolicy",
    "ServiceMonitor",
    "PrometheusRule",
    "ScaledObject",
)
LABELS = {"app.kubernetes.io/name": "supervit"}
SERVER_BYTES, BYTES_PER_PIXEL = 1_850_000_000, 16  # of the server itself, and of a WebP while it is decoded
KUBECTL = shutil.which("kubectl")
# Debian only packages a kubectl of 2021; kubernetes-validate checks the same manifests against the API without it.
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
# In CI, where the suite gates changes, it must not pass by skipping.
needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None and "CI" not in os.environ, reason="Prometheus is not installed"
)


def kustomization(folder: str) -> Manifest:
    read: Manifest = yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text())
    return read


@cache
def manifests() -> dict[str, Manifest]:
    """Read every manifest, by kind; there is one of each kind."""
    files = [path for folder in FOLDERS for path in sorted((KUBERNETES / folder).glob("*.yaml"))]
    found = [yaml.safe_load(path.read_text()) for path in files if path.stem != "kustomization"]
    by_kind = {each["kind"]: each for each in found}
    assert len(by_kind) == len(found)
    return by_kind


def pod() -> Manifest:
    found: Manifest = manifests()["Deployment"]["spec"]["template"]["spec"]
    return found


def server() -> Manifest:
    (container,) = pod()["containers"]
    found: Manifest = container
    return found


def environment() -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in server()["env"]}


def triggers() -> dict[str, Manifest]:
    return {trigger["name"]: trigger for trigger in manifests()["ScaledObject"]["spec"]["triggers"]}


def queries() -> dict[str, str]:
    return {name: trigger["metadata"]["query"] for name, trigger in triggers().items()}


def flaws(manifest: Manifest, version: str = NEWEST) -> str:
    """Return the violations of the published schema of its kind in a manifest; an empty string if it is valid."""
    if module := RESOURCE_MODELS.get(manifest["kind"]):
        model = getattr(importlib.import_module(module), manifest["kind"])
        try:
            understood = model.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_unset=True)
        except ValueError as error:
            return str(error)
        # The models silently drop unknown fields.
        return "" if understood == manifest else f"only this much of it is understood: {understood}"
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)
    return ""


def changed(kind: str, path: str, value: object) -> Manifest:
    """Copy a manifest with another value at a dotted path; None removes the value."""
    manifest = copy.deepcopy(manifests()[kind])
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    place: Any = manifest
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return manifest


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_is_valid_by_the_schema_of_its_kind(kind: str, version: str) -> None:
    assert flaws(manifests()[kind], version) == ""


def test_every_manifest_is_of_a_kind_that_is_checked() -> None:
    assert set(manifests()) == set(KINDS)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Namespace", "metadata.labels", ["restricted"]),
        ("Deployment", "spec.template.spec.terminationGracePeriodSeconds", "a minute"),
        ("Deployment", "spec.template.spec.containers.0.readynessProbe", {}),
        ("Deployment", "spec.template.spec.containers.0.name", None),
        ("Deployment", "spec.selector", None),
        ("Service", "spec.ports.0.port", "http"),
        ("PodDisruptionBudget", "spec.maxUnavailabel", 1),
        ("NetworkPolicy", "spec.policyTypes", "Egress"),
        ("ServiceMonitor", "spec.endpoints.0.interval", "often"),
        ("ServiceMonitor", "spec.endpoints.0.ports", "http"),
        ("ServiceMonitor", "spec.selector", None),
        ("PrometheusRule", "spec.groups.0.rules.0.expr", None),
        ("PrometheusRule", "spec.groups.1.rules.0.for", "a while"),
        ("ScaledObject", "spec.scaleTargetRef", None),
        ("ScaledObject", "spec.triggers.0.metadata.threshold", 1),
        ("ScaledObject", "spec.minReplicaCount", "2"),
        ("ScaledObject", "spec.advanced.horizontalPodAutoscalerConfig.behaviour", {}),
    ],
)
def test_a_mistake_in_a_manifest_is_found(kind: str, path: str, value: object) -> None:
    assert flaws(changed(kind, path, value))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_kustomization_lists_every_file_of_its_folder(folder: str) -> None:
    resources = set(kustomization(folder)["resources"])
    beside = {path.name for path in (KUBERNETES / folder).glob("*.yaml")} - {"kustomization.yaml"}
    assert resources - {"../base"} == beside
    assert ("../base" in resources) == (folder != "base")


@needs_kubectl
def test_kustomize_renders_valid_manifests_in_the_namespace() -> None:
    command = [str(KUBECTL), "kustomize", str(KUBERNETES / "autoscaled")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rendered = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
    assert set(rendered) == set(KINDS)
    for kind, manifest in rendered.items():
        assert flaws(manifest) == ""
        namespace = None if kind == "Namespace" else kustomization("base")["namespace"]
        assert manifest["metadata"].pop("namespace", None) == namespace
        assert manifest == manifests()[kind]


def test_the_namespace_that_is_created_is_the_one_that_is_used_and_queried() -> None:
    namespaces = {kustomization(folder)["namespace"] for folder in FOLDERS}
    assert namespaces == {manifests()["Namespace"]["metadata"]["name"]}
    queried = {name for query in queries().values() for name in re.findall(r'namespace="([^"]*)"', query)}
    assert queried == namespaces


def test_every_selector_matches_the_labels_of_the_pods() -> None:
    spec = manifests()["Deployment"]["spec"]
    assert spec["template"]["metadata"]["labels"] == LABELS
    assert spec["selector"]["matchLabels"] == LABELS
    assert manifests()["Service"]["spec"]["selector"] == LABELS
    assert manifests()["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == LABELS
    assert manifests()["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == LABELS
    for constraint in pod()["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"] == LABELS


def test_the_service_monitor_selects_the_service_and_sets_the_job_of_rules_and_queries() -> None:
    service, monitor = manifests()["Service"], manifests()["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    job = service["metadata"]["labels"][monitor["jobLabel"]]
    rules = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text()
    for text in (rules, *queries().values()):
        assert set(re.findall(r'job="([^"]*)"', text)) == {job}


def test_the_prometheus_rule_manifest_has_the_tested_rules() -> None:
    tested = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
    assert manifests()["PrometheusRule"]["spec"] == tested


def test_every_named_port_leads_to_the_port_that_the_server_listens_on() -> None:
    ports = {port["name"]: port["containerPort"] for port in server()["ports"]}
    assert ports == {"http": Settings.model_fields["port"].default}
    (service_port,) = manifests()["Service"]["spec"]["ports"]
    assert service_port["targetPort"] in ports
    assert [endpoint["port"] for endpoint in manifests()["ServiceMonitor"]["spec"]["endpoints"]] == [
        service_port["name"]
    ]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server()[probe]["httpGet"]["port"] in ports


def test_every_probed_or_scraped_path_is_a_route_of_the_server() -> None:
    checkpoint = load_checkpoint(DEFAULT_CHECKPOINT)
    runtime = ServerRuntime(Settings(), checkpoint, TorchEngine(checkpoint.model, "cpu", threads=1))
    client = TestClient(create_app(runtime))
    paths = {server()[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    paths |= {endpoint["path"] for endpoint in manifests()["ServiceMonitor"]["spec"]["endpoints"]}
    assert paths == {"/health/ready", "/health/live", "/metrics"}
    for path in paths:
        assert client.get(path).status_code in (200, 503)
    assert client.get("/healthy").status_code == 404


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that the server reads from the environment of the deployment."""
    for name in [name for name in os.environ if name.startswith("SUPERVIT_")]:
        monkeypatch.delenv(name)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return Settings()


def test_every_variable_is_a_setting_and_the_server_listens_on_all_interfaces(settings: Settings) -> None:
    assert unknown_variables() == []
    assert {name.removeprefix("SUPERVIT_").lower() for name in environment()} == settings.model_fields_set
    assert settings.host == "0.0.0.0"


def test_kubernetes_adds_no_variables_of_services_to_the_environment() -> None:
    assert pod()["enableServiceLinks"] is False


def test_the_grace_period_is_longer_than_the_sleep_and_the_drain(settings: Settings) -> None:
    sleep_s = server()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert sleep_s >= 5
    assert pod()["terminationGracePeriodSeconds"] >= sleep_s + settings.drain_s + 10


def test_the_startup_probe_allows_a_start_of_minutes_beside_noisy_neighbours() -> None:
    probe = server()["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 2 * 120


def test_the_root_file_system_is_read_only_and_writable_folders_are_volumes_of_the_pod(settings: Settings) -> None:
    assert server()["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {mount["mountPath"]: mount for mount in server()["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    for path in (str(settings.profile_folder), "/tmp"):  # noqa: S108 # libraries expect it
        assert not mounts[path].get("readOnly")
        assert "emptyDir" in volumes[mounts[path]["name"]]


def test_the_pod_runs_unprivileged_without_a_service_account_token_and_without_egress() -> None:
    assert pod()["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    context = server()["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert pod()["automountServiceAccountToken"] is False
    assert manifests()["NetworkPolicy"]["spec"]["policyTypes"] == ["Egress"]
    assert "egress" not in manifests()["NetworkPolicy"]["spec"]


def test_cpu_requests_equal_cpu_limits_of_two_or_more_whole_cores() -> None:
    resources = server()["resources"]
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"]
    assert int(resources["limits"]["cpu"]) >= 2


def test_probes_and_scrapes_have_connections_while_all_requests_are_being_answered(settings: Settings) -> None:
    assert settings.max_in_flight <= 0.75 * settings.max_connections


def test_the_memory_limit_covers_the_most_that_clients_can_make_the_server_hold(settings: Settings) -> None:
    decoding = settings.decode_threads * settings.max_image_pixels * BYTES_PER_PIXEL
    bodies = settings.max_connections * settings.max_body_bytes
    limit = int(server()["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
    assert SERVER_BYTES + decoding + bodies <= limit


def test_the_image_has_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert server()["image"] == f"{project['name']}:{project['version']}"


def test_only_the_scaler_sets_the_number_of_replicas() -> None:
    deployment, scaled = manifests()["Deployment"], manifests()["ScaledObject"]["spec"]
    assert "replicas" not in deployment["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert 2 <= scaled["minReplicaCount"] < scaled["maxReplicaCount"]


def test_scaling_in_is_slower_than_scaling_out() -> None:
    behavior = manifests()["ScaledObject"]["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] < behavior["scaleDown"]["stabilizationWindowSeconds"]
    assert behavior["scaleDown"]["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 300}]


def test_scaling_compares_the_loss_as_is_and_engines_per_replica_and_missing_data_is_an_error() -> None:
    assert {name: trigger["metricType"] for name, trigger in triggers().items()} == {
        "accuracy-loss": "Value",
        "engines-wanted": "AverageValue",
    }
    for trigger in triggers().values():
        assert trigger["type"] == "prometheus"
        assert trigger["metadata"]["ignoreNullValues"] == "false"


def test_every_series_in_a_scaler_query_is_exported_by_the_server() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    known = {sample.name: sample.labels for family in registry.collect() for sample in family.samples}
    missed = {"result": "missed"}
    assert registry.get_sample_value("supervit_deadlines_total", missed) == 0
    for query in queries().values():
        used = re.findall(r"(supervit_\w+)\{([^}]*)\}", query)
        assert len(used) == query.count("supervit_")
        for name, matchers in used:
            assert name in known
            labels = dict(re.findall(r'(\w+)="([^"]*)"', matchers))
            own = {name: value for name, value in labels.items() if name not in ("namespace", "job")}
            assert own in ({}, missed, {"stage": "decode"})


COUNTERS = {
    "met": "supervit_deadlines_total{SOURCE,result='met'}",
    "missed": "supervit_deadlines_total{SOURCE,result='missed'}",
    "accuracy_loss": "supervit_accuracy_loss_total{SOURCE}",
    "busy": "supervit_engine_taken_seconds_total{SOURCE}",
    "spent": "supervit_spent_gflops_total{SOURCE}",
    "saved": "supervit_saved_gflops_total{SOURCE}",
    "decode": "supervit_stage_duration_seconds_sum{SOURCE,stage='decode'}",
}
IDLE = dict.fromkeys(COUNTERS, 0.0)
CALM = IDLE | {"met": 100, "busy": 0.5, "spent": 6}
# Always busy, except for the turnaround between batches. Twice the engines could give every answer its full accuracy.
STRAINED = IDLE | {"met": 100, "accuracy_loss": 3, "busy": 0.9, "spent": 3, "saved": 3}


def pods(number: int, per_second: dict[str, float], namespace: str = "supervit") -> list[Manifest]:
    """Return the series of a number of ready pods over ten minutes, in which each pod counts this much per second."""
    series = []
    for name in range(number):
        source = f"namespace='{namespace}',job='supervit',pod='{name}'"
        series.append({"series": f"supervit_ready{{{source}}}", "values": "1x40"})
        for key, rate in per_second.items():
            counter = COUNTERS[key].replace("SOURCE", source)
            series.append({"series": counter, "values": f"0+{15 * rate}x40"})
    return series


@needs_prometheus
@pytest.mark.parametrize(
    ("series", "accuracy_loss", "engines_wanted"),
    [
        pytest.param(pods(3, IDLE), 0, 0, id="without traffic nothing is lost and no engine wanted"),
        pytest.param(pods(3, CALM), 0, 1.5, id="engines that suffice lose nothing"),
        pytest.param(
            pods(2, CALM | {"busy": 0.95}), 0, 1.6, id="engines that are busy but give nothing up lose nothing"
        ),
        pytest.param(pods(3, STRAINED), 3, 2.4, id="strained engines lose what they give up, and none can be spared"),
        pytest.param(
            pods(2, STRAINED | {"accuracy_loss": 0, "met": 95, "missed": 5}),
            5,
            1.6,
            id="a missed deadline has lost it all",
        ),
        pytest.param(
            pods(3, STRAINED | {"busy": 0.2}), 0, 1.2, id="small budgets on idle engines are the clients' own"
        ),
        pytest.param(pods(2, IDLE | {"missed": 5}), 0, 0, id="a model that fails is not helped by another replica"),
        pytest.param(
            pods(3, CALM | {"missed": 25, "decode": 1.9}),
            20,
            2.4,
            id="idle engines behind a queue of images are too few",
        ),
        pytest.param(pods(3, CALM | {"decode": 1.4}), 0, 2.1, id="threads that decode are not spared for idle engines"),
        pytest.param(
            pods(1, STRAINED | {"met": 0.1, "accuracy_loss": 0.006}),
            0.6,
            0.8,
            id="less than a request a second weighs less",
        ),
        pytest.param([], None, None, id="where nothing is measured nothing is said"),
        pytest.param(pods(2, STRAINED, "staging"), None, None, id="another namespace is another service"),
        pytest.param(
            [*pods(2, CALM), *pods(2, STRAINED, "staging")], 0, 1, id="the strain of another namespace is not ours"
        ),
    ],
)
def test_scaler_queries_return_the_expected_accuracy_loss_and_engines_wanted(
    series: list[Manifest], accuracy_loss: float | None, engines_wanted: float | None, tmp_path: Path
) -> None:
    expected = {"accuracy-loss": accuracy_loss, "engines-wanted": engines_wanted}
    cases = [
        {
            "expr": f"round({queries()[name]}, 1e-6)",
            "eval_time": "8m",
            "exp_samples": [] if value is None else [{"labels": "{}", "value": value}],
        }
        for name, value in expected.items()
    ]
    test = {"interval": "15s", "input_series": series, "promql_expr_test": cases}
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
