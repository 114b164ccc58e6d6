"""docs/page.png: the page of `mixtral serve`, with an answer of the bundled model. Needs chromium-driver, pillow."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "server")]  # the browser and the server of the tests

from PIL import Image  # noqa: E402

import mixtral  # noqa: E402
from browser import Page, browser, resize  # noqa: E402
from running import DEMO, served  # noqa: E402


def main(out: Path, dark: bool = False, width: int = 1100, height: int = 640) -> None:
    model = mixtral.Mixtral.from_pretrained(DEMO)
    with served(model, served_model_name="demo") as url, browser() as driver:
        resize(driver, width, height, dark)
        page = Page(driver, url)
        page.set("#seed", 4)
        page.set("#max_tokens", 150)
        page.set("#layer", 3)
        page.send("And it came to pass in those days, that the king of")
        page.run("document.activeElement.blur()")
        page.run("showTip(document.querySelectorAll('.token')[36])")
        driver.save_screenshot(str(out))
    Image.open(out).convert("RGB").quantize(128).save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "page.png")
