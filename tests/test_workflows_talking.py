from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_studio.cli.answer_stream import wrapped
from dpo_studio.console.progress import Progress
from dpo_studio.errors import UsageError
from dpo_studio.preferences.pair import Message
from dpo_studio.workflows.loading import LoadedModel, load_any
from dpo_studio.workflows.talking import Chat, Sampling, answers, generate_answers
from tests.tiny_runs import Said, dpo

HEADING = "/base  /tuned  /new  /help  /quit"
SHORT = ("--max-new-tokens", "12", "--dtype", "float32")


@pytest.fixture(scope="module")
def loaded(tiny_run: Path) -> LoadedModel:
    return load_any(str(tiny_run))


def generate(model: Path, *more: object) -> Said:
    return dpo("generate", model, "--prompt", "What is water?", *SHORT, *more)


def chat(model: Path, *lines: str, more: tuple[object, ...] = ()) -> list[str]:
    """What is answered to each line. An answer of a tiny model may hold line breaks, so it is asked for one by one."""
    said = dpo("chat", model, *SHORT, *more, stdin="".join(f"{line}\n" for line in lines))
    assert said.code == 0, said.err
    assert HEADING in said.err.splitlines()
    return said.out.splitlines()


# dpo generate


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(tiny_run: Path) -> None:
    first = generate(tiny_run, "--seed", 3)
    assert first.code == 0
    assert first.out.strip()
    assert generate(tiny_run, "--seed", 3).out == first.out
    assert len({generate(tiny_run, "--seed", seed).out for seed in range(3, 6)}) == 3


def test_at_temperature_0_the_seed_does_not_matter(tiny_run: Path) -> None:
    assert generate(tiny_run, "--temperature", 0, "--seed", 1).out == generate(tiny_run, "--temperature", 0).out


def test_base_answers_as_the_model_before_training(tiny_run: Path, tiny_base: Path) -> None:
    base = generate(tiny_run, "--base", "--temperature", 0)
    assert base.out == generate(tiny_base, "--temperature", 0).out
    assert base.out != generate(tiny_run, "--temperature", 0).out
    assert generate(tiny_run / "adapter", "--temperature", 0).out == generate(tiny_run, "--temperature", 0).out


def test_the_prompt_may_come_from_stdin(tiny_base: Path) -> None:
    said = dpo("generate", tiny_base, "--prompt", "-", *SHORT, stdin="What is water?")
    assert said.out == generate(tiny_base).out


def test_a_system_turn_is_heard(tiny_base: Path) -> None:
    assert generate(tiny_base, "--system", "Answer in French.").out != generate(tiny_base).out


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_wrong_usage(prompt: str, tiny_base: Path) -> None:
    said = dpo("generate", tiny_base, "--prompt", prompt)
    assert (said.code, said.out) == (2, "")
    assert "the prompt is empty" in said.err


@pytest.mark.parametrize(
    "flags",
    [
        *(("--temperature", "-1"), ("--temperature", "nan"), ("--max-new-tokens", "0"), ("--top-p", "0")),
        *(("--top-p", "1.5"), ("--dtype", "int8"), ("--seed", "x")),
    ],
)
def test_an_impossible_setting_is_wrong_usage(flags: tuple[str, str], tiny_base: Path) -> None:
    said = dpo("generate", tiny_base, "--prompt", "x", *flags)
    assert (said.code, said.out) == (2, "")


def test_text_beyond_ascii_goes_both_ways(tiny_base: Path) -> None:
    assert dpo("generate", tiny_base, "--prompt", "पानी 📱 <|im_end|> \u202e", *SHORT).code == 0


# Streamed and not


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_streamed_text_is_the_text_that_is_not_streamed(loaded: LoadedModel, temperature: float) -> None:
    sampling = Sampling(temperature, max_new_tokens=20, seed=4)
    for tuned in (True, False):
        whole = answers(loaded, [[Message("user", "Why?")]], sampling, tuned=tuned, progress=Progress(quiet=True))
        assert "".join(Chat(loaded, sampling, tuned=tuned).say("Why?")) == whole[0].text


def test_the_python_api_answers_as_the_command_does(tiny_run: Path) -> None:
    (answer,) = generate_answers(str(tiny_run), ["What is water?"], sampling=Sampling(max_new_tokens=12))
    assert f"{answer.text}\n" == dpo("generate", tiny_run, "--prompt", "What is water?", "--max-new-tokens", 12).out


def test_what_only_a_stream_can_do_is_refused_elsewhere(loaded: LoadedModel) -> None:
    """Silently drawing from all tokens would be another answer than was asked for."""
    with pytest.raises(UsageError, match="top_p"):
        answers(loaded, [[Message("user", "x")]], Sampling(top_p=0.5), tuned=True, progress=Progress(quiet=True))


# dpo chat


def test_base_and_tuned_answer_as_generate_does(tiny_run: Path) -> None:
    cold = ("--temperature", 0)
    tuned, base = (generate(tiny_run, *cold, *flag).out.splitlines() for flag in ((), ("--base",)))
    assert chat(tiny_run, "What is water?", more=cold) == tuned
    assert chat(tiny_run, "/base", "What is water?", more=cold) == base
    assert chat(tiny_run, "/base", "/tuned", "What is water?", more=cold) == tuned


def test_a_turn_is_remembered_until_new(loaded: LoadedModel, tiny_run: Path) -> None:
    """The second answer sees the first turn; after /new it does not. Cold, so that only the turns can differ."""
    cold = ("--temperature", 0)
    once = chat(tiny_run, "What is water?", more=cold)
    assert chat(tiny_run, "Hello", "/new", "What is water?", more=cold)[-len(once) :] == once
    assert chat(tiny_run, "Hello", "What is water?", more=cold)[-len(once) :] != once
    talk = Chat(loaded, Sampling(0, 8))
    first = "".join(talk.say("Hello"))
    assert talk.turns == [Message("user", "Hello"), Message("assistant", first)]


def test_an_answer_broken_off_is_not_remembered(loaded: LoadedModel) -> None:
    talk = Chat(loaded, Sampling(0, 8))
    pieces = talk.say("Hello")
    next(pieces)
    pieces.close()
    assert talk.turns == []


@pytest.mark.parametrize("lines", [(), ("",), ("/quit",), ("/quit", "What is water?"), ("/new", "/base")])
def test_the_end_of_the_input_or_quit_ends_quietly(lines: tuple[str, ...], tiny_base: Path) -> None:
    assert chat(tiny_base, *lines) == []


def test_an_unknown_command_is_not_taken_for_a_prompt(tiny_base: Path) -> None:
    said = dpo("chat", tiny_base, stdin="/foo\n")
    assert (said.code, said.out) == (0, "")
    assert "no such command: /foo" in said.err


def test_what_is_loaded_is_said_first_and_help_lists_the_commands(tiny_run: Path, tiny_base: Path) -> None:
    said = dpo("chat", tiny_run, *SHORT, stdin="/help\n")
    assert (said.code, said.out) == (0, "")
    lines = said.err.splitlines()
    first = lines[lines.index(HEADING) - 1]
    assert str(tiny_base) in first and "adapter" in first and "float32 on cpu" in first
    assert all(command in said.err for command in ("/base", "/tuned", "/new", "/quit", "Ctrl-C"))
    assert "no adapter" in dpo("chat", tiny_base, *SHORT).err


def test_ctrl_c_stops_the_answer_and_not_the_session(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after a piece, the next question is answered as if the first had not been asked."""
    whole = Chat.say

    def interrupted(talk: Chat, text: str) -> Iterator[str]:
        if text != "Hello":
            yield from whole(talk, text)
            return
        pieces = whole(talk, text)
        yield next(pieces)
        pieces.close()
        raise KeyboardInterrupt

    cold = ("--temperature", 0)
    alone = chat(tiny_run, "What is water?", more=cold)
    monkeypatch.setattr(Chat, "say", interrupted)
    said = dpo("chat", tiny_run, *SHORT, *cold, stdin="Hello\nWhat is water?\n")
    assert said.code == 0
    assert "(stopped" in said.err
    assert said.out.splitlines()[-len(alone) :] == alone


def test_a_cut_answer_is_marked(tiny_run: Path) -> None:
    """On stderr, so that stdout is the answer alone; two tokens end no answer of this model at temperature 0."""
    loaded = load_any(str(tiny_run))
    chats = [[Message("user", "What is water?")]]
    (answer,) = answers(loaded, chats, Sampling(0, 2), tuned=True, progress=Progress(quiet=True))
    said = dpo("generate", tiny_run, "--prompt", "What is water?", "--temperature", 0, "--max-new-tokens", 2)
    assert ("cut at 2 tokens" in said.err) is (not answer.ended)
    assert not answer.ended
    assert said.out == f"{answer.text}\n"


# dpo generate --prompts


@pytest.mark.parametrize("kind", ["prompts.txt", "prompts.jsonl"])
def test_a_file_of_prompts_is_answered_line_by_line(
    kind: str, loaded: LoadedModel, tiny_run: Path, tmp_path: Path
) -> None:
    asked = ["What is water?", "Why is it wet?", "What is water?"]
    lines = asked if kind.endswith("txt") else [json.dumps({"prompt": prompt}) for prompt in asked]
    (tmp_path / kind).write_text("\n".join([*lines, "", ""]))
    more = ("--prompts", tmp_path / kind, "--max-new-tokens", 12, "--seed", 3)
    said = dpo("generate", tiny_run, *more, "--out", tmp_path / "out.jsonl")
    assert (said.code, said.out) == (0, ""), said.err
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == dpo("generate", tiny_run, *more).lines
    assert [line["prompt"] for line in written] == asked
    chats = [[Message("user", prompt)] for prompt in asked]
    expected = answers(loaded, chats, Sampling(0.7, 12, seed=3), tuned=True, progress=Progress(quiet=True))
    assert [(line["answer"], line["cut"]) for line in written] == [(a.text, not a.ended) for a in expected]


def test_what_is_no_file_of_prompts_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a"}\n{"ask": "b"}\n')
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, words in (("wrong.jsonl", "line 2"), ("empty.txt", "no prompt"), ("none.txt", "no such file")):
        said = dpo("generate", tiny_base, "--prompts", tmp_path / name)
        assert said.code == 1 and words in said.err
    both = dpo("generate", tiny_base, "--prompt", "x", "--prompts", tmp_path / "empty.txt")
    neither = dpo("generate", tiny_base)
    assert (both.code, neither.code) == (2, 2)
    file = tmp_path / "wrong.jsonl"
    assert dpo("generate", tiny_base, "--prompts", file, "--out", file).code == 2
    assert dpo("generate", tiny_base, "--prompts", file, "--top-p", "0.5").code == 2


def test_several_samples_and_both_sides_are_a_line_each(loaded: LoadedModel, tiny_run: Path, tmp_path: Path) -> None:
    """Two prompts, three samples, two sides: twelve lines, of which every side's first sample is the plain answer."""
    asked = ["What is water?", "Why is it wet?"]
    (file := tmp_path / "prompts.txt").write_text("\n".join(asked))
    more = ("--prompts", file, "--max-new-tokens", 12)
    lines = dpo("generate", tiny_run, *more, "--samples", 3, "--both").lines
    order = [(prompt, sample, side) for prompt in asked for sample in range(3) for side in ("base", "tuned")]
    assert [(line["prompt"], line["sample"], line["model"]) for line in lines] == order
    for side, option in (("tuned", ()), ("base", ("--base",))):
        plain = [line["answer"] for line in dpo("generate", tiny_run, *more, *option).lines]
        assert plain == [line["answer"] for line in lines if line["sample"] == 0 and line["model"] == side]
    tuned = [line["answer"] for line in lines if line["model"] == "tuned" and line["prompt"] == asked[0]]
    assert len(set(tuned)) == 3
    both = [line["model"] for line in dpo("generate", tiny_run, *more, "--both").lines]
    assert both == ["base", "tuned"] * 2


@pytest.mark.parametrize(
    "more", [("--samples", "2", "--temperature", "0"), ("--both", "--base"), ("--samples", "0"), ()], ids=str
)
def test_samples_that_mean_nothing_are_wrong_usage(more: tuple[str, ...], tiny_base: Path, tmp_path: Path) -> None:
    (file := tmp_path / "prompts.txt").write_text("a")
    given = ("--prompts", file, *more) if more else ("--prompt", "a", "--samples", "2")
    assert dpo("generate", tiny_base, *given).code == 2


# What a terminal shows


@pytest.mark.parametrize("width", [1, 7, 12, 40])
@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_words_are_not_broken_at_the_end_of_a_line(width: int, cut: int) -> None:
    """However the text arrives: the same words, no line too long but for a word that is, its own line breaks kept."""
    text = "Turn it off  at once,\nthen  dry\n\n  - the incomprehensibilities\n水が 濡れている\tso be it "
    shown = "".join(wrapped((text[at : at + cut] for at in range(0, len(text), cut)), width))
    assert shown.split() == text.split()
    assert [line for line in shown.split("\n") if not line] == [""]
    for line in shown.split("\n"):
        wide = sum(2 if "぀" <= one <= "鿿" else 1 for one in line.rstrip())
        assert wide <= width or len(line.split()) == 1
    assert "".join(wrapped(text, 1000)) == text
