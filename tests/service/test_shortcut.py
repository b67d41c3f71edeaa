import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient

from service.shortcut import Shortcut


async def take(request: Request) -> Response:
    return Response(b"short " + await request.body(), 201, {"Taken": "yes"})


@pytest.fixture
def client() -> TestClient:
    """An app with a route of its own at the path that the shortcut takes, and at another."""
    app = FastAPI()

    @app.api_route("/here", methods=["GET", "PUT", "OPTIONS", "POST"])
    @app.post("/there")
    async def other() -> str:
        return "long"

    app.add_middleware(Shortcut, path="/here", handle=take)
    return TestClient(app)


def test_a_post_on_the_path_is_answered_by_the_handler_alone(client: TestClient) -> None:
    answer = client.post("/here?who=me", content=b"bytes")
    assert (answer.status_code, answer.content, answer.headers["Taken"]) == (201, b"short bytes", "yes")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/here"), ("PUT", "/here"), ("OPTIONS", "/here"), ("POST", "/there")]
)
def test_everything_else_goes_to_the_app(client: TestClient, method: str, path: str) -> None:
    assert client.request(method, path).json() == "long"


@pytest.mark.parametrize("path", ["/here/", "/here/more", "/HERE"])
def test_a_path_that_only_looks_like_it_goes_to_the_app(client: TestClient, path: str) -> None:
    assert client.post(path, follow_redirects=False).status_code in (307, 404)
