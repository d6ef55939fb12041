"""The model that lmms-eval asks."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmms_eval.api.model import lmms

from lmms_eval_xllm import parts

PASSING = (408, 429, 500, 502, 503, 504)  # HTTP states after which the same request may succeed


class XLLM(lmms):
    """Asks an OpenAI-compatible server.

    Args:
      base_url: of its API.
      model_version: name of the model there; '' takes the first that it lists.
      api_key: of the server; '' for none.
      max_new_tokens: of an answer, where the task says nothing.
      num_concurrent: requests at a time.
      timeout: seconds that a reply may take.
      retries: after failures that may pass.
    """

    is_simple = False

    def __init__(
        self,
        base_url: str = "http://localhost:8000/v1",
        model_version: str = "",
        api_key: str = "",
        max_new_tokens: int = 64,
        num_concurrent: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        **_: Any,
    ):
        super().__init__()
        self._url, self._key = base_url.rstrip("/"), api_key
        self._tokens, self._parallel = int(max_new_tokens), int(num_concurrent)
        self._timeout, self._retries = float(timeout), int(retries)
        self._model = model_version or self._call("models")["data"][0]["id"]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in order; a request that fails for good ends the evaluation."""
        with ThreadPoolExecutor(self._parallel) as pool:
            return list(pool.map(self._answer, requests))

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Not offered: the server gives texts."""
        raise NotImplementedError("tasks that compare likelihoods need the model itself")

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        """Not offered."""
        raise NotImplementedError("tasks of several rounds are not offered")

    def _answer(self, request: Any) -> str:
        _, to_messages, options, number, task, split = request.args
        given = to_messages(self.task_dict[task][split][number])
        body = {
            "model": self._model,
            "messages": parts.messages(given),
            "max_tokens": int(options.get("max_new_tokens") or self._tokens),
            "temperature": float(options.get("temperature") or 0),
        }
        until = options.get("until")
        stops = [until] if isinstance(until, str) else list(until or ())
        body |= {"stop": stops} if any(stops) else {}
        said = self._call("chat/completions", body)
        return said["choices"][0]["message"]["content"] or ""

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self._retries + 1):
            asked = urllib.request.Request(f"{self._url}/{path}", data, headers)
            try:
                with urllib.request.urlopen(asked, timeout=self._timeout) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                told = error.read(500).decode("utf-8", "replace")
                if error.code not in PASSING or attempt == self._retries:
                    raise RuntimeError(f"{self._url} answers {error.code}: {told}") from None
            except OSError:
                if attempt == self._retries:
                    raise
            time.sleep(min(2.0**attempt, 30.0))
        raise AssertionError
