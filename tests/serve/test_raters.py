"""One person is one rater, however the name is typed, and a misspelling is asked back."""

import json
from urllib.parse import quote

import pytest
from http_server import PROMPTS, fixed_text, serving

from jaxllm.serve.raters import near_names, normalized


@pytest.mark.parametrize("name", ["Ann", " ann", "ANN ", "a\uff4en", "\u00a0Ann"])
def test_a_name_has_one_spelling(name):
    assert normalized(name) == "ann"


@pytest.mark.parametrize(
    ("name", "same"), [("JOS\u00c9 ", "jose\u0301"), ("Stra\u00dfe", "STRASSE"), ("Ann  B", "ann b")]
)
def test_composed_and_folded_names_are_the_same(name, same):
    assert normalized(name) == normalized(same)


@pytest.mark.parametrize(
    ("name", "near"),
    [("anna", ["ann"]), ("ann", []), ("anne", ["ann"]), ("tim", []), ("rater 2", ["rater 1"]), ("", [])],
)
def test_names_near_a_known_one_are_found(name, near):
    assert near_names(name, {"ann", "tom", "rater 1"}) == near


def test_a_rater_continues_under_any_spelling_and_is_asked_back_for_a_near_one(model, tmp_path):
    path = tmp_path / "a.jsonl"
    with serving([fixed_text(model, "Yes.")], path, prompts=PROMPTS, raters_per_pair=2) as client:

        def rate(rater):
            offer = client.post("/api/next", {"rater": rater})[1]["offer"]
            body = {"rater": rater, "id": offer["id"], "choice": 0}
            assert client.post("/api/choice", body)[0] == 200

        def state(rater):
            return json.loads(client.send("GET", f"/api/state?rater={quote(rater)}")[1])

        rate("Ann")
        rate(" ANN ")
        rate("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645")  # a zero-width non-joiner is part of a name
        assert [row["rater"] for row in client.rows[:2]] == ["ann", "ann"]
        assert client.rows[0]["comparison"] != client.rows[1]["comparison"], "each pair once a rater"
        assert (state("aNN")["progress"]["mine"], state("aNN")["near"]) == (2, [])
        assert state("Anna")["near"] == ["ann"]
        assert client.post("/api/undo", {"rater": "Ann"})[0] == 200
    # Rows of earlier versions have names as they were typed.
    path.write_text(path.read_text().replace('"rater": "ann"', '"rater": "Ann"'))
    with serving([fixed_text(model, "Yes.")], path, prompts=PROMPTS, raters_per_pair=2) as client:
        assert json.loads(client.send("GET", "/api/state?rater=ann")[1])["progress"]["mine"] == 1
        assert client.post("/api/undo", {"rater": "ann"})[0] == 200
