"""Access control: foreign hosts and origins, the token, large bodies, and headers that keep scripts out."""

import http.client
import re
import socket
import time

import pytest
from http_server import LONE_SURROGATE, REQUEST, fixed_text, serving

from jaxllm.serve.app import MAX_BODY, MAX_LOGIN_BODY, PAGE


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


@pytest.fixture
def connect():
    """(client, sent) -> a connection on which this has been sent."""
    opened = []

    def connect(client, sent=b""):
        opened.append(socket.create_connection(("127.0.0.1", client.port), timeout=5))
        opened[-1].sendall(sent)
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def received(connection):
    """All that the server sends until it closes the connection."""
    parts = []
    while part := connection.recv(2**16):
        parts.append(part)
    return b"".join(parts)


def test_a_login_is_read_up_to_a_small_limit(client, connect):
    assert client.send("POST", "/api/login", b" " * (MAX_LOGIN_BODY + 1))[0] == 413
    head = f"POST /api/login HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MAX_BODY}\r\n\r\n".encode()
    unfinished = connect(client, head + b" " * (MAX_LOGIN_BODY + 1))
    assert unfinished.recv(2**16).startswith(b"HTTP/1.1 413"), "without waiting for the rest"


REQUEST_HEAD = b"POST /api/%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
UNFINISHED = [b"", b"GET / HTTP/1.1\r\nHost: loc", REQUEST_HEAD % b"login", REQUEST_HEAD % b"next"]


def test_a_request_that_does_not_arrive_in_time_is_dropped(model, tmp_path, connect, monkeypatch):
    monkeypatch.setattr("jaxllm.serve.connections.REQUEST_SECONDS", 0.5)
    with serving([fixed_text(model, "Yes.")], tmp_path / "a.jsonl", token="correct horse battery") as client:
        connections = [connect(client, sent) for sent in UNFINISHED]
        again = connect(client, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.2)
        again.sendall(b"GET / HTTP/1.1\r\nHo")  # a second request, after a whole one
        for connection in (*connections, again):
            received(connection)  # ends, before the timeout of the test's side
        assert client.send("GET", "/")[0] == 200


def test_a_body_that_does_not_arrive_in_time_is_an_error(client, connect, monkeypatch):
    monkeypatch.setattr("jaxllm.serve.app.BODY_SECONDS", 0.2)
    answer = connect(client, REQUEST_HEAD % b"login").recv(2**16)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within 0.2 seconds" in answer


def test_connections_beyond_the_limit_are_turned_away(model, tmp_path, connect, monkeypatch):
    monkeypatch.setattr("jaxllm.serve.connections.MAX_CONNECTIONS", 3)
    with serving([fixed_text(model, "Yes.")], tmp_path / "a.jsonl") as client:
        idle = [connect(client) for _ in range(3)]
        assert received(connect(client)).startswith(b"HTTP/1.1 503")
        idle[0].close()
        time.sleep(0.2)
        assert client.send("GET", "/")[0] == 200


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


def test_the_page_iterates_over_no_stream_which_safari_cannot():
    script = (PAGE / "page.js").read_text()
    assert re.findall(r"for await \(const \w+ of (\w+)", script) == ["pieces"], "an async generator"


def test_denials_are_logged_in_growing_steps(model, tmp_path, capsys):
    with serving([fixed_text(model, "Yes.")], tmp_path / "a.jsonl", token="correct horse battery") as client:
        for _ in range(5):
            client.send("GET", "/v1/models\x1b[2J".replace("\x1b", "%1b"))
        client.post("/api/login", {"token": "wrong"})
        client.post("/api/login", {"token": "wrong"})
        client.post("/api/login", {"token": "wrong"})
        client.send("GET", "/", Host="evil.example")
    path = "'/v1/models\\x1b[2J'"
    assert capsys.readouterr().err.splitlines() == [
        *(f"401 to 127.0.0.1: GET {path} ({count} so far)" for count in (1, 2, 4)),
        "401 to 127.0.0.1: POST '/api/login' (8 so far)",
        "403 to 127.0.0.1: GET '/' (1 so far)",
    ]


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
