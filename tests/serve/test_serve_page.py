"""The page in a browser: chat, choose, take back; and the file that comes of it trains a reward model."""

import shutil
from contextlib import contextmanager

import pytest
from test_serve import QUESTIONS, ROOT, parrot, serving

from experiments import serve
from jaxllm.runs.checkpoints import load_checkpoint
from jaxllm.training.checkpoint import find_checkpoint

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
SLOW_ANSWER = "Yes, one two three four five six."

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
    """What a person does with it."""

    def __init__(self, browser):
        self.browser = browser

    def open(self, client, view="chat"):
        self.browser.get("about:blank")
        self.browser.get_log("browser")  # what was logged before is not of this test
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

    def say(self, text):
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
    def count(self):
        return self.find("#count").text

    @property
    def complaints(self):
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def speaker(chat_model):
    made = serve.load_speaker(str(chat_model), find_checkpoint(chat_model), 8)
    yield made
    made.engine.close()


def test_a_chat_goes_on_and_begins_anew(page, speaker, tmp_path):
    with serving([speaker], tmp_path / "a.jsonl") as client:
        page.open(client)
        page.say("one and two?")
        page.say("six and ten?")
        said = page.texts("#messages li")
        assert [said[0], said[2]] == ["one and two?", "six and ten?"]
        assert all(text.endswith(f"\n{speaker.name}") for text in said[1::2])
        page.say("four and one? " * 6)  # the model reads 64 tokens, and each of these has 18 or more
        page.say("three and two? " * 6)
        assert "no longer fit and are forgotten" in " ".join(page.texts("#messages .note"))
        page.find("#reset").click()
        assert page.texts("#messages li") == []
        page.write("#text", "seven " * 99 + "\n")
        page.wait(lambda: page.find("#error").is_displayed())
        assert "shorten them" in page.find("#error").text
        assert page.find("#text").get_attribute("value").startswith("seven seven")


@contextmanager
def answering(page, speaker, path):
    """A model in the middle of its answer to "Well?", which goes on when it is told to."""
    slow = parrot(speaker, SLOW_ANSWER)
    slow.engine.go_on.clear()
    with serving([slow], path) as client:
        page.open(client)
        page.write("#text", "Well?\n")
        page.wait(lambda: page.texts("#messages .writing") not in ([], [""]))
        yield slow


def test_an_answer_shows_as_it_is_said_and_can_be_stopped(page, speaker, tmp_path):
    with answering(page, speaker, tmp_path / "a.jsonl") as slow:
        begun = page.texts("#messages .writing")[0]
        assert SLOW_ANSWER.startswith(begun)
        page.find("#stop").click()
        page.wait(lambda: page.find("#send").is_displayed())
        assert slow.engine.cancelled.wait(20)
        assert page.texts("#messages .assistant")[0].startswith(begun)
        slow.engine.go_on.set()


def test_a_new_conversation_forgets_the_answer_that_was_coming(page, speaker, tmp_path):
    with answering(page, speaker, tmp_path / "a.jsonl") as slow:
        page.find("#reset").click()
        page.wait(lambda: page.find("#send").is_displayed())
        slow.engine.go_on.set()
        page.say("And now?")
        assert page.texts("#messages .user") == ["And now?"]
        assert slow.engine.asked[-1] == speaker.template.prompt([{"role": "user", "content": "And now?"}])


def test_a_prompt_that_cannot_be_compared_leaves_the_pair_to_be_judged(page, speaker, tmp_path):
    with serving([speaker], tmp_path / "a.jsonl", prompts=QUESTIONS) as client:
        page.open(client, "compare")
        page.name("Ann")
        shown = page.texts(".answer .said")
        page.write("#own", "seven " * 99 + "\n")
        page.wait(lambda: page.find("#error").is_displayed())
        page.wait(lambda: page.texts(".answer .said") == shown)
        assert page.find("#own").get_attribute("value").startswith("seven seven")
        page.find("[data-choice=tie]").click()
        page.wait(lambda: page.count.startswith("1 by you"))
        assert client.rows[0]["answers"] == shown


def test_what_a_model_says_is_text_and_no_html(page, speaker, tmp_path):
    with serving([parrot(speaker, HOSTILE)], tmp_path / "a.jsonl", prompts=QUESTIONS) as client:
        page.open(client)
        page.say("<b>Well?</b>")
        asked, *shown = page.texts("#messages li")
        assert asked == "<b>Well?</b>"
        page.open(client, "compare")
        page.name("<b>ann</b>")
        shown += page.texts(".answer .said")
        assert all(text.startswith(HOSTILE) for text in shown)
        assert len(shown) == 3
        assert page.browser.title == "jaxllm"
        assert page.browser.find_elements("css selector", "main img, main script, main b") == []
        assert page.complaints == []


def test_ten_choices_and_an_undo_train_a_reward_model(page, speaker, chat_model, run_process, tmp_path):
    prompts = [[{"role": "user", "content": f"{i} and ten?"}] for i in range(12)]
    path, keys = tmp_path / "preferences.jsonl", "a1b2ab"
    with serving([speaker], path, prompts=prompts, raters_per_pair=2) as client:
        page.open(client, "compare")
        page.name("Ann")

        def after(act):
            shown = page.texts(".answer .said")
            act()
            page.wait(lambda: page.texts(".answer .said") != shown or not page.find("#pair").is_displayed())
            page.wait(lambda: "busy" not in page.find("#pair").get_attribute("class"))
            return shown

        chosen = [after(lambda key=key: page.press(key))["1a2b".index(key) // 2] for key in keys]
        after(lambda: page.press("x"))
        last = after(lambda: page.press("t"))
        after(lambda: page.press("u"))
        assert page.texts(".answer .said") == last, "it is there again, as it was"
        buttons = [".answer[data-choice='1']", ".answer[data-choice='0']", "[data-choice=tie]"]
        for button in [buttons[0], buttons[1], *[buttons[0]] * 2]:
            chosen.append(after(page.find(button).click)["01".index(button[-3])])
        after(page.find(buttons[2]).click)
        page.wait(lambda: page.count.startswith("12 by you"))
        assert page.find("#progress").get_attribute("value") == "12"
        assert "rest is for other raters" in page.find("#waiting").text
        rows = client.rows
        assert [row["choice"] for row in rows] == [0, 0, 1, 1, 0, 1, "bad", 1, 0, 1, 1, "tie"]
        assert [row["answers"][row["choice"]] for row in rows if row["choice"] in (0, 1)] == chosen
        page.browser.refresh()
        page.wait(lambda: page.count.startswith("12 by you, 12 of 24 in all"))
        assert page.find("#rater").get_attribute("value") == "Ann"
        page.name("Bob")
        page.press("t")
        page.wait(lambda: "(1 judged by several" in page.find("#agreement").text)
        assert page.complaints == []
    workdir = tmp_path / "reward"
    shape = {"model.num_layers": 1, "model.width": 32, "model.max_length": 64, "data.sequence_length": 64}
    few = {"training.steps": 2, "data.batch_size": 2, "data.train": path, "data.validation_fraction": 0.3}
    flags = [f"--config.{field}={value}" for field, value in (shape | few).items()]
    config = f"--config={ROOT / 'configs' / 'reward_model_pairs.py'}:tiny"
    code, output, errors = run_process(
        "train.py", config, f"--workdir={workdir}", f"--init_from={chat_model}", *flags
    )
    assert code == 0, errors
    assert "10 kept, 3 dropped (3 tie): 10 of prompt, answers, choice" in output
    assert load_checkpoint(str(workdir)).stage == "reward_model"


def test_the_page_asks_for_the_token_once(page, speaker, tmp_path):
    with serving([speaker], tmp_path / "a.jsonl", token="correct horse battery") as client:
        page.open(client)
        page.write("#token", "wrong\n")
        page.wait(lambda: "not the token" in page.find("#login-error").text)
        page.write("#token", "correct horse battery\n")
        page.wait(lambda: page.texts("#model option") == [speaker.name])
        page.say("one and two?")
        page.browser.refresh()
        page.wait(lambda: page.texts("#model option") == [speaker.name])
