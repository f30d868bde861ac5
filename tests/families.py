"""Which model families work, each verb against plain transformers and plain PEFT, on tiny random checkpoints.

    python -m tests.families [NAME ...] [--attention auto|sdpa] [--write docs/models.md]

The plain side reads one sequence at a time with eager attention, ids from `apply_chat_template` alone. Of each family:
`train` a fresh adapter; `load` it with plain PEFT, every tensor as saved; `score` the run; `generate` greedily; export
it `merged`; and `learn` from a given adapter, losses and gradient norms against a plain loop of PEFT and AdamW.

Exit code 1 if a number is wrong or a command crashed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from dpo_studio.models.support import fast_path
from tests.tiny_runs import dpo, tiny_rows, write_recipe, write_rows
from tests.tiny_tokenizers import VOCABULARY, end_ids, tiny_tokenizer

__all__ = ["FAMILIES", "FAST", "Family", "Finding", "examine", "table"]

_TESTED = Path(__file__).parents[1] / "src/dpo_studio/models/tested.json"
VERBS = ("train", "load", "score", "generate", "merge", "learn")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 48,
    "n_embd": 48,
    "intermediate_size": 80,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rotary_dim": 8,
    "max_position_embeddings": 384,
    "n_positions": 384,
    "initializer_range": 0.2,  # so that what a token sees changes its log-prob by whole nats
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "query_pre_attn_scalar": 12,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
}
WINDOW: dict[str, Any] = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
_ROPE = {"rope_theta": 10000.0}
_LONG = {
    **_ROPE,
    "rope_type": "longrope",
    "short_factor": [1.0] * 6,
    "long_factor": [4.0] * 6,
    "original_max_position_embeddings": 60,
}
_TEXT = {key: SIZES[key] for key in list(SIZES)[:16] if not key.startswith(("n_", "ffn", "rotary", "vocab_size_"))}
_EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}


@dataclass(frozen=True)
class Family:
    """A model type, what differs from `SIZES`, and what its refusal must say; empty if it is to be right."""

    kind: str
    changes: dict[str, Any] = field(default_factory=dict)
    refused: str = ""


FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "llama, tied": Family("llama", {"tie_word_embeddings": True}),
    "llama, biases": Family("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, rope yarn": Family(
        "llama",
        {
            "rope_parameters": {
                **_ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 60,
            }
        },
    ),
    "llama, rope dynamic": Family(
        "llama", {"rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 4.0}}, "longest position seen so far"
    ),
    "mistral": Family("mistral", {"sliding_window": None}),
    "mistral, window": Family("mistral", {"sliding_window": 9}),
    "mistral3 (wrapper)": Family(
        "mistral3",
        {
            "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
            "vision_config": {**_EYES, "model_type": "pixtral", "head_dim": 8},
        },
    ),
    "ministral": Family("ministral", WINDOW),
    "qwen2": Family("qwen2"),
    "qwen2, window": Family("qwen2", {**WINDOW, "use_sliding_window": True}),
    "qwen3": Family("qwen3"),
    "qwen3_next": Family("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2", WINDOW),
    "gemma3_text": Family("gemma3_text", WINDOW),
    "gemma3_text, bidirectional": Family(
        "gemma3_text", {**WINDOW, "use_bidirectional_attention": True}, "looks at later tokens"
    ),
    "gemma3 (wrapper)": Family(
        "gemma3", {"text_config": {**_TEXT, **WINDOW}, "vision_config": _EYES, "mm_tokens_per_image": 4}
    ),
    "gemma4_text": Family("gemma4_text", WINDOW),
    "phi": Family("phi"),
    "phi3": Family("phi3"),
    "phi3, window": Family("phi3", {"sliding_window": 9}),
    "phi3, long rope": Family("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 60}),
    "granite": Family("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "cohere": Family("cohere"),
    "cohere2": Family("cohere2", WINDOW),
    "olmo": Family("olmo"),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3", WINDOW),
    "gpt_neox": Family("gpt_neox"),
    "gpt_neo": Family(
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gptj": Family("gptj"),
    "bloom": Family("bloom"),
    "mpt": Family("mpt", {"d_model": 48, "n_heads": 4, "n_layers": 2}),
    "stablelm": Family("stablelm", {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}),
    "starcoder2": Family("starcoder2"),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0]}),
    "glm": Family("glm"),
    "glm4": Family("glm4"),
    "nemotron": Family("nemotron"),
    "exaone4": Family("exaone4", WINDOW),
    "ernie4_5": Family("ernie4_5"),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense"),
    "seed_oss": Family("seed_oss"),
    "apertus": Family("apertus"),
    "arcee": Family("arcee"),
    "helium": Family("helium"),
    "diffllama": Family("diffllama"),
    "persimmon": Family("persimmon"),
    "bitnet": Family("bitnet"),
    "cwm": Family("cwm", WINDOW),
    "biogpt": Family("biogpt"),
    "mamba": Family("mamba", {"state_size": 8, "time_step_rank": 4}),
    "llama4_text": Family("llama4_text", {"attention_chunk_size": 16, "intermediate_size_mlp": 80}),
    "qwen3_5_text": Family("qwen3_5_text", _DELTA),
    "qwen3_5 (wrapper)": Family(
        "qwen3_5",
        {
            "text_config": {**_TEXT, **_DELTA},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "depth": 1,
                "num_heads": 2,
                "out_hidden_size": 48,
            },
        },
    ),
    "granitemoehybrid": Family("granitemoehybrid", {"layer_types": ["mamba", "attention"], **_MAMBA}),
    "falcon_h1": Family("falcon_h1", {**_MAMBA, "mamba_d_ssm": 96}),
    "nemotron_h": Family(
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 6,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "bamba": Family("bamba", {"attn_layer_indices": [1], **_MAMBA}),
    "lfm2": Family("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "mamba2": Family("mamba2", {"num_heads": 6, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16}),
    "recurrent_gemma": Family(
        "recurrent_gemma", {"block_types": ["recurrent", "attention"], "attention_window_size": 9, "lru_width": 48}
    ),
    "gpt2": Family("gpt2"),
    "opt": Family("opt", {"word_embed_proj_dim": 48}),
    "falcon": Family("falcon"),
    "falcon, ALiBi": Family("falcon", {"alibi": True}),
    "gpt_oss": Family("gpt_oss", WINDOW),
    "deepseek_v3": Family("deepseek_v3", {"num_hidden_layers": 3, "num_key_value_heads": 4, "head_dim": 8}),
    "phimoe": Family("phimoe"),
    "dory": Family("dory", {}, "more than one product between"),
    "mixtral": Family("mixtral"),
    "qwen3_moe": Family("qwen3_moe"),
    "olmoe": Family("olmoe"),
}
FAST = (
    "mistral, window",
    "qwen2, window",
    "gemma3 (wrapper)",
    "phi3, long rope",
    "cohere",
    "gpt_neox",
    "llama, rope dynamic",
    "mistral3 (wrapper)",
    "bloom",
    "qwen3_next",
)
"""Ten for every test run: six that are computed each in a way of its own, and four that are refused."""


@dataclass
class Finding:
    """What became of a family."""

    name: str
    verbs: dict[str, str] = field(default_factory=dict)
    layout: str = ""
    adapted: str = ""
    fast: str = ""
    """Verb -> "right", or what is wrong or refused in words that begin with "wrong: ", "refused: " or "crash: "."""

    @property
    def state(self) -> str:
        """The worst of what its verbs found."""
        for state, word in (("CRASH", "crash"), ("WRONG", "wrong"), ("PARTLY", "refused")):
            if any(found.startswith(word) for found in self.verbs.values()):
                return "REFUSED" if self.verbs["train"].startswith("refused") and state == "PARTLY" else state
        return "RIGHT"

    @property
    def words(self) -> str:
        """Everything that is not right."""
        return "; ".join(f"{verb} {found}" for verb, found in self.verbs.items() if found != "right")


class _NotRight(Exception):
    pass


@dataclass
class _Bench:
    """One family's base, its pairs as plain ids, and the plain models."""

    folder: Path
    attention: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    ids: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def plain(self, folder: Path | None = None) -> Any:
        folder = folder or self.base
        auto = _auto(type(AutoConfig.from_pretrained(folder)))
        model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return model.requires_grad_(False).eval()

    def logps(self, model: Any) -> torch.Tensor:
        """(P, 2), one sequence at a time."""
        found = [[_logp(model, prompt, answer) for answer in answers] for prompt, *answers in self.ids]
        return torch.stack([torch.stack(pair) for pair in found])

    def command(self, *arguments: object) -> Any:
        said = dpo(*arguments)
        if said.code != 0:
            raise _NotRight("refused: " + " ".join(said.err.split("error:")[-1].split()).replace(f"{self.folder}/", ""))
        return said

    def recipe(self, name: str, **model: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        file = write_recipe(
            folder / "recipe.yaml",
            self.base,
            rows=self.rows,
            model={"attention": self.attention, **model},
            data={"held_out": {"source": str(self.folder / "held.jsonl")}},
            adapter={"rank": 4, "alpha": 8},
            training={
                "pairs_per_step": len(self.rows),
                "max_steps": 3,
                "learning_rate": 3e-3 if model else 3e-2,
                "schedule": "constant",
                "warmup": 0,
            },
            run={"folder": str(folder if name == "run" else folder / "run")},
        )
        if model:  # an adapter that brings its own rank
            recipe = yaml.safe_load(file.read_text())
            del recipe["adapter"]
            file.write_text(yaml.safe_dump(recipe))
        return file


def examine(name: str, folder: Path, attention: str = "auto") -> Finding:
    """Make the family's checkpoint in `folder` and put every verb to the test."""
    bench = _Bench(folder, attention)
    _build(FAMILIES[name], bench)
    finding = Finding(name)
    steps: dict[str, Callable[[_Bench], None]] = {
        "train": _train,
        "load": _load,
        "score": _score,
        "generate": _generate,
        "merge": _merge,
        "learn": _learn,
    }
    for verb, step in steps.items():
        try:
            step(bench)
            finding.verbs[verb] = "right"
        except _NotRight as words:
            finding.verbs[verb] = str(words)
        except Exception as error:
            trace = traceback.extract_tb(error.__traceback__)[-1]
            finding.verbs[verb] = f"crash: {type(error).__name__}: {str(error)[:200]} ({trace.name}, {trace.lineno})"
        if verb == "train":
            if finding.verbs[verb] != "right":
                break
            _note_what_it_got(finding, bench)
    return finding


def _note_what_it_got(finding: Finding, bench: _Bench) -> None:
    finding.layout = yaml.safe_load((bench.run / "recipe.yaml").read_text())["model"]["layout"]
    named = json.loads((bench.run / "adapter" / "adapter_config.json").read_text())
    targets = [*named["target_modules"], *(named.get("target_parameters") or [])]
    finding.adapted = " ".join(sorted({target.rpartition(".")[2] for target in targets}))
    finding.fast = fast_path(AutoConfig.from_pretrained(bench.base).get_text_config(), finding.layout)  # type: ignore[arg-type]


def _build(family: Family, bench: _Bench) -> None:
    kind = type(AutoConfig.for_model(family.kind))
    known = set(getattr(kind, "__dataclass_fields__", SIZES))
    wrapper = "text_config" in family.changes
    sizes = {
        key: value
        for key, value in SIZES.items()
        if key in known and not (wrapper and key[:3] not in ("pad", "bos", "eos"))
    }
    if family.kind == "gemma3n_text":
        sizes.pop("head_dim", None)
    config = kind(**(sizes | family.changes))
    torch.manual_seed(0)
    model = _auto(kind).from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():  # no norm, bias or sink at the value where it does nothing
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter += 0.1 * torch.randn(parameter.shape)
    model.generation_config.eos_token_id = sorted(end_ids())
    model.generation_config.pad_token_id = 0
    model.save_pretrained(bench.base)
    tiny_tokenizer().save_pretrained(bench.base)
    tokenizer = AutoTokenizer.from_pretrained(bench.base)  # for some model types of another class than was saved
    bench.rows = tiny_rows(6)
    bench.rows[1]["chosen"] += " " + " ".join(bench.rows[2]["rejected"].split() * 4)
    bench.rows[3]["rejected"] += " " + " ".join(bench.rows[2]["chosen"].split() * 4)
    write_rows(bench.folder / "held.jsonl", tiny_rows(6, seed=1))
    for row in bench.rows:
        chats = [[{"role": "user", "content": row["prompt"]}]]
        chats += [[*chats[0], {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]
        prompt, *whole = (
            tokenizer.apply_chat_template(chat, add_generation_prompt=len(chat) == 1, return_dict=False)
            for chat in chats
        )
        ends = [len(ids) - ids[::-1].index(tokenizer.eos_token_id) for ids in whole]
        chosen, rejected = (ids[len(prompt) : end] for ids, end in zip(whole, ends, strict=True))
        bench.ids.append((prompt, chosen, rejected))


def _auto(config: type) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto if config in auto._model_mapping else AutoModelForImageTextToText


def _logp(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *answer]])
    logps_TV = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    summed: torch.Tensor = logps_TV.gather(1, ids[0, len(prompt) :, None]).sum()
    return summed


def _apart(found: torch.Tensor, right: torch.Tensor, limit: float, what: str) -> None:
    """Relative, with nothing taken for smaller than a thousandth."""
    off = ((found - right).abs() / right.abs().clamp(min=1e-3)).max().item()
    if not off < limit:
        raise _NotRight(f"wrong: {what} {off:.2g} relative off")


def _train(bench: _Bench) -> None:
    bench.command("train", bench.recipe("run"))


def _policy(bench: _Bench) -> Any:
    return PeftModel.from_pretrained(bench.plain(), bench.run / "adapter").eval()


def _load(bench: _Bench) -> None:
    saved = load_file(bench.run / "adapter" / "adapter_model.safetensors")
    loaded = {
        name.replace(".default.", "."): value for name, value in _policy(bench).state_dict().items() if "lora_" in name
    }
    lost = [name for name in saved.keys() | loaded.keys() if name not in loaded or name not in saved]
    lost += [name for name in saved.keys() & loaded.keys() if not torch.equal(saved[name], loaded[name])]
    if lost:
        raise _NotRight(f"wrong: {len(lost)} tensors are not what plain PEFT loads, the first is {min(lost)}")
    if not any(value.any() for name, value in saved.items() if "lora_B" in name):
        raise _NotRight("wrong: nothing was learned")


@torch.no_grad()
def _score(bench: _Bench) -> None:
    lines = bench.command("score", bench.run, bench.run / "pairs.jsonl", "--dtype", "float32").lines
    for prefix, model in (("", _policy(bench)), ("reference_", bench.plain())):
        found = torch.tensor([[line[f"{prefix}{side}_logp"] for side in ("chosen", "rejected")] for line in lines])
        _apart(found, bench.logps(model), 2e-4, f"{prefix}log-probs")


@torch.no_grad()
def _generate(bench: _Bench) -> None:
    asked = bench.rows[0]["prompt"]
    said = bench.command(
        "generate", bench.run, "--prompt", asked, "--temperature", 0, "--max-new-tokens", 12, "--dtype", "float32"
    )
    prompt = torch.tensor([bench.ids[0][0]])
    told = _policy(bench).generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=2,
        pad_token_id=0,
    )
    text = AutoTokenizer.from_pretrained(bench.base).decode(told[0, prompt.shape[1] :], skip_special_tokens=True)
    if text.strip() != said.out.strip():
        raise _NotRight(f"wrong: {said.out.strip()!r} is not {text.strip()!r}")


@torch.no_grad()
def _merge(bench: _Bench) -> None:
    """Rounded to bf16 as an export is, plain PEFT's merge loses some too: five times that is too much."""
    bench.command("export", bench.run, bench.folder / "merged", "--to", "merged")
    policy = _policy(bench)
    right = bench.logps(policy)
    tokens = torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in bench.ids])
    plain = bench.logps(policy.merge_and_unload().bfloat16().float())
    ours = bench.logps(bench.plain(bench.folder / "merged"))
    off, rounding = (((x - right).abs().sum() / tokens.sum()).item() for x in (ours, plain))
    if off > 5 * rounding + 0.05:
        raise _NotRight(f"wrong: {off:.2g} nats a token off, a plain merge {rounding:.2g}")


def _learn(bench: _Bench) -> None:
    own = json.loads((bench.run / "adapter" / "adapter_config.json").read_text())
    chosen = {key: own[key] for key in ("target_modules", "target_parameters", "exclude_modules") if own.get(key)}
    torch.manual_seed(1)
    student: Any = get_peft_model(bench.plain(), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **chosen))
    trained = [p for p in student.parameters() if p.requires_grad]
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    student.save_pretrained(bench.folder / "start")
    bench.command("train", bench.recipe("learn", adapter=str(bench.folder / "start")))
    metrics = (bench.folder / "learn" / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, metrics) if "grad_norm" in line]
    student.eval()
    with torch.no_grad():
        reference = bench.logps(student)
    optimizer = torch.optim.AdamW(trained, lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    right = []
    for _ in lines:
        optimizer.zero_grad()
        ratios = bench.logps(student) - reference
        loss = -logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
        torch.autograd.backward(loss)
        right.append([loss.item(), torch.nn.utils.clip_grad_norm_(trained, 1.0).item()])
        optimizer.step()
    found = torch.tensor([[line["loss"], line["grad_norm"]] for line in lines])
    _apart(found, torch.tensor(right), 2e-3, "losses or gradient norms")


def table(rows: list[dict[str, str]]) -> str:
    """docs/models.md, of rows as `dpo models` reads them."""
    right = sum(row["right"] == "all verbs" for row in rows)
    lines = [
        "# Which models work",
        "",
        "Written by `python -m tests.families --write docs/models.md`. `dpo models` prints it, and",
        "`dpo models MODEL` says what a given model gets and why. Each family is a tiny random checkpoint",
        "on which every verb was run (train, load in plain PEFT, score, generate, merge, learn from a given",
        "adapter) and every number compared with plain transformers (eager attention, one sequence at a",
        "time) and plain PEFT, in float32 on a CPU. A family that is not listed may work too: the start of",
        "every training and scoring compares log-probs with the plain model's and stops where they differ.",
        "The layouts are explained in [recipe.md](recipe.md); FlexAttention takes heads of 16 or more.",
        "",
        f"{right} of {len(rows)} are right in every verb; what is refused is refused before anything is trained.",
        "",
        "| family | layout | adapted by `all-linear` | fast path (GPU) | right | refused, and why |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row[key] or "-" for key in ("family", "layout", "adapted", "fast", "right"))
        lines.append(f"| {' | '.join(cells)} | {row['refused']} |")
    return "\n".join(lines) + "\n"


def _write(findings: list[Finding], file: Path) -> None:
    """The table in both forms; families that were not run keep the row that they had."""
    known = {row["family"]: row for row in json.loads(_TESTED.read_text())["families"]} if _TESTED.is_file() else {}
    known |= {finding.name: _row(finding) for finding in findings}
    rows = [known[name] for name in FAMILIES if name in known]
    file.write_text(table(rows), encoding="utf-8")
    lines = ",\n".join(json.dumps(row) for row in rows)
    _TESTED.write_text(f'{{"families": [\n{lines}\n]}}\n', encoding="utf-8")


def _row(finding: Finding) -> dict[str, str]:
    """What `dpo models` reads."""
    right = [verb for verb in VERBS if finding.verbs.get(verb) == "right"]
    return {
        "family": finding.name,
        "layout": finding.layout,
        "adapted": finding.adapted,
        "fast": finding.fast,
        "right": "all verbs" if len(right) == len(VERBS) else ", ".join(right),
        "refused": _cause(finding),
    }


def _cause(finding: Finding) -> str:
    words = finding.words.split(" hint:")[0].partition("refused: ")[2] or finding.words
    return words.partition(") ")[2].removesuffix(": DPO Studio cannot train or score it yet") or words


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars of the libraries are not part of the table."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FAMILIES))
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--write", type=Path, metavar="FILE")
    given = parser.parse_args()
    if unknown := set(given.names) - set(FAMILIES):
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    findings = []
    for name in given.names or FAMILIES:
        with tempfile.TemporaryDirectory() as folder, _quiet():
            os.environ["DPO_STUDIO_CACHE"] = str(Path(folder) / "cache")
            findings.append(examine(name, Path(folder), given.attention))
        print(f"{name:28} {findings[-1].state:8} {findings[-1].words[:200]}", flush=True)
        if given.write is not None:
            _write(findings, given.write)
    return int(any(finding.state in ("CRASH", "WRONG") for finding in findings))


if __name__ == "__main__":
    sys.exit(_main())
