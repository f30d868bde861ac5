"""The LLM judge on a stub server that does what a real one does not do on demand."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from dpo_studio.errors import JudgeError, UsageError
from dpo_studio.evaluation.endpoint import Asking, Endpoint
from dpo_studio.evaluation.judges import Comparison, summary
from dpo_studio.evaluation.llm_judge import LLMJudge
from dpo_studio.evaluation.llm_template import TEMPLATE, filled, read_template
from dpo_studio.preferences.pair import Message
from dpo_studio.sampling.completion import Completion
from tests.stub_server import Reply, Stub, better_says_good, says, stub_server

KEY = "sk-of-the-tests-0123456789"
QUICK = Asking(concurrency=2, timeout_s=5.0, attempts=4, first_wait_s=0.01)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def answer(text: str) -> Completion:
    return Completion(text, ended=True, tokens=1)


def comparison(number: int, a: str = "good", b: str = "bad") -> Comparison:
    return Comparison((Message("user", f"question {number}"),), answer(f"{a} {number}"), answer(f"{b} {number}"))


COMPARISONS = [comparison(0), comparison(1, "bad", "good"), comparison(2, "fine", "bad")]
"""A fair judge says: a, b, tie."""


def judge_at(stub: Stub, folder: Path, asking: Asking = QUICK, **settings: Any) -> LLMJudge:
    said: list[str] = []
    judge = LLMJudge(
        "m", Endpoint(stub.url, asking, said.append), folder / "replies.jsonl", say=said.append, **settings
    )
    object.__setattr__(judge, "heard", said)
    return judge


def winners(judge: LLMJudge, comparisons: list[Comparison] | None = None) -> list[str]:
    return [verdict.winner for verdict in judge.judge_all(comparisons or COMPARISONS)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]


def test_both_orders_are_asked_and_a_fair_judge_is_the_same_in_both(tmp_path: Path) -> None:
    with stub_server(better_says_good) as stub:
        judge = judge_at(stub, tmp_path)
        done: list[int] = []
        verdicts = judge.judge_all(COMPARISONS, done.append)
    assert [verdict.winner for verdict in verdicts] == ["a", "b", "tie"]
    assert [verdict.by_order for verdict in verdicts] == [("a", "a"), ("b", "b"), ("tie", "tie")]
    assert verdicts[0].reason == "Because."
    assert sum(done) == 3
    assert len(stub.requests) == 6
    assert {request["model"] for request in stub.requests} == {"m"}
    assert {request["temperature"] for request in stub.requests} == {0}
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in stub.headers)


def test_a_judge_that_likes_the_first_place_is_found_out(tmp_path: Path) -> None:
    """Both orders answered `1`: every comparison is a tie, and the first place is preferred 6 times of 6."""
    with stub_server(lambda number, request: says("Verdict: 1")) as stub:
        verdicts = judge_at(stub, tmp_path).judge_all(COMPARISONS)
    assert {verdict.winner for verdict in verdicts} == {"tie"}
    assert verdicts[0].reason == "The judge disagrees with itself: A when A came first, B when B did."
    counted = summary(verdicts)
    assert (counted["first_shown_preferred"], counted["orders_disagree"], counted["not_judged"]) == (1.0, 3, 0)


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    """One comparison, two requests. The first is answered at the fifth attempt, after four different failures."""
    trouble = [
        Reply("{}", 429, {"Retry-After": "0"}),
        Reply('{"error": {"message": "overloaded"}}', 500),
        Reply('{"choices": [{"message": ' + " " * 100, drop_after=20),
        Reply("<html>gateway</html>", 200, {"Content-Type": "text/html"}),
    ]

    def serve(number: int, request: dict[str, Any]) -> Reply:
        return trouble[number] if number < 4 else better_says_good(number, request)

    with stub_server(serve) as stub:
        judge = judge_at(stub, tmp_path, Asking(attempts=5, first_wait_s=0.01))
        assert winners(judge, [comparison(0)]) == ["a"]
        assert len(stub.requests) == 6
    assert judge.endpoint.retries == 4
    heard = " ".join(judge.heard)  # type: ignore[attr-defined]
    for why in ("status 429", "status 500", "no connection", "a reply that is not JSON", "4 attempts more"):
        assert why in heard


@pytest.mark.parametrize("silence", [Reply(hang=True), Reply("x" * 1000, drip_s=0.05)], ids=["hangs", "drips"])
def test_a_server_that_keeps_one_waiting_is_asked_again_and_then_left(tmp_path: Path, silence: Reply) -> None:
    """Also one that sends a byte now and then, for which a limit between bytes never comes."""
    quick = Asking(concurrency=2, timeout_s=0.4, attempts=2, first_wait_s=0.01)
    with stub_server(lambda n, request: silence if n == 0 else better_says_good(n, request)) as stub:
        assert winners(judge_at(stub, tmp_path, quick)) == ["a", "b", "tie"]
        assert len(stub.requests) == 7
    with stub_server(lambda n, request: silence) as stub:
        with pytest.raises(JudgeError, match=r"gave no answer in 2 attempts: no answer within 0\.4 s"):
            winners(judge_at(stub, tmp_path / "other", quick))
        assert len(stub.requests) == 2


def test_no_server_at_all_is_said_after_the_attempts(tmp_path: Path) -> None:
    with stub_server(better_says_good) as stub:
        pass
    with pytest.raises(JudgeError, match="gave no answer in 4 attempts: no connection") as caught:
        winners(judge_at(stub, tmp_path))
    assert "replies so far are saved" in str(caught.value)


UNREADABLE: list[tuple[str, Callable[[], Reply], str]] = [
    ("nothing", lambda: says(""), "unparsable"),
    ("null", lambda: says(None), "unparsable"),
    ("prose", lambda: says("I think the first one is better."), "unparsable"),
    ("both", lambda: says("Verdict: 1\nor\nVerdict: 2"), "unparsable"),
    ("the wording back", lambda: says(TEMPLATE), "unparsable"),
    ("only thought", lambda: says("<think>hm\nVerdict: 1"), "unparsable"),
    ("an apology", lambda: says("I'm sorry, I can't judge that."), "refused"),
    ("a refusal", lambda: says(None, refusal="no"), "refused"),
    ("a filter", lambda: Reply('{"error": {"code": "content_filter", "message": "blocked"}}', 400), "refused"),
    (
        *("a policy", lambda: Reply('{"error": {"message": "by our content management policy"}}', 422)),
        "refused",
    ),
    ("too long", lambda: Reply('{"error": {"message": "maximum context length is 4096"}}', 400), "too_long"),
]


@pytest.mark.parametrize(("serve", "counted"), [row[1:] for row in UNREADABLE], ids=[row[0] for row in UNREADABLE])
def test_a_reply_without_a_verdict_is_a_tie_kept_and_counted(
    tmp_path: Path, serve: Callable[[], Reply], counted: str
) -> None:
    with stub_server(lambda number, request: serve()) as stub:
        verdicts = judge_at(stub, tmp_path).judge_all([comparison(0)])
        assert winners(judge_at(stub, tmp_path), [comparison(0)]) == ["tie"]
        assert len(stub.requests) == 2  # it is not asked again
    assert verdicts[0].winner == "tie"
    assert verdicts[0].reason.startswith("Not judged: ")
    assert summary(verdicts)[counted] == 2
    assert sum(summary(verdicts)[kind] for kind in ("unparsable", "refused", "too_long")) == 2
    assert len(lines(tmp_path)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "Verdict: 1",
        "**Verdict:** 1",
        "Good.\n\nFinal verdict: Answer 1.",
        "<think>Verdict: 2</think>\nVerdict: 1",
        "No opening.\nVerdict: 2</think>Verdict: 1",
        "Verdict: 1\n\nVerdict: 1",
        "verdict - 1\n",
    ],
)
def test_a_verdict_is_read_however_it_is_dressed(tmp_path: Path, text: str) -> None:
    with stub_server(lambda number, request: says(text)) as stub:
        (verdict,) = judge_at(stub, tmp_path).judge_all([comparison(0)])
    assert verdict.by_order == ("a", "b")


def test_what_no_further_attempt_can_change_stops_at_once_and_says_nothing_of_the_key(tmp_path: Path) -> None:
    def serve(number: int, request: dict[str, Any]) -> Reply:
        said = f"Incorrect API key provided: {KEY}, that is '{KEY}'" + " and more" * 50
        return better_says_good(number, request) if number < 3 else Reply(json.dumps({"error": {"message": said}}), 401)

    with stub_server(serve) as stub:
        judge = judge_at(stub, tmp_path, Asking(concurrency=1, attempts=9))
        with pytest.raises(JudgeError, match=r"says no \(status 401\).*\[key\]") as caught:
            winners(judge)
        assert len(stub.requests) == 4
    assert KEY[:12] not in str(caught.value)
    assert "OPENAI_API_KEY" in str(caught.value)
    with stub_server(better_says_good) as stub:  # mended: three replies are known, three are asked for
        again = judge_at(stub, tmp_path)
        assert winners(again) == ["a", "b", "tie"]
        assert len(stub.requests) == 3
        assert any("3 of the known replies of m were given by" in text for text in again.heard)  # type: ignore[attr-defined]


def test_an_exhausted_quota_is_not_waited_for(tmp_path: Path) -> None:
    body = '{"error": {"code": "insufficient_quota", "message": "You exceeded your current quota"}}'
    with stub_server(lambda number, request: Reply(body, 429)) as stub:
        with pytest.raises(JudgeError, match="quota"):
            winners(judge_at(stub, tmp_path))
        assert len(stub.requests) == 1


def test_a_key_that_prompt_and_reply_repeat_reaches_no_file(tmp_path: Path) -> None:
    with stub_server(lambda number, request: says(f"I saw {KEY}.\nVerdict: 1")) as stub:
        pasted = Comparison((Message("user", f"is {KEY} a good key?"),), answer("yes"), answer("no"))
        verdicts = judge_at(stub, tmp_path).judge_all([pasted])
    assert KEY not in (tmp_path / "replies.jsonl").read_text()
    assert "I saw [key]." in lines(tmp_path)[0]["reply"]["choices"][0]["message"]["content"]
    assert KEY not in verdicts[0].reason


def test_half_a_line_is_a_reply_that_never_came(tmp_path: Path) -> None:
    """As a full disk leaves it. The next line must not be glued to it."""
    with stub_server(better_says_good) as stub:
        winners(judge_at(stub, tmp_path))
        file = tmp_path / "replies.jsonl"
        file.write_bytes(file.read_bytes()[:-30])
        assert winners(judge_at(stub, tmp_path)) == ["a", "b", "tie"]
        assert len(stub.requests) == 7
        assert winners(judge_at(stub, tmp_path)) == ["a", "b", "tie"]
        assert len(stub.requests) == 7


def test_a_reply_is_known_by_all_it_depends_on(tmp_path: Path) -> None:
    """Another template, parameter or answer is asked anew; the same two answers in swapped places are not."""
    with stub_server(better_says_good) as stub:
        winners(judge_at(stub, tmp_path), [comparison(0)])
        assert winners(judge_at(stub, tmp_path), [comparison(0).swap()]) == ["b"]
        assert len(stub.requests) == 2
        winners(judge_at(stub, tmp_path, template=TEMPLATE + "Be brief."), [comparison(0)])
        winners(judge_at(stub, tmp_path, parameters={"temperature": 1}), [comparison(0)])
        winners(judge_at(stub, tmp_path), [comparison(0, "good", "worse")])
        assert len(stub.requests) == 8


def test_the_same_question_is_asked_once_and_equal_answers_not_at_all(tmp_path: Path) -> None:
    with stub_server(better_says_good) as stub:
        twice = [comparison(0), comparison(0), comparison(1, "same", "same")]
        done: list[int] = []
        verdicts = judge_at(stub, tmp_path).judge_all(twice, done.append)
        assert len(stub.requests) == 2
    assert [verdict.winner for verdict in verdicts] == ["a", "a", "tie"]
    assert verdicts[2].reason == "Both answers are the same."
    assert sum(done) == 3


def test_as_many_requests_at_a_time_as_asked_for(tmp_path: Path) -> None:
    with stub_server(lambda n, request: better_says_good(n, request, wait_s=0.1)) as stub:
        winners(judge_at(stub, tmp_path, Asking(concurrency=3)), [comparison(number) for number in range(6)])
        assert stub.at_once == 3


def test_an_estimate_before_anything_is_asked(tmp_path: Path) -> None:
    """A template of 40 characters and texts of 12, 6 and 5: twice 63 // 4... characters, at 4 a token.

    The template without its places is `Verdict: ? ` (11); prompt `question 0` (10), answers `good 0` (6) and `bad 0`
    (5) make 32 characters a request, 64 in two: 16 tokens read. At most 2 x 50 written. At $2 and $10 a million:
    (16 x 2 + 100 x 10) / 1,000,000 = $0.001032.
    """
    template = "Verdict: ? {prompt}{answer_1}{answer_2}"
    with stub_server(better_says_good) as stub:
        judge = judge_at(stub, tmp_path, template=template, parameters={"max_tokens": 50}, price=(2.0, 10.0))
        cost = judge.estimate([comparison(0), comparison(1, "same", "same")])
        assert stub.requests == []
    assert (cost.requests, cost.known, cost.tokens_in, cost.tokens_out) == (2, 0, 16, 100)
    assert cost.dollars == pytest.approx(0.001032)


def test_the_bill_is_what_the_server_counted(tmp_path: Path) -> None:
    """Two replies of 100 tokens read and 7 written; at $2 and $10 a million (400 + 140) / 1,000,000."""
    with stub_server(better_says_good) as stub:
        judge = judge_at(stub, tmp_path, price=(2.0, 10.0))
        winners(judge, [comparison(0)])
    assert judge.heard[-1] == "2 replies: 200 tokens read, 14 written, $0.0005"  # type: ignore[attr-defined]


def test_where_a_loop_runs_already_it_judges_all_the_same(tmp_path: Path) -> None:
    """As in a notebook."""

    async def cell(judge: LLMJudge) -> list[str]:
        return winners(judge)

    with stub_server(better_says_good) as stub:
        assert asyncio.run(cell(judge_at(stub, tmp_path))) == ["a", "b", "tie"]


def test_text_that_spells_a_place_stays_text() -> None:
    tricky = Comparison((Message("user", "{answer_1}"),), answer("{answer_2} {prompt}"), answer("B"))
    assert filled("{prompt}|{answer_1}|{answer_2}", tricky) == "{answer_1}|{answer_2} {prompt}|B"


def test_a_template_that_cannot_work_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "template.txt"
    file.write_text("{prompt} {answer_1} Verdict: 1 or 2")
    with pytest.raises(UsageError, match=r"has no \{answer_2\}"):
        read_template(file)
    file.write_text("{prompt} {answer_1} {answer_2} Which one?")
    with pytest.raises(UsageError, match="does not say how to answer"):
        read_template(file)
    file.write_text(TEMPLATE)
    assert read_template(file) == TEMPLATE


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost:8000",
        "ftp://host/v1",
        "http:///v1",
        "http://host:99999/v1",
        "http://host:x/v1",
        "http://host:0/v1",
    ],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="not the address of a server"):
        Endpoint(address, QUICK, print)


@pytest.mark.parametrize(
    "address",
    [
        *("https://me:secret@host/v1", "https://secret@host/v1", "https://:secret@host/v1"),
        *("https://host/v1?api_key=secret", "https://host/v1#secret"),
    ],
)
def test_an_address_with_a_secret_in_it_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(UsageError) as caught:
        Endpoint(address, QUICK, print)
    assert "secret" not in str(caught.value)


async def _key_sent(endpoint: Endpoint) -> str:
    async with endpoint.client() as client:
        return str(client.api_key)


def test_the_default_key_goes_nowhere_in_clear_text(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert asyncio.run(_key_sent(Endpoint("http://judge.example/v1", Asking(), said.append))) == "none"
    assert "judge.example gets no key" in said[0]
    assert asyncio.run(_key_sent(Endpoint("https://judge.example/v1", Asking(), said.append))) == KEY
    monkeypatch.setenv("THEIR_KEY", "theirs-123 \n")
    named = Asking(key_variable="THEIR_KEY")
    assert asyncio.run(_key_sent(Endpoint("http://judge.example/v1", named, said.append))) == "theirs-123"


def test_a_key_that_is_missing_or_broken_is_said_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="NO_SUCH_KEY is unset or empty"):
        Endpoint("https://judge.example/v1", Asking(key_variable="NO_SUCH_KEY"), print)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-half\nsecret")
    with pytest.raises(UsageError, match="OPENAI_API_KEY has a character") as caught:
        Endpoint("https://judge.example/v1", Asking(), print)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-half\x7f", "sk-\u00fc", "sk half", "\u2713"])
def test_a_key_is_of_characters_that_a_header_may_hold(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match="OPENAI_API_KEY has a character that is not allowed in a key"):
        Endpoint("https://judge.example/v1", Asking(), print)


def test_without_a_key_there_is_none_to_speak_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    said: list[str] = []
    assert asyncio.run(_key_sent(Endpoint("http://judge.example/v1", Asking(), said.append))) == "none"
    assert said == []


def test_without_the_package_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError, match="needs the openai package") as told:
        asyncio.run(_key_sent(Endpoint("https://judge.example/v1", Asking(), print)))
    assert "judge" in str(told.value.hint)


@pytest.mark.parametrize("choices", [None, [], {}, "x", [7], [None], ["x"]])
def test_a_reply_without_choices_is_asked_for_again_and_said(tmp_path: Path, choices: Any) -> None:
    with stub_server(lambda number, request: Reply(json.dumps({"choices": choices}))) as stub:
        with pytest.raises(JudgeError, match="a reply without choices"):
            judge_at(stub, tmp_path).judge_all([comparison(0)])
        assert len(stub.requests) > 2


@pytest.mark.parametrize("failure", [TimeoutError(), openai.APITimeoutError(httpx2.Request("POST", "http://a/v1"))])
def test_a_time_that_runs_out_is_told_as_one_whoever_notices(failure: Exception) -> None:
    """Our clock for a whole reply, or the client's for a piece of it."""

    class Client:
        async def post(self, *_: object, **__: object) -> None:
            raise failure

    endpoint = Endpoint("http://localhost:1/v1", Asking(attempts=1, timeout_s=7), print)
    with pytest.raises(JudgeError, match="in 1 attempts: no answer within 7 s"):
        asyncio.run(endpoint.complete(Client(), {}))
