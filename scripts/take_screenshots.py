"""Take the pictures of the page: docs/images/page-*.png.

A server is started, runs with made-up losses are trained on it, and a headless Chromium looks at
them. Times and ids differ from one call to the next, so the files do too.

    python -m scripts.take_screenshots [--out FOLDER]
"""

import argparse
import io
import math
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from tests.e2e.harness import serve
from tests.web.browser import Browser, start_chromium
from tests.web.made_up_runs import Trainer, falling, noisy, train_eventful

FOLDER = Path(__file__).resolve().parents[1] / "docs/images"

RUN = "gpt-7b-pretrain"

DESKTOP, PHONE = (1280, 1000), (390, 844)


def train_others(address: str) -> None:
    """Train the runs that the list shows beside the eventful one."""
    cosine = {"peak": 2e-4, "min": 2e-5, "warmup": 500, "decay": {"style": "cosine"}}
    plain: dict[str, Any] = {"total": 20_000, "learning_rate": cosine, "weight_decay": 0.1}
    plain["feedback"] = {"delay": 128}

    def train(name: str, end: int, best: float, **fields: Any) -> Trainer:
        job = Trainer(address, plain | {"name": name} | fields)
        job.open()
        job.train(0, end, noisy(falling(best, 700.0), 0.04))
        return job

    train("llama-1b-ablation-a", 6000, 2.4)
    job = train("llama-1b-ablation-b", 5000, 2.45)
    job.adjust(hold=True, reason="wait for the new data")
    job.train(5000, 5300, noisy(falling(2.45, 700.0), 0.04))
    train("vit-large", 4000, 1.2, total=4000).finish()
    job = train("whisper-small", 3000, 0.8)
    job.train(3000, 3010, lambda _: math.nan)
    Trainer(address, plain | {"name": "mixtral-finetune"})


def picture(browser: Browser, height: int, scale: float = 1.0) -> Image.Image:
    """Return the first `height` pixels of the page; `scale`: pixels for one of them."""
    # No element has the focus or the pointer.
    browser.run_script("document.activeElement.blur(); scrollTo(0, 0)")
    width = browser.run_script("return innerWidth")
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.wait(
        lambda: browser.run_script(
            "return innerHeight === arguments[0] && devicePixelRatio === arguments[1]",
            height,
            scale,
        ),
        "the new size",
    )
    # Two frames: one in which sizes are noticed, one in which all is drawn with them.
    browser.driver.execute_async_script(
        "const done = arguments[0];"
        "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 300)))"
    )
    return Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")


def save(image: Image.Image, path: Path) -> None:
    """Write it with a palette: a third of the bytes, and nobody sees it."""
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path} {image.width} x {image.height}, {path.stat().st_size:,} bytes")


def bottom(browser: Browser, css: str) -> int:
    """Return where an element ends, in pixels from the top of the page."""
    script = "return document.querySelector(arguments[0]).getBoundingClientRect().bottom + scrollY"
    found: float = browser.run_script(script, css)
    return math.ceil(found)


def take(browser: Browser, address: str, folder: Path) -> None:
    """Take all pictures of the server at `address`."""

    def open_run(size: tuple[int, int], theme: str) -> None:
        browser.resize(size)
        browser.prefer(theme)
        browser.open(f"{address}/runs/{RUN}")
        browser.wait_for(".chart .legend", "what if")
        browser.wait_for("#connection", "live")

    for theme in ("light", "dark"):
        open_run(DESKTOP, theme)
        whole = picture(browser, bottom(browser, ".figures") + 16)
        save(whole, folder / f"page-run-{theme}.png")
    open_run(DESKTOP, "light")
    save(dry_run(browser), folder / "page-dry-run.png")
    open_run(PHONE, "light")
    save(picture(browser, bottom(browser, ".figures") + 12, 1.5), folder / "page-run-phone.png")
    browser.resize(DESKTOP)
    browser.prefer("light")
    browser.open(address)
    browser.wait_for(".runs tbody tr", RUN)
    browser.wait_for("#connection", "live")
    save(picture(browser, bottom(browser, ".runs") + 48), folder / "page-runs.png")


def dry_run(browser: Browser) -> Image.Image:
    """Return the dialog of an anneal that is shown before it is confirmed."""
    browser.click("[data-role=adjust]")
    browser.choose("dialog select", "begin_decay")
    browser.fill("dialog [name=length]", "8000")
    browser.fill("dialog textarea", "the loss has stopped falling")
    browser.fill("dialog [id$=-author]", "operator")
    browser.click("dialog [type=submit]")
    browser.wait_for("dialog .values", "→")
    shown = picture(browser, 1400)
    edges = browser.run_script(
        "const box = document.querySelector('dialog').getBoundingClientRect();"
        "return [box.left - 24, box.top - 24, box.right + 24, box.bottom + 24]"
    )
    return shown.crop(tuple(map(round, edges)))


def main() -> None:
    """Take them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data:
        program = serve(Path(data) / "data")
        driver = start_chromium()
        try:
            train_others(program.grpc)
            with train_eventful(program.grpc, RUN):
                take(Browser(driver), f"http://{program.http}", folder)
        finally:
            driver.quit()
            program.dispose()


if __name__ == "__main__":
    main()
