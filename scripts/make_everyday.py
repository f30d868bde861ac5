"""Make `bundled:everyday`, the preference pairs of `dpo demo`, from the bundled model's own answers.

    python scripts/make_everyday.py --model FOLDER [--device cuda] [--pool FILE.json.gz] [--out FILE.jsonl]

FOLDER holds SmolLM2-135M-Instruct as safetensors with its tokenizer. For every prompt of `everyday_prompts.txt` the
model answers in two ways: asked for two or three plain sentences (the request is NOT kept in the row), and as it
ordinarily would. Chosen is the best short answer that a rule finds complete, on the subject and free of invented
contacts. Rejected is one of two faults, so that "shorter" alone is never the lesson:

- in about two rows of three a stub, one sentence where two to four were wanted;
- in the others an ordinary answer that goes on past `LONG_WORDS` words.

With long answers alone as the rejected ones, training fell into answers of a dozen words at every learning rate that
taught it to stop (see the card). A prompt without both answers is left out. `--pool` keeps what was sampled, so that
picking can be changed without sampling again.

Seeded: the same machine and the same versions make the same file. Another machine rounds bf16 otherwise and draws other
answers; the card beside the data names the machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_studio.evaluation.everyday import EverydayRule, content_stems
from dpo_studio.sampling.completion import Completion

HERE = Path(__file__).parent
OUT = HERE.parent / "src/dpo_studio/preferences/bundled/everyday.jsonl"

Message = dict[str, str]
Candidates = dict[str, Any]
"""One prompt with its sampled answers: `short` (with scores) and `ordinary`."""

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
STUB_SHARE = 0.65
"""Share of rows whose rejected answer is a stub. Tuned answers that ended, and that said nothing: 0.99 and 0.95 with no
stubs (learning rate 1e-4, beta 0.1), 0.86 and 0.06 with half (1.7e-4, 0.5), 0.99 and 0.07 with 0.65 (2.9e-4, 0.5)."""
BATCH = 512
HELD_OUT_OVERLAP = 0.5
"""A held-out prompt may share at most this part of its content words with any training prompt (Jaccard)."""
SHOWCASE = "I have dropped my phone in water. Now it is not working what should I do now?"


@dataclass(frozen=True)
class Prompts:
    """The prompts by split, in file order."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


STRUCK = (
    "Who do I call first when a pipe bursts, and what do I do until they come?",
    "I smell gas in the cellar. What do I do?",
    "Is chocolate really bad for dogs?",
    "How do I get a splinter out?",
    "What is the safest way to walk across a frozen lake?",
    "My bank card was swallowed by the machine. What now?",
    "A letter says I have won a prize but must pay a fee first. Is that real?",
    "How do I drive safely in heavy fog?",
    "How do I drive on snow?",
    "The toilet keeps running after I flush. How do I stop it?",
    "How do I compare two phone contracts?",
)
"""Training prompts left out after reading the rows: the answer picked could hurt someone, or is plain nonsense."""


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


def sample_pool(speaker: Speaker, prompts: Sequence[str], seed: int) -> list[Candidates]:
    """All candidates of every prompt: short ones with their scores, ordinary ones."""
    pool: list[Candidates] = [{"prompt": p, "short": [], "ordinary": []} for p in prompts]
    for k, ask in enumerate(ASKS):
        for j, temperature in enumerate(SHORT_TEMPERATURES):
            chats = [asked_for_short(p, ask) for p in prompts]
            answers = speaker.answers(chats, temperature, SHORT_TOKENS, seed + 10 * k + j)
            for row, answer in zip(pool, answers, strict=True):
                row["short"].append({"answer": answer, "ask": k, "temperature": temperature})
    for j, temperature in enumerate(ORDINARY_TEMPERATURES):
        chats = [asked(p) for p in prompts]
        answers = speaker.answers(chats, temperature, ORDINARY_TOKENS, seed + 100 + j)
        for row, answer in zip(pool, answers, strict=True):
            row["ordinary"].append(answer)
    for row in pool:
        score_short(speaker, row)
    return pool


def score_short(speaker: Speaker, row: Candidates) -> None:
    """How likely each short answer is after its prompt, and after a prompt that says nothing."""
    texts = [c["answer"].text or " " for c in row["short"]]
    with_prompt = speaker.mean_logp(asked(row["prompt"]), texts)
    without = speaker.mean_logp(asked("Please go on."), texts)
    for candidate, p, q in zip(row["short"], with_prompt, without, strict=True):
        candidate |= {"logp": p, "gain": p - q}


SMALL_TALK = re.compile(
    r"(?:^|[.!?] )as an?\b|language model|smollm|hugging face|chatbot|\bhow can i (?:help|assist)|\bfeel free\b"
    r"|\blet me know\b|\bi'(?:m|ve|ll)\b|\bi (?:am|can't|cannot|can help|can assist|don't)\b|here(?:'s| is| are)\b"
    r"|\b(?:idiom|joke|puzzle|riddle|classic|advice|metaphor|testament|sentences?|magic\w*)\b",
    re.IGNORECASE,
)
"""The answer speaks of itself, or takes the question for a riddle: this model's favourite ways of missing the point."""
MARKUP = re.compile(r"[\n*#\"“”:\[\]()]|(?:^|\s)\d\.(?:\s|$)")
LEAST_SCORE = -0.9
"""Below it answers drift off the subject: most of the twenty lowest, when read, did."""
VARIED = 0.72
"""Least share of different words among the longer words: below it the answer turns in circles."""


def sentences(text: str) -> list[str]:
    """The text cut after full stops, question and exclamation marks."""
    return re.split(r"(?<=[.!?])\s+", text)


def is_good_short(rule: EverydayRule, prompt: str, answer: Completion, least_words: int = 20) -> bool:
    """Two to four plain sentences on the subject that end by themselves, without any fault the rule knows."""
    text = answer.text
    long_words = [word for word in re.findall(r"[a-z']+", text.lower()) if len(word) > 3]
    return (
        answer.ended
        and least_words <= len(text.split()) <= 60
        and 2 <= len(sentences(text)) <= 4
        and text[-1:] in ".!"
        and len(set(long_words)) >= VARIED * len(long_words)
        and not MARKUP.search(text)
        and not SMALL_TALK.search(text)
        and rule.void(prompt, text) is None
        and not rule.faults(answer)
    )


def pick_chosen(rule: EverydayRule, row: Candidates) -> str | None:
    """The best short answer: likely after its prompt, much less likely after any other; so fluent and to the point."""
    good = [c for c in row["short"] if is_good_short(rule, row["prompt"], c["answer"])]
    best = max(good, key=short_score, default=None)
    if best and short_score(best) > LEAST_SCORE:
        answer: Completion = best["answer"]
        return answer.text
    return pick_opening(rule, row)


def short_score(candidate: Candidates) -> float:
    """Mean log-probability of the answer's tokens, and what the prompt adds to it, in nats."""
    return float(candidate["logp"] + candidate["gain"])


def pick_opening(rule: EverydayRule, row: Candidates) -> str | None:
    """Where no short answer will do: the first sentences of another, if they can stand alone."""
    coolest_first = sorted(row["short"], key=lambda c: float(c["temperature"]))
    for answer in [*(c["answer"] for c in coolest_first), *row["ordinary"]]:
        parts = sentences(answer.text)
        for count in (4, 3, 2):
            opening = " ".join(parts[:count])
            if count < len(parts) and is_good_short(rule, row["prompt"], Completion(opening, True, 0), least_words=25):
                return opening
    return None


def long_answers(row: Candidates) -> list[Completion]:
    """The ordinary answers that go on and on; those that ended by themselves before those that were cut."""
    long = [a for a in row["ordinary"] if len(a.text.split()) >= LONG_WORDS]
    return sorted(long, key=lambda a: not a.ended)


def pick_stub(row: Candidates, chosen: str, from_chosen: bool) -> str | None:
    """One sentence: the chosen answer's own first, or the first of another short answer."""
    firsts = [sentences(c["answer"].text)[0] for c in row["short"] if c["answer"].ended]
    others = [t for t in firsts if 4 <= len(t.split()) <= 18 and t[-1:] in ".!" and t not in chosen]
    own = [sentences(chosen)[0]] if len(sentences(chosen)[0].split()) <= 26 else []
    return next(iter(own + others if from_chosen else others + own), None)


def rows(rule: EverydayRule, pool: Sequence[Candidates], split: str) -> Iterator[dict[str, Any]]:
    """One row a prompt that has both answers."""
    for place, candidates in enumerate(pool):
        chosen = pick_chosen(rule, candidates)
        if chosen is None or candidates["prompt"] in STRUCK:
            continue
        if place * GOLDEN % 1 < STUB_SHARE:
            rejected = pick_stub(candidates, chosen, from_chosen=place % 2 == 1)
        else:
            rejected = next((a.text for a in long_answers(candidates)), None)
        if rejected and rejected != chosen:
            yield {
                "split": split,
                "prompt": asked(candidates["prompt"]),
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }


GOLDEN = 0.6180339887
"""Multiples of the golden ratio, modulo 1, fall evenly: every subject gets its share of both faults."""


def save_pool(pool: Sequence[Candidates], path: Path) -> None:
    """Candidates as gzipped JSON."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(pool, file, default=asdict)


def load_pool(path: Path) -> list[Candidates]:
    """What `save_pool` wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        pool: list[Candidates] = json.load(file)
    for row in pool:
        row["ordinary"] = [Completion(**a) for a in row["ordinary"]]
        row["short"] = [c | {"answer": Completion(**c["answer"])} for c in row["short"]]
    return pool


def main() -> None:
    """Sample (or read the pool), pick, write, and say how many rows there are."""
    parser = argparse.ArgumentParser(description="Make bundled:everyday from the bundled model's own answers.")
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=Path, help="read the sampled answers here; written first if missing")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    prompts = read_prompts(HERE / "everyday_prompts.txt")
    if args.pool and args.pool.exists():
        pool = load_pool(args.pool)
    else:
        pool = sample_pool(Speaker.load(args.model, args.device), prompts.train + prompts.held_out, args.seed)
        if args.pool:
            save_pool(pool, args.pool)
    rule, cut = EverydayRule(), len(prompts.train)
    found = [*rows(rule, pool[:cut], "train"), *rows(rule, pool[cut:], "held_out")]
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), "utf-8")
    trained = sum(row["split"] == "train" for row in found)
    size = args.out.stat().st_size / 1000
    print(f"{trained} training rows and {len(found) - trained} held out in {args.out}, {size:.0f} kB")


if __name__ == "__main__":
    main()
