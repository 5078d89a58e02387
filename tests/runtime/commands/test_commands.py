"""`python -m runtime`: what it prints where, and with which status it ends."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bench import bandwidth
from fusionroute.runtime.commands import generate as generate_module
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.stream import End, Stream, no_release
from fusionroute.runtime.text import Token
from fusionroute.runtime.tokenizer_trial import Trial
from tests.support.bundles import rehash
from tests.support.commands import Command

PROMPT = "12+30="


def test_generate_streams_what_the_runtime_generates(bundles: list[Path], command: Command) -> None:
    for bundle in bundles:
        with FusionRuntime.load(bundle) as runtime:
            expected = runtime.generate(PROMPT, 6)
        ended = command("generate", bundle, "--prompt", PROMPT, "--max-new-tokens", 6)
        assert ended.status == 0 and ended.err == ""
        assert ended.out == expected.text + "\n"


def test_generate_json(bundles: list[Path], command: Command) -> None:
    with FusionRuntime.load(bundles[0]) as runtime:
        expected = runtime.generate(PROMPT, 6)
        ids = runtime.encode(PROMPT)
    for prompt in (("--prompt", PROMPT), ("--prompt-ids", ",".join(map(str, ids)))):
        ended = command("generate", bundles[0], *prompt, "--max-new-tokens", 6, "--json", "--show-routing")
        assert ended.status == 0 and ended.err == ""
        printed = json.loads(ended.out)
        assert printed.pop("precision")
        assert printed == {
            "text": expected.text,
            "token_ids": expected.token_ids,
            "experts": expected.experts,
            "logprobs": expected.logprobs,
            "finish_reason": expected.finish_reason,
            "drafted": 0,
            "accepted": 0,
        }


def test_generate_with_a_pinned_expert(bundles: list[Path], command: Command) -> None:
    with FusionRuntime.load(bundles[0]) as runtime:
        name = runtime.expert_names[1]
        expected = runtime.generate(PROMPT, 6, expert=name)
    printed = json.loads(command("generate", bundles[0], "--prompt", PROMPT, "--max-new-tokens", 6, "--json", "--expert", name).out)
    assert printed["token_ids"] == expected.token_ids and set(printed["experts"]) == {name}


def test_generate_shows_the_routing(bundles: list[Path], command: Command) -> None:
    with FusionRuntime.load(bundles[0]) as runtime:
        expected = runtime.generate(PROMPT, 6)
    shown = command("generate", bundles[0], "--prompt", PROMPT, "--max-new-tokens", 6, "--show-routing").out.removeprefix(expected.text)
    runs = [line.split()[:2] for line in shown.splitlines() if " token(s)  " in line]
    assert [name for name, count in runs for _ in range(int(count))] == expected.experts


def test_routing_of_tokens_without_text(bundles: list[Path], command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens() -> Generator[Token | End, None, None]:
        for id, text in ((5, "a"), (1, ""), (70, "")):  # a special token, and the first of a character's
            yield Token(id, "expert0", 0.0, np.zeros(1, np.float32), text)
        yield End("stop", 0, 0)

    monkeypatch.setattr(FusionRuntime, "stream", lambda *_, **__: Stream(tokens(), no_release))
    shown = command("generate", bundles[0], "--prompt", PROMPT, "--show-routing").out
    assert "  3 token(s)  'a' <bos> (id 1) token (id 70)" in shown


def test_tools_and_documents_reach_the_chat_template(bundles: list[Path], command: Command, tmp_path: Path) -> None:
    tools, documents = [{"type": "function", "function": {"name": "f"}}], [{"title": "T", "text": "x"}]
    bundle = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    (bundle / "chat_template.jinja").write_text("{{ messages[0].content }}{{ tools | tojson }}{{ documents | tojson }}")
    rehash(bundle, "chat_template.jinja")
    files = [tmp_path / "tools.json", tmp_path / "documents.json"]
    for file, values in zip(files, (tools, documents), strict=True):
        file.write_text(json.dumps(values))
    with FusionRuntime.load(bundle) as runtime:
        text = PROMPT + json.dumps(tools) + json.dumps(documents)
        ids = runtime.tokenizer.encode(text, special=False)  # type: ignore[union-attr]
        assert runtime.prompt_ids([{"role": "user", "content": PROMPT}], tools=tools, documents=documents) == ids
        expected = runtime.generate(ids, 6).token_ids
    options = ("--chat", "--tools", files[0], "--documents", files[1])
    printed = json.loads(command("generate", bundle, "--prompt", PROMPT, "--max-new-tokens", 6, "--json", *options).out)
    assert printed["token_ids"] == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[1]", "tools[0] is 1, expected a dict with a JSON schema."), ("{", "Expecting property name"), (None, "No such file or directory")],
)
def test_tools_that_are_no_list_of_dicts(bundles: list[Path], command: Command, tmp_path: Path, content: str | None, reason: str) -> None:
    file = tmp_path / "tools.json"
    if content is not None:
        file.write_text(content)
    ended = command("generate", bundles[0], "--prompt", PROMPT, "--chat", "--tools", file)
    assert ended.status == 2 and "holds no JSON list of dicts" in " ".join(ended.err.replace("│", " ").split()), ended.err
    assert reason.split()[0] in ended.err
    assert command("generate", bundles[0], "--prompt", PROMPT, "--tools", file).status == 2


@pytest.mark.parametrize("verb", ["generate", "bench"])
def test_trust_leaves_out_the_trial_of_the_tokenizer(bundles: list[Path], command: Command, verb: str, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))  # never loaded before
    fast = (
        "--prompt",
        PROMPT,
        *(("--max-new-tokens", 1) if verb == "generate" else ("--new-tokens", 2, "--repeats", 1, "--precision", "fp32")),
    )
    known = bandwidth.Bandwidth(20e9, 1 << 28)
    with patch.object(Trial, "decide") as trial, patch.object(bandwidth, "of_host", return_value=known):
        assert command(verb, bundle, *fast, "--trust").status == 0
        assert not trial.called
        assert command(verb, bundle, *fast).status == 0
        assert trial.called


def test_verify_tries_the_tokenizer_unless_it_is_trusted(bundles: list[Path], command: Command, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    (bundle / "tokenizer.json").write_text('{"model": {"type": "None"}}')
    rehash(bundle, "tokenizer.json")
    refused = command("inspect", bundle, "--verify")
    assert refused.status == 1 and f"{bundle / 'tokenizer.json'} cannot be read as a tokenizer.json (" in refused.err
    assert command("inspect", bundle, "--verify", "--trust").status == 0
    assert command("inspect", bundle).status == 0


@pytest.mark.parametrize("option", [(), ("--show-routing",)])
def test_text_is_printed_as_it_is(bundles: list[Path], command: Command, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...]) -> None:
    text = "a\tb\r[bold]\u2028\nc  "

    def tokens() -> Generator[Token | End, None, None]:
        yield Token(1, "expert0", 0.0, np.zeros(1, np.float32), text)
        yield End("stop", 0, 0)

    monkeypatch.setattr(FusionRuntime, "stream", lambda *_, **__: Stream(tokens(), no_release))
    assert command("generate", bundles[0], "--prompt", PROMPT, *option).out.startswith(text + "\n")


def test_generate_by_ids_without_a_tokenizer(bundles: list[Path], command: Command, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    content = json.loads((bundle / "manifest.json").read_text())
    for name in ("tokenizer.json", "chat_template.jinja"):
        content["files"].pop(name, None)
        (bundle / name).unlink(missing_ok=True)
    (bundle / "manifest.json").write_text(json.dumps(content))
    ended = command("generate", bundle, "--prompt-ids", "1,5,9", "--max-new-tokens", 4)
    with FusionRuntime.load(bundle) as runtime:
        assert list(map(int, ended.out.split())) == runtime.generate([1, 5, 9], 4).token_ids
    for option, lacking in (((), "tokenizer.json"), (("--chat",), "chat_template.jinja")):
        ended = command("generate", bundle, "--prompt", PROMPT, *option)
        assert ended.status == 1 and f"has no {lacking}" in ended.err
    assert "token ids only" in command("inspect", bundle).out


def test_a_seed_gives_the_same_text_again(bundles: list[Path], command: Command) -> None:
    sampled = ("generate", bundles[0], "--prompt", PROMPT, "--max-new-tokens", 8, "--temperature", 1.5, "--json", "--seed")
    assert command(*sampled, 3).out == command(*sampled, 3).out != command(*sampled, 4).out


def test_inspect(bundles: list[Path], command: Command) -> None:
    for bundle in bundles:
        content = json.loads((bundle / "manifest.json").read_text())
        ended = command("inspect", bundle, "--verify")
        assert ended.status == 0 and ended.err == ""
        assert f"All {len(content['files'])} files have the hashes of the manifest." in ended.out
        for word in (content["family"], *(model["name"] for model in content["models"]), *(v["precision"] for v in content["variants"])):
            assert word in ended.out
        for verified in (False, True):
            ended = command("inspect", bundle, "--json", *(["--verify"] if verified else []))
            assert json.loads(ended.out) == content | {"verified": verified, "signed": False}


def test_inspect_tells_how_well_lambda_was_tuned(bundles: list[Path], command: Command, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    Manifest.read(bundle).model_copy(update={"lam": 0.25, "lam_curve": [(0.0, 0.5), (0.25, 0.75)]}).write(bundle)
    assert "λ = 0.25 (tuned: accuracy 75.0% on the validation split)" in " ".join(command("inspect", bundle).out.split())


@pytest.mark.parametrize(
    ("target", "precision", "item_size"),
    [
        ("ort:cpu", "fp16", 4),
        ("ort:cpu", "int8", 4),
        ("ort:cuda", "fp16", 2),
        ("ort:cuda", "bf16", 2),
        ("portable", "bf16", 2),
        ("portable", "int8", 4),
        ("tensorrt", "fp32", 4),
        ("tensorrt", "int8", 2),
        ("tensorrt", "int4", 2),
        ("tensorrt:10.3", "bf16", 2),
    ],
)
def test_inspect_counts_the_bytes_of_keys_and_values(
    bundles: list[Path], command: Command, tmp_path: Path, target: str, precision: str, item_size: int
) -> None:
    bundle = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    manifest = Manifest.read(bundle)
    model = manifest.models[0].model_copy(update={"layers": 3, "kv_heads": 5, "head_size": 100})
    models = [model, *(model.model_copy(update={"name": expert}) for expert in manifest.experts)]
    variant = manifest.variants[0].model_copy(update={"target": target, "precision": precision})
    manifest.model_copy(update={"models": models, "variants": [variant]}).write(bundle)
    row = next(line for line in command("inspect", bundle).out.splitlines() if line.startswith(f" {target} "))
    assert f" {2 * 3 * 5 * 100 * item_size:,} " in row


def test_inspect_tells_of_changed_weights_when_asked(bundles: list[Path], command: Command, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    weights = next((bundle / "graphs" / "weights").iterdir())
    weights.write_bytes(bytes(weights.stat().st_size))
    assert command("inspect", bundle).status == 0
    ended = command("inspect", bundle, "--verify")
    assert ended.status == 1 and ended.out == ""
    assert_one_sentence(ended.err, weights.name, "was changed after the export")


def test_pack_and_unpack(bundles: list[Path], command: Command, tmp_path: Path) -> None:
    file, folder = tmp_path / "bundle.tar", tmp_path / "back"
    ended = command("pack", bundles[0], file)
    assert (ended.status, ended.err) == (0, "") and ended.out.startswith(f"{file}: ")
    ended = command("unpack", file, folder)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out == f"{folder}: {len(Manifest.read(folder).files)} files, all with the hashes of the manifest\n"
    for arguments, words in (
        (("pack", bundles[0], file), "exists: name another file"),
        (("unpack", file, folder), "exists and is not empty"),
        (("unpack", folder / "report.json", tmp_path / "other"), "expected a file that `fusionroute pack` wrote"),
    ):
        ended = command(*arguments)
        assert ended.status == 1 and ended.out == ""
        assert_one_sentence(ended.err, words)


def assert_one_sentence(err: str, *words: str) -> None:
    assert err.startswith("error: ") and err.endswith(".\n") and err.count("\n") == 1, err
    for word in words:
        assert word in err


FAILURES: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "no bundle": (("generate", "nowhere", "--prompt", "a"), ("no bundle at nowhere", "export.py")),
    "nothing to inspect": (("inspect", "nowhere"), ("no bundle at nowhere",)),
    "precision": (("generate", "BUNDLE", "--prompt", "a", "--precision", "int3"), ("int3", "--precision")),
    "device": (("generate", "BUNDLE", "--prompt", "a", "--device", "rtx"), ("no graphs for rtx, only for ort:cpu", "--target rtx")),
    "expert": (("generate", "BUNDLE", "--prompt", "a", "--expert", "history"), ("'history'", "expert0, expert1")),
    "no such id": (("generate", "BUNDLE", "--prompt-ids", "99999999"), ("99999999", "vocabulary")),
    "negative id": (("generate", "BUNDLE", "--prompt-ids", "-3"), ("-3", "vocabulary")),
    "long prompt": (("generate", "BUNDLE", "--prompt-ids", ",".join(["1"] * 9000)), ("9000 tokens", "context", "--max-seq-len")),
    "surrogates": (("generate", "BUNDLE", "--prompt", "\udc80"), ("Unicode",)),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_end_in_one_sentence(bundles: list[Path], command: Command, name: str) -> None:
    arguments, words = FAILURES[name]
    ended = command(*(bundles[0] if argument == "BUNDLE" else argument for argument in arguments))
    assert ended.status == 1 and ended.out == ""
    assert_one_sentence(ended.err, *words)


def test_a_budget_for_experts_changes_no_text(bundles: list[Path], command: Command) -> None:
    """Of 1 MiB, which holds both small experts; no bundle of one base takes one."""
    asked = ("generate", bundles[0], "--prompt", "12+30=", "--max-new-tokens", "6", "--json")
    assert command(*asked, "--expert-memory", "1").out == command(*asked).out
    refused = command("generate", bundles[2], "--prompt", "a", "--expert-memory", "5")
    assert refused.status == 1
    assert_one_sentence(refused.err, "expert_memory is for experts that can leave", "leave it out")


USAGE: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "no command": ((), ()),
    "unknown command": (("train",), ("train",)),
    "unknown flag": (("inspect", "BUNDLE", "--colour"), ("--colour",)),
    "no prompt": (("generate", "BUNDLE"), ("--prompt TEXT", "--prompt-ids IDS")),
    "two prompts": (("generate", "BUNDLE", "--prompt", "a", "--prompt-ids", "1"), ("--prompt",)),
    "ids that are none": (("generate", "BUNDLE", "--prompt-ids", "1,x"), ("'1,x'", "2,17,5")),
    "chat of ids": (("generate", "BUNDLE", "--prompt-ids", "1", "--chat"), ("--prompt TEXT",)),
    "device": (("generate", "BUNDLE", "--prompt", "a", "--device", "tpu"), ("'tpu'", "auto, cpu, cuda")),
    "fusion": (("generate", "BUNDLE", "--prompt", "a", "--fusion", "product"), ("'product'", "additive")),
    "lambda": (("generate", "BUNDLE", "--prompt", "a", "--lambda", "2"), ("2.0", "from 0")),
    "temperature": (("generate", "BUNDLE", "--prompt", "a", "--temperature", "-1"), ("temperature is -1.0",)),
    "top-p": (("generate", "BUNDLE", "--prompt", "a", "--top-p", "nan"), ("top_p",)),
    "seed": (("generate", "BUNDLE", "--prompt", "a", "--seed", "-1"), ("seed is -1",)),
    "count": (("generate", "BUNDLE", "--prompt", "a", "--max-new-tokens", "0"), ("at least 1",)),
    "word for a number": (("generate", "BUNDLE", "--prompt", "a", "--top-k", "many"), ("--top-k", "integer")),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_has_status_2(bundles: list[Path], command: Command, name: str) -> None:
    arguments, words = USAGE[name]
    ended = command(*(bundles[0] if argument == "BUNDLE" else argument for argument in arguments))
    assert ended.status == 2
    assert "Traceback" not in ended.out + ended.err
    shown = " ".join((ended.out + ended.err).replace("│", " ").split())
    for word in words:
        assert word in shown


def test_faults_end_in_one_sentence_and_a_traceback_on_demand(
    bundles: list[Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any, **__: Any) -> None:
        raise RuntimeError("two\nlines.")

    monkeypatch.setattr(generate_module, "FusionRuntime", type("Broken", (FusionRuntime,), {"load": fault}))
    ended = command("generate", bundles[0], "--prompt", "a")
    assert ended.status == 1
    assert_one_sentence(ended.err, "command generate failed unexpectedly", "RuntimeError: two lines.", "--debug")
    for arguments in (("--debug", "generate", bundles[0], "--prompt", "a"), ("generate", bundles[0], "--prompt", "a", "--debug")):
        ended = command(*arguments)
        assert ended.status == 1 and "Traceback" in ended.err


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "runtime", *map(str, arguments)], capture_output=True, timeout=60, check=False, **options)


def test_as_a_process(bundles: list[Path], tmp_path: Path) -> None:
    """Statuses, streams, and a reader that leaves early."""
    done = run("generate", bundles[0], "--prompt", PROMPT, "--max-new-tokens", 4, "--json")
    assert done.returncode == 0 and done.stderr == b"" and len(json.loads(done.stdout)["token_ids"]) <= 4
    failed = run("inspect", tmp_path / "nowhere")
    assert failed.returncode == 1 and failed.stdout == b""
    assert_one_sentence(failed.stderr.decode(), "nowhere")
    for arguments in (("inspect", bundles[0], "--json"), ("generate", bundles[0], "--prompt", PROMPT, "--max-new-tokens", 4)):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "wb") as closed:
            left = subprocess.run(
                [sys.executable, "-m", "runtime", *map(str, arguments)], stdout=closed, stderr=subprocess.PIPE, timeout=60, check=False
            )
        assert b"Traceback" not in left.stderr and left.returncode == 1


def test_cache_shows_and_clears(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "fusionroute"
    assert command("cache").out.strip() == f"0 entries, 0.0 MB in {folder}"
    for name, size in (("costs/a.json", 10), ("costs/b.json", 20), ("calibration/c.npy", 2_000_000)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))
    shown = command("cache").out
    assert "costs" in shown and "calibration" in shown and f"3 entries, 2.0 MB in {folder}" in shown
    listed = json.loads(command("cache", "costs", "--json").out)
    assert listed["folder"] == str(folder) and not listed["cleared"]
    assert {(entry["kind"], entry["path"], entry["bytes"]) for entry in listed["entries"]} == {
        ("costs", str(folder / "costs" / "a.json"), 10),
        ("costs", str(folder / "costs" / "b.json"), 20),
    }
    assert f"2 entries, 0.0 MB removed from {folder}" in command("cache", "costs", "--clear").out
    assert json.loads(command("cache", "--clear", "--json").out)["entries"][0]["kind"] == "calibration"
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_generate_by_a_grammar_with_biases_and_ends(bundles: list[Path], command: Command, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema, lark = tmp_path / "schema.json", tmp_path / "choice.lark"
    schema.write_text('{"enum": ["on", "off"]}')
    lark.write_text('start: "yes" | "no"')
    for option, value, texts in (
        ("--json-schema", schema, ('"on"', '"off"')),
        ("--lark", lark, ("yes", "no")),
        ("--regex", "[ab]c", ("ac", "bc")),
    ):
        printed = json.loads(command("generate", bundles[0], "--prompt", PROMPT, option, value, "--json").out)
        assert printed["text"] in texts and printed["finish_reason"] == "stop"
    options = {"presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {9: 2.0, 7: -np.inf}, "top_logprobs": 2, "ignore_eos": True}
    with FusionRuntime.load(bundles[0]) as runtime:
        expected = runtime.generate(PROMPT, 6, min_new_tokens=2, stop_token_ids=[9], **options)  # type: ignore[arg-type]
    flags = ("--presence-penalty", 0.5, "--frequency-penalty", 0.2, "--logit-bias", "9=2", "--logit-bias", "7=-inf", "--top-logprobs", 2)
    ends = ("--ignore-eos", "--min-new-tokens", 2, "--stop-id", 9, "--max-new-tokens", 6, "--json")
    printed = json.loads(command("generate", bundles[0], "--prompt", PROMPT, *flags, *ends).out)
    assert printed["token_ids"] == expected.token_ids
    assert [[tuple(each) for each in tokens] for tokens in printed["top_logprobs"]] == [list(each) for each in expected.top_logprobs]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--logit-bias", "a=1"), "--logit-bias is no ID=BIAS of a token id and a number, such as 17=-4.5."),
        (("--regex", "a", "--lark", "b"), "A text has one grammar: give one of --json-schema, --regex and --lark."),
        (("--json-schema", "/nowhere"), "/nowhere cannot be read (No such file or directory): name a text file in UTF-8."),
    ],
)
def test_wrong_grammars_and_biases(bundles: list[Path], command: Command, options: tuple[str, ...], sentence: str) -> None:
    ended = command("generate", bundles[0], "--prompt", PROMPT, *options)
    assert ended.status == 2 and sentence in " ".join(ended.err.replace("│", " ").split())
