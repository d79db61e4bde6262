"""The WebGPU target in headless Chromium with its software adapter: `pytest -m webgpu`.

Needs `apt install chromium` and `pip install playwright`. With MOQC_SCREENSHOT=FILE the page is photographed.
Chromium's adapter has no 16-bit floats: those are tested in Node (docs/targets.md says what it takes).
"""

import json
import os
import shutil
import subprocess
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import moqc
from moqc.errors import TargetError

pytestmark = pytest.mark.webgpu
FLAGS = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--use-vulkan=swiftshader",
    "--no-sandbox",
)
PROMPT = "The history of the city begins"
LOGITS = """async (parts) => {
  moqc.model.reset();
  const found = [];
  for (const part of parts) {
    for (const value of await moqc.model.extend(part, true)) found.push(value);
  }
  moqc.model.reset();
  return found;
}"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a log."""

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def served(folder):
    """The address of a server of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """tiny-moe for this CPU and for browsers; the same plan, so the same weights."""
    folder = tmp_path_factory.mktemp("webgpu")
    for target in ("native", "webgpu"):
        moqc.compile(
            "examples/models/tiny-moe", folder / target, target=target, activations="float", max_batch=1,
            bits=3.0, allocator="uniform", calibration_tokens=2048, cache=folder / "cache",
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def page(artifacts):
    """The artifact's page, loaded in Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium: `apt install chromium`")
    with served(artifacts / "webgpu") as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        found = browser.new_page()
        found.goto(f"{address}/")
        found.wait_for_function("window.moqc || document.querySelector('#status.error')", timeout=600_000)
        assert found.inner_text("#status") == "ready"
        yield found
        browser.close()


@pytest.mark.parametrize("step", [1, 3, 20])
def test_logits_agree_with_the_cpu(artifacts, page, step):
    ids = np.random.default_rng(0).integers(2, 16_000, 20).tolist()
    expected = moqc.load(artifacts / "native").forward(ids)
    parts = [ids[at : at + step] for at in range(0, len(ids), step)]
    found = np.array(page.evaluate(LOGITS, parts)).reshape(expected.shape)
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)


def test_the_demo_writes_the_text_that_python_writes(artifacts, page):
    page.fill("#prompt", PROMPT)
    page.fill("#tokens", "24")
    page.click("#run")
    page.wait_for_function("!document.querySelector('#run').disabled", timeout=600_000)
    expected = PROMPT + moqc.load(artifacts / "native").generate(PROMPT, max_tokens=24)
    assert page.inner_text("#text") == expected
    if "MOQC_SCREENSHOT" in os.environ:
        page.screenshot(path=os.environ["MOQC_SCREENSHOT"])


@pytest.mark.parametrize(
    "text",
    [
        "It's I'LL we've 12345  \n\n  x\ttab é ünïcode 日本語 🙂🙂 <|endoftext|> foo  ",
        "def f(x):\n    return x**2\n",
        " a",
    ],
)
def test_the_pages_tokenizer_is_the_models(artifacts, page, text):
    tokenizer = moqc.load(artifacts / "native").tokenizer
    ids = page.evaluate("text => moqc.tokenizer.encode(text)", text)
    assert ids == tokenizer.encode(text)
    assert page.evaluate("ids => moqc.tokenizer.decode(ids)", ids) == tokenizer.decode(ids)


def test_in_16_bits_the_pages_model_says_what_the_cpu_says(artifacts):
    """On an adapter with shader-f16: Mesa's lavapipe, through Dawn in Node."""
    packages = os.environ.get("MOQC_NODE")
    if packages is None:
        pytest.skip("MOQC_NODE is no folder with `npm install webgpu`")
    ids = np.random.default_rng(0).integers(2, 16_000, 20).tolist()
    cpu = moqc.load(artifacts / "native")
    job = {"parts": [ids[:12], *([each] for each in ids[12:])], "prompt": cpu.encode(PROMPT), "tokens": 24}
    program = Path(__file__).parent / "support" / "model_in_node.mjs"
    with served(artifacts / "webgpu") as address:
        command = ["node", program, address, Path(packages).resolve(), json.dumps(job)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert found["precision"] == "float16"
    expected = cpu.forward(ids)
    error = np.array(found["logits"]).reshape(expected.shape) - expected
    assert np.linalg.norm(error) < 2e-2 * np.linalg.norm(expected)
    assert cpu.tokenizer.decode(found["ids"]) == cpu.generate(PROMPT, max_tokens=24)


def test_python_says_how_to_open_it(artifacts):
    with pytest.raises(TargetError, match=r"page for browsers: `python -m http\.server"):
        moqc.load(artifacts / "webgpu")
