"""Requests that the models answer, with any of the fields together, and what their answers must be beyond the schema.

Schemathesis's own requests are mostly as short as they can be, and one wrong field of thirty has a request refused.
"""

import json
from typing import Any

import schemathesis
from hypothesis import strategies as st

from tests.support.server import MODEL

VOCABULARY = 300  # of the system that answers
IDS = st.integers(0, VOCABULARY - 1)
TEXTS = st.text(max_size=24)
SHORT = st.text(min_size=1, max_size=6)
SCHEMAS: Any = st.sampled_from(
    [
        {"type": "object"},
        {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"], "additionalProperties": False},
        {"enum": [1, "zwei", None, [True]]},
        {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        {"type": "number", "minimum": -1, "maximum": 1},
        {"anyOf": [{"type": "string"}, {"type": "boolean"}]},
    ]
)
FORMATS = st.one_of(
    st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    st.fixed_dictionaries({"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"name": SHORT, "schema": SCHEMAS})}),
)
OUTPUTS = st.one_of(
    st.fixed_dictionaries({"json": SCHEMAS}),
    st.fixed_dictionaries({"regex": st.sampled_from(["[0-9]+", "(yes|no)", "a*b?", r"\d{2}:\d{2}", "."])}),
    st.fixed_dictionaries({"grammar": st.sampled_from(['start: "a" | "b" start', "start: /[a-z]+/", 'start: ("(" start ")")?'])}),
)
GRAMMAR = st.one_of(
    st.just({}),
    st.just({}),
    st.fixed_dictionaries({"response_format": FORMATS}),
    st.fixed_dictionaries({"structured_outputs": OUTPUTS}),
)
OWN = st.fixed_dictionaries(
    {"routing": st.just(True)},
    optional={
        "expert": st.sampled_from(["expert0", "expert1"]),
        "lam": st.floats(0, 1),
        "fusion": st.sampled_from(["weighted", "additive"]),
        "candidates": st.integers(0, 20),
        "drafts": st.booleans(),
        "precision": st.sampled_from(["fp32", None]),
    },
)
PENALTIES = st.floats(-2, 2)
OPTIONAL: dict[str, Any] = {
    "stream": st.sampled_from([True, False, None]),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans(), "include_obfuscation": st.booleans()}),
    "n": st.integers(1, 3),
    "temperature": st.one_of(st.just(0), st.just(0.0), st.floats(0.001, 2)),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 400),
    "min_p": st.floats(0, 1),
    "presence_penalty": PENALTIES,
    "frequency_penalty": PENALTIES,
    "repetition_penalty": st.one_of(st.floats(0.1, 3), st.sampled_from([1e-30, 1e-20, 1e20, 1e300])),
    "logit_bias": st.dictionaries(IDS.map(str), st.floats(-99, 100), max_size=4),
    "seed": st.integers(),
    "stop": st.one_of(SHORT, st.lists(SHORT, max_size=4), st.none()),
    "stop_token_ids": st.lists(IDS, max_size=4),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 2),
    "fusionroute": OWN,
    "user": TEXTS,
    "metadata": st.dictionaries(TEXTS, TEXTS, max_size=2),
    "store": st.booleans(),
    "service_tier": st.none(),
    "prompt_cache_key": TEXTS,
    "safety_identifier": TEXTS,
}
COMPLETIONS = st.fixed_dictionaries(
    {
        "model": st.just(MODEL),
        "max_tokens": st.integers(2, 8),
        "prompt": st.one_of(
            TEXTS,
            st.lists(IDS, min_size=1, max_size=40),
            st.lists(TEXTS, min_size=1, max_size=3),
            st.lists(st.lists(IDS, min_size=1, max_size=8), min_size=1, max_size=3),
        ),
    },
    optional=OPTIONAL | {"logprobs": st.integers(0, 20), "best_of": st.just(1), "echo": st.just(False), "suffix": st.none()},
)
CONTENTS = st.one_of(TEXTS, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}), min_size=1, max_size=2))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENTS}, optional={"name": SHORT}
    ),
    min_size=1,
    max_size=4,
)
NAMES = ["add", "weather", "größer"]
OBJECTS: Any = SCHEMAS.filter(lambda schema: schema.get("type") == "object")


def tool(name: str) -> Any:
    """A function of this name."""
    function = st.fixed_dictionaries({"name": st.just(name)}, optional={"description": TEXTS, "parameters": OBJECTS})
    return st.fixed_dictionaries({"type": st.just("function"), "function": function})


CHOICES: list[Any] = ["none", "auto", "required", None, *({"type": "function", "function": {"name": name}} for name in NAMES)]
TOOLS: Any = st.fixed_dictionaries(
    {
        "tools": st.permutations([*map(tool, NAMES)]).flatmap(lambda tools: st.tuples(*tools)).map(list),
        "tool_choice": st.sampled_from(CHOICES),
    },
    optional={"parallel_tool_calls": st.booleans()},
)
CHATS = st.fixed_dictionaries(
    {"model": st.just(MODEL), "messages": MESSAGES, "max_completion_tokens": st.integers(2, 8)},
    optional=OPTIONAL
    | {
        "logprobs": st.just(True),
        "top_logprobs": st.integers(0, 20),
        "documents": st.lists(st.fixed_dictionaries({"title": TEXTS, "text": TEXTS}), max_size=2),
        "modalities": st.just(["text"]),
    },
)


def consistent(body: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both together, without what excludes each other."""
    body |= more
    forced = body.get("tool_choice") not in (None, "none", "auto")
    if forced or body.get("structured_outputs") or body.get("response_format", {}).get("type", "text") != "text":
        body.pop("ignore_eos", None)  # a grammar ends its text
    return body | {"logprobs": True} if body.get("top_logprobs") else body


BODIES = {
    "/v1/completions": st.builds(consistent, COMPLETIONS, GRAMMAR),
    "/v1/chat/completions": st.builds(consistent, CHATS, st.one_of(GRAMMAR, TOOLS)),
}


@schemathesis.hook
def before_generate_body(context: Any, strategy: Any) -> Any:
    """These, on the routes that generate."""
    return BODIES.get(context.operation.path, strategy)


@schemathesis.check
def streams_are_whole(_: Any, response: Any, case: Any) -> None:
    """A stream ends with [DONE]; every choice ends once; and no event is a fault of the server's, which has status 200 by then."""
    if response.status_code != 200 or "text/event-stream" not in str(response.headers.get("content-type")):
        return
    *events, done, rest = response.content.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", ""), "The stream has no end."
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in chunks:
        assert chunk.get("error", {}).get("type") != "server_error", chunk
    if any("error" in chunk for chunk in chunks):
        return
    ended = sorted(choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"])
    prompts = case.body.get("prompt")
    several = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    assert ended == list(range(several * (case.body.get("n") or 1))), ended
