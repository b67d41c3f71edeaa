import re

import pytest
from fastapi.testclient import TestClient

from service.http.pages import SAMPLES, WEB
from tests.service.http.scripted_server import error_code

MAX_PAGE_BYTES = 100_000  # for the files of the page, and again for the samples
ASSETS = sorted(path.name for path in WEB.iterdir())


def test_the_page_and_all_that_it_loads_are_small() -> None:
    assert {"index.html", "app.js", "style.css"} <= set(ASSETS)
    assert sum((WEB / name).stat().st_size for name in ASSETS) < MAX_PAGE_BYTES
    assert sum(path.stat().st_size for path in SAMPLES.iterdir()) < MAX_PAGE_BYTES


def test_the_page_and_every_file_that_it_references_are_served(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["Content-Type"].startswith("text/html")
    named = {target for target in re.findall(r'(?:src|href)="([^"#]+)"', page.text) if not target.startswith("http")}
    assert {"web/app.js", "web/style.css", "web/samples/dalmatian.jpg", "docs", "metrics"} <= named
    assert 'accept="image/*" capture="environment"' in page.text  # opens the camera of a phone
    for target in named:
        assert client.get(f"/{target}").status_code == 200, target
    imported = {name for path in WEB.glob("*.js") for name in re.findall(r'from "\./([^"]+)"', path.read_text())}
    assert imported
    assert imported <= set(ASSETS)


def test_the_page_uses_relative_urls_and_works_behind_a_proxy_at_any_path() -> None:
    for path in WEB.glob("*.*"):
        assert not re.findall(r"""(?:src=|href=|fetch\(|ask\(|from |EventSource\()["'`]/""", path.read_text()), path


@pytest.mark.parametrize("path", ["/", "/docs", "/web/app.js", "/web/samples/dalmatian.jpg"])
def test_files_have_a_strict_content_security_policy(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(rule.strip().split(" ", 1) for rule in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"


def test_an_unchanged_file_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/web/app.js")
    assert first.headers["Cache-Control"] == "no-cache"
    again = client.get("/web/app.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/web/samples/dalmatian.jpg").headers["Cache-Control"] == "max-age=86400"


def test_unknown_files_and_methods_get_errors_in_the_usual_format(client: TestClient) -> None:
    assert error_code(client.get("/web/nothing.js"), 404) == "not_found"
    assert error_code(client.get("/web/%2e%2e/app.py"), 404) == "not_found"
    assert error_code(client.post("/"), 405) == "method_not_allowed"


def test_the_documentation_page_loads_everything_from_this_server(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "http" not in page.replace("http-equiv", "")
    assert client.get("/web/docs/swagger-ui-bundle.js").status_code == 200
    assert "openapi.json" in client.get("/web/docs.js").text
