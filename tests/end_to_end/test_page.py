"""The page at / in a real browser, against a real server: what a user sees and does there."""

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright

from models.checkpoint import Checkpoint, load_checkpoint
from service.access.key_file import make_key
from service.app import create_app
from service.engines.profile_store import extended_profile, nominal_latencies
from service.http.connections import Connections
from service.http.early_rejection import EarlyRejection, RejectingProtocol
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.end_to_end.test_serving import ROOT, SMALL_CHECKPOINT, START_LIMIT_S, free_port

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# In CI, where the suite gates changes, it must not pass by skipping.
pytestmark = pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="Chromium is not installed")
PHOTOGRAPHS = ROOT / "models" / "checkpoints" / "photographs"
HEDGEHOG = PHOTOGRAPHS / "hedgehog.jpg"
TIMEOUT_MS = 15_000
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
# Messages that the browser itself logs for every error response, unreachable server and ended stream.
OF_ANSWERS = re.compile(r"Failed to load resource|net::ERR_")
HAND_OVER = """([kind, name, type, base64]) => {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], name, { type }));
    const event = kind === "paste"
        ? new ClipboardEvent("paste", { clipboardData: dataTransfer, bubbles: true })
        : new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
}"""
WATCH_SHIFTS = """
    window.shifts = [];
    new PerformanceObserver((list) => {
        for (const entry of list.getEntries()) {
            const names = entry.sources.map(({ node }) => node?.id || node?.className || node?.textContent);
            window.shifts.push(`${entry.value.toFixed(5)} ${names}`);
        }
    }).observe({ type: "layout-shift", buffered: true });
"""


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(SMALL_CHECKPOINT)


@contextmanager
def serving(checkpoint: Checkpoint, port: int, keys: Path | None = None) -> Iterator[str]:
    """Serve as `supervit serve` does, but with nominal latencies instead of those of this machine."""
    latencies = nominal_latencies(extended_profile(checkpoint))
    runtime = ServerRuntime(Settings(checkpoint=SMALL_CHECKPOINT, keys=keys), checkpoint, latencies=latencies)
    protocol = partial(RejectingProtocol, connections=Connections(99, 99), early=EarlyRejection(runtime.context))
    app = create_app(runtime, ready_first=True)
    server = uvicorn.Server(uvicorn.Config(app, port=port, http=protocol, ws="none", log_config=None))  # type: ignore[arg-type] # only called
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        runtime.drain()
        server.should_exit = True
        thread.join(START_LIMIT_S)
        assert not thread.is_alive()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def url(checkpoint: Checkpoint) -> Iterator[str]:
    with serving(checkpoint, free_port()) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


class Visit:
    """An open page, the problems in its console, and the URLs that it requests."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:  # noqa: ANN401 - the browser's
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(TIMEOUT_MS)
        self.page = self.context.new_page()
        self.origin = "/".join(url.split("/")[:3])
        self.problems: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.add_init_script(WATCH_SHIFTS)
        self.page.goto(url)

    def close(self) -> None:
        """Close the page, and check that it had no problems and sent no request to another server."""
        self.context.close()
        assert not self.problems
        assert [asked for asked in self.asked if not asked.startswith((self.origin, "blob:", "data:"))] == []

    def forgive_errors(self) -> None:
        """Discard the browser's own messages about error responses, which the test provoked."""
        self.problems = [problem for problem in self.problems if not OF_ANSWERS.search(problem)]

    def _hear(self, message: ConsoleMessage) -> None:
        # The server explains one image at a time, perhaps that of a page already closed, and the page tries again.
        is_busy_explainer = "/explain?" in message.location["url"] and " 429 " in message.text
        if message.type in ("error", "warning") and not is_busy_explainer:
            self.problems.append(message.text)


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Visit]:
    """The page after its first sample is answered and explained."""
    visit = Visit(browser, url)
    answered(visit.page)
    yield visit
    visit.close()


@pytest.fixture
def page(visit: Visit) -> Page:
    return visit.page


def answered(page: Page, name: str = "dalmatian.jpg") -> None:
    """Wait until the page shows the answer and the explanation for this photo."""
    expect(page.locator("#canvas")).to_have_attribute("aria-label", re.compile(f"^{re.escape(name)}.*patches"))
    expect(page.locator("body")).not_to_have_class(re.compile("busy"))


def set_compute(page: Page, share: float) -> None:
    slider = page.locator("#gflops")
    with page.expect_response(lambda response: "/classify" in response.url):
        slider.fill(str(round(share * 200)))
    expect(page.locator("body")).not_to_have_class(re.compile("busy"))


def number(page: Page, selector: str) -> float:
    found = re.search(r"\d+(\.\d+)?", page.locator(selector).inner_text())
    assert found, selector
    return float(found[0])


def test_the_page_classifies_a_sample_before_any_user_input(page: Page) -> None:
    expect(page.locator("#status")).to_have_text(SMALL_CHECKPOINT)
    assert page.locator("#bars li").count() == 5
    shares = [float(text.split()[0]) for text in page.locator("#bars b").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5
    assert page.locator("#reason").inner_text().endswith(".")
    assert page.locator("circle.chosen").count() == 1
    assert number(page, "#total") > 0
    widths = page.locator("#timing i").evaluate_all("all => all.map((each) => each.getBoundingClientRect().width)")
    assert sum(widths) == pytest.approx(page.locator("#timing").bounding_box()["width"], abs=1)  # type: ignore[index] # it is shown


def test_the_page_shows_the_answer_of_the_server_to_a_chosen_photo(page: Page, url: str) -> None:
    page.set_input_files("#file", HEDGEHOG)
    answered(page, HEDGEHOG.name)
    best = httpx.post(f"{url}/classify", content=HEDGEHOG.read_bytes()).json()["predictions"][0]
    expect(page.locator("#bars li").first).to_have_text(f"{best['label']}{100 * best['probability']:.1f} %")
    assert page.locator("#samples [aria-pressed=true]").count() == 0


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_photo_may_be_dropped_or_pasted(page: Page, kind: str) -> None:
    data = page.evaluate(
        """async (path) => btoa(Array.from(new Uint8Array(await (await fetch(path)).arrayBuffer()),
        (byte) => String.fromCharCode(byte)).join(""))""",
        "web/samples/starfish.jpg",
    )
    if kind == "drop":
        page.evaluate(HAND_OVER, ["dragover", "mine.jpg", "image/jpeg", data])
        expect(page.locator("#drop")).to_be_visible()
    page.evaluate(HAND_OVER, [kind, "mine.jpg", "image/jpeg", data])
    answered(page, "mine.jpg")
    expect(page.locator("#drop")).to_be_hidden()


def test_a_large_photo_is_reduced_before_its_upload(page: Page, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.effect_noise((2400, 1200), 90).convert("RGB").save(large)
    with page.expect_request(lambda request: "/classify" in request.url) as asked:
        page.set_input_files("#file", large)
    assert len(asked.value.post_data_buffer or b"") < large.stat().st_size / 4
    answered(page, "large.png")


def test_a_smaller_compute_budget_gets_a_cheaper_sub_network_and_shows_the_reason(page: Page) -> None:
    def place() -> float:
        return float(page.locator("circle.chosen").get_attribute("cx") or "nan")

    most = place()
    set_compute(page, 0.5)
    limit = number(page, "#gflops-value")
    text = page.locator("#chosen").inner_text()
    found = re.search(r"([\d.]+) GFLOPs", text)
    assert found
    assert float(found[1]) <= limit
    assert f"within {limit:g} GFLOPs" in page.locator("#reason").inner_text()
    assert place() < most
    assert page.locator("line.limit").count() == 1
    page.locator("#gflops").press("End")
    expect(page.locator("#gflops-value")).to_have_text("no limit")
    expect(page.locator("line.limit")).to_have_count(0)


def test_a_latency_budget_is_sent_and_shown(page: Page) -> None:
    with page.expect_request(lambda request: "/classify" in request.url) as asked:
        page.locator("#ms").press("ArrowLeft")
    shown = number(page, "#ms-value")
    assert f"budget_ms={shown:g}" in asked.value.url
    assert shown < 1100
    expect(page.locator("#total")).to_contain_text(f"/ {shown:.0f} ms")


def test_pruned_patches_are_dimmed_block_by_block(page: Page, url: str) -> None:
    set_compute(page, 0.0)  # the cheapest sub-network prunes most
    expect(page.locator("#steps input")).to_have_count(4)
    cheapest = httpx.get(f"{url}/subnetworks").json()["subnetworks"][0]
    pinned = {"patch_grid": cheapest["patch_grid"], "keep_rate": cheapest["keep_rate"]}
    photo = (PHOTOGRAPHS / "dalmatian.jpg").read_bytes()
    explanation = httpx.post(f"{url}/explain", params=pinned, content=photo).json()["explanation"]
    total = cheapest["patch_grid"] ** 2

    def patches() -> list[list[int]]:
        """Return the colour of one point in every patch, as drawn."""
        page.wait_for_timeout(400)  # the patches fade
        return list(
            page.locator("#canvas").evaluate(
                """(canvas, [grid, share, ratio]) => {
                    const copy = new OffscreenCanvas(canvas.width, canvas.height);
                    const context = copy.getContext("2d", { willReadFrequently: true });
                    context.drawImage(canvas, 0, 0);
                    const seen = canvas.width * share * ratio;
                    const at = (index) => Math.round((canvas.width - seen) / 2 + (index + 0.3) * seen / grid);
                    return Array.from({ length: grid * grid }, (_, index) => Array.from(
                        context.getImageData(at(index % grid), at(Math.floor(index / grid)), 1, 1).data));
                }""",
                [cheapest["patch_grid"], explanation["seen_share"], shorter_share(page)],
            )
        )

    page.locator("#step-0").check()
    expect(page.locator("#caption")).to_contain_text("Cut into")
    whole = patches()
    for step, pruning in enumerate(explanation["prunings"], start=1):
        page.locator(f"#step-{step}").check()
        expect(page.locator("#caption")).to_contain_text(f"keeps {len(pruning['kept'])} of {total}")
        now = patches()
        unchanged = [index for index in range(total) if now[index] == whole[index]]
        assert set(pruning["kept"]) <= set(unchanged)
        assert len(unchanged) <= len(pruning["kept"]) + 2  # a patch may have the colour of the veil


def shorter_share(page: Page) -> float:
    return float(
        page.evaluate(
            """async () => {
                const photo = await fetch("web/samples/dalmatian.jpg");
                const { width, height } = await createImageBitmap(await photo.blob());
                return Math.min(width, height) / Math.max(width, height);
            }"""
        )
    )


def test_both_looks_of_a_cascaded_answer_are_shown(page: Page) -> None:
    def with_looks(route: Route) -> None:
        answer = route.fetch().json()
        first = {"patch_grid": 5, "keep_rate": 0.5, "confidence": 0.62}
        second = {"patch_grid": 8, "keep_rate": 1.0, "confidence": 0.97}
        route.fulfill(json={**answer, "looks": [first, second]})

    assert page.locator("#looks").inner_text() == ""
    page.route("**/classify*", with_looks)
    set_compute(page, 0.9)
    expect(page.locator("#looks")).to_have_text(
        "Looked twice: grid 5 · keep 0.5, 62 % sure → grid 8 · keep 1, 97 % sure"
    )


def test_every_trained_sub_network_can_be_compared(page: Page, url: str) -> None:
    page.get_by_role("button", name="Run all 12").click()
    expect(page.locator("#compare-note")).to_contain_text("of 12 say")
    rows = [row for row in httpx.get(f"{url}/subnetworks").json()["subnetworks"] if row["is_trained"]]
    cells = page.locator("td.variant")
    assert cells.count() == len(rows) == 12
    photo = (PHOTOGRAPHS / "dalmatian.jpg").read_bytes()
    rates = sorted({row["keep_rate"] for row in rows}, reverse=True)
    grids = sorted({row["patch_grid"] for row in rows})
    for row in (rows[0], rows[-1]):
        pinned = {"patch_grid": row["patch_grid"], "keep_rate": row["keep_rate"]}
        best = httpx.post(f"{url}/classify", params=pinned, content=photo).json()["predictions"][0]
        place = rates.index(row["keep_rate"]) * len(grids) + grids.index(row["patch_grid"])
        assert best["label"] in cells.nth(place).inner_text()
        assert f"{100 * best['probability']:.1f} %" in cells.nth(place).inner_text()
    page.get_by_role("button", name="Umbrella").click()
    expect(cells.first).to_contain_text("\N{EN DASH}")  # the results were of another photo


def test_the_live_panel_shows_the_load_of_a_burst(page: Page) -> None:
    rate = page.locator(".tile", has_text="Requests / s").locator("b")
    page.get_by_role("button", name="Send a burst").click()
    expect(page.locator("#live-note")).to_contain_text(re.compile(r"with \d+ ms each: \d+ in time"))
    expect(rate).to_have_text(re.compile(r"[1-9]\d"))
    expect(page.locator("#mix polygon").first).to_be_attached()
    expect(page.locator("#mix-legend li").first).to_contain_text("%")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send a burst")).to_be_visible()


def test_a_file_that_is_no_image_shows_an_error_until_the_next_photo(visit: Visit, tmp_path: Path) -> None:
    page, bad = visit.page, tmp_path / "notes.jpg"
    bad.write_text("no picture at all")
    page.set_input_files("#file", bad)
    expect(page.get_by_role("alert")).to_contain_text("The server cannot read this image")
    expect(page.locator("#bars")).not_to_contain_text("%")  # of the photo before
    expect(page.locator("#total")).to_be_empty()
    expect(page.locator("circle.chosen")).to_have_count(0)
    page.get_by_role("button", name="Umbrella").click()
    answered(page, "umbrella.jpg")
    expect(page.locator("#toast")).to_be_hidden()
    visit.forgive_errors()


def test_the_page_reports_an_overloaded_server_and_retries(visit: Visit) -> None:
    page = visit.page
    error = {"code": "overloaded", "message": "1024 requests are in the server already", "details": {"reason": "full"}}
    tries = []

    def refuse_once(route: Route) -> None:
        tries.append(route.request.url)
        if len(tries) == 1:
            route.fulfill(status=429, headers={"Retry-After": "1"}, json={"error": error})
        else:
            route.continue_()

    page.route("**/classify*", refuse_once)
    page.get_by_role("button", name="Umbrella").click()
    expect(page.get_by_role("alert")).to_contain_text("The server is overloaded")
    answered(page, "umbrella.jpg")
    expect(page.locator("#toast")).to_be_hidden()
    assert len(tries) == 2
    visit.forgive_errors()


def test_the_page_reports_an_unreachable_server_and_recovers_by_itself(
    browser: Browser, checkpoint: Checkpoint
) -> None:
    port = free_port()
    with serving(checkpoint, port) as url:
        visit = Visit(browser, url)
        answered(visit.page)
    status, alert = visit.page.locator("#status"), visit.page.get_by_role("alert")
    expect(status).to_have_text("offline")
    expect(alert).to_contain_text("The server does not answer")
    with serving(checkpoint, port):
        expect(status).to_have_text(SMALL_CHECKPOINT)
        expect(alert).to_contain_text("Back online")
        visit.page.get_by_role("button", name="Umbrella").click()
        answered(visit.page, "umbrella.jpg")
        visit.forgive_errors()
        visit.close()


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
def test_the_page_has_no_accessibility_violations(browser: Browser, url: str, options: dict[str, Any]) -> None:
    visit = Visit(browser, url, reduced_motion="reduce", **options)
    answered(visit.page)
    expect(visit.page.get_by_text("Take a photo")).to_be_visible(visible=options is PHONE)  # with the camera of a phone
    set_compute(visit.page, 0.0)
    violations = Axe().run(visit.page).response["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in violations] == []
    visit.close()


def test_the_page_can_be_used_with_the_keyboard_alone(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the photo")).to_be_focused()
    page.keyboard.press("Enter")
    set_compute(page, 0.0)
    page.locator("#steps input").last.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#step-2")).to_be_focused()
    expect(page.locator("#step-2")).to_be_checked()
    page.get_by_role("button", name="Umbrella").focus()
    page.keyboard.press("Enter")
    answered(page, "umbrella.jpg")
    assert page.locator("#gflops").get_attribute("aria-valuetext") == page.locator("#gflops-value").inner_text()


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desktop", "phone"])
def test_the_layout_neither_shifts_when_answers_arrive_nor_overflows_the_width(
    browser: Browser, url: str, options: dict[str, Any]
) -> None:
    visit = Visit(browser, url, **options)
    page = visit.page
    answered(page)
    set_compute(page, 0.0)
    set_compute(page, 0.6)
    page.evaluate("document.getElementById('compare').click()")
    expect(page.locator("#compare-note")).to_contain_text("of 12 say")
    page.evaluate("document.querySelector('[data-name=umbrella]').click()")
    answered(page, "umbrella.jpg")
    page.wait_for_timeout(1200)  # longer than the 1 s between two events of the server
    assert page.evaluate("window.shifts") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("innerWidth")
    visit.close()


def test_the_api_documentation_loads_nothing_from_other_servers(browser: Browser, url: str) -> None:
    visit = Visit(browser, f"{url}/docs")
    visit.page.get_by_text("/explain").first.wait_for()
    visit.close()


def test_the_page_asks_for_an_api_key_once_and_remembers_it(
    browser: Browser, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    made = make_key("page")
    (tmp_path / "keys.toml").write_text(made.entry)
    with serving(checkpoint, free_port(), tmp_path / "keys.toml") as url:
        visit = Visit(browser, url)
        page, dialog = visit.page, visit.page.get_by_role("dialog")
        expect(dialog).to_contain_text("requires an API key")
        assert Axe().run(page).violations_count == 0
        dialog.get_by_label("API key").fill("another one")
        dialog.get_by_role("button", name="Use key").click()
        expect(dialog).to_be_visible()  # the key was wrong
        dialog.get_by_label("API key").fill(made.secret)
        page.keyboard.press("Enter")
        answered(page)
        expect(dialog).not_to_be_visible()
        page.locator("#compare").click()
        expect(page.locator("#compare-note")).to_contain_text("of 12 say")
        expect(dialog).not_to_be_visible()
        page.reload()
        answered(page)
        expect(dialog).not_to_be_visible()
        visit.forgive_errors()
        visit.close()


def test_the_page_says_that_an_api_key_is_required_if_none_is_given(
    browser: Browser, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "keys.toml").write_text(make_key("page").entry)
    with serving(checkpoint, free_port(), tmp_path / "keys.toml") as url:
        visit = Visit(browser, url)
        visit.page.get_by_role("button", name="Continue without").click()
        expect(visit.page.get_by_role("alert")).to_contain_text("The server requires an API key")
        visit.forgive_errors()
        visit.close()
