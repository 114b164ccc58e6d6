"""The page in a browser, in front of a real server and the bundled model."""

import base64
import os
import signal
import sys

import pytest
from selenium.webdriver import ActionChains

import mixtral
from browser import Page, browser
from processes import ServerProcess
from running import DEMO, served

PROMPT = "In the beginning"


@pytest.fixture(scope="module")
def model():
    return mixtral.Mixtral.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def url(model):
    with served(model, served_model_name="demo") as url:
        yield url


@pytest.fixture(scope="module")
def driver():
    with browser() as driver:
        yield driver


@pytest.fixture
def page(driver, url):
    page = Page(driver, url)
    page.set("#temperature", 0)
    yield page
    assert page.complaints() == []


def test_tokens_have_the_experts_of_a_trace(page, model):
    page.set("#max_tokens", 24)
    page.send(PROMPT)
    expected = model.generate(PROMPT, max_tokens=24, temperature=0, return_routed_experts=True)[0]
    assert page.text(".answer") == expected.text
    prompt = len(expected.prompt_token_ids)
    answer = expected.routed_experts[prompt:]
    weights = model.trace([*expected.prompt_token_ids, *expected.token_ids[:-1]]).topk_weights[prompt:]
    shown = page.all(".token")
    assert len(shown) == len(answer) == 23
    colour_of = {}
    for layer in (0, model.config.num_layers - 1):
        page.set("#layer", layer)
        for expert, colour in zip(
            answer[:, layer, 0].tolist(), page.each(".token", "getComputedStyle(e).backgroundColor"), strict=True
        ):
            assert colour_of.setdefault(expert, colour) == colour  # one colour an expert, in all layers
        chosen = [(answer[:, layer] == expert).any(1).float().mean().item() for expert in range(len(page.all(".bar")))]
        shares = page.each("#experts button > span:last-child", "e.textContent")
        assert shares == [f"{100 * share:.0f} %" for share in chosen]
        ActionChains(page.driver).move_to_element(shown[5]).perform()
        lines = page.text("#tip").split("\n")[1:]
        pairs = zip(answer[5, layer].tolist(), weights[5, layer].tolist(), strict=True)
        assert lines == [f"expert {expert}: {weight:.3f}" for expert, weight in pairs]
    assert len(set(colour_of.values())) == len(colour_of) > 2


def test_another_k_gives_other_experts(page):
    page.set("#max_tokens", 8)
    page.set("#experts_per_token", 1)
    page.send(PROMPT)
    assert set(page.each(".token", "e.experts[0].length")) == {1}


def test_chat_streams_and_goes_on(page):
    page.one("input[value=chat]").click()
    page.set("#max_tokens", 12)
    page.send("What is a mixture of experts?")
    page.send("And a router?")
    assert len(page.all(".answer")) == 2 and all(page.each(".answer", "e.textContent"))
    assert page.text("#error") == ""


def test_nothing_is_asked_of_another_host(page, url):
    page.send(PROMPT)
    asked = page.run("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert asked and all(name.startswith(url) or name.startswith("data:") for name in asked)


def test_the_command_with_a_key_and_a_trace(driver, tmp_path):
    path = tmp_path / "t.safetensors"
    command = [sys.executable, "-m", "mixtral", "serve", str(DEMO), "--port", "0", "--trace", str(path)]
    with ServerProcess(command, env={**os.environ, "MIXTRAL_API_KEY": "secret"}) as server:
        assert server.get("/").status == 401
        driver.execute_cdp_cmd("Network.enable", {})
        # What the browser sends from then on when its user has typed the key into the dialogue that "/" asks for.
        basic = base64.b64encode(b"me:secret").decode()
        driver.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {"Authorization": f"Basic {basic}"}})
        try:
            page = Page(driver, server.url)
            page.set("#max_tokens", 8)
            page.send(PROMPT)
            shown = page.each(".token", "e.experts")
        finally:
            driver.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {}})
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    trace = mixtral.Trace.load(path)
    assert len(shown) > 0 and trace.topk_ids.tolist()[-len(shown) :] == shown
