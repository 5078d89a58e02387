"""Tokens that tokenizer.json does not name, special tokens and chat templates: as transformers reads a checkpoint's files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusionroute.fr_export.bundle.texts import write_texts
from fusionroute.fr_export.checkpoints.chat_template_files import chat_templates
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.hub import PATTERNS
from fusionroute.fr_export.checkpoints.sources.model_folder import texts_in
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.checkpoints.tokenizer_files import TokenizerFiles, read_tokenizer
from fusionroute.runtime.errors import InputError
from tests.support.systems import Shape, make_model, make_system, write_tokenizer

TEXT = "a<x>b <y> <bos>c<eos><|end|> <pad>"
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def folder_with(folder: Path, **files: Any) -> Path:
    """A tokenizer of 300 tokens, and other files; None: without that one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, 300)
    for name, content in files.items():
        path = folder / f"{name}.json"
        if content is None:
            path.unlink()
        else:
            path.write_text(json.dumps(content))
    return folder


def read(folder: Path, vocab_size: int = 400) -> TokenizerFiles:
    tokenizer = read_tokenizer("It", texts_in(folder), vocab_size)
    assert tokenizer is not None
    return tokenizer


def named(content: str, special: bool, **flags: bool) -> dict[str, Any]:
    return {"content": content, "special": special} | FLAGS | flags


tokens = st.sampled_from(["<x>", "<y>", "<|end|>", "<bos>", "<eos>", "<pad>"])
entries = st.builds(named, tokens, st.booleans(), lstrip=st.booleans(), rstrip=st.booleans())
names = st.dictionaries(st.sampled_from(["bos_token", "eos_token", "pad_token", "unk_token", "image_token"]), tokens, max_size=4)
configs = st.builds(
    lambda roles, added, more, key: roles | ({"added_tokens_decoder": added} if added else {}) | ({key: more} if more else {}),
    names,
    st.dictionaries(st.integers(300, 310).map(str), entries, max_size=3),
    st.lists(tokens, max_size=2, unique=True),
    st.sampled_from(["additional_special_tokens", "extra_special_tokens"]),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs, special=st.none() | names, added=st.none() | st.dictionaries(tokens, st.just(300), max_size=1))
def test_every_token_is_the_one_that_transformers_reads(
    tmp_path: Path, config: dict[str, Any], special: dict[str, str] | None, added: dict[str, int] | None
) -> None:
    folder = folder_with(tmp_path / "checkpoint", tokenizer_config=config)
    for name, content in (("special_tokens_map", special), ("added_tokens", added)):
        (folder / f"{name}.json").unlink(missing_ok=True)
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    expected = PreTrainedTokenizerFast.from_pretrained(folder)
    files = read(folder)
    assert files.named == expected.special_tokens_map
    assert files.tokenizer.get_added_tokens_decoder() == expected.backend_tokenizer.get_added_tokens_decoder()
    assert files.tokenizer.encode(TEXT).ids == expected(TEXT).input_ids

    again = tmp_path / "again"  # what a bundle and its folders for Optimum have
    shutil.rmtree(again, ignore_errors=True)
    again.mkdir()
    (again / "tokenizer.json").write_bytes(files.content)
    (again / "tokenizer_config.json").write_text(json.dumps(dict(files.config)))
    reread = PreTrainedTokenizerFast.from_pretrained(again)
    assert reread(TEXT).input_ids == expected(TEXT).input_ids
    assert reread.special_tokens_map == expected.special_tokens_map
    assert reread.all_special_tokens == expected.all_special_tokens


def test_a_tokenizer_without_other_tokens_is_kept_byte_for_byte(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    assert read(folder).content == (folder / "tokenizer.json").read_bytes()
    assert read(folder_with(tmp_path, tokenizer_config=None)).content == (folder / "tokenizer.json").read_bytes()


def test_a_token_that_the_model_does_not_embed_is_none(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, tokenizer_config={"eos_token": "<eos>", "pad_token": "[PAD]"})
    files = read(folder, vocab_size=300)
    assert files.beyond == ("[PAD]",) and files.named["pad_token"] == "[PAD]"
    assert max(files.tokenizer.encode("a[PAD]").ids) < 300
    assert max(read(folder, vocab_size=301).tokenizer.encode("a[PAD]").ids) == 300


def test_transformers_4_can_read_the_config(tmp_path: Path) -> None:
    """It knows no `TokenizersBackend`, and takes extra_special_tokens for a dict."""
    written = {
        "backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"], "is_local": True,
        "model_max_length": 77, "bos_token": named("<bos>", True) | {"__type": "AddedToken"}, "auto_map": {"AutoTokenizer": ["a.B", None]},
        "chat_template": "x",
    }  # fmt: skip
    assert read(folder_with(tmp_path, tokenizer_config=written)).config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 77,
        "bos_token": "<bos>",
        "additional_special_tokens": ["<x>"],
    }


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer_config", {"bos_token": 5}, "transformers cannot read tokenizer_config.json"),
        ("tokenizer_config", {"added_tokens_decoder": {"300": "<x>"}}, "transformers cannot read tokenizer_config.json"),
        ("added_tokens", {"<x>": 300}, None),
        ("special_tokens_map", [], "special_tokens_map.json holds no JSON object"),
    ],
)
def test_files_that_name_no_tokens(tmp_path: Path, name: str, content: Any, reason: str | None) -> None:
    folder = folder_with(tmp_path, **{name: content})
    if reason is None:
        assert read(folder).tokenizer.token_to_id("<x>") == 300
        return
    with pytest.raises(InputError) as caught:
        read(folder)
    assert str(caught.value).startswith(f"It has a broken tokenizer: {reason}") and "write or download it again" in str(caught.value)


PLACES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "a file": ({"chat_template.jinja": "A", "tokenizer_config.json": '{"chat_template": "B"}'}, {"default": "A"}),
    "a folder": (
        {"chat_template.jinja": "A", "additional_chat_templates/tool_use.jinja": "T", "additional_chat_templates/rag.jinja": "R"},
        {"default": "A", "rag": "R", "tool_use": "T"},
    ),
    "a folder alone": (
        {"additional_chat_templates/tool_use.jinja": "T", "tokenizer_config.json": '{"chat_template": "B"}'},
        {"tool_use": "T"},
    ),
    "a text of the config": ({"tokenizer_config.json": '{"chat_template": "B"}'}, {"default": "B"}),
    "a list of the config": (
        {"tokenizer_config.json": '{"chat_template": [{"name": "default", "template": "B"}, {"name": "tool_use", "template": "T"}]}'},
        {"default": "B", "tool_use": "T"},
    ),
    "a dict of the config": ({"tokenizer_config.json": '{"chat_template": {"default": "B"}}'}, {"default": "B"}),
    "no place": ({"tokenizer_config.json": "{}"}, {}),
}
OF_PROCESSORS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "a JSON file": ({"chat_template.json": '{"chat_template": "C"}'}, {"default": "C"}),
    "a processor's config": ({"processor_config.json": '{"chat_template": "P"}'}, {"default": "P"}),
    "a tokenizer's before it": (
        {"chat_template.json": '{"chat_template": "C"}', "tokenizer_config.json": '{"chat_template": "B"}'},
        {"default": "B"},
    ),
}


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("place", PLACES | OF_PROCESSORS)
def test_templates_are_read_where_transformers_reads_them(tmp_path: Path, place: str) -> None:
    files, expected = (PLACES | OF_PROCESSORS)[place]
    folder = write_files(tmp_path, files)
    assert chat_templates("It", texts_in(folder)) == expected
    if place in PLACES:
        write_tokenizer(folder, 300)
        for name in ("chat_template.jinja", "tokenizer_config.json"):  # the helper writes its own
            (folder / name).unlink()
        stored = PreTrainedTokenizerFast.from_pretrained(write_files(folder, files)).chat_template
        assert (expected or None) == ({"default": stored} if isinstance(stored, str) else stored)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            {"chat_template.jinja": "{{ bos_token }}\n{% for m in messages %}"},
            "It has a default chat template that cannot be compiled (line 2: Unexpected end of template. Jinja was looking for the following"
            " tags: 'endfor' or 'else'. The innermost block that needs to be closed is 'for'): mend it, or remove it.",
        ),
        (
            {"chat_template.jinja": "x", "additional_chat_templates/tool_use.jinja": "{{ tools | to_yaml }}"},
            "It has a tool_use chat template that cannot be compiled (line 1: No filter named 'to_yaml'): mend it, or remove it.",
        ),
        (
            {"tokenizer_config.json": '{"chat_template": {"../x": "x"}}'},
            "It has a chat template of the name '../x': give it one of letters, digits, '-' and '_'.",
        ),
        (
            {"chat_template.json": '{"chat_template": [{"name": "default"}]}'},
            "It has a broken tokenizer: the chat_template in chat_template.json is no text; write it again.",
        ),
    ],
)
def test_broken_templates_are_refused_before_any_work(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        chat_templates("It", texts_in(write_files(tmp_path, files)))
    assert str(caught.value) == sentence


def test_a_router_with_a_broken_template_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "router", Shape(layers=1, tokenizer=True), 0, expert=False)
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(InputError) as caught:
        Checkpoint.open("router", str(folder), head_key="routing_head")
    assert str(caught.value).startswith(f"The router ({folder}) has a default chat template that cannot be compiled (line 1: ")


def test_names_of_special_tokens_are_the_tokenizers_not_the_configs(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", Shape(layers=1, tokenizer=True, config={"eos_token_id": [5, 2]}), 0, expert=False)
    assert Checkpoint.open("m", str(folder)).named_tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<pad>", "bos_token": null}')
    assert Checkpoint.open("m", str(folder)).named_tokens == {"eos_token": "<pad>"}
    (folder / "tokenizer_config.json").unlink()  # then config.json's ids are all that is known
    checkpoint = Checkpoint.open("m", str(folder))
    assert checkpoint.vocabulary is not None
    assert [checkpoint.vocabulary[name] for name in checkpoint.named_tokens.values()] == [1, 5]


def test_texts_of_a_bundle_are_read_by_transformers(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", Shape(layers=1, vocab=304, tokenizer=True), 0, expert=False)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("T{{ eos_token }}")
    out = tmp_path / "out"
    out.mkdir()
    write_texts(out, Checkpoint.open("m", str(folder)))
    expected, again = (PreTrainedTokenizerFast.from_pretrained(each) for each in (folder, out))
    assert again.chat_template == expected.chat_template and set(again.chat_template) == {"default", "tool_use"}
    assert again.special_tokens_map == expected.special_tokens_map and again(TEXT).input_ids == expected(TEXT).input_ids


@pytest.mark.parametrize("end", [300, -1])
def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path: Path, end: int) -> None:
    router, experts = make_system(tmp_path, Shape(layers=1, experts=1, tokenizer=True, config={"eos_token_id": [2, end]}))
    with pytest.raises(InputError) as caught:
        System.open(None, router, experts)
    assert str(caught.value) == (
        f"The router ({router}) ends texts with token {end}, which is outside the vocabulary of 300: correct eos_token_id in its "
        "config.json or generation_config.json."
    )


def test_a_vocabulary_with_merges_is_converted(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", Shape("qwen2", layers=1), 0, expert=False)
    alphabet = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256), strict=True))
    (folder / "vocab.json").write_text(json.dumps(alphabet | {"ab": 256, "<|endoftext|>": 257}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    checkpoint = Checkpoint.open("m", str(folder))
    assert "tokenizer.json converted from vocab.json" in checkpoint.notes and checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.encode("abc").ids == [256, alphabet["c"]] == AutoTokenizer.from_pretrained(folder)("abc").input_ids


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", Shape(layers=1), 0, expert=False)
    assert Checkpoint.open("m", str(folder)).notes == ("it has no tokenizer, so token ids are all that a bundle of it can read",)


def test_all_of_these_files_are_downloaded() -> None:
    from fnmatch import fnmatch

    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
                 "chat_template.json", "processor_config.json", "additional_chat_templates/tool_use.jinja", "vocab.json", "merges.txt", "tekken.json", "tokenizer.model"):  # fmt: skip
        assert any(fnmatch(name, pattern) for pattern in PATTERNS)
