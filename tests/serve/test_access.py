"""Access control: foreign hosts and origins, the token, large bodies, and headers that keep scripts out."""

import http.client
import re

import pytest
from http_server import LONE_SURROGATE, REQUEST, serving

from jaxllm.serve.app import MAX_BODY, PAGE


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "desktop-a:8000"}, 200),
        ({"Host": "Desktop-A:8000", "Origin": "http://desktop-a:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Host": "localhost:1", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:1", "Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://["}, 403),
    ],
)
def test_foreign_hosts_and_origins_are_not_allowed(client, headers, status):
    for method, path in (("GET", "/"), ("GET", "/v1/models")):
        assert client.send(method, path, **headers)[0] == status


def test_a_large_body_is_an_error_even_without_a_content_length(client):
    body = b'{"a": "' + b"x" * MAX_BODY + b'"}'
    assert client.send("POST", "/v1/chat/completions", body)[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    parts = (body[i : i + 2**16] for i in range(0, len(body), 2**16))
    connection.request("POST", "/api/next", parts, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_every_response_has_the_headers_that_keep_scripts_out(client):
    for path, status in (
        ("/", 200),
        ("/page.js", 200),
        ("/v1/models", 200),
        ("/../serve.py", 404),
        ("/x", 404),
    ):
        code, _, headers = client.send("GET", path)
        assert code == status
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers
    assert client.send("GET", "/x", Host="evil.example")[2]["content-security-policy"]


def test_the_page_loads_nothing_from_elsewhere_and_writes_no_html():
    page = {file.name: file.read_text() for file in PAGE.iterdir()}
    assert set(page) == {"index.html", "page.js", "page.css"}
    assert not re.search(r"https?://|\son\w+=|style=|<script>|<style", page["index.html"])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page["page.js"])


def test_without_the_token_only_the_page_is_served(model, tmp_path):
    token = "correct horse battery"
    with serving([model], tmp_path / "a.jsonl", token=token) as client:
        assert client.send("GET", "/")[0] == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": token},
            {"Cookie": "jaxllm=x"},
        ):
            assert client.send("GET", "/v1/models", **headers)[0] == 401
            assert client.post("/v1/chat/completions", REQUEST, **headers)[0] == 401
            assert client.post("/api/next", {"rater": "ann"}, **headers)[0] == 401
        assert client.send("GET", "/v1/models", Authorization=f"Bearer {token}")[0] == 200
        for wrong in ("wröng", LONE_SURROGATE):
            assert client.post("/api/login", {"token": wrong})[0] == 401
        status, _, headers = client.send("POST", "/api/login", {"token": token})
        cookie, *attributes = headers["set-cookie"].split("; ")
        assert status == 200
        assert {"HttpOnly", "SameSite=strict"} <= set(attributes)
        assert token not in cookie
        for others in ("", "a=b; ", 'theme={"dark": 1}; ', "x=1, 2; ", "flag; ", "user=J\xf6rg; "):
            assert client.send("GET", "/v1/models", Cookie=others + cookie)[0] == 200
