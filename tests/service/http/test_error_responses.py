import pytest
from fastapi.testclient import TestClient


@pytest.fixture
def problem(client: TestClient) -> dict[str, object]:
    answer: dict[str, object] = client.post("/classify", content=b"no image").json()
    return answer


def test_an_error_is_an_rfc_9457_problem_that_also_holds_the_older_error_object(problem: dict[str, object]) -> None:
    error = problem.pop("error")
    assert isinstance(error, dict)
    assert set(error) == {"code", "message", "details"}
    assert problem == {
        "type": "urn:supervit:error:invalid_image",
        "title": "Invalid image",
        "status": 422,
        "detail": error["message"],
    }


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, "application/problem+json"),
        ("*/*", "application/problem+json"),
        ("application/json, */*;q=0.1", "application/problem+json"),
        ("application/json, application/problem+json", "application/problem+json"),
        ("text/html", "application/problem+json"),
        ("application/json", "application/json"),
        ("application/json;q=0.9, text/html", "application/json"),
    ],
)
def test_errors_are_typed_problem_json_unless_the_client_accepts_only_plain_json(
    client: TestClient, accept: str | None, media_type: str
) -> None:
    del client.headers["Accept"]
    headers = {} if accept is None else {"Accept": accept}
    answers = [
        client.post("/classify", content=b"no image", headers=headers),
        client.post("/decide?top_k=1", headers=headers),
        client.post("/nowhere", headers=headers),
        client.post("/classify", headers={**headers, "Origin": "http://evil.example"}),
    ]
    assert [answer.status_code for answer in answers] == [422, 422, 404, 403]
    assert {answer.headers["Content-Type"] for answer in answers} == {media_type}


def test_a_successful_answer_is_plain_json(client: TestClient, photo: bytes) -> None:
    assert client.post("/classify", content=photo).headers["Content-Type"] == "application/json"
