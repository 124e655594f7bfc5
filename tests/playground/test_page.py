"""The playground as a person uses it in headless Chromium."""

import functools
import json
import re
import shutil
import threading
import time

import pytest
from playground_client import ask

from qadapter import OffInside


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium from the system."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
    ):  # fmt: skip
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the page did not get there in time"
        threading.Event().wait(0.05)


ENTER, TAB, ESCAPE, CONTROL = "\ue007", "\ue004", "\ue00c", "\ue009"
END, HOME, LEFT, UP, RIGHT, DOWN = "\ue010", "\ue011", "\ue012", "\ue013", "\ue014", "\ue015"


def browser_actions(browser):
    from selenium.webdriver import ActionChains

    return ActionChains(browser)


class Page:
    """The page in the browser, opened afresh."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        wait_until(lambda: browser.find_elements("css selector", "#weights input"))  # the policy is known

    def find(self, name):
        return self.browser.find_element("id", name)

    def text(self, name):
        """An answer; the policy's side shows special tokens, the base's does not."""
        return re.sub(r"<pad>|</s>|\s", "", self.find(name).text)

    def send(self, prompt):
        self.find("prompt").clear()
        self.find("prompt").send_keys(prompt + CONTROL + ENTER)
        self.wait()

    def wait(self, condition=lambda: True):
        """Until the answer is there and as it should be."""
        wait_until(lambda: self.find("status").text == "Done." and condition())

    def tip(self):
        """The rows of the table that explains a token: [base token, probability, policy token, probability]."""
        rows = self.browser.find_elements("css selector", "#tip tr")
        return [
            [cell.get_attribute("textContent") for cell in row.find_elements("css selector", "td")] for row in rows[1:]
        ]


def test_a_person_types_sends_moves_the_slider_and_reads_another_answer(address, browser):
    page = Page(browser, address)
    page.send("what is it")
    base, first = page.text("base-answer"), page.text("policy-answer")
    assert base
    assert first
    assert base != first
    slider = page.find("strength")
    slider.send_keys(LEFT * 20)  # from 1.00 to 0.00
    assert page.find("strength-value").text == "0.00"
    page.wait(lambda: page.text("policy-answer") == base)
    slider.send_keys(RIGHT * 24)
    page.wait(lambda: page.text("policy-answer") not in ("", base))


def test_hovering_over_a_token_shows_the_likeliest_under_base_and_policy(address, browser):
    page = Page(browser, address)
    page.send("hello")
    *_, last = ask(address, strength=1.0, max_new_tokens=80, weights={"concise": 1.0, "polite": 0.0})
    token = browser.find_elements("css selector", ".token")[1]
    browser_actions(browser).move_to_element(token).perform()
    view, tip = last["tokens"][1], page.find("tip")
    assert tip.is_displayed()
    assert f"KL {view['kl']:.3f}" in tip.text
    shown = page.tip()
    for index, top in ((0, view["base_top"]), (2, view["top"])):
        assert [row[index + 1] for row in shown] == [f"{100 * probability:.1f}%" for _, probability in top]
        assert [row[index] for row in shown] == [json.dumps(text)[1:-1] for text, _ in top]
    assert view["base_top"] != view["top"]
    browser_actions(browser).move_to_element(page.find("prompt")).perform()
    assert not tip.is_displayed()


def test_the_cap_and_the_weights_can_be_tried(address, browser):
    page = Page(browser, address)
    page.send("what is it")
    base, free = page.text("base-answer"), page.text("policy-answer")
    assert free != base
    page.find("cap").send_keys(HOME)
    assert page.find("cap-value").text == "0.00010"
    page.wait(lambda: "largest 0.000 nats" in page.find("summary").text)
    assert page.text("policy-answer") == base
    page.find("cap").send_keys(RIGHT * 50)
    page.wait(lambda: page.text("policy-answer") == free)
    threshold = page.find("threshold")
    threshold.send_keys(RIGHT * 50)
    assert page.find("threshold-value").text == "10"
    page.wait(lambda: page.text("policy-answer") == base)
    threshold.send_keys(HOME)
    assert page.find("threshold-value").text == "off"
    page.wait(lambda: page.text("policy-answer") == free)
    page.find("decay").send_keys(HOME)
    assert page.find("decay-value").text == "0.70"
    page.wait(lambda: page.text("policy-answer") not in ("", free))
    page.find("decay").send_keys(RIGHT * 40)
    assert page.find("decay-value").text == "off"
    page.wait(lambda: page.text("policy-answer") == free)
    page.find("weight-concise").send_keys(LEFT * 20)  # both are at 0 now
    page.wait(lambda: page.text("policy-answer") == base)
    page.find("weight-polite").send_keys(RIGHT * 20)
    page.wait(lambda: page.text("policy-answer") not in ("", base, free))


def test_everything_is_done_without_a_mouse(address, browser):
    """Tab reaches all there is, in the order of the page; a token's tip comes and goes by keys."""
    page = Page(browser, address)

    def press(keys):
        browser_actions(browser).send_keys(keys).perform()

    def tab():
        press(TAB)
        return browser.switch_to.active_element

    assert [tab().get_attribute("id") for _ in range(2)] == ["prompt", "send"]  # `stop` is off
    press(ENTER)
    page.wait()
    dials = ["strength", "weight-concise", "weight-polite", "cap", "threshold", "decay", "inside"]
    assert [tab().get_attribute("id") for _ in dials] == dials
    assert tab().tag_name == "summary"
    press(ENTER)
    assert [tab().get_attribute("id") for _ in range(4)] == ["temperature", "length", "seed", "measure"]
    assert tab().get_attribute("class") == "token"
    assert page.find("tip").is_displayed()
    assert len(page.tip()) == 5
    press(ESCAPE)
    assert not page.find("tip").is_displayed()
    tokens = browser.find_elements("class name", "token")
    press(RIGHT * 2)
    assert browser.switch_to.active_element == tokens[2]
    assert page.find("tip").is_displayed()
    press(LEFT)
    assert browser.switch_to.active_element == tokens[1]
    press(HOME + LEFT)
    assert browser.switch_to.active_element == tokens[0]
    press(END)
    assert browser.switch_to.active_element == tokens[-1]
    assert tab() not in tokens  # however long the answer


@pytest.mark.parametrize("size", [(1280, 720), (1366, 768)])
def test_the_page_fits_a_laptop(address, browser, size):
    page = Page(browser, address)
    before = browser.get_window_size()
    try:
        browser.set_window_size(*size)
        page.send("what is it")
        assert browser.execute_script(
            "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        for name in ("base-answer", "policy-answer"):  # the answers begin above the fold
            box = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", page.find(name))
            assert box["top"] + 24 < browser.execute_script("return window.innerHeight")
            assert box["width"] > 400
            assert float(page.find(name).value_of_css_property("font-size").removesuffix("px")) >= 16
    finally:
        browser.set_window_size(before["width"], before["height"])


def test_an_error_is_said_on_the_page(address, browser):
    browser.get(address)
    prompt = browser.find_element("id", "prompt")
    prompt.clear()
    browser.execute_script("arguments[0].value = 'x'.repeat(400)", prompt)
    browser.find_element("id", "send").click()
    wait_until(lambda: "passes the model's" in browser.find_element("id", "status").text)


@pytest.fixture
def slow_page(policy, address, browser, monkeypatch):
    """The page, with a model that answers only as fast as the test lets it."""
    gate = threading.Semaphore(0)
    forward = type(policy).forward

    @functools.wraps(forward)
    def waiting(self, *args, **kwargs):
        assert gate.acquire(timeout=60)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(policy), "forward", waiting)
    yield Page(browser, address), gate
    gate.release(10_000)
    wait_until(lambda: browser.find_element("id", "status").text in ("Done.", "Stopped."))


def write(page, name, value):
    """Set a field at once."""
    page.browser.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))", page.find(name), value
    )


def test_base_and_policy_answer_the_prompt_that_was_sent(slow_page, browser):
    """Also where the prompt is written on while the base answers."""
    page, gate = slow_page
    browser.execute_script("window.sent = []; const f = window.fetch; window.fetch = (u, o) => { "
                           "sent.push(JSON.parse(o.body)); return f(u, o); }")  # fmt: skip
    write(page, "prompt", "what is it")
    write(page, "length", 3)
    page.find("send").click()
    gate.release(2)
    wait_until(lambda: browser.execute_script("return sent.length"))
    write(page, "prompt", "what is it that")
    write(page, "seed", 7)
    gate.release(100)
    page.wait()
    base, answer = browser.execute_script("return sent")
    for name in ("prompt", "max_new_tokens", "temperature", "seed"):
        assert base[name] == answer[name]


def test_an_earlier_prompts_answer_is_gone_once_another_prompt_is_sent(slow_page):
    page, gate = slow_page
    gate.release(500)
    page.send("what is it")
    while gate.acquire(blocking=False):
        pass
    write(page, "prompt", "hello")
    page.find("send").click()
    wait_until(lambda: page.find("status").text == "Answering ...")
    assert [page.find(name).text for name in ("policy-answer", "policy-strength", "summary")] == ["", "", ""]


def test_the_part_of_an_answer_that_is_there_stays_when_the_shading_changes(address, browser):
    page = Page(browser, address)
    browser.execute_script("element('policy-answer').append('Because the')")
    write(page, "measure", "ratio")
    assert page.find("policy-answer").text == "Because the"
    page.send("hello")
    assert page.find("legend").text.split() == ["≤", "−2", "≥", "2", "nats"]
    write(page, "measure", "kl")
    assert page.find("legend").text.split() == ["0", "≥", "1", "nat"]
    token = browser.find_element("class name", "token")
    assert token.value_of_css_property("background-color") != "rgba(0, 0, 0, 0)"
    write(page, "measure", "none")
    assert not page.find("legend").is_displayed()
    assert token.value_of_css_property("background-color") == "rgba(0, 0, 0, 0)"


def test_a_wrong_number_under_closed_sampling_is_shown(address, browser):
    page = Page(browser, address)
    write(page, "length", 4096)
    page.find("send").click()
    wait_until(lambda: page.find("length").is_displayed())
    assert browser.switch_to.active_element.get_attribute("id") == "length"


def test_a_tip_is_read_at_the_bottom_of_the_window(address, browser):
    page = Page(browser, address)
    page.send("hello")
    token = browser.find_elements("css selector", ".token")[1]
    browser.execute_script(
        "document.body.style.paddingTop = '1000px'; "
        "scrollTo(0, scrollY + Math.ceil(arguments[0].getBoundingClientRect().bottom) - innerHeight)",
        token,
    )
    browser.execute_script("arguments[0].focus({preventScroll: true})", token)
    top, bottom, height = browser.execute_script(
        "const box = document.getElementById('tip').getBoundingClientRect(); return [box.top, box.bottom, innerHeight]"
    )
    assert 0 <= top < bottom <= height


def test_characters_of_several_tokens_are_shown_whole_and_shaded_by_the_one_that_moved_most(address, browser):
    Page(browser, address)
    views = [("h", 0.1), ("", 0.2), ("", 0.9), ("\N{GRINNING FACE}", 0.3), ("", 0.5)]
    common = {"logp": -1.0, "base_logp": -1.0, "strength": 1.0, "top": [], "base_top": []}
    views = [{"text": text, "kl": kl, **common} for text, kl in views]
    browser.execute_script("tokens = arguments[0]; paint()", views)
    spans = browser.find_elements("css selector", ".token")
    assert [span.text for span in spans] == ["h", "\N{GRINNING FACE}", "\N{REPLACEMENT CHARACTER}"]
    assert [span.get_attribute("data-index") for span in spans] == ["0", "2", "4"]


def test_answers_in_scripts_from_right_to_left_begin_at_the_right(address, browser):
    page = Page(browser, address)
    for name in ("base-answer", "policy-answer", "prompt"):
        browser.execute_script("arguments[0].textContent = 'مرحبا!'", page.find(name))
        assert page.find(name).value_of_css_property("direction") == "rtl"


def test_a_screen_reader_hears_what_the_sliders_show_and_whole_answers(address, browser):
    page = Page(browser, address)
    names = {"strength": "1.00", "weight-polite": "0.00", "cap": "off", "threshold": "off", "decay": "off"}
    for name, said in names.items():
        assert page.find(name).get_attribute("aria-valuetext") == said
    page.find("cap").send_keys(HOME)
    assert page.find("cap").get_attribute("aria-valuetext") == "0.00010"
    browser.execute_script(
        "window.busy = []; new MutationObserver((all) => all.forEach((one) => busy.push(one.oldValue))).observe("
        "arguments[0], {attributes: true, attributeFilter: ['aria-busy'], attributeOldValue: true})",
        page.find("policy-answer"),
    )
    page.send("what is it")
    assert page.find("policy-answer").get_attribute("aria-busy") == "false"
    assert "true" in browser.execute_script("return busy")


def test_a_strength_between_the_sliders_steps_is_kept(address, browser):
    page = Page(browser, address)
    for asked in (0.33, -0.52, 3.5):
        browser.execute_script("setSlider(document.getElementById('strength'), arguments[0])", asked)
        assert float(page.find("strength").get_attribute("value")) == asked
        browser.execute_script("arguments[0].value = 0", page.find("strength"))
        assert float(page.find("strength").get_attribute("value")) == 0


def test_the_adapter_can_be_kept_out_of_code_and_the_like(address, browser, monkeypatch):
    monkeypatch.setattr(OffInside, "off", lambda self, text: True)
    page = Page(browser, address)
    page.send("what is it")
    policy, base = page.text("policy-answer"), page.text("base-answer")
    assert policy != base
    page.find("inside").send_keys(" ")
    page.wait(lambda: page.text("policy-answer") == base)
    page.find("inside").send_keys(" ")
    page.wait(lambda: page.text("policy-answer") == policy)


@pytest.mark.parametrize("weights", [{"formal": 0.33, "terse": 2.5}, {"formal": 0.125, "terse": -1.5}])
def test_stored_weights_are_kept_wherever_they_lie(address, browser, weights):
    page = Page(browser, address)
    browser.execute_script("addWeights(arguments[0], {})", weights)
    assert {name: float(page.find(f"weight-{name}").get_attribute("value")) for name in weights} == weights


def test_the_strength_is_of_weights_where_they_can_be_interpolated(address, plain_address, browser):
    page = Page(browser, address)
    assert not page.find("interpolation").is_displayed()
    page = Page(browser, plain_address)
    page.find("strength").send_keys(RIGHT * 10)
    page.send("what is it")
    by_logits, select = page.text("policy-answer"), page.find("interpolation")
    select.send_keys(DOWN)  # letters typed within a second would be one word
    page.wait(lambda: page.text("policy-answer") not in ("", by_logits))
    assert not page.find("decay").is_enabled()
    assert not page.find("threshold").is_enabled()
    select.send_keys(UP)
    page.wait(lambda: page.text("policy-answer") == by_logits)
    assert page.find("decay").is_enabled()
