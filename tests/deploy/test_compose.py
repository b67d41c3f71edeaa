"""The Compose file agrees with the Compose specification, the repository and the server's settings."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings, unknown_variables

Services = dict[str, dict[str, Any]]

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
SERVER_BYTES, BYTES_PER_PIXEL = 1_850_000_000, 16  # of the server itself, and of a WebP while it is decoded
BELONG_TO_THE_IMAGE = {"host", "port", "fd", "profile_folder"}  # or published ports and volumes would lead nowhere


def interpolated(**variables: str) -> dict[str, Any]:
    """Read the file as Compose does, with these variables set and no others."""

    def replace(match: re.Match[str]) -> str:
        name, operator, word = match.groups()
        value = variables.get(name, "")
        return {":-": value or word, ":+": word if value else ""}[operator]

    def walk(node: object) -> object:
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        return re.sub(r"\$\{(\w+)(:[-+])([^}]*)\}", replace, node) if isinstance(node, str) else node

    read = walk(yaml.safe_load(TEXT))
    assert isinstance(read, dict)
    assert "${" not in str(read)
    return read


def services(**variables: str) -> Services:
    found: Services = interpolated(**variables)["services"]
    return found


def complaints(text: str, folder: Path) -> str:
    """Return the violations of the Compose specification in a file; an empty string if it is valid."""
    path = folder / "docker-compose.yml"
    path.write_text(text)
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


def mounts() -> list[dict[str, Any]]:
    """Return all mounts of folders of this machine."""
    return [mount for service in services().values() for mount in service["volumes"] if isinstance(mount, dict)]


def seen_at(service: str, path: str) -> Path:
    """Return the file of the repository that a service sees at a path."""
    for mount in services()[service]["volumes"]:
        if isinstance(mount, dict) and path.startswith(f"{mount['target']}/"):
            return ROOT.joinpath(mount["source"], path.removeprefix(f"{mount['target']}/"))
    raise AssertionError(f"{path} is in none of the folders of {service}")


def test_the_file_is_valid_by_the_compose_specification(tmp_path: Path) -> None:
    assert complaints(TEXT, tmp_path) == ""


@pytest.mark.parametrize(
    ("sound", "broken"),
    [
        ("    ports:", "    port:"),
        ("condition: service_healthy", "condition: healthy"),
        ("cap_drop: [ALL]", "cap_drop: ALL"),
        ("      retries: 3", "      tries: 3"),
    ],
)
def test_a_mistake_in_the_file_is_found(sound: str, broken: str, tmp_path: Path) -> None:
    assert sound in TEXT
    assert complaints(TEXT.replace(sound, broken, 1), tmp_path) != ""


def test_every_image_has_a_version_and_the_server_image_has_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    images = {name: service["image"] for name, service in services().items()}
    assert images.pop("supervit") == f"{project['name']}:{project['version']}"
    assert images.keys() == {"prometheus", "grafana"}
    for image in images.values():
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", image)


def test_the_default_pytorch_build_is_that_of_the_dockerfile() -> None:
    arguments = services()["supervit"]["build"]["args"]
    assert [f"ARG {name}={value}" for name, value in arguments.items()] == re.findall(
        r"^ARG .*", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    assert services(TORCH_INDEX="another")["supervit"]["build"]["args"] == {"TORCH_INDEX": "another"}


def test_every_port_is_bound_to_localhost_by_default() -> None:
    for service in services().values():
        for port in service["ports"]:
            assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)
    http, grpc = services(SERVER_ADDRESS="0.0.0.0:80", GRPC_ADDRESS="0.0.0.0:81")["supervit"]["ports"]
    assert (http, grpc) == ("0.0.0.0:80:8000", "0.0.0.0:81:8001")


def test_every_setting_of_the_server_can_be_set_except_those_that_the_image_fixes() -> None:
    variables = {name for name in services()["supervit"]["environment"] if not name.startswith("OTEL_")}
    names = {name.removeprefix("SUPERVIT_").lower() for name in variables}
    assert names == set(Settings.model_fields) - BELONG_TO_THE_IMAGE
    told = services(SUPERVIT_MAX_IN_FLIGHT="7")["supervit"]["environment"]
    assert told["SUPERVIT_MAX_IN_FLIGHT"] == "7"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that the server reads from its environment, in which a variable without a value is not set."""
    for name, value in services()["supervit"]["environment"].items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    assert unknown_variables() == []
    return Settings()


def test_probes_and_scrapes_have_connections_while_all_requests_are_being_answered(settings: Settings) -> None:
    assert settings.max_in_flight <= 0.75 * settings.max_connections


def test_the_memory_limit_covers_the_most_that_clients_can_make_the_server_hold(settings: Settings) -> None:
    limit = re.fullmatch(r"(\d+)g", services()["supervit"]["deploy"]["resources"]["limits"]["memory"])
    assert limit
    decoding = settings.decode_threads * settings.max_image_pixels * BYTES_PER_PIXEL
    bodies = settings.max_connections * settings.max_body_bytes
    assert SERVER_BYTES + decoding + bodies < int(limit[1]) * 2**30


def test_the_memory_limit_can_be_raised_for_more_workers() -> None:
    resources = services(SERVER_MEMORY="12g")["supervit"]["deploy"]["resources"]
    assert resources["limits"]["memory"] == "12g"


def test_the_stop_grace_period_is_longer_than_the_drain(settings: Settings) -> None:
    grace_s = re.fullmatch(r"(\d+)s", services()["supervit"]["stop_grace_period"])
    assert grace_s
    assert int(grace_s[1]) >= settings.drain_s + 10


@pytest.mark.parametrize("name", services())
def test_every_service_is_read_only_unprivileged_and_limited(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["logging"] == {"driver": "local"}
    assert service["deploy"]["resources"]["limits"].keys() >= {"memory", "pids"}
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "user"}


def test_every_mounted_folder_exists_and_is_read_only() -> None:
    assert {mount["source"] for mount in mounts()} == {
        "./models/checkpoints",
        "./deploy/prometheus",
        "./deploy/grafana/provisioning",
        "./deploy/grafana/dashboards",
    }
    for mount in mounts():
        assert (ROOT / mount["source"]).is_dir(), mount["source"]
        assert mount["read_only"] is True
        assert mount["bind"] == {"create_host_path": False}


def test_all_persistent_data_has_a_volume() -> None:
    kept = {
        mount.partition(":")[0]
        for service in services().values()
        for mount in service["volumes"]
        if isinstance(mount, str)
    }
    assert kept == set(interpolated()["volumes"]) == {"profiles", "prometheus-data", "grafana-data"}
    folder = re.search(r"SUPERVIT_PROFILE_FOLDER=(\S+)", (ROOT / "Dockerfile").read_text())
    assert folder
    assert f"profiles:{folder[1]}" in services()["supervit"]["volumes"]


def test_a_service_that_others_wait_for_to_be_healthy_has_a_health_check() -> None:
    waits = {
        (name, other, rule["condition"])
        for name, service in services().items()
        for other, rule in service.get("depends_on", {}).items()
    }
    assert waits == {("prometheus", "supervit", "service_started"), ("grafana", "prometheus", "service_healthy")}
    assert "healthcheck" in services()["prometheus"]
    assert "healthcheck" not in services()["supervit"]  # the image has one


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_a_health_check_requests_the_published_port(name: str) -> None:
    service = services()[name]
    (port,) = service["ports"]
    assert service["healthcheck"]["test"][-1].startswith(f"http://127.0.0.1:{port.rpartition(':')[2]}/")


def test_prometheus_finds_its_configuration_its_rules_and_the_server() -> None:
    (path,) = (word.partition("=")[2] for word in services()["prometheus"]["command"] if "config.file" in word)
    configuration = yaml.safe_load(seen_at("prometheus", path).read_text())
    for rules in configuration["rule_files"]:
        assert (seen_at("prometheus", path).parent / rules).is_file()
    port = Settings.model_fields["port"].default
    (job,) = (job for job in configuration["scrape_configs"] if job["job_name"] == "supervit")
    assert job.get("metrics_path", "/metrics") == "/metrics"
    assert job["static_configs"][0]["targets"] == [f"supervit:{port}"]


def test_grafana_finds_prometheus_its_dashboards_and_its_home_dashboard() -> None:
    provisioning = seen_at("grafana", "/etc/grafana/provisioning/datasources")
    (source,) = (
        each for path in provisioning.glob("*.yml") for each in yaml.safe_load(path.read_text())["datasources"]
    )
    assert source["url"] == "http://prometheus:9090"
    provisioning = seen_at("grafana", "/etc/grafana/provisioning/dashboards")
    (provider,) = (
        each for path in provisioning.glob("*.yml") for each in yaml.safe_load(path.read_text())["providers"]
    )
    home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert seen_at("grafana", home).is_file()
    assert home.rpartition("/")[0] == provider["options"]["path"]


def grafana_setting(section: str, key: str, **variables: str) -> str:
    """Return the value that Grafana uses: a variable that is not empty, or else the default from its command line."""
    grafana = services(**variables)["grafana"]
    name = f"GF_{section.upper().replace('.', '_')}_{key.upper()}"
    defaults = dict(word.removeprefix("cfg:default.").split("=") for word in grafana["command"])
    return str(grafana["environment"].get(name) or defaults.get(f"{section}.{key}", ""))


def test_without_a_password_grafana_has_no_account_and_anonymous_viewers() -> None:
    assert grafana_setting("security", "disable_initial_admin_creation") == "true"
    assert grafana_setting("auth.anonymous", "enabled") == "true"
    assert grafana_setting("auth.anonymous", "org_role") == "Viewer"


def test_with_a_password_grafana_has_one_account_and_no_anonymous_access() -> None:
    given = {"GRAFANA_ADMIN_PASSWORD": "Oooh, a secret"}
    assert grafana_setting("security", "disable_initial_admin_creation", **given) == "false"
    assert grafana_setting("security", "admin_password", **given) == "Oooh, a secret"
    assert grafana_setting("auth.anonymous", "enabled", **given) == "false"


def test_every_variable_is_explained_at_the_top_of_the_file() -> None:
    head, _, body = TEXT.partition("\nname:")
    used = {name for name in re.findall(r"\$\{(\w+)", body) if not name.startswith("SUPERVIT_")}
    assert used <= set(re.findall(r"[A-Z_]+", head))
