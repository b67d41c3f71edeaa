import re

import pytest
from fastapi.testclient import TestClient

from service.http.pages import SAMPLES, WEB
from tests.service.http.scripted_server import error_code

MAX_PAGE_BYTES = 100_000  # without the samples
ASSETS = sorted(path.name for path in WEB.iterdir())


def test_the_page_and_all_that_it_loads_are_small() -> None:
    assert {"index.html", "app.js", "style.css"} <= set(ASSETS)
    assert sum((WEB / name).stat().st_size for name in ASSETS) < MAX_PAGE_BYTES
    assert sum(path.stat().st_size for path in SAMPLES.iterdir()) < MAX_PAGE_BYTES


def test_the_page_is_served_and_so_is_whatever_it_names(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["Content-Type"].startswith("text/html")
    named = {target for target in re.findall(r'(?:src|href)="([^"#]+)"', page.text) if not target.startswith("http")}
    assert {"web/app.js", "web/style.css", "web/samples/dalmatian.jpg", "docs", "metrics"} <= named
    assert 'accept="image/*" capture="environment"' in page.text  # a telephone opens its camera
    for target in named:
        assert client.get(f"/{target}").status_code == 200, target
    imported = {name for path in WEB.glob("*.js") for name in re.findall(r'from "\./([^"]+)"', path.read_text())}
    assert imported
    assert imported <= set(ASSETS)


def test_the_page_asks_for_its_parts_beside_itself_so_that_a_proxy_may_put_it_anywhere() -> None:
    for path in WEB.glob("*.*"):
        assert not re.findall(r"""(?:src=|href=|fetch\(|ask\(|from |EventSource\()["'`]/""", path.read_text()), path


@pytest.mark.parametrize("path", ["/", "/docs", "/web/app.js", "/web/samples/dalmatian.jpg"])
def test_files_may_do_no_more_than_they_must(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(rule.strip().split(" ", 1) for rule in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"


def test_a_file_that_is_still_the_same_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/web/app.js")
    assert first.headers["Cache-Control"] == "no-cache"
    again = client.get("/web/app.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/web/samples/dalmatian.jpg").headers["Cache-Control"] == "max-age=86400"


def test_what_is_not_there_is_an_error_of_the_one_shape(client: TestClient) -> None:
    assert error_code(client.get("/web/nothing.js"), 404) == "not_found"
    assert error_code(client.get("/web/%2e%2e/app.py"), 404) == "not_found"
    assert error_code(client.post("/"), 405) == "method_not_allowed"


def test_the_documentation_comes_from_this_server(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "http" not in page.replace("http-equiv", "")
    assert client.get("/web/docs/swagger-ui-bundle.js").status_code == 200
    assert "openapi.json" in client.get("/web/docs.js").text
