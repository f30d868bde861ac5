"""Make `bundled:everyday`, the preference pairs of `dpo demo`, from the bundled model's own answers.

    python scripts/make_everyday.py --model FOLDER [--device cuda] [--out FILE.jsonl]

FOLDER holds SmolLM2-135M-Instruct as safetensors with its tokenizer. For every prompt of `everyday_prompts.txt` the
model answers in two ways: asked for two or three plain sentences (the request is NOT kept in the row), and as it
ordinarily would. Chosen is the best short answer that a rule finds complete, on the subject and free of invented
contacts; rejected is an ordinary answer that goes on past `LONG_WORDS` words. A prompt without both is left out.

Seeded: the same machine and the same versions make the same file. Another machine rounds bf16 otherwise and draws other
answers; the card beside the data names the machine.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_studio.evaluation.judges import Completion, EverydayRule, content_stems

HERE = Path(__file__).parent
OUT = HERE.parent / "src/dpo_studio/preferences/bundled/everyday.jsonl"

Message = dict[str, str]

SHORT = " Answer in two or three plain sentences."
ASKS: tuple[tuple[str | None, str], ...] = (
    (None, SHORT),
    ("You are a practical adviser who gives correct advice in two or three plain sentences, without lists.", SHORT),
    (None, " Give one piece of practical advice in two or three short sentences."),
)
"""System turn (None: the template's own) and what is added to the prompt, to get short answers."""
SHORT_TEMPERATURES = (0.2, 0.4, 0.4, 0.6)
"""Cooler than the ordinary answers: what a model of this size says when it is sure is more often to the point."""
ORDINARY_TEMPERATURES = (0.7, 0.7, 0.7, 0.7)
SHORT_TOKENS, ORDINARY_TOKENS = 100, 140
LONG_WORDS = 75
BATCH = 64
HELD_OUT_OVERLAP = 0.5
"""A held-out prompt may share at most this part of its content words with any training prompt (Jaccard)."""
SHOWCASE = "I have dropped my phone in water. Now it is not working what should I do now?"


@dataclass(frozen=True)
class Prompts:
    """The prompts by split, in file order."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_prompts(path: Path) -> Prompts:
    """One prompt a line below `[train]` and `[held_out]`; `#` lines name the subject."""
    found: dict[str, list[str]] = {"train": [], "held_out": []}
    split = "train"
    for line in filter(None, map(str.strip, path.read_text("utf-8").splitlines())):
        if line.startswith("["):
            split = line.strip("[]")
        elif not line.startswith("#"):
            found[split].append(line)
    prompts = Prompts(tuple(found["train"]), tuple(found["held_out"]))
    check_apart(prompts)
    return prompts


def check_apart(prompts: Prompts) -> None:
    """No prompt twice, the showcase prompt nowhere, and no held-out prompt close to a training prompt."""
    everything = [*prompts.train, *prompts.held_out]
    assert len({p.lower() for p in everything}) == len(everything), "a prompt comes twice"
    assert SHOWCASE not in everything, "the demo's showcase prompt must not be trained on"
    for held in prompts.held_out:
        a = content_stems(held)
        for trained in prompts.train:
            b = content_stems(trained)
            assert len(a & b) <= HELD_OUT_OVERLAP * len(a | b), f"too close: {held!r} and {trained!r}"


@dataclass(frozen=True)
class Speaker:
    """The model with its tokenizer: samples answers and says how likely one is."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: str, device: str) -> Speaker:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
        return cls(model.eval(), tokenizer)

    @torch.no_grad()
    def answers(self, chats: Sequence[list[Message]], temperature: float, limit: int, seed: int) -> list[Completion]:
        """One sampled answer a chat."""
        torch.manual_seed(seed)
        return [
            self._completion(row)
            for start in range(0, len(chats), BATCH)
            for row in self._sample(chats[start : start + BATCH], temperature, limit)
        ]

    def _sample(self, chats: Sequence[list[Message]], temperature: float, limit: int) -> list[list[int]]:
        batch = self.tokenizer.apply_chat_template(
            list(chats), add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        ).to(self.model.device)
        ids = self.model.generate(
            **batch, max_new_tokens=limit, do_sample=True, temperature=temperature, top_k=0, top_p=1.0
        )
        rows: list[list[int]] = ids[:, batch["input_ids"].shape[1] :].tolist()
        return rows

    def _completion(self, row: list[int]) -> Completion:
        """Cut the row at its end of turn (which is also what pads it)."""
        end = self.tokenizer.eos_token_id
        ended = end in row
        row = row[: row.index(end) + 1] if ended else row
        return Completion(self.tokenizer.decode(row, skip_special_tokens=True).strip(), ended, len(row))

    @torch.no_grad()
    def mean_logp(self, chat: list[Message], answers: Sequence[str]) -> list[float]:
        """Mean token log-probability of each answer as the assistant's next turn."""
        prompt = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        tails = [self.tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
        width = max(map(len, tails))
        ids_BT = torch.tensor([prompt + t + [0] * (width - len(t)) for t in tails], device=self.model.device)
        logits_BTV = self.model(ids_BT).logits[:, len(prompt) - 1 : -1].float()
        logp_BT: Tensor = logits_BTV.log_softmax(-1).gather(2, ids_BT[:, len(prompt) :, None])[..., 0]
        return [float(row[: len(tail)].mean()) for row, tail in zip(logp_BT, tails, strict=True)]


def asked(prompt: str) -> list[Message]:
    """The prompt as a row holds it: one user turn."""
    return [{"role": "user", "content": prompt}]


def asked_for_short(prompt: str, ask: tuple[str | None, str]) -> list[Message]:
    """The prompt with a request for two or three sentences around it."""
    system, suffix = ask
    turns = [{"role": "system", "content": system}] if system else []
    return turns + asked(prompt + suffix)


def sample_pool(speaker: Speaker, prompts: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """All candidates of every prompt: short ones with their scores, ordinary ones."""
    pool: list[dict[str, Any]] = [{"prompt": p, "short": [], "ordinary": []} for p in prompts]
    for k, ask in enumerate(ASKS):
        for j, temperature in enumerate(SHORT_TEMPERATURES):
            chats = [asked_for_short(p, ask) for p in prompts]
            for row, answer in zip(
                pool, speaker.answers(chats, temperature, SHORT_TOKENS, seed + 10 * k + j), strict=True
            ):
                row["short"].append({"answer": answer, "ask": k, "temperature": temperature})
    for j, temperature in enumerate(ORDINARY_TEMPERATURES):
        chats = [asked(p) for p in prompts]
        for row, answer in zip(
            pool, speaker.answers(chats, temperature, ORDINARY_TOKENS, seed + 100 + j), strict=True
        ):
            row["ordinary"].append(answer)
    for row in pool:
        score_short(speaker, row)
    return pool


def score_short(speaker: Speaker, row: dict[str, Any]) -> None:
    """How likely each short answer is after its prompt, and after a prompt that says nothing."""
    texts = [c["answer"].text or " " for c in row["short"]]
    with_prompt = speaker.mean_logp(asked(row["prompt"]), texts)
    without = speaker.mean_logp(asked("Please go on."), texts)
    for candidate, p, q in zip(row["short"], with_prompt, without, strict=True):
        candidate |= {"logp": p, "gain": p - q}


EMPTY_PHRASES = re.compile(
    r"\bas an ai\b|\blanguage model\b|smollm|hugging face|\bi'm (?:sorry|here|glad|just|not able|unable|happy)\b|\bi am (?:sorry|an)\b"
    r"|\bi (?:can't|cannot|can help|can assist|don't)\b|\bhow can i (?:help|assist)|\bfeel free\b|\blet me know\b|here(?:'s| is| are)\b",
    re.IGNORECASE,
)
"""Small talk about itself: such an answer says less than its length."""
CREATIVE = re.compile(r"^(?:write|tell me|suggest|give me|explain)\b", re.IGNORECASE)


def is_good_short(rule: EverydayRule, prompt: str, answer: Completion) -> bool:
    """Two to four plain sentences on the subject that end by themselves, without any fault the rule knows."""
    text = answer.text
    sentences = re.findall(r"[.!?](?=\s|$)", text)
    return (
        answer.ended
        and 20 <= len(text.split()) <= 60
        and 2 <= len(sentences) <= 4
        and text[-1:] in ".!"
        and not re.search(r"[\n*#\"“”:\[\]()]", text)
        and not EMPTY_PHRASES.search(text)
        and rule.void(prompt, text) is None
        and not rule.faults(answer)
    )


def short_score(candidate: dict[str, Any]) -> float:
    """Likely after this prompt, and much less likely after any other: fluent and to the point."""
    return float(candidate["logp"] + candidate["gain"])


def pick_chosen(rule: EverydayRule, row: dict[str, Any]) -> str | None:
    """The best short answer, or None."""
    good = [c for c in row["short"] if is_good_short(rule, row["prompt"], c["answer"])]
    return max(good, key=short_score)["answer"].text if good else None


def pick_rejected(row: dict[str, Any]) -> str | None:
    """The first ordinary answer that goes on and on; one that ended by itself before one that was cut."""
    long = [a for a in row["ordinary"] if len(a.text.split()) >= LONG_WORDS]
    long.sort(key=lambda a: not a.ended)
    return long[0].text if long else None


def rows(rule: EverydayRule, pool: Sequence[dict[str, Any]], split: str) -> Iterator[dict[str, Any]]:
    """One row a prompt that has both answers."""
    for candidates in pool:
        chosen, rejected = pick_chosen(rule, candidates), pick_rejected(candidates)
        if chosen and rejected:
            yield {
                "split": split,
                "prompt": asked(candidates["prompt"]),
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description="Make bundled:everyday from the bundled model's own answers.")
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    prompts = read_prompts(HERE / "everyday_prompts.txt")
    speaker, rule = Speaker.load(args.model, args.device), EverydayRule()
    lines = []
    for split, asks in (("train", prompts.train), ("held_out", prompts.held_out)):
        pool = sample_pool(speaker, asks, args.seed)
        lines += [json.dumps(row, ensure_ascii=False) for row in rows(rule, pool, split)]
    args.out.write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{len(lines)} rows in {args.out}, {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
