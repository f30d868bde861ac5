# ruff: noqa: E501 - a template stands on one line, however long
"""Chat templates that would break out, run for ever or fill the memory are stopped; honest ones write what they did."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken

from dpo_studio.errors import ModelError
from dpo_studio.preferences.pair import Message
from dpo_studio.tokens import metering
from dpo_studio.tokens.chat import ChatEncoder, PairError
from dpo_studio.tokens.template import LONGEST_CHAT, ChatTemplate, TemplateLimit
from tests.guard_words import words_of
from tests.tiny_tokenizers import FAMILIES, tiny_tokenizer

CHAT = [{"role": "user", "content": "How far\nis <b>it</b>? "}, {"role": "assistant", "content": "About 384,400 km."}]
ITSELF = "{% set ns = namespace(x=['a']) %}{% for i in range(40) %}"
TWINS = "{%% set ns = namespace(x=['a'], y=['a']) %%}{%% for i in range(45) %%}{%% set ns.x = %s %%}{%% set ns.y = %s %%}{%% endfor %%}"
COMPARED = "{% if ns.x == ns.y %}{% endif %}"
"""What holds itself twice, 45 times over, is compared with its like in one call that does not end."""
FILTERED = "{%% for i in range(%d) %%}{%% if 1|abs %%}{%% endif %%}{%% endfor %%}x"
SEVEN_MILLION = "{% set x = 'a' * 7000000 %}"
CALLED = "{%% macro m() %%}{%% endmacro %%}{%% for i in range(%d) %%}{%% if m() %%}{%% endif %%}{%% endfor %%}"
SEPARATED = "{{ {'a': 1}|tojson(separators=('%s', ':')) }}"
SECONDS = 3
"""Of thread time, at a tenth of the real limits."""

BREAKING_OUT = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ range.__wrapped__ }}{{ namespace.__globals__['time'].sleep(1) }}",
    "{{ joiner.__init__.__globals__.__builtins__ }}",
    "{% for x in messages|map(attribute='__class__') %}{{ x.mro() }}{% endfor %}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '../../secret' %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ lipsum.__globals__.os.popen('id').read() }}",
    "{{ config }}{{ request.application }}",
    "{{ dict.mro() }}",
    "{{ messages[0].content.encode('utf-8') }}",
    "{{ 'x'.join.__self__.__class__ }}",
    "{% set ns = namespace(__class__=1) %}{{ ns.__class__.__subclasses__() }}",
]
RUNNING_ON = [
    "{% for a in range(999999) %}{% for b in range(999999) %}{% endfor %}{% endfor %}",
    "{% for a in range(999) %}{% for b in range(999) %}{% for c in range(999) %}{{ c }}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(1000000) %}{% endfor %}" * 40,
    "{% for a in range(10 ** 15) %}{% endfor %}",
    "{{ range(10 ** 15)|list }}",
    "{{ range(10 ** 15)|join }}",
    "{{ (10 ** 15) in range(10 ** 15)|map('string') }}{{ range(2000000)|map('upper')|list|length }}",
    "{% macro m(n) %}{{ m(n - 1) }}{{ m(n - 1) }}{% endmacro %}{{ m(60) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m() %}{% call m() %}{% endcall %}{% endmacro %}{{ m() }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "{% for i in [1] recursive %}{% if i == 1 %}{{ loop(range(2, 99999999)) }}{% endif %}{% endfor %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ 7 ** (10 ** 9) }}",
    "{% set ns = namespace(x=7) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set x = ('f' * 4000000)|int(0, 16) %}{{ x // 7 }}",
    "{{ 1|round(999999999) }}",
    "{% set x = 'ab' * 1000000 %}{% for i in range(1000000) %}{% if 'ba' ~ i in x %}{% endif %}{% endfor %}",
    "{% for i in range(1000000) %}{% set x = dict(a=i) %}{% endfor %}",
    "{% for i in range(1000000) %}{% if messages|selectattr('role')|list %}{% endif %}{% endfor %}",
]
FILLING = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ 10 ** 10 * (0, 1) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x|replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
    "{% endfor %}",
    "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = m(ns.x) %}{% endfor %}",
    ITSELF + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    ITSELF + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
    ITSELF + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    ITSELF + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    ITSELF + "{% set ns.x = [ns.x] + [ns.x] %}{% endfor %}{{ ns.x == ns.x|list }}",
    ITSELF + "{% set ns.x = [ns.x] * 2 %}{% endfor %}{{ ns.x|string }}",
    ITSELF + "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson(indent=9) }}",
    TWINS % (("[ns.x, ns.x]", "[ns.y, ns.y]")) + COMPARED,
    TWINS % (("(ns.x, ns.x)", "(ns.y, ns.y)")) + COMPARED,
    TWINS % (("{1: ns.x, 2: ns.x}", "{1: ns.y, 2: ns.y}")) + COMPARED,
    TWINS % (("dict(a=ns.x, b=ns.x)", "dict(a=ns.y, b=ns.y)")) + COMPARED,
    TWINS % (("[ns.x] * 2", "[ns.y] * 2")) + COMPARED,
    TWINS % (("[ns.x] + [ns.x]", "[ns.y] + [ns.y]")) + COMPARED,
    "{% set ns = namespace() %}{% macro m() %}{% set ns.v = varargs %}{% endmacro %}{% for i in range(40) %}"
    "{{ m(ns.v, ns.v) }}{% endfor %}{{ ns.v }}",
    "{% set a = namespace() %}{% set b = namespace(x=a, y=a) %}{{ [b, b] }}",
    "{% set ns = namespace() %}{% set ns.self = ns %}{{ ns }}",
    "{% set ns = namespace() %}{{ ns|string }}",
    "{{ [{'a': 1}.items()] * 100 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%.9999999999f' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ 'a'.zfill(10 ** 10) }}",
    "{{ '\t'.expandtabs(10 ** 10) }}",
    "{{ 'a'|center(10 ** 10) }}",
    "{{ [1]|batch(10 ** 10, 0)|list }}",
    "{{ [1]|slice(10 ** 10)|list }}",
    "{{ 'a'|indent(10 ** 10) }}",
    "{{ 'a\nb'|indent('x' * 7000000) }}",
    "{{ {'a': 1}|tojson(indent=10 ** 10) }}",
    "{{ {'a': 1}|tojson(separators=('x' * 7000000, 'y')) }}",
    "{{ ('a' * 4000).replace('', 'b' * 4000) }}",
    "{{ ('a' * 4000)|replace('a', 'b' * 4000) }}",
    "{{ ('b' * 4000).join(['a'] * 4000) }}",
    "{{ (['a'] * 4000)|join('b' * 4000) }}",
    "{{ ('a' * 7000000)|list|length }}",
    "{% set x = 'a' * 7000000 %}{{ [x, x] }}",
    "{% set x = 'a' * 7000000 %}" + "{{ x }}" * 40,
    "{% set x = 'a' * 7000000 %}" + "{% set y %}{{ x[1:] }}{% endset %}" * 40,
    "{% set x = 'a' * 7000000 %}" + "{% if x[1:] == x[:-1] %}{% endif %}" * 40,
    "{% macro m() %}{% for i in range(999999) %}" + "a" * 9000 + "{% endfor %}{% endmacro %}{% set x = m() %}",
    "{% for i in range(999999) %}" + "a" * 9000 + "{% endfor %}",
    "{% macro m() %}" + "a" * 200000 + "{% endmacro %}{% for i in range(99999) %}{% set x = m() %}{% endfor %}",
    "{% for x in ['a' * 1000000] * 7 %}{{ (messages|map(attribute='role')|list * 9000)|map('replace', 'u', x)|list }}"
    "{% endfor %}",
    "{{ lipsum(n=99999999) }}",
    "{{ strftime_now('%9999999999d') }}",
    "{{ strftime_now('%d' * 9999) }}",
    "{{ raise_exception('x' * 7000000) }}",
]
NO_TEMPLATE = [
    "{% if %}",
    "{{ x",
    "{% endfor %}",
    "{#" * 100_000,
    "{{ " + "(" * 100_000,
    "{{ " + "-" * 100_000 + "1 }}",
    "{{ x" + ".a" * 100_000 + " }}",
    "{{ " + "[" * 200 + "]" * 200 + " }}",
    "{% if x %}" * 5_000 + "{% endif %}" * 5_000,
    "{% for x in y %}" * 300 + "{% endfor %}" * 300,
    "{{ " + "9" * 100_000 + " }}",
    "a" * 256_001,
]


def render(source: str) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(CHAT, add_generation_prompt=True)


@pytest.fixture
def a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "BUDGET", metering.Budget(characters=20_000_000, seconds=0.5))


@pytest.mark.usefixtures("a_tenth")
@pytest.mark.parametrize("source", [*BREAKING_OUT, *RUNNING_ON, *FILLING], ids=words_of)
def test_hostile_templates_are_stopped_in_time(source: str) -> None:
    """Each raises, or writes what holds nothing of the machine (jinja writes what is not there as nothing)."""
    before = time.thread_time()
    try:
        text = render(source)
    except (TemplateError, ModelError, TypeError, ValueError, ArithmeticError) as error:
        text = ""
        assert "memory" not in str(error), "the machine's limit stopped it, not ours"
    assert time.thread_time() - before < SECONDS
    assert len(text) < 1000
    assert not any(word in text for word in ("root:", "uid=", "<class", "<module", "object at 0x", "<function"))
    assert len(CHAT) == 2 and CHAT[0]["content"].startswith("How far")


@pytest.mark.parametrize("source", NO_TEMPLATE, ids=words_of)
def test_what_is_no_template_is_refused_before_it_runs(source: str) -> None:
    before = time.thread_time()
    with pytest.raises(ModelError, match="the chat template") as refused:
        ChatTemplate(source, {})
    assert time.thread_time() - before < SECONDS
    assert len(refused.value.message) < 600


def test_the_kernel_agrees_that_little_memory_is_taken() -> None:
    """A third of those that make much, one after another, in a process that is allowed 3 GB and two minutes of CPU."""
    code = (
        "from tests.test_guards_template import FILLING, render\n"
        "for source in FILLING[::3]:\n"
        "    try: render(source)\n"
        "    except MemoryError: raise SystemExit(f'memory: {source[:80]}')\n"
        "    except Exception: pass\n"
        "print('all')"
    )

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (120, 120))

    done = subprocess.run([sys.executable, "-c", code], preexec_fn=limited, capture_output=True, text=True)
    assert done.stdout == "all\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("just", "over"),
    [
        ("{{ ('a' * 8000000)|length }}", "{{ ('a' * 8000001)|length }}"),
        ("{{ ('a' * 7999999 ~ 'b')|length }}", "{{ ('a' * 7999999 ~ 'bc')|length }}"),
        ("{{ ('a' * 7999999 + 'b')|length }}", "{{ ('a' * 7999999 + 'bc')|length }}"),
        ("{{ (2 ** 2048) > 0 }}", "{{ (2 ** 2049) > 0 }}"),
        ("{{ (2 ** 2000) * (2 ** 2000) > 0 }}", "{{ (2 ** 2047) * (2 ** 2049) > 0 }}"),
        ("{{ ('f' * 1024)|int(0, 16) > 0 }}", "{{ ('f' * 1025)|int(0, 16) > 0 }}"),
        ("{{ range(1000000)|length }}", "{{ range(1000001)|length }}"),
        ("{{ '%999d' % 1 }}", "{{ '%1000d' % 1 }}"),
        ("{{ {'a': 1}|tojson(indent=16) }}", "{{ {'a': 1}|tojson(indent=17) }}"),
        ("{{ {'a': 1}|tojson(indent='%s') }}" % (" " * 16), "{{ {'a': 1}|tojson(indent='%s') }}" % (" " * 17)),
        ("{{ ('b' * 799990).join(['a'] * 10)|length }}", "{{ ('b' * 799991).join(['a'] * 10)|length }}"),
        (SEPARATED % ("," * (99 - 3 * metering.ITEM)), SEPARATED % ("," * (100 - 3 * metering.ITEM))),
        ("{{ " + "[0] + " * 9 + "[messages[0].role] }}", "{{ " + "[" * 33 + "messages" + "]" * 33 + " }}"),
        ("{{ strftime_now('%d' * 50)|length }}", "{{ strftime_now('%d' * 50 ~ 'x')|length }}"),
        ("{{ strftime_now('%20d')|length }}", "{{ strftime_now('%200d')|length }}"),
        ("{{ ('a' * 7999996)|indent(4)|length }}", "{{ ('a' * 7999997)|indent(4)|length }}"),
        ("{{ ('\\n' * 999999)|indent(7)|length }}", "{{ ('\\n' * 1000000)|indent(7)|length }}"),
        ("{{ ('a' * 7999996)|indent('....')|length }}", "{{ ('a' * 7999996)|indent('.....')|length }}"),
        ("a" * 256_000, "a" * 256_001),
        *(
            (SEVEN_MILLION + once + often * 27 + "x", SEVEN_MILLION + once + often * 28 + "x")
            for once, often in (
                ("", "{% if x|tojson %}{% endif %}"),
                ("", "{% if x[1:] %}{% endif %}"),
                ("", "{% if x.startswith('b') %}{% endif %}"),
                ("{% macro m(a) %}{% endmacro %}", "{% if m(x) %}{% endif %}"),
            )
        ),
        (
            "{% set x = 'a' * 1999900 %}{% set y = [x, x] + [x, x] %}x",
            "{% set x = 'a' * 1999900 %}{% set y = [x, x, x] + [x, x] %}x",
        ),
        (FILTERED % 485000, FILTERED % 500000),  # each is a step of its own
        (CALLED % 33000 + "x" * 5000, CALLED % 34500 + "x" * 5000),  # a call costs as much as the template is long
        (
            "{% for i in range(950000) %}{% endfor %}x",
            "{% for i in range(999999) %}{% endfor %}{% for i in [1,2] %}{% endfor %}",
        ),
    ],
    ids=words_of,
)
def test_limits_stand_where_they_are_said_to(just: str, over: str) -> None:
    """What is just within one is written; the next larger is refused."""
    assert render(just)
    with pytest.raises((TemplateLimit, ModelError)):
        render(over)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "it is nested too deep, or calls itself without end"),
        ("{{ 'a' * 10 ** 9 }}", "it makes a value of 1,000,000,000 characters"),
        ("{{ [messages] * 10 ** 9 }}", "it makes a value of"),
        (
            "{% for i in range(999999) %}{% endfor %}",
            "it makes more than 200,000,000 characters, or takes 1,000,000 steps",
        ),
        ("{{ ('a' * 7000000).replace('a', 'b' * 7000000) }}", "it makes a value of 49,000,000,000,000 characters"),
        ("{{ ('a' * 7000000)|replace('a', 'b' * 7000000) }}", "it makes a value of 49,000,000,000,000 characters"),
        ("{{ ('b' * 7000000).join(['a'] * 300000) }}", "it makes a value of 2,100,002,700,008 characters"),
        ("{{ (['a'] * 300000)|join('b' * 7000000) }}", "it makes a value of 2,100,002,700,008 characters"),
        ("{{ ('%999d' * 9000) % ((1,) * 9000) }}", "it makes a value of 9,189,008 characters"),
        ("{{ 'a'.ljust(3) }}", "it calls str.ljust"),
        ("{{ range(3).count(1) }}", "it calls range.count"),
        ("{{ '{}'.format(3) }}", "it calls 'format'"),
        ("{{ [namespace()] }}", "it puts a Namespace where values go"),
        ("{{ namespace()|replace('a', 'b') }}", "it puts a Namespace where values go"),
        (
            ITSELF + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
            "it makes a value of more than 8,000,000 characters",
        ),
        ("{{ " + "[" * 33 + "messages" + "]" * 33 + " }}", "it makes a value 32 deep"),
        ("{{ ('f' * 9999)|int(0, 16) }}", "it makes a number of thousands of digits"),
        ("{{ 2 ** 9999 }}", "it raises a number to a power of thousands of digits"),
        ("{{ 2 ** 2000 * 2 ** 2000 * 2 ** 2000 }}", "it makes a number of thousands of digits"),
        ("{{ '%5000d' % 1 }}", "it pads a text to thousands of characters"),
        ("{{ {}|tojson(indent=99) }}", "it writes JSON with more than 16 spaces a level"),
        ("{{ strftime_now('x' * 101) }}", "it writes the date in more than 100 characters"),
        ("{{ ' '.join(messages|map('string')) }}", "it joins something that is not a list: put `|list` before"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{% if %}", "the chat template cannot be used: Expected an expression"),
        ("{{ " + "(" * 100_000 + " }}", "the chat template cannot be used: it is nested too deep"),
        ("a" * 256_001, "the chat template has 256,001 characters, over 256,000"),
    ],
    ids=words_of,
)
def test_what_was_wrong_is_said(source: str, words: str) -> None:
    with pytest.raises((TemplateError, ModelError)) as refused:
        render(source)
    assert str(refused.value).startswith(words) and len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        ("banana", "an", "xyz"),
        ("banana", "", "-"),
        ("", "", "ab"),
        ("aaa", "a", "a"),
        ("banana", "z", "long"),
        ("aaaa", "aa", "bcd"),
    ],
)
def test_the_length_of_what_is_replaced_is_known_before(text: str, old: str, new: str) -> None:
    assert metering.length_replaced(text, old, new) == len(text.replace(old, new))


def test_what_is_replaced_by_less_costs_what_it_was() -> None:
    assert metering.length_replaced("banana", "ana", "") == 6
    assert [metering.length_replaced("banana", *odd) for odd in ((1, "x"), ("n", None), (None, 2))] == [6, 6, 6]


def test_a_template_s_own_words_are_cut() -> None:
    with pytest.raises(TemplateError) as refused:
        render("{{ raise_exception('x' * 9000) }}")
    assert str(refused.value) == "x" * 400


def test_time_is_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million steps of a few microseconds pass, the same with a search of 2 MB in each do not."""
    monkeypatch.setattr(metering, "BUDGET", metering.Budget(seconds=0.2))
    slow = "{% set x = 'ab' * 1000000 %}{% for i in range(900000) %}{% if 'ba' ~ i in x %}{% endif %}{% endfor %}"
    with pytest.raises(TemplateLimit, match=r"takes more than 0\.2 seconds"):
        render(slow)


HONEST = [
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}{{ loop.index0 }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}{{ loop.previtem is defined }}"
    "{{ (loop.nextitem or m).role }}{{ loop.revindex }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest if m.role in ['user', 'assistant'] %}{{ m.content.split('<b>')[-1].lstrip() }}{% else %}-{% endfor %}",
    "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.last = m.role %}"
    "{% endfor %}{{ ns.n }}{{ ns.last ~ '!' ~ ns.n }}",
    "{% macro turn(m, end='x') -%}{{ m.role|upper }}: {{ m.content|tojson }}{{ end }}{{ caller() if caller }}{%- endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ turn(m, end='y') }}{% call turn(m) %}!{% endcall %}{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% continue %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set x %}{% for m in messages %}{{ m.role }},{% endfor %}{% endset %}{{ x | replace(',', ';') }}{{ x.count(',') }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | rejectattr('role', 'eq', 'user') | first | tojson(indent=2) }}",
    "{{ {'b': [1, 2.5, none, true], 'a': 'é<'} | tojson }}{{ {'b': 1, 'a': 2} | dictsort }}{{ dict(a=1).items() | list }}",
    "{{ {'b': 'é', 'a': [1, 2]} | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true, indent='-') }}",
    "{{ 'banana'.replace('an', 'xyz', 1) }}{{ 'banana' | replace('an', 'xyz', 1) }}{{ {1: 'a'}.get(1) }}{{ [3, 4].index(4) }}",
    "{{ '%s has %03d' % (messages[0].role, 7) }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 2 ** -1 }}{{ 'ab' * 3 }}{{ [1] + [2] }}{{ (1,) * 2 }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[0].get('name', 'no') }}{{ messages[::-1] }}",
    "{{ tools is none }}{{ tools is defined }}{{ nothing is defined }}{{ nothing | default('d') }}[{{ nothing }}]"
    "{{ documents }}{{ add_generation_prompt }}",
    "{% set j = joiner('|') %}{% for m in messages %}{{ j() }}{{ m.role.title() }}{% endfor %}",
    "{{ 'a\n b' | indent(2) }}{{ 'abc'[1:] }}{{ 'abc'.upper().startswith('A') }}{{ ' x '.strip() }}{{ 'a,b'.split(',') }}"
    "{{ '-'.join(['a', 'b']) }}{{ 'abc'.replace('b', '') }}{{ 'x'.rjust is defined }}{{ 'a b'.title() }}",
    "{% for i in range(3) %}{{ i }}{% for j in range(1, 7, 2) %}{{ j }}{% endfor %}{% endfor %}{{ range(3) | list }}",
    "{% for m in [{'n': 'a', 'c': [{'n': 'b', 'c': []}]}] recursive %}{{ m.n }}{{ loop(m.c) }}{% endfor %}",
    "{{ messages | length }}{{ [3, 1, 2] | sort }}{{ [1, 1] | unique | list }}{{ 'A' | lower }}{{ '5' | int + 1 }}{{ [1, 2] | max }}"
    "{{ messages | last | string }}{{ '<' | e }}{{ '<' | safe }}{{ [1, 2] | reverse | list }}{{ none | default('x', true) }}",
    "{{ 'a\n\n b' | indent }}{{ 'a\n\n b' | indent('> ', true) }}{{ 'a\n\n b' | indent(1, blank=true) }}{{ [1, 2] | join }}"
    "{{ messages | join('-', attribute='role') }}{{ dict({'a': 1}, b=2) }}{{ dict([('a', 1)]).a }}{{ namespace({'a': 1}, b=2).a }}",
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n {{ m.role }}\n  {%+ endif %}\n\n{% endfor %}\n .\n",
    "{% filter upper %}{% for m in messages %}{{ m.role }}{% endfor %}{% endfilter %}{% block b %}in{% endblock %}{{ self.b() }}",
]


@pytest.mark.parametrize("source", HONEST, ids=words_of)
@pytest.mark.parametrize("open_answer", [False, True])
def test_honest_templates_write_what_transformers_writes(source: str, open_answer: bool) -> None:
    """The oracle is `apply_chat_template`, which runs them in jinja's own sandbox."""
    tokenizer = tiny_tokenizer("llama2")
    tokenizer.chat_template = source
    theirs = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=open_answer)
    ours = ChatTemplate(source, tokenizer.special_tokens_map).render(CHAT, add_generation_prompt=open_answer)
    assert ours == theirs != ""


def test_nothing_is_formed_while_compiling() -> None:
    """No meter runs then: this one, put where a rendering's would be, has paid for nothing."""
    meter = metering.Meter()
    before = meter._left
    token = metering.METER.set(meter)
    template = ChatTemplate("{{ 'a'|upper }}{{ 'b' ~ 'c' }}{{ [1, 2]|join }}", {})
    metering.METER.reset(token)
    assert meter._left == before
    assert template.render(CHAT, add_generation_prompt=False) == "Abc12"


def test_special_tokens_are_text_in_lists_too() -> None:
    tokens = {"eos_token": AddedToken("</s>"), "extra": [AddedToken("<a>"), "<b>"]}
    template = ChatTemplate("{{ eos_token }}{{ extra[0] ~ extra[1] }}{{ extra|length }}", tokens)
    assert template.render(CHAT, add_generation_prompt=False) == "</s><a><b>2"


def encoder_with(template: Any) -> ChatEncoder:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer, eos_ids=[])


@pytest.mark.usefixtures("a_tenth")
@pytest.mark.parametrize("source", [RUNNING_ON[0], FILLING[0], BREAKING_OUT[0]], ids=["time", "size", "way out"])
def test_a_tokenizer_with_such_a_template_is_refused_with_a_way_on(source: str) -> None:
    with pytest.raises(ModelError, match="the chat template") as refused:
        encoder_with(source)
    assert "model.chat_template: FILE" in str(refused.value.hint)


@pytest.mark.usefixtures("a_tenth")
def test_a_template_that_turns_on_one_prompt_ends_everything_there() -> None:
    """Otherwise sixty thousand pairs would each take the whole of the limit."""
    encoder = encoder_with(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% if 'moon' in m.content %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
    )
    assert encoder.prompt_ids([Message("user", "the sun")])
    with pytest.raises(ModelError, match="the chat template is stopped"):
        encoder.prompt_ids([Message("user", "the moon")])


def test_a_chat_that_no_model_could_read_is_one_pair_refused() -> None:
    """Four million characters pass every honest template; one more is the row's fault, not the template's."""
    encoder = encoder_with(FAMILIES["chatml"].template)
    with pytest.raises(PairError, match="4,000,001 characters"):
        encoder.prompt_ids([Message("user", "a" * (LONGEST_CHAT + 1))])


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].template])
def test_the_longest_chat_passes_every_family_s_template(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    template = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
    long = [{"role": ("user", "assistant")[turn % 2], "content": "a" * (LONGEST_CHAT // 1000)} for turn in range(1000)]
    assert len(template.render(long, add_generation_prompt=True)) > LONGEST_CHAT


def test_of_several_templates_the_default_one_is_taken() -> None:
    several = {"default": FAMILIES["chatml"].template, "tool_use": "{{ raise_exception('no') }}"}
    assert encoder_with(several).prompt_ids([Message("user", "hello")])
    with pytest.raises(ModelError, match="several chat templates, none the default"):
        encoder_with({"a": "x", "b": "y"})
