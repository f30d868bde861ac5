# ruff: noqa: E501 - a template stands on one line, however long
"""What transformers renders is rendered: constructs of chat templates that a meter could get wrong."""

from __future__ import annotations

import pytest

from dpo_studio.tokens.template import ChatTemplate
from tests.guard_words import words_of
from tests.tiny_tokenizers import tiny_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " How far is it to the sea? "},
    {"role": "assistant", "content": "An hour's walk."},
]
SOURCES = [
    "{% macro line(text) %}{{ text | trim }}{% endmacro %}{% for m in messages %}{% set ns = namespace(seen=false) %}{{ line(m.content) }}{% endfor %}",
    "{% macro line(text, ns) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ text }}{% endmacro %}{% for m in messages %}{% set ns = namespace(n=loop.index) %}{{ line(m.content, ns) }}{{ ns.n }}{% endfor %}",
    "{% macro outer(m) %}{% for k, v in m.items() %}{% set at = namespace(k=k) %}{{ inner(at.k, v) }}{% endfor %}{% endmacro %}{% macro inner(k, v) %}{{ k ~ ':' ~ v }}{% endmacro %}{% for m in messages %}{% set ns = namespace() %}{{ outer(m) }}{% endfor %}",
    "{% block all %}{% macro say(x) %}{{ x }}{{ caller() }}{% endmacro %}{% for m in messages %}{% set ns = namespace(a=1) %}{% call say(m.role) %}{% endcall %}{% endfor %}{% endblock %}",
    "{% macro tree(x, depth=0) %}{% if x is mapping %}{% for k, v in x | dictsort %}{{ '  ' * depth ~ k }}\n{{ tree(v, depth + 1) }}{% endfor %}{% elif x is string %}{{ x }}{% elif x is iterable %}{% for y in x %}{{ tree(y, depth + 1) }}{% endfor %}{% endif %}{% endmacro %}{{ tree(messages) }}",
    "{% for m in messages %}{% set kept = 'out' %}{% generation %}{% set kept = 'in' %}{{ m.content ~ kept }}{% endgeneration %}{{ kept }}{% endfor %}",
    "{{ strftime_now('%Y-%m-%d') }}{{ strftime_now(format='%B') }}{{ strftime_now is defined }}",
    "{{ messages | groupby('role') | map(attribute=0) | join }}{{ messages | batch(2) | list | length }}{{ [1, 2, 3] | slice(2) | list }}{{ 2.567 | round(1) }}{{ 'a b c' | wordcount }}{{ 'a long text indeed' | truncate(8) }}{{ 'a' | center(5) }}|{{ messages[0] | attr('nothing') is defined }}",
    "{{ messages[0].content.isidentifier() }}{{ 'x'.isprintable() }}{{ messages[-1].role.removesuffix('ant') }}{{ messages[1:][0].content.strip().partition(' ')[2] }}",
    "{% set ns = namespace(turns=[], found=none) %}{% for m in messages %}{% set ns.turns = ns.turns + [m] %}{% if m.role == 'user' and ns.found is none %}{% set ns.found = loop.index0 %}{% endif %}{% endfor %}{{ ns.turns[ns.found].content ~ (ns.turns | tojson) }}",
]


@pytest.mark.parametrize("source", SOURCES, ids=words_of)
def test_what_transformers_renders_is_rendered(source: str) -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = source
    theirs = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(source, tokenizer.special_tokens_map).render(CHAT, add_generation_prompt=True) == theirs != ""
