"""The dashboard that ships is the one that its builder builds, and Grafana provisions it without manual steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana import dashboard as builder

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"


@pytest.fixture
def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "supervit.json").read_text())
    return read


def test_the_dashboard_is_what_its_builder_builds(dashboard: dict[str, Any]) -> None:
    assert json.loads(JSONEncoder().encode(builder.build().build())) == dashboard


def test_every_panel_has_a_title_a_unit_and_a_description_and_overlaps_no_other(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"].endswith(".")
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert all(target["legendFormat"] for target in panel["targets"])


def test_the_rows_are_service_level_adaptation_load_and_machine(dashboard: dict[str, Any]) -> None:
    rows = [panel["title"].split(":")[0] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == ["Service level", "Adaptation", "Load", "Machine"]


def test_panels_use_the_provisioned_data_source_and_dashboards_are_loaded_from_their_folder(
    dashboard: dict[str, Any],
) -> None:
    source, *others = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert not others
    asked = [panel["datasource"] for panel in dashboard["panels"] if panel["type"] != "row"]
    asked += [catalog["datasource"] for catalog in dashboard["templating"]["list"]]
    assert all(one == {"type": source["type"], "uid": source["uid"]} for one in asked)
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "supervit.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
