"""A model behind OpenAI's API, such as experiments/serve.py: /v1/models and /v1/chat/completions."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxllm.data.messages import Messages
from jaxllm.errors import ConfigError, RunError
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.synthesize.writers import Check, Written

API_KEY = "OPENAI_API_KEY"  # the environment variable that is sent, and never written down
ATTEMPTS = 6  # of a request that the network or an overloaded server refuses
TIMEOUT = 600.0  # seconds that a completion may take


class ServerWriter:
    """A model of a server. The same seeds give the same texts only where the server honors `seed`."""

    def __init__(self, url: str, field: str, *, requests: int):
        """`url` ends with /v1, or with /v1#NAME where the server has several models; so many `requests` at a
        time. ConfigError where there is no such server or model."""
        self.url, _, name = url.partition("#")
        self.requests = requests
        try:
            names = [model["id"] for model in self._send("models")["data"]]
        except (RunError, KeyError, TypeError) as error:
            raise ConfigError(f"{field}={url}: {error}; it must be a server of OpenAI's API") from None
        if name not in names and (name or len(names) != 1):
            raise ConfigError(f"{field}={url}: choose a model as {self.url}#NAME, of {', '.join(names)}")
        self.name = name or names[0]
        self.identity = {"model": f"{self.url}#{self.name}"}

    def problem(self, messages: Messages, max_new_tokens: int) -> str | None:
        """None: only the server knows."""
        return None

    def complete(
        self,
        conversations: Sequence[Messages],
        *,
        group_size: int,
        sampling: SamplingConfig,
        keys: jax.Array,
        check: Check,
    ) -> list[Written]:
        """As in `Writer`."""
        seeds = np.asarray(jax.vmap(lambda key: jax.random.bits(key) >> 1)(keys)).tolist()
        options = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            **sampling.filters,
        }

        def one(i: int) -> Written:
            check()
            body = {"model": self.name, "messages": list(conversations[i // group_size]), "seed": seeds[i]}
            choice = self._send("chat/completions", body | options)["choices"][0]
            return Written((choice["message"]["content"] or "").strip(), choice["finish_reason"] == "stop")

        with ThreadPoolExecutor(self.requests) as pool:
            return list(pool.map(one, range(len(seeds))))

    def _send(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The response to GET, or to POST of a body. RunError where there is none after all attempts."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        problem = ""
        for attempt in range(ATTEMPTS if body else 1):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", content, headers)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {' '.join(error.read(500).decode(errors='replace').split())}"
                if error.code not in (408, 429) and error.code < 500:
                    break
            except (OSError, ValueError) as error:
                problem = str(error)
        raise RunError(f"{self.url}: {problem}")
