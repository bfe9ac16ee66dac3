from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jinn.text.template import ChatTemplate, TemplateError

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi there"}]

# One template a line: server-side template injection as known from Flask, Ansible, dbt, SGLang and LiteLLM,
# and templates that would take minutes or gigabytes without the meter.
INJECTIONS = (Path(__file__).parent / "injections.txt").read_text().splitlines()
BOMBS = (Path(__file__).parent / "bombs.txt").read_text().splitlines()

LEAKS = re.compile(
    r"<(class|function|module|bound|built-in|generator|Macro|Loop)|0x[0-9a-f]{6}|root:|uid=|Error\b"
)


def outcome(source: str) -> str:
    try:
        return ChatTemplate(source).render(MESSAGES)
    except TemplateError as error:
        return str(error)


@pytest.mark.parametrize("source", INJECTIONS)
def test_an_injection_reaches_nothing(source: str) -> None:
    text = outcome(source)
    assert not LEAKS.search(text), text
    assert MESSAGES == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi there"}]


def test_the_list_of_injections_is_long_enough() -> None:
    assert len(set(INJECTIONS)) >= 60


def test_bombs_end_in_time_and_in_memory() -> None:
    script = (
        "import json, resource, sys, time\n"
        "from jinn.text.template import ChatTemplate, TemplateError\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "ChatTemplate('{{ 1 }}').render([{'role': 'user', 'content': 'x'}])\n"
        "before, report = peak(), []\n"
        "for source in json.load(sys.stdin):\n"
        "    start = time.perf_counter()\n"
        "    try: size = len(ChatTemplate(source).render([{'role': 'user', 'content': 'hi'}]))\n"
        "    except TemplateError as error: size = str(error)\n"
        "    report.append((source, size, time.perf_counter() - start, peak() - before))\n"
        "print(json.dumps(report))\n"
    )
    child = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script],
        input=json.dumps(BOMBS).encode(),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=120,
    )
    for source, size, seconds, mebibytes in json.loads(child.stdout):
        assert seconds < 2, (source, seconds)  # 0.25 on a quiet machine
        assert mebibytes <= 64, (source, mebibytes)
        assert isinstance(size, str) or size < 1000, source


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 'a' * 10 ** 9 }}", "it does too much work for these messages"),
        ("{{ 2 ** 9999 }}", "an integer of more than 4096 bits"),
        ("{{ 1.5|round(999) }}", "more than 100 places"),
        ("{{ '%999d' % 1 }}", "wider than 99 columns"),
        ("{{ 1|tojson(indent=99) }}", "indents JSON by more than 16"),
        ("{{ messages|map('upper') }}", "uses a function as if it were text"),
        ("{{ 'a'.ljust(3) }}", "access to attribute 'ljust' of 'str' object is unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nests too deeply"),
    ],
)
def test_the_reason_is_told(source: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(reason)):
        ChatTemplate(source).render(MESSAGES)


def test_the_same_template_stops_at_the_same_place_each_time() -> None:
    source = (
        "{% for i in range(99999) %}{% if 'ab' in 'xy' * i %}{{ raise_exception(i) }}{% endif %}{% endfor %}"
    )
    assert len({outcome(source.replace("'ab'", "'xy' * 700")) for _ in range(3)}) == 1


def test_comparing_all_messages_with_all_is_within_the_allowance() -> None:
    source = (
        "{% for m in messages %}{% for n in messages %}{% if m.content == n.content and not loop.first %}"
        "{% endif %}{% endfor %}{% endfor %}done"
    )
    messages = [{"role": "user", "content": f"message number {index}"} for index in range(300)]
    assert ChatTemplate(source).render(messages) == "done"


def test_a_text_that_grows_with_each_message_is_within_the_allowance() -> None:
    step = "{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}"
    source = "{% set ns = namespace(t='') %}" + step + "{{ ns.t }}"
    messages = [{"role": "user", "content": "x" * 1000}] * 500
    assert ChatTemplate(source).render(messages) == "x" * 500_000


EXPRESSIONS = (
    *(
        "messages",
        "messages[0]",
        "messages[0].content",
        "m",
        "m.role",
        "x",
        "ns.a",
        "ns",
        "loop.index",
        "loop",
    ),
    *(
        "'a'",
        "''",
        "7",
        "0",
        "-1",
        "1.5",
        "none",
        "true",
        "[]",
        "{}",
        "(1, 'a')",
        "range(9)",
        "nothing",
        "range(99999)",
    ),
)
FILTERS = (
    *(
        "upper",
        "list",
        "length",
        "first",
        "tojson",
        "join(', ')",
        "string",
        "map('upper')",
        "sort",
        "reverse",
        "int",
    ),
    *(
        "default('d')",
        "items",
        "dictsort",
        "trim",
        "replace('a', 'bb')",
        "indent(3)",
        "select('string')",
        "round(2)",
    ),
    *(
        "unique",
        "max",
        "selectattr('role', 'equalto', 'user')",
        "map(attribute='role')",
        "groupby('role')",
        "safe",
    ),
)
METHODS = (
    "split('a')",
    "strip()",
    "items()",
    "get('role')",
    "join(messages)",
    "upper()",
    "__class__",
    "count('a')",
)


def random_expression(rng: random.Random, depth: int = 0) -> str:
    kind = rng.randrange(9) if depth < 4 else 0
    if kind <= 1:
        return rng.choice(EXPRESSIONS)
    inner = random_expression(rng, depth + 1)
    if kind == 2:
        return f"({inner})|{rng.choice(FILTERS)}"
    if kind == 3:
        return f"({inner}).{rng.choice(METHODS)}"
    if kind == 4:
        return f"({inner})[{random_expression(rng, depth + 1)}]"
    if kind == 5:
        return f"({inner})[{rng.choice(('1:', '::-1', ':2'))}]"
    operator = rng.choice(("+", "*", "~", "**", "%", "-", "//", "==", "in", "not in", "<", "and", "or", "is"))
    other = (
        rng.choice(("defined", "string", "mapping"))
        if operator == "is"
        else random_expression(rng, depth + 1)
    )
    return f"({inner} {operator} {other})"


def random_statement(rng: random.Random, depth: int = 0) -> str:
    kind, value = rng.randrange(9) if depth < 4 else 0, random_expression(rng)
    if kind <= 2:
        return f"{{{{ {value} }}}}"
    body = "".join(random_statement(rng, depth + 1) for _ in range(rng.randint(0, 3)))
    return {
        3: f"{{% if {value} %}}{body}{{% else %}}-{{% endif %}}",
        4: f"{{% for m in {value} %}}{body}{{% endfor %}}",
        5: f"{{% set x = {value} %}}",
        6: f"{{% set ns.a = {value} %}}",
        7: f"{{% set x %}}{body}{{% endset %}}",
        8: f"{{% macro f(x) %}}{body}{{% endmacro %}}{{{{ f({value}) }}}}",
    }[kind]


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_generated_templates_render_or_tell_why(count: int) -> None:
    rng = random.Random(4)
    rendered = 0
    for _ in range(count):
        source = "{% set ns = namespace(a='b') %}" + "".join(
            random_statement(rng) for _ in range(rng.randint(1, 3))
        )
        start = time.perf_counter()
        text = outcome(source)
        assert time.perf_counter() - start < 2, source
        assert not LEAKS.search(text), (source, text)
        rendered += not text.startswith("chat template")
    assert rendered > count / 10
