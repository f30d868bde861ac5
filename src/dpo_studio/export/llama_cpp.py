"""llama.cpp as the consumer of an export: log-probs of given tokens, greedy answers, and the chats as it reads them.

In this process, by the package `xllamacpp` (extra `gguf-check`). A log-prob is asked for one token at a time: a bias
makes the wanted token the one that is sampled, and the server reports what it had before any bias.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_studio.errors import ModelError

__all__ = ["LlamaCpp"]

_FORCED = 1000.0
"""A bias in nats that no log-prob outweighs."""
_SAME = 1e-3
"""Nats between two log-probs of one context: it is computed in other batches."""


class LlamaCpp:
    """A GGUF loaded by llama.cpp, on the CPU."""

    @staticmethod
    def installed() -> bool:
        """Whether the package is there."""
        return find_spec("xllamacpp") is not None

    def __init__(self, file: Path, *, context: int, adapter: Path | None = None) -> None:
        """`context` is the most tokens of a chat.

        Raises:
            ModelError: llama.cpp cannot load the file.
        """
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = context, 1, 0
        settings.warmup, settings.verbosity, settings.use_jinja = False, 0, True
        settings.cpuparams.n_threads = os.cpu_count() or 1
        if adapter is not None:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        try:
            self._server = xllamacpp.Server(settings)
        except Exception as error:
            raise ModelError(f"llama.cpp cannot load {file.name}: {error}") from None

    def token_logps(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """log p of each token of `answer` after `prompt` and the tokens before it, in nats."""
        return [
            self._next([*prompt, *answer[:at]], token)["logprobs"]["content"][0]["logprob"]
            for at, token in enumerate(answer)
        ]

    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """The ids of the most likely continuation, up to `tokens` of them or the end of the turn."""
        choice = self._ask(prompt=list(prompt), n_predict=tokens, n_probs=1, temperature=0)["choices"][0]
        return [one["id"] for one in (choice["logprobs"] or {"content": []})["content"]]

    def ends_at(self, prompt: Sequence[int], token: int) -> bool:
        """Whether generation stops where `token` is sampled, as at an end of turn."""
        bias = [[token, _FORCED]]
        choice = self._ask(prompt=list(prompt), n_predict=2, n_probs=0, temperature=0, logit_bias=bias)["choices"][0]
        return bool(choice["finish_reason"] == "stop")

    def reads_chat_as(self, messages: Sequence[dict[str, str]], prompt: Sequence[int]) -> str | None:
        """None if llama.cpp's own rendering of a chat is `prompt` to the id; else what is different.

        Rendered behind a cache that holds `prompt`, the chat shares as many tokens with it as are the same from the
        first on; the last one, which is always computed again, shows in the next token's log-prob.
        """
        forced = prompt[-1]  # any token: only its log-prob is looked at
        expected = self._next(prompt, forced)["logprobs"]["content"][0]["logprob"]
        asked = {"messages": list(messages), "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 1}
        found = self._answered(
            self._server.handle_chat_completions({**asked, "logit_bias": [[forced, _FORCED]], "cache_prompt": True})
        )
        usage = found["usage"]
        read, shared = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        if read != len(prompt):
            return f"{read} tokens instead of {len(prompt)}, the first {shared} of them the same"
        if shared < len(prompt) - 1:
            return f"another token at place {shared}"
        logp = found["choices"][0]["logprobs"]["content"][0]["logprob"]
        return None if abs(logp - expected) <= _SAME * max(1.0, abs(expected)) else "another last token"

    def _next(self, ids: Sequence[int], token: int) -> dict[str, Any]:
        asked = self._ask(prompt=list(ids), n_predict=1, n_probs=1, temperature=0, logit_bias=[[token, _FORCED]])
        choice: dict[str, Any] = asked["choices"][0]
        if choice["logprobs"] is None or choice["logprobs"]["content"][0]["id"] != token:
            raise ModelError(f"llama.cpp reports no log-prob of token {token}: is it in the vocabulary of the file?")
        return choice

    def _ask(self, **asked: Any) -> dict[str, Any]:
        return self._answered(self._server.handle_completions({**asked, "cache_prompt": True}))

    @staticmethod
    def _answered(reply: Any) -> dict[str, Any]:
        if not isinstance(reply, dict) or "choices" not in reply:
            raise ModelError(f"llama.cpp answers with an error: {str(reply)[:200]}")
        return reply
