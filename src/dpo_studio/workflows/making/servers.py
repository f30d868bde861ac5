"""A chat model behind an OpenAI-compatible server as the writer of answers (`server:NAME@URL`).

Every reply is kept before it is used (`evaluation.kept_replies`), and a request whose reply is kept is not made again.
What a reply says is an answer only if it is one text and nothing else; anything else is counted by its reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_studio.console.progress import Progress
from dpo_studio.errors import UsageError
from dpo_studio.evaluation.endpoint import Asking, Endpoint
from dpo_studio.evaluation.kept_replies import Bill, KeptReplies, Request, digest_of
from dpo_studio.evaluation.llm_parameters import check_parameters
from dpo_studio.preferences.turns import Turns
from dpo_studio.sampling.completion import Completion

__all__ = ["Server", "ServerOptions"]

_OURS = {"dpo_studio": "answer"}
_KEPT = "answers of servers.jsonl"
_SEEDS = 2**31
"""Servers take a seed of so many values."""
_MORE = ("tool_calls", "function_call", "audio")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class ServerOptions:
    """How servers are asked for answers."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Parameters sent with every request; None removes one."""
    price: tuple[float, float] | None = None
    """Dollars a million tokens, read and written."""
    asking: Asking = field(default_factory=lambda: Asking(options="--server"))

    def __post_init__(self) -> None:
        if self.price is not None and not all(0 <= price < float("inf") for price in self.price):
            raise UsageError(f"--server-price {self.price} is not a pair of prices")


class Server:
    """One chat model of one server."""

    def __init__(
        self,
        model: str,
        url: str,
        work: Path,
        *,
        options: ServerOptions,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        """
        Raises:
            UsageError: the address or a parameter cannot be used.
        """
        wanted = {"temperature": temperature, "max_tokens": max_new_tokens, "seed": seed} | dict(options.parameters)
        self.parameters = {name: value for name, value in wanted.items() if value is not None}
        check_parameters(self.parameters, "--server-param")
        self.model, self._say = model, say
        endpoint = Endpoint(url, options.asking, say)
        self.url = endpoint.base_url
        self._kept = KeptReplies(work / _KEPT, endpoint, _OURS, options.price, say)

    def answers(
        self, prompts: Mapping[str, Turns], samples: int, progress: Progress
    ) -> tuple[dict[str, list[Completion | str]], Bill]:
        """({prompt key: its samples, each an answer or why there is none}, what all their requests cost).

        Raises:
            JudgeError: the server declines, or stops answering. Replies that came are kept.
        """
        asked = {(key, n): self._request(key, turns, n) for key, turns in prompts.items() for n in range(samples)}
        requests = {request.key: request for request in asked.values()}
        known = self._kept.known(requests)
        missing = [request for key, request in requests.items() if key not in known]
        self._say(self._kept.estimate(missing, len(known)).line(self.model))
        with progress.task(f"answers of {self.model}", len(requests), "answers") as advance:
            advance(len(known))
            self._kept.ask(missing, known, lambda _: advance(1))
        found = {key: [answer_in(known[asked[key, n].key]) for n in range(samples)] for key in prompts}
        return found, self._kept.bill([known[key] for key in requests])

    def _request(self, key: str, turns: Turns, sample: int) -> Request:
        """Each sample of a prompt has a seed of its own; a server that is sent none draws as it likes."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        parameters = dict(self.parameters)
        if isinstance(seed := parameters.get("seed"), int):
            parameters["seed"] = int(digest_of([seed, key, sample])[:8], 16) % _SEEDS
        what = [self.model, parameters, messages, sample]
        about = {"prompt": turns[-1].content[:200], "sample": str(sample)}
        return Request(digest_of(what), {"model": self.model, "messages": messages, **parameters}, about)


def answer_in(record: Mapping[str, Any]) -> Completion | str:
    """The answer in a kept reply, or why it holds none."""
    if record.get("declined"):
        return f"the server declined ({record['declined']})"
    reply = record["reply"]
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return "a reply without a message"
    if any(message.get(name) for name in _MORE):
        return "a tool call"
    if message.get("refusal"):
        return "the server declined (refused)"
    if any(message.get(name) for name in _THOUGHTS):
        return "a thought beside the answer, which pairs do not hold"
    text, why = message.get("content"), choice.get("finish_reason") if isinstance(choice, dict) else None
    if not isinstance(text, str):
        return "a reply whose content is no text"
    if not _is_text(text):
        return "a reply that is not valid Unicode"
    if why not in ("stop", "length"):
        return f"a reply that ended by {json.dumps(why)[:40]}"
    return Completion(text, ended=why != "length", tokens=_tokens(reply, text))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tokens(reply: Mapping[str, Any], text: str) -> int:
    """As the server counted them, else words."""
    usage = reply.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count < 2**31 else len(text.split()) + 1
