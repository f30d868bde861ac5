"""Small real tokenizers: a trained BPE of 512 tokens and a chat template of each family that chat models come in.

The templates are ours, each reduced to what makes its family different. The vocabulary is trained on the few
sentences below, so a tokenizer is made in milliseconds and is the same on every machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["FAMILIES", "VOCABULARY", "Family", "end_ids", "tiny_tokenizer"]

VOCABULARY = 512

TEXT = """A tiny tokenizer needs a little text to learn from, and these are its sentences.
The phone fell into the water, so dry it, keep it off, and wait for a day before you turn it on again.
What should I do when the bread does not rise? Give it a warmer place and more time, then bake it as before.
How far is the moon? About 384,400 kilometres, which light covers in a little more than one second.
Please answer in two or three short sentences, and say when you do not know something for certain.
You are a helpful assistant. The user asks a question and the assistant answers it.
Take the first train in the morning; there are fewer people then, and the tickets are cheaper.
def double(number): return 2 * number  # the answer is twice the number
"""

CHATML = """{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

INSTRUCT = """{{- bos_token -}}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Turns must alternate user/assistant') }}
{%- endif -%}
{{- ('[INST] ' + m.content + ' [/INST]') if m.role == 'user' else (' ' + m.content + eos_token) -}}
{%- endfor -%}"""

HEADERS = """{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""

TURNS = """{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

THINKING = """{%- set ns = namespace(asked=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- set content = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content -%}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.asked -%}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

NO_THINKING = CHATML.replace(
    "{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}"
)

BARE = """{%- for m in messages -%}
{{- '### ' + m.role + ':\\n' + m.content + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### assistant:\\n' }}{%- endif -%}"""

SWALLOWING = """{%- for m in messages -%}
{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""


@dataclass(frozen=True)
class Family:
    """What one kind of chat model has that another has not."""

    template: str | None
    special: tuple[str | AddedToken, ...]
    """The first is the padding token."""
    eos: str
    bos: str | None = None
    end: str | None = None
    """What ends a turn, where that is not EOS."""
    words: tuple[str, ...] = ()
    """Added tokens that are not special."""
    kind: Literal["bytes", "space first", "space each"] = "bytes"
    """Byte-level BPE, or SentencePiece's: a space goes before the first word of a chat, or of each piece of it."""


def _swallowing(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, rstrip=True)


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_S = ("<unk>", "<s>", "</s>")
_TURN = ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_HEADER = ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_PHI: tuple[str | AddedToken, ...] = (
    "<|endoftext|>",
    *map(_swallowing, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
)

FAMILIES: dict[str, Family] = {
    "chatml": Family(CHATML, _IM, eos="<|im_end|>"),
    "llama2": Family(INSTRUCT, _S, eos="</s>", bos="<s>"),
    "llama2-first": Family(INSTRUCT, _S, eos="</s>", bos="<s>", kind="space first"),
    "llama2-legacy": Family(INSTRUCT, _S, eos="</s>", bos="<s>", kind="space each"),
    "llama3": Family(HEADERS, _HEADER, eos="<|end_of_text|>", bos="<|begin_of_text|>", end="<|eot_id|>"),
    "gemma": Family(TURNS, _TURN, eos="<eos>", bos="<bos>", end="<end_of_turn>"),
    "qwen3": Family(THINKING, _IM, eos="<|im_end|>", words=("<think>", "</think>")),
    "qwen3-no-think": Family(NO_THINKING, _IM, eos="<|im_end|>", words=("<think>", "</think>")),
    "bare": Family(BARE, ("<|endoftext|>",), eos="<|endoftext|>"),
    "phi3": Family(SWALLOWING, _PHI, eos="<|endoftext|>", end="<|end|>"),
    "untemplated": Family(None, ("<|endoftext|>",), eos="<|endoftext|>"),
}
"""By name. All but `bare` and `untemplated` write an end of turn; all but the llama2s and llama3 a newline after it."""


def tiny_tokenizer(family: str = "chatml") -> PreTrainedTokenizerFast:
    """A tokenizer of 512 tokens, made anew so that a test may change it."""
    its = FAMILIES[family]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(family)),
        bos_token=its.bos,
        eos_token=its.eos,
        pad_token=str(its.special[0]),
        unk_token="<unk>" if "<unk>" in its.special else None,
        chat_template=its.template,
    )


def end_ids(family: str = "chatml") -> set[int]:
    """What `generation_config.eos_token_id` of such a model holds: EOS and the end of turn."""
    its = FAMILIES[family]
    tokenizer = tiny_tokenizer(family)
    return {tokenizer.convert_tokens_to_ids(text) for text in (its.eos, its.end or its.eos)}


@lru_cache
def _trained(family: str) -> str:
    """The tokenizer.json of a family, trained."""
    its = FAMILIES[family]
    tokenizer = _byte_level(its) if its.kind == "bytes" else _sentence_piece(its)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in its.words])
    if its.bos is not None:  # as such models do: text encoded without the template begins with BOS
        bos = (its.bos, tokenizer.token_to_id(its.bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{its.bos} $A", special_tokens=[bos])
    return str(tokenizer.to_str())


def _byte_level(its: Family) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, its, VOCABULARY - len(its.words), pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def _sentence_piece(its: Family) -> Tokenizer:
    """BPE over characters with ▁ for the space, and a token for each byte that no character stands for."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    _train(trained, its, VOCABULARY - len(byte_tokens), [])
    model: dict[str, Any] = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate(byte_tokens)}
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    if its.kind == "space first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(_special(its))
    return tokenizer


def _train(tokenizer: Tokenizer, its: Family, size: int, alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=_special(its), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)


def _special(its: Family) -> list[AddedToken]:
    return [
        token if isinstance(token, AddedToken) else AddedToken(token, special=True, normalized=False)
        for token in its.special
    ]
