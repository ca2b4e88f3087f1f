"""The page in a browser: chat, compare, undo; and a reward model trains on the choices."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from http_server import PROMPTS, fixed_text, serving

from jaxllm.runs.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
SLOW_REPLY = "Yes, one two three four five six."

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser):
    return Page(browser)


class Page:
    """What a person does with the page."""

    def __init__(self, browser):
        self.browser = browser

    def open(self, client, view="chat"):
        self.browser.get("about:blank")
        self.browser.get_log("browser")  # drop what earlier tests logged
        self.browser.get(f"http://127.0.0.1:{client.port}/#{view}")

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def texts(self, selector):
        return [each.text for each in self.browser.find_elements("css selector", selector)]

    def wait(self, condition):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 60, 0.05).until(lambda _: condition())

    def write(self, selector, text):
        self.wait(lambda: self.find(selector).is_displayed())
        self.find(selector).send_keys(text)

    def press(self, key):
        self.browser.switch_to.active_element.send_keys(key)

    def send(self, text):
        before = len(self.texts("#messages .assistant small"))
        self.write("#text", f"{text}\n")
        self.wait(lambda: len(self.texts("#messages .assistant small")) > before)

    def name(self, rater):
        self.wait(lambda: self.find("#rater").is_displayed())
        self.browser.execute_script("localStorage.clear()")
        self.find("#rater").clear()
        self.write("#rater", f"{rater}\n")
        self.wait(lambda: self.find("#pair").is_displayed())

    @property
    def focused(self):
        return self.browser.switch_to.active_element

    @property
    def count(self):
        return self.find("#count").text

    @property
    def errors(self):
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_chat_continues_and_starts_anew(page, model, tmp_path):
    with serving([model], tmp_path / "a.jsonl") as client:
        page.open(client)
        page.send("one and two?")
        page.send("six and ten?")
        messages = page.texts("#messages li")
        assert [messages[0], messages[2]] == ["one and two?", "six and ten?"]
        assert all(text.endswith("\nchat") for text in messages[1::2])
        page.send("four and one? " * 6)  # 18 tokens or more each; the model's context has 64
        page.send("three and two? " * 6)
        assert "no longer fit and were dropped" in " ".join(page.texts("#messages .note"))
        page.find("#reset").click()
        assert page.texts("#messages li") == []
        page.write("#text", "seven " * 99 + "\n")
        page.wait(lambda: page.find("#error").is_displayed())
        assert "shorten the conversation" in page.find("#error").text
        assert page.find("#text").get_attribute("value").startswith("seven seven")


def test_models_are_chosen_by_name_and_their_paths_are_tooltips(page, model, tmp_path):
    other = fixed_text(model, "Other.")._replace(
        name="other", checkpoint={"path": "/runs/other", "hash": "0"}
    )
    with serving([model, other], tmp_path / "a.jsonl") as client:
        page.open(client)
        page.wait(lambda: page.texts("#model option") == ["chat", "other"])
        assert page.find("#model").get_attribute("title") == model.checkpoint["path"]
        page.find("#model").send_keys("other")
        assert page.find("#model").get_attribute("title") == "/runs/other"
        page.send("Well?")
        assert page.texts("#messages li")[1].startswith("Other.")
        label = page.find("#messages .assistant small")
        assert (label.text, label.get_attribute("title")) == ("other", "/runs/other")


@contextmanager
def paused_reply(page, model, path):
    """A model that pauses in its reply to "Well?" until the test sets `resume`."""
    slow = fixed_text(model, SLOW_REPLY)
    slow.engine.resume.clear()
    with serving([slow], path) as client:
        page.open(client)
        page.write("#text", "Well?\n")
        page.wait(lambda: page.texts("#messages .writing") not in ([], [""]))
        yield slow


def test_a_reply_is_shown_while_it_is_generated_and_can_be_stopped(page, model, tmp_path):
    with paused_reply(page, model, tmp_path / "a.jsonl") as slow:
        shown = page.texts("#messages .writing")[0]
        assert SLOW_REPLY.startswith(shown)
        page.find("#stop").click()
        page.wait(lambda: page.find("#send").is_displayed())
        assert slow.engine.cancelled.wait(20)
        assert page.texts("#messages .assistant")[0].startswith(shown)
        slow.engine.resume.set()


def test_a_reply_that_ends_leaves_the_focus_where_it_is(page, model, tmp_path):
    with paused_reply(page, model, tmp_path / "a.jsonl") as slow:
        page.browser.execute_script("document.getElementById('model').focus()")
        slow.engine.resume.set()
        page.wait(lambda: page.find("#send").is_displayed())
        assert page.focused.get_attribute("id") == "model"


def test_a_new_conversation_drops_the_reply_in_progress(page, model, tmp_path):
    with paused_reply(page, model, tmp_path / "a.jsonl") as slow:
        page.find("#reset").click()
        page.wait(lambda: page.find("#send").is_displayed())
        slow.engine.resume.set()
        page.send("And now?")
        assert page.texts("#messages .user") == ["And now?"]
        assert slow.engine.prompts[-1] == model.template.prompt([{"role": "user", "content": "And now?"}])


def test_a_prompt_that_cannot_be_compared_keeps_the_pair_on_the_page(page, model, tmp_path):
    with serving([model], tmp_path / "a.jsonl", prompts=PROMPTS) as client:
        page.open(client, "compare")
        page.name("Ann")
        shown = page.texts(".answer .text")
        page.write("#own", "seven " * 99 + "\n")
        page.wait(lambda: page.find("#error").is_displayed())
        page.wait(lambda: page.texts(".answer .text") == shown)
        assert page.find("#own").get_attribute("value").startswith("seven seven")
        page.find("[data-choice=tie]").click()
        page.wait(lambda: page.count.startswith("1 by you"))
        assert client.rows[0]["answers"] == shown


def test_names_are_asked_back_shortcuts_are_optional_and_the_focus_stays(page, model, tmp_path):
    hebrew = fixed_text(model, "\u05e9\u05dc\u05d5\u05dd.")
    with serving([hebrew], tmp_path / "a.jsonl", prompts=PROMPTS, raters_per_pair=2) as client:
        page.open(client, "compare")
        page.name("Ann")
        assert page.find(".answer .text").value_of_css_property("direction") == "rtl"

        def choices_are(number):
            page.wait(lambda: page.count.startswith(f"{number} by you"))
            page.wait(lambda: "busy" not in page.find("#pair").get_attribute("class"))

        page.find("[data-choice=tie]").click()
        choices_are(1)
        assert page.focused.get_attribute("data-choice") == "tie"
        page.find("#shortcuts").click()
        page.press("x")
        page.find("#shortcuts").click()
        page.press("t")
        choices_are(2)
        assert [row["choice"] for row in client.rows] == ["tie", "tie"], "x was off"
        page.find("#rater").clear()
        page.write("#rater", "Anna\n")
        page.wait(lambda: page.texts("#near-names button") == ["I am ann", "No, I am new: Anna"])
        page.find("#near-names button").click()
        choices_are(2)
        assert page.find("#rater").get_attribute("value") == "ann"
        page.find("#undo").click()
        choices_are(1)
        page.find("#undo").click()
        choices_are(0)
        assert page.focused.get_attribute("id") == "question", "undo is disabled now"
        assert page.errors == []


def test_generated_html_is_shown_as_text(page, model, tmp_path):
    with serving([fixed_text(model, HOSTILE)], tmp_path / "a.jsonl", prompts=PROMPTS) as client:
        page.open(client)
        page.send("<b>Well?</b>")
        sent, *shown = page.texts("#messages li")
        assert sent == "<b>Well?</b>"
        page.open(client, "compare")
        page.name("<b>ann</b>")
        shown += page.texts(".answer .text")
        assert all(text.startswith(HOSTILE) for text in shown)
        assert len(shown) == 3
        assert page.browser.title == "jaxllm"
        assert page.browser.find_elements("css selector", "main img, main script, main b") == []
        assert page.errors == []


def test_ten_choices_and_an_undo_train_a_reward_model(page, model, chat_model, run_process, tmp_path):
    prompts = [[{"role": "user", "content": f"{i} and ten?"}] for i in range(12)]
    path, keys = tmp_path / "preferences.jsonl", "a1b2ab"
    with serving([model], path, prompts=prompts, raters_per_pair=2) as client:
        page.open(client, "compare")
        page.name("Ann")

        def after(act):
            shown = page.texts(".answer .text")
            act()
            page.wait(lambda: page.texts(".answer .text") != shown or not page.find("#pair").is_displayed())
            page.wait(lambda: "busy" not in page.find("#pair").get_attribute("class"))
            return shown

        chosen = [after(lambda key=key: page.press(key))["1a2b".index(key) // 2] for key in keys]
        after(lambda: page.press("x"))
        last = after(lambda: page.press("t"))
        after(lambda: page.press("u"))
        assert page.texts(".answer .text") == last, "undo shows the same pair again"
        buttons = [".answer[data-choice='1']", ".answer[data-choice='0']", "[data-choice=tie]"]
        for button in [buttons[0], buttons[1], *[buttons[0]] * 2]:
            chosen.append(after(page.find(button).click)["01".index(button[-3])])
        after(page.find(buttons[2]).click)
        page.wait(lambda: page.count.startswith("12 by you"))
        assert page.find("#progress").get_attribute("value") == "12"
        assert "remaining choices are for other raters" in page.find("#waiting").text
        rows = client.rows
        assert [row["choice"] for row in rows] == [0, 0, 1, 1, 0, 1, "bad", 1, 0, 1, 1, "tie"]
        assert [row["answers"][row["choice"]] for row in rows if row["choice"] in (0, 1)] == chosen
        page.browser.refresh()
        page.wait(lambda: page.count.startswith("12 by you, 12 of 24 in total"))
        assert page.find("#rater").get_attribute("value") == "Ann"
        page.name("Bob")
        page.press("t")
        page.wait(lambda: "(pairs with several raters: 1" in page.find("#agreement").text)
        assert page.errors == []
    workdir = tmp_path / "reward"
    shape = {"model.num_layers": 1, "model.width": 32, "model.max_length": 64, "data.sequence_length": 64}
    few = {"training.steps": 2, "data.batch_size": 2, "data.train": path, "data.validation_fraction": 0.3}
    flags = [f"--config.{field}={value}" for field, value in (shape | few).items()]
    config = f"--config={ROOT / 'configs' / 'reward_model_pairs.py'}:tiny"
    code, output, errors = run_process(
        "train.py", config, f"--workdir={workdir}", f"--init_from={chat_model}", *flags
    )
    assert code == 0, errors
    assert "10 kept, 3 dropped (3 tie); formats: 10 [prompt, answers, choice]" in output
    assert not load_checkpoint(str(workdir)).generates


def test_the_page_requires_the_token_once(page, model, tmp_path):
    with serving([model], tmp_path / "a.jsonl", token="correct horse battery") as client:
        page.open(client)
        page.write("#token", "wrong\n")
        page.wait(lambda: "wrong token" in page.find("#login-error").text)
        page.write("#token", "correct horse battery\n")
        page.wait(lambda: page.texts("#model option") == ["chat"])
        page.send("one and two?")
        page.browser.refresh()
        page.wait(lambda: page.texts("#model option") == ["chat"])
