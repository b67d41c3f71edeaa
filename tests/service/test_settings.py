import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from models.files.sources import find_checkpoint, shipped_names
from service.errors import CommandError
from service.settings import (
    DEFAULT_CHECKPOINT,
    Settings,
    comma_separated,
    named_settings,
    read_settings,
    unknown_variables,
    worker_environment,
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cors_origins", "example.org"),
        ("cors_origins", "https://example.org, https://example.org/page"),
        ("allowed_hosts", "http://example.org"),
        ("allowed_hosts", "example.org, example.org:8000"),
    ],
)
def test_an_origin_or_a_host_name_that_could_never_match_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings.model_validate({name: value})
    Settings(cors_origins="https://example.org, http://localhost:3000, *", allowed_hosts="example.org, localhost")


def test_every_setting_is_also_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "checkpoint": "/models/a.pth",
        "watch_checkpoint": "True",
        "host": "0.0.0.0",
        "port": "80",
        "grpc_port": "82",
        "fd": "3",
        "keep_alive_s": "60",
        "cors_origins": "https://example.org",
        "allowed_hosts": "example.org",
        "keys": "/etc/keys.toml",
        "admin_port": "81",
        "tls_certificate": "/etc/tls.crt",
        "tls_key": "/etc/tls.key",
        "forwarded_allow_ips": "10.0.0.1",
        "max_in_flight_per_address": "8",
        "max_decode_s_per_address": "7.5",
        "max_connections": "9",
        "max_connections_per_address": "7",
        "workers": "2",
        "device": "cuda:1",
        "max_batch_size": "3",
        "max_in_flight": "4",
        "drain_s": "9.5",
        "engine": "torch",
        "precision": "int8",
        "threads": "2",
        "policy": "slackfit",
        "cascades": "True",
        "audit": "False",
        "default_budget_ms": "250.0",
        "max_utilization": "0.6",
        "profile_folder": "/var/cache/profiles",
        "monitor_interval_s": "0.5",
        "decode_threads": "5",
        "max_body_bytes": "6",
        "max_upload_s": "8.5",
        "max_image_pixels": "7",
        "max_decode_bytes": "8",
        "log_level": "error",
        "log_format": "json",
        "log_requests": "True",
    }
    assert set(values) == set(Settings.model_fields)
    for name, value in values.items():
        monkeypatch.setenv(f"SUPERVIT_{name.upper()}", value)
    settings = Settings()
    assert {name: str(getattr(settings, name)) for name in values} == values


def test_the_default_checkpoint_ships_with_the_package() -> None:
    assert Settings().checkpoint == DEFAULT_CHECKPOINT
    assert DEFAULT_CHECKPOINT in shipped_names()
    assert find_checkpoint(DEFAULT_CHECKPOINT).stat().st_size <= 48_000_000


@pytest.mark.parametrize(("name", "value"), [("PORT", "70000"), ("MAX_BATCH_SIZE", "0"), ("LOG_LEVEL", "loud")])
def test_a_setting_outside_its_range_is_rejected(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"SUPERVIT_{name}", value)
    with pytest.raises(ValidationError):
        Settings()


def test_an_environment_variable_outside_its_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERVIT_MAX_BATCH_SIZE", "0")
    with pytest.raises(CommandError, match=r"^SUPERVIT_MAX_BATCH_SIZE: must be at least 1$"):
        read_settings(port=80)
    assert read_settings(port=80, max_batch_size=2).port == 80


def test_every_setting_has_a_description() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_a_setting_of_several_names_is_split_at_its_commas() -> None:
    assert comma_separated(None) is None
    assert comma_separated("") == ()
    assert comma_separated("a.example, b.example,") == ("a.example", "b.example")


def test_an_environment_variable_that_is_no_setting_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERVIT_PORT", "80")
    monkeypatch.setenv("SUPERVIT_MAX_WAITNG", "4")
    monkeypatch.setenv("SUPERVIT_API_KEY", "of the commands that ask a server")
    assert unknown_variables() == ["SUPERVIT_MAX_WAITNG"]


def test_a_worker_gets_the_settings_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERVIT_MAX_BATCH_SIZE", "4")
    given = Settings(workers=3, port=8123, max_utilization=0.5)
    environment = worker_environment(given)
    assert environment["PATH"] == os.environ["PATH"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert Settings() == given.model_copy(update={})


def test_a_setting_that_is_also_an_environment_variable_does_not_count_as_given_explicitly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SUPERVIT_HOST", "0.0.0.0")
    assert named_settings(Settings(host="::", port=80)) == {"port"}


@pytest.mark.parametrize("given", ["tls_certificate", "tls_key"])
def test_a_tls_certificate_and_its_key_must_be_given_together(given: str) -> None:
    with pytest.raises(ValidationError, match="give both or none"):
        Settings(**{given: Path("tls.pem")})  # type: ignore[arg-type] # the field is a path


@pytest.mark.parametrize("ports", [{"port": 81, "admin_port": 81}, {"admin_port": 81, "grpc_port": 81}])
def test_ports_must_differ_unless_they_are_0(ports: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="admin_port and grpc_port must differ"):
        Settings(**ports)  # type: ignore[arg-type] # they are ports
    Settings(port=0, admin_port=0, grpc_port=0)


def test_hosts_and_origins_are_compared_in_lower_case_as_browsers_send_them() -> None:
    settings = Settings(allowed_hosts="Example.org", cors_origins="https://Example.org")
    assert (settings.allowed_hosts, settings.cors_origins) == ("example.org", "https://example.org")
