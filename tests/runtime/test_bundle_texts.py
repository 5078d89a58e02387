"""Special tokens and chat templates as a bundle holds them, and bundles of older versions."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import BundleError, FusionRuntime, InputError
from fusionroute.runtime.prompt import MOST_BYTES
from tests.support.bundles import edit, rehash

TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ x_token }}|{{ messages[0].content }}"
MESSAGES = [{"role": "user", "content": "a"}]


@pytest.fixture
def bundle(bundles: list[Path], tmp_path: Path) -> Path:
    """A bundle to change, whose template shows what special tokens it sees."""
    folder = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    return put(folder, "chat_template.jinja", TEMPLATE)


def put(bundle: Path, name: str, content: str) -> Path:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text(content)
    rehash(bundle, name)
    return bundle


def rendered(bundle: Path, **options: Any) -> tuple[list[int], FusionRuntime]:
    with FusionRuntime.load(bundle, "fp32", "cpu", threads=1, trusted=True) as runtime:
        return runtime.prompt_ids(MESSAGES, **options), runtime


def ids_of(runtime: FusionRuntime, text: str) -> list[int]:
    assert runtime.tokenizer is not None
    return runtime.tokenizer.encode(text, special=False)


def test_special_tokens_are_those_of_the_tokenizer_config(bundle: Path) -> None:
    put(bundle, "tokenizer_config.json", '{"eos_token": "<pad>", "pad_token": "<eos>", "image_token": "<img>", "x_token": 5, "bos": "a"}')
    ids, runtime = rendered(bundle)
    assert ids == ids_of(runtime, "|<pad>|<eos>|<img>||a")


def test_bundles_of_older_versions_have_two_in_the_manifest(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest["files"].pop("tokenizer_config.json"))
    (bundle / "tokenizer_config.json").unlink()
    ids, runtime = rendered(bundle)
    assert ids == ids_of(runtime, "<bos>|<eos>||||a")


def test_tools_choose_their_template(bundle: Path) -> None:
    put(bundle, "additional_chat_templates/tool_use.jinja", "T{{ tools | tojson }}")
    plain, runtime = rendered(bundle)
    assert plain == ids_of(runtime, "<bos>|<eos>||||a")
    assert rendered(bundle, tools=[{"name": "f"}])[0] == ids_of(runtime, 'T[{"name": "f"}]')


def test_names_of_the_template_alone(bundle: Path) -> None:
    put(bundle, "chat_template.jinja", "{{ enable_thinking }}{{ eos_token }}")
    ids, runtime = rendered(bundle, chat_template_kwargs={"enable_thinking": False, "eos_token": "x"})
    assert ids == ids_of(runtime, "Falsex")
    with pytest.raises(InputError) as caught:
        rendered(bundle, chat_template_kwarg={})
    assert str(caught.value).startswith("Unknown option chat_template_kwarg (chat_template_kwargs?): expected some of tools, documents,")


@pytest.mark.parametrize("content", ["[]", "{", '{"eos_token": "a", "eos_token": "b"}'])
def test_a_broken_tokenizer_config(bundle: Path, content: str) -> None:
    put(bundle, "tokenizer_config.json", content)
    with pytest.raises(BundleError, match=r"tokenizer_config\.json cannot be read \(.*\); export the bundle again\.$"):
        rendered(bundle)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_texts_that_fill_memory(bundle: Path, name: str) -> None:
    put(bundle, name, " " * (MOST_BYTES + 1))
    with pytest.raises(BundleError) as caught:
        rendered(bundle)
    assert str(caught.value) == f"{bundle / name} has {MOST_BYTES + 1} bytes, expected {MOST_BYTES} at most; export the bundle again."
