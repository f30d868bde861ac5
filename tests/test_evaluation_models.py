"""Judges that are models, against the plain models: a reward model and the policy's implicit reward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from dpo_studio.config import ModelSection
from dpo_studio.errors import ModelError
from dpo_studio.evaluation import reward_model
from dpo_studio.evaluation.implicit import ImplicitReward
from dpo_studio.evaluation.judges import Comparison, Verdict, not_judged
from dpo_studio.evaluation.reward_model import Encoded, load_reward_model
from dpo_studio.models.tokenizer_settings import load_encoder
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.sampling.completion import Completion
from dpo_studio.tokens.chat import ChatEncoder
from dpo_studio.tokens.encode import encode_pairs
from tests.pairs_of_ids import encoded
from tests.policies import plain_peft_on, policy_on
from tests.textbook import plain_logps
from tests.tiny_models import tiny_folder, tiny_model
from tests.tiny_runs import dpo, write_rows
from tests.tiny_tokenizers import VOCABULARY, tiny_tokenizer

PROMPT = (Message("user", "What should I do?"),)
TEXTS = [
    ("Wait for a day.", "No."),
    ("", "The phone fell into the water, so dry it, and bake it as before."),
    ("It spells <|im_end|> and more.", "Wait for a day."),
    ("More time.", "More time.  "),
]
COMPARISONS = [Comparison(PROMPT, *(Completion(text, ended=True, tokens=1) for text in texts)) for texts in TEXTS]


def numbers(verdict: Verdict) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?", verdict.reason)]


def winner_of(a: float, b: float) -> str:
    return "tie" if a == b else "a" if a > b else "b"


def decoder_folder(folder: Path, *, labels: int = 1, **changes: Any) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(**(tiny_model().config.to_dict() | {"num_labels": labels} | changes))
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    tiny_tokenizer("chatml").save_pretrained(folder)
    return folder


def alone(folder: Path, comparison: Comparison) -> list[float]:
    """Each answer through the saved model on its own, its chat written by the tokenizer itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = tiny_tokenizer("chatml")
    rewards = []
    for answer in (comparison.a, comparison.b):
        turns = [{"role": turn.role, "content": turn.content} for turn in comparison.prompt]
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer.text}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        rewards.append((logits[-1] - (logits[0] if len(logits) == 2 else 0)).item())
    return rewards


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("pad", ["no padding token", "its own end of turn", "a token of its own"])
def test_a_reward_model_reads_a_batch_as_it_reads_each_chat_alone(tmp_path: Path, labels: int, pad: str) -> None:
    """Padded on the right to the longest; where the padding token is the end of turn, alone and in a batch alike."""
    end = tiny_tokenizer("chatml").eos_token_id
    pad_id = {"no padding token": None, "its own end of turn": end, "a token of its own": 0}[pad]
    folder = decoder_folder(tmp_path / "rm", labels=labels, pad_token_id=pad_id)
    judge = load_reward_model(str(folder), dtype="float32")
    done: list[int] = []
    verdicts = judge.judge_all(COMPARISONS, done.append)
    for comparison, verdict in zip(COMPARISONS, verdicts, strict=True):
        if "<|im_end|>" in comparison.a.text:  # text that spells a special token stays text, other than in the oracle
            continue
        a, b = alone(folder, comparison)
        assert numbers(verdict) == pytest.approx([a, b], rel=1e-2, abs=1e-3)
        assert verdict.winner == winner_of(a, b)
    assert sum(done) == len(COMPARISONS)
    swapped = judge.judge_all([comparison.swap() for comparison in COMPARISONS])
    opposite = {"a": "b", "b": "a", "tie": "tie"}
    assert [opposite[verdict.winner] for verdict in swapped] == [verdict.winner for verdict in verdicts]


def test_text_cannot_end_its_own_turn(tmp_path: Path) -> None:
    """The spelled `<|im_end|>` is read as the tokenizer writes it when told to split special tokens: several ids."""
    judge = load_reward_model(str(decoder_folder(tmp_path / "rm", pad_token_id=0)), dtype="float32")
    end = tiny_tokenizer("chatml").eos_token_id
    (chat,) = judge.encode([(*PROMPT, Message("assistant", TEXTS[2][0]))])
    assert isinstance(chat, Encoded)
    assert chat.ids.count(end) == 3  # of the system's, the user's and the assistant's turn


def test_an_encoder_without_a_template_gets_two_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in batches of any size the same."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        max_position_embeddings=40,
        initializer_range=0.3,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer("untemplated")
    tokenizer.save_pretrained(tmp_path)
    long = Comparison(PROMPT, Completion("water " * 60, ended=True, tokens=1), COMPARISONS[0].b)
    verdicts = load_reward_model(str(tmp_path), dtype="float32").judge_all([*COMPARISONS, long])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for comparison, verdict in zip(COMPARISONS, verdicts, strict=False):
        with torch.no_grad():
            a, b = (
                model(**tokenizer(PROMPT[0].content, answer.text, return_tensors="pt")).logits.item()
                for answer in (comparison.a, comparison.b)
            )
        assert numbers(verdict) == pytest.approx([a, b], rel=1e-2, abs=1e-3)
    assert verdicts[-1] == not_judged("an answer is too long for the reward model, which reads 40 tokens")
    monkeypatch.setattr(reward_model, "_TOKENS_AT_ONCE", {"cpu": 1})
    one_by_one = load_reward_model(str(tmp_path), dtype="float32").judge_all([*COMPARISONS, long])
    assert [verdict.winner for verdict in one_by_one] == [verdict.winner for verdict in verdicts]


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    """A causal model has no head that gives a reward: transformers would make one up, at random."""
    with pytest.raises(ModelError, match="missing tensors, the first is score"):
        load_reward_model(str(tiny_folder(tmp_path / "causal", vocab_size=VOCABULARY)))
    with pytest.raises(ModelError, match="has 3 labels"):
        load_reward_model(str(decoder_folder(tmp_path / "three", labels=3)))
    folder = decoder_folder(tmp_path / "pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle only"):
        load_reward_model(str(folder))


def test_the_implicit_reward_is_the_textbooks(tiny_base: Path) -> None:
    """beta x (log-prob with PEFT's own LoRA - log-prob without), one sequence at a time, eager attention.

    An answer that never ended is read without the end of turn that the template writes.
    """
    encoder = load_encoder(tiny_base, ModelSection(path=str(tiny_base)))
    cut = Comparison(PROMPT, Completion("More time", ended=False, tokens=2), COMPARISONS[0].a)
    comparisons = [COMPARISONS[0], COMPARISONS[1], cut, Comparison(PROMPT, COMPARISONS[0].a, COMPARISONS[0].a)]
    judge = ImplicitReward("it", policy_on(), encoder, 0.5)
    done: list[int] = []
    verdicts = judge.judge_all(comparisons, done.append)
    assert sum(done) == 4
    assert verdicts[3] == not_judged("both answers have the same token ids")
    turns = [(Message("assistant", c.a.text), Message("assistant", c.b.text)) for c in comparisons[:3]]
    pairs = encode_pairs([Pair(PROMPT, (a,), (b,)) for a, b in turns], encoder, max_length=None).pairs
    last = pairs[2].chosen
    object.__setattr__(last, "ids", last.ids[:-1])
    object.__setattr__(last, "scored", last.scored[:-1])
    oracle = plain_peft_on()
    with torch.no_grad():
        policy = plain_logps(oracle, pairs)
        with oracle.disable_adapter():
            reference = plain_logps(oracle, pairs)
    rewards = 0.5 * (policy - reference)
    for verdict, (a, b) in zip(verdicts, rewards.tolist(), strict=False):
        assert numbers(verdict) == pytest.approx([a, b], abs=0.011)
        assert verdict.winner == winner_of(a, b)


def test_the_implicit_reward_reads_the_tokens_that_were_drawn(tiny_base: Path) -> None:
    """A model may write `bread` as its letters: another chain of tokens, with another log-prob."""
    encoder = load_encoder(tiny_base, ModelSection(path=str(tiny_base)))
    tokenizer = tiny_tokenizer("chatml")
    letters = [i for letter in "bread" for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    other = tokenizer("wait", add_special_tokens=False)["input_ids"]
    assert encoder.decode(letters) == "bread" and len(letters) > len(tokenizer("bread")["input_ids"])
    ours = encoder.vocabulary_digest
    drawn = [
        Completion(encoder.decode(ids), ended=False, tokens=len(ids), ids=tuple(ids), vocabulary=ours)
        for ids in (letters, other)
    ]
    (verdict,) = ImplicitReward("it", policy_on(), encoder, 1.0).judge_all([Comparison(PROMPT, *drawn)])
    pair = encoded(encoder.prompt_ids(PROMPT), letters, other)
    oracle = plain_peft_on()
    with torch.no_grad(), oracle.disable_adapter():
        reference = plain_logps(oracle, [pair])
    with torch.no_grad():
        rewards = plain_logps(oracle, [pair]) - reference
    assert numbers(verdict) == pytest.approx(rewards[0].tolist(), abs=0.011)


@pytest.mark.parametrize("vocabulary", ["another model's", "nobody's"])
def test_the_implicit_reward_reads_tokens_of_another_vocabulary_as_text(tiny_base: Path, vocabulary: str) -> None:
    """Gemma's tokens begin with two more special ones: the same ids are valid and other words. So the rewards are those
    of the same texts without ids."""
    encoder = load_encoder(tiny_base, ModelSection(path=str(tiny_base)))
    theirs = ChatEncoder(tiny_tokenizer("gemma"), eos_ids=[2])
    texts = ("Wait for a day", "The bread does not rise")
    ids = [tiny_tokenizer("gemma")(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert ids != [tiny_tokenizer("chatml")(text, add_special_tokens=False)["input_ids"] for text in texts]
    digest = theirs.vocabulary_digest if vocabulary == "another model's" else ""
    assert digest != encoder.vocabulary_digest
    drawn = [
        Completion(text, ended=False, tokens=len(one), ids=tuple(one), vocabulary=digest)
        for text, one in zip(texts, ids, strict=True)
    ]
    plain = [Completion(text, ended=False, tokens=1) for text in texts]
    judge = ImplicitReward("it", policy_on(), encoder, 1.0)
    verdicts = judge.judge_all([Comparison(PROMPT, *drawn), Comparison(PROMPT, *plain)])
    assert verdicts[0] == verdicts[1]


def test_a_vocabulary_is_the_same_or_another() -> None:
    """A chat template is no part of it: Qwen3's two differ in that alone, and from ChatML in two words."""
    digests = {
        family: ChatEncoder(tiny_tokenizer(family), eos_ids=[]).vocabulary_digest
        for family in ("chatml", "qwen3", "qwen3-no-think")
    }
    assert digests["qwen3"] == digests["qwen3-no-think"] != digests["chatml"]


def test_models_are_judges_on_the_command_line(tiny_run: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The implicit reward agrees with people as often as `dpo score` finds the chosen answer's reward higher."""
    rows = [{"prompt": f"{n}?", "chosen": f"bread {n}", "rejected": "wait " * (n % 5 + 1)} for n in range(12)]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    said = dpo("judge", "check", pairs, "--judge", f"implicit:{tiny_run}", "--dtype", "float32", "--json")
    assert said.code == 0, said.err
    scored = dpo("score", tiny_run, pairs, "--dtype", "float32").lines
    assert f'"agreement": {sum(line["margin"] > 0 for line in scored) / 12}' in said.out
    base = dpo("judge", "check", pairs, "--judge", f"implicit:{tiny_base}")
    assert base.code == 1
    assert "has no adapter" in base.err
    folder = decoder_folder(tmp_path / "rm", pad_token_id=0)
    said = dpo("judge", "check", pairs, "--judge", f"reward:{folder}", "--dtype", "float32")
    assert said.code == 0, said.err
    assert "agreement" in said.out
