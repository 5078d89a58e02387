"""Chat templates that never end, or take all memory; and the templates of common families, which are as before."""

import time

import pytest

from fusionroute.runtime import InputError, bounded_templates
from fusionroute.runtime.chat import render

MESSAGES = [{"role": "user", "content": "x"}]
CHARACTERS, ITEMS = "it makes more than 8388608 characters of text", "it makes more than 4096 items"
MANY = "it makes more than 8388608 items or characters"
BITS = "it makes more than 4096 bits of a number"
ALTOGETHER = "it makes more than 134217728 characters and items altogether"
WIDE = "a format pads to 100 characters or more, or to a width that is given elsewhere"
DEEP = "maximum recursion depth exceeded"


def doubling(step: str, start: str = "'a'") -> str:
    return f"{{% set ns = namespace(s={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}"


BOMBS = {
    "a power": ("{{ (messages|length + 9) ** (messages|length * 100000000) }}", BITS),
    "a product of products": (doubling("{% set ns.s = ns.s * ns.s %}", "3"), BITS),
    "a long text": ("{{ ('a' * 1000000000)|length }}", MANY),
    "a long list": ("{{ ([1] * 1000000000)|length }}", "it makes more than 262144 items or characters"),
    "a text that doubles": (doubling("{% set ns.s = ns.s ~ ns.s %}"), CHARACTERS),
    "a sum that doubles": (doubling("{% set ns.s = ns.s + ns.s %}"), CHARACTERS),
    "a list that doubles": (doubling("{% set ns.s = ns.s + ns.s %}", "[1]"), ITEMS),
    "a list of lists": (doubling("{% set ns.s = [ns.s, ns.s] %}"), ITEMS),
    "a dict of dicts": (doubling("{% set ns.s = {'a': ns.s, 'b': ns.s} %}"), ITEMS),
    "a namespace of namespaces": (doubling("{% set ns.s = namespace(a=ns.s, b=ns.s) %}") + "{{ ns.s }}", ITEMS),
    "a block that doubles": (doubling("{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"), CHARACTERS),
    "slices": ("{% set s = 'a' * 8000000 %}" + "{% set t = s[1:] %}" * 20, ALTOGETHER),
    "padding": ("{{ 'a'|center(1500000000) }}", "No filter named 'center'"),
    "padding by a method": ("{{ 'a'.ljust(1500000000) }}", "access to attribute 'ljust' of 'str' object is unsafe"),
    "bytes of a number": ("{{ (1).to_bytes(1500000000) }}", "access to attribute 'to_bytes' of 'int' object is unsafe"),
    "an indentation": ("{{ messages[0].content|indent(1500000000) }}", "it makes more than 64 characters of padding"),
    "an indentation of JSON": ("{{ messages|tojson(indent=1500000000) }}", "it makes more than 64 characters of padding"),
    "separators of JSON": ("{{ messages|tojson(separators=('a' * 1000, ':')) }}", "it makes more than 64 characters of padding"),
    "indented lines": ("{{ ('\n' * 1000000)|indent(64) }}", CHARACTERS),
    "digits": ("{{ 1|round(1000000000) }}", "it makes more than 64 characters of padding"),
    "a format": ("{{ '%1000000000d'|format(1) }}", WIDE),
    "a format by its operator": ("{{ '%1000000000d' % 1 }}", WIDE),
    "a width elsewhere": ("{{ '%*d' % (1000000000, 1) }}", WIDE),
    "a format by its method": ("{{ '{:>1000000000}'.format('a') }}", WIDE),
    "a width in a format": ("{{ '{:>{}}'.format('a', 1000000000) }}", WIDE),
    "a text in a format, often": ("{{ ('%(a)s' * 10000) % {'a': 'a' * 1000000} }}", CHARACTERS),
    "a date": ("{{ strftime_now('%1000000000Y') }}", WIDE),
    "replacements": ("{{ ('a' * 8000000)|replace('', 'b' * 8000000) }}", CHARACTERS),
    "replacements by a method": ("{{ ('a' * 8000000).replace('a', 'b' * 8000000) }}", CHARACTERS),
    "separators": ("{{ range(100000)|join('a' * 1000000) }}", CHARACTERS),
    "separators by a method": ("{{ ('a' * 1000000).join(['a'] * 1000) }}", CHARACTERS),
    "a text for each number": ("{{ range(100000)|map('replace', '', 'a' * 1000000)|list|length }}", ALTOGETHER),
    "keys of one text": ("{{ {}.fromkeys(range(100000), 'a' * 100000) }}", CHARACTERS),
    "sums of lists": ("{{ [[1]]|sum(start=[]) }}", "No filter named 'sum'"),
    "filler": ("{{ lipsum(100000) }}", "'lipsum' is undefined"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", DEEP),
    "a loop in itself": ("{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", DEEP),
    "many operands": ("{{ " + "messages~" * 50_000 + "1 }}", "it has more than 262144 characters"),
    "many negations": ("{{ " + "not " * 50_000 + "1 }}", DEEP),
    "many parentheses": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", DEEP),
    "many conditions": ("{% if 1 %}" * 5000, DEEP),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    template, why = BOMBS[name]
    if why == ITEMS:  # to count fewer
        monkeypatch.setattr(bounded_templates, "MOST_ITEMS", 4096)
    with pytest.raises(InputError) as caught:
        render(template, MESSAGES, bos_token="", eos_token="")
    assert str(caught.value).startswith(f"The chat template refused the messages: {why}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_steps_are_counted(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(bounded_templates, "MOST_STEPS", 10_000)
    with pytest.raises(InputError, match=r"^The chat template refused the messages: it makes more than 10000 steps\.$"):
        render(template, MESSAGES, bos_token="", eos_token="")


def test_time_is_up_also_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_templates, "MOST_SECONDS", 0.05)
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"it takes more than 0\.05 seconds\.$"):
        render("{{ range(100000)|groupby('real')|length }}{{ range(100000)|groupby('imag')|length }}", MESSAGES, bos_token="", eos_token="")
    assert time.monotonic() - begin < 5


ORDINARY = {
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}": "<|user|>\nx</s>\n",
    "{{ bos_token + messages[0].content.strip().replace('x', 'yy') + '%s-%02d' % ('a', 3) }}": "<s>yya-03",
    "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}": "1",
    "{{ messages | tojson(indent=2) }}": '[\n  {\n    "role": "user",\n    "content": "x"\n  }\n]',
    "{{ ', '.join(['a', 'b']) ~ (messages | map(attribute='role') | join('+')) }}": "a, buser",
    "{{ (messages | selectattr('role', 'equalto', 'user') | list | length) * 3 }}": "3",
    "{% if messages is defined and 'x' in messages[0]['content'] %}{{ '{} {}'.format(1, 'b') }}{% endif %}": "1 b",
    "{% for a, b in {'k': 1}.items() %}{{ a }}={{ b }}{% endfor %}{{ 'l1\nl2' | indent(4) }}": "k=1l1\n    l2",
}


@pytest.mark.parametrize("template", ORDINARY)
def test_ordinary_templates_are_as_they_were(template: str) -> None:
    assert render(template, MESSAGES, bos_token="<s>", eos_token="</s>") == ORDINARY[template]
