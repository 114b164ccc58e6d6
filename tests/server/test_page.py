"""The page in a browser, against a server that says what each test wants."""

import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

from browser import WAIT, Page, browser, resize
from fake_server import EXPERTS, LAYERS, answer, chunk, fake_server, route, rows

WORDS = ["Once", " upon", " a", " time", ",", "\n", "there", " was", " a", " king"]


@pytest.fixture(scope="module")
def driver():
    with browser() as driver:
        yield driver


@pytest.fixture
def server():
    with fake_server() as server:
        server.events = lambda body, chat: answer(WORDS, chat)
        yield server


@pytest.fixture
def page(driver, server):
    page = Page(driver, server.url)
    yield page
    assert page.complaints() == []


def test_a_completion_streams_after_its_prompt(page, server):
    page.send("In the beginning")
    assert page.text("#completion-log") == "In the beginning" + "".join(WORDS)
    assert page.text(".answer") == "".join(WORDS)
    assert page.text("#status").startswith(f"length, {len(WORDS)} tokens, ")
    assert page.one("#prompt").get_attribute("value") == ""
    assert server.bodies[0] == {
        "model": "fake",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.7,
        "max_tokens": 128,
        "return_routed_experts": True,
        "prompt": "In the beginning",
    }


def test_the_settings_are_sent(page, server):
    for name, value in {"temperature": 0, "max_tokens": 7, "seed": 11, "experts_per_token": 3}.items():
        page.set(f"#{name}", value)
    page.send("x")
    body = server.bodies[0]
    assert [body[name] for name in ("temperature", "max_tokens", "seed", "experts_per_token")] == [0, 7, 11, 3]


def test_a_chat_sends_what_was_said_before(page, server):
    page.one("input[value=chat]").click()
    page.send("Hello")
    page.send("More")
    said = "".join(WORDS)
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "Hello"}]
    assert server.bodies[1]["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "More"},
    ]
    assert page.text("#chat-log") == f"Hello{said}More{said}"
    page.one("#clear").click()
    assert page.text("#chat-log") == ""


def test_text_appears_while_the_answer_is_written_and_stop_ends_it(page, server):
    def endless(body, chat):
        for _ in range(1000):
            yield chunk("word ", chat)
            yield 0.02

    server.events = endless
    page.send("go", wait=False)
    page.until(lambda: page.text(".answer").count("word") > 3)
    assert page.one("#stop").is_enabled() and not page.one("#send").is_enabled()
    page.one("#stop").click()
    page.until(lambda: page.one("#send").is_enabled())
    assert page.text("#status") == "stopped"
    assert server.gone.wait(WAIT)
    written = page.text(".answer")
    assert 3 < written.count("word") < 1000
    server.gone.clear()
    page.send("again", wait=False)
    page.until(lambda: len(page.all(".answer")) == 2)
    page.one("#prompt").send_keys(Keys.ESCAPE)
    page.until(lambda: page.one("#send").is_enabled())
    assert server.gone.wait(WAIT)


def test_tokens_have_the_colours_of_their_experts_in_the_chosen_layer(page):
    page.send("x")
    by_layer = []
    for layer in range(LAYERS):
        page.set("#layer", layer)
        assert page.text("#layer-name") == f"Layer {layer} of 0 to {LAYERS - 1}"
        colours = page.each(".token", "getComputedStyle(e).backgroundColor")
        assert len(colours) == len(WORDS) - 1  # the newest token is not routed yet
        of_expert = {}
        for number, colour in enumerate(colours):
            of_expert.setdefault(route(number)[layer][0], set()).add(colour)
        assert all(len(same) == 1 for same in of_expert.values())
        assert len(set.union(*of_expert.values())) == len(of_expert) == EXPERTS
        by_layer.append(colours)
    assert by_layer[0] != by_layer[1] != by_layer[2]


def shares(page) -> list[str]:
    return page.each("#experts button > span:last-child", "e.textContent")


def test_the_bars_fill_while_the_answer_is_written(page, server):
    def slowly(body, chat):
        yield from answer(WORDS[:2], chat)
        yield 0.5
        yield chunk("!", chat, **rows([(1, b" upon")]))

    server.events = slowly
    assert shares(page) == ["0 %"] * EXPERTS
    page.send("x", wait=False)
    page.until(lambda: shares(page) == ["100 %", "100 %", "0 %", "0 %"])  # the first word went to experts 0 and 1
    page.until(lambda: shares(page) == ["50 %", "100 %", "50 %", "0 %"])
    widths = page.each(".bar i", "e.style.width")
    assert widths == ["50%", "0%", "50%", "50%", "0%", "50%", "0%", "0%"]  # first choices, then others
    page.until(lambda: page.one("#send").is_enabled())
    page.set("#layer", 2)
    assert shares(page) == ["50 %", "0 %", "50 %", "100 %"]


def test_pointing_at_a_token_shows_the_routers_weights(page):
    page.send("x")
    assert not page.one("#tip").is_displayed()
    ActionChains(page.driver).move_to_element(page.all(".token")[1]).perform()
    assert page.text("#tip") == '" upon", layer 0\nexpert 1: 0.750\nexpert 2: 0.250'
    ActionChains(page.driver).move_to_element(page.one("h1")).perform()
    assert not page.one("#tip").is_displayed()


def test_the_keyboard_reaches_everything(page):
    page.one("#prompt").send_keys("first", Keys.SHIFT, Keys.ENTER, Keys.NULL, "second", Keys.ENTER)
    page.until(lambda: page.text("#status").startswith("length"))
    assert page.text(".prompt") == "first\nsecond"
    log = page.one("#completion-log")
    for key, word in [(Keys.ARROW_RIGHT, "Once"), (Keys.ARROW_RIGHT, " upon"), (Keys.ARROW_LEFT, "Once")]:
        log.send_keys(key)
        assert page.text(".token.current") == word
    assert page.one("#tip").is_displayed() and page.text("#tip").startswith('"Once", layer 0\nexpert 0: 0.750')
    page.one("#layer").send_keys(Keys.ARROW_RIGHT)
    assert page.text("#layer-name").startswith("Layer 1 ")
    page.one("#experts button").send_keys(Keys.SPACE)
    dim = page.each(".token", "e.classList.contains('dim')")
    assert dim == [0 not in route(number)[1] for number in range(len(WORDS) - 1)]
    page.one("#experts button").send_keys(Keys.SPACE)
    assert page.all(".token.dim") == []
    assert min(page.each("input, textarea, button, [tabindex]", "e.tabIndex")) == 0


def test_a_character_of_several_tokens_and_text_held_back(page, server):
    snowman = "☃".encode()
    pieces = [(0, b" ice"), (1, snowman[:1]), (2, snowman[1:2]), (3, snowman[2:]), (4, b" man")]

    def events(body, chat):
        yield chunk("ice", chat)  # a chat answer begins without its space
        yield chunk("", chat, **rows(pieces[:2]))
        yield chunk("", chat, **rows(pieces[2:]))  # " man" is held back: a stop string may begin with it
        yield chunk("☃ m", chat)
        yield chunk("an<b>", chat, "stop")

    server.events = events
    page.send("x")
    tokens = page.each(".token", "e.textContent")
    assert tokens == ["ice", "☃", " man"]
    assert page.text(".answer") == "ice☃ man<b>"
    assert page.all(".answer b") == []  # text is never markup


@pytest.mark.parametrize("status", [400, 500])
def test_an_error_is_shown_and_the_prompt_comes_back(page, server, status):
    server.status = status
    page.send("hello")
    assert page.text("#error") == "not today"
    assert page.one("#prompt").get_attribute("value") == "hello" and page.text("#completion-log") == ""
    server.status = 200
    page.send("")
    assert page.text("#error") == "" and page.text(".answer") == "".join(WORDS)


def test_an_answer_that_breaks_off_says_so_and_keeps_its_text(page, server):
    def broken(body, chat):
        yield chunk("half", chat)
        yield {"error": {"message": "the server is stopping"}}

    server.events = broken
    page.send("x")
    assert page.text("#error") == "the server is stopping" and page.text(".answer") == "half"

    def cut(body, chat):
        yield chunk("half", chat)
        raise ConnectionError

    server.events = cut
    page.send("y")
    assert page.text("#error") == "the connection ended before the answer did"


def test_a_key_is_asked_for_where_the_server_wants_one(driver, server):
    server.key = "secret"
    page = Page(driver, server.url, ready=False)
    page.until(lambda: page.one("#key").is_displayed())
    assert page.text("#error") == "a key is needed"
    page.one("#key").send_keys("secret", Keys.TAB)
    page.until(lambda: page.text("#model") == "fake")
    page.send("x")
    assert page.text(".answer") == "".join(WORDS) and page.text("#error") == ""
    assert page.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_is_readable_in_light_and_dark_on_small_and_large_screens(page, width, dark):
    try:
        resize(page.driver, width, 700, dark)
        page.send("A prompt")
        assert page.run("document.documentElement.scrollWidth") <= width
        beside = page.one("aside").rect["x"] > page.one("#completion-log").rect["x"] + 100
        assert beside == (width == 1280)
        contrasts = page.run(CONTRASTS)
        assert len(contrasts) > len(WORDS) and min(contrasts) >= 4.5, contrasts
    finally:
        resize(page.driver)


# WCAG contrasts of text on its background: the body's, and a token's for each.
CONTRASTS = """(() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => {
      const c = v / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (text, back) => {
    const [a, b] = [luminance(text), luminance(back)].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const body = getComputedStyle(document.body);
  const results = [contrast(body.color, body.backgroundColor)];
  for (const quiet of document.querySelectorAll(".quiet, label, .prompt"))
    results.push(contrast(getComputedStyle(quiet).color, body.backgroundColor));
  for (const token of document.querySelectorAll(".token"))
    results.push(contrast(getComputedStyle(token).color, getComputedStyle(token).backgroundColor));
  return results;
})()"""
