import pytest


@pytest.fixture(autouse=True)
def profile_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep measured latencies out of the user's cache; all tests share them, so that few of them measure."""
    monkeypatch.setenv("SUPERVIT_PROFILE_FOLDER", str(tmp_path_factory.getbasetemp() / "profiles"))
