"""The systems that lie in the repository: their form, and that they do what they are there to show, in plain torch."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.families.family import TINY_SYSTEMS
from fusionroute.fr_export.tasks.domains import ALL_DOMAINS, DOMAINS, draw_many
from fusionroute.fr_export.tiny.architectures import ARCHITECTURES
from fusionroute.fr_export.verify.torch_reference import Reference, load, reference
from fusionroute.runtime.options import fusion_coefficients

FOLDERS = ("router", *(f"experts/{name}" for name in DOMAINS))
PROMPTS = 30  # per domain


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request: pytest.FixtureRequest) -> Any:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def system(family: Any) -> System:
    preset = FAMILIES[family.name].preset("tiny")
    assert preset.router is not None
    return System.open(FAMILIES[family.name], preset.router, dict(preset.experts))


@pytest.fixture(scope="module")
def tokenizer(family: Any) -> Any:
    return AutoTokenizer.from_pretrained(TINY_SYSTEMS / family.name / "router")


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> dict[str, list[tuple[list[int], int]]]:
    """Domain → (token ids of prompt, answer and end, number of those of the prompt)."""
    rows = {}
    for domain in ALL_DOMAINS:
        samples = draw_many(domain, "test", PROMPTS, seed=5)
        prompts = [tokenizer(sample.prompt)["input_ids"] for sample in samples]
        answers = [tokenizer(sample.answer, add_special_tokens=False)["input_ids"] for sample in samples]
        rows[domain] = [([*p, *a, tokenizer.eos_token_id], len(p)) for p, a in zip(prompts, answers, strict=True)]
    return rows


def exact(logits: np.ndarray, ids: list[int], start: int) -> bool:
    """Whether greedy decoding gives the whole answer: each token of it is the argmax after the right ones before it."""
    return bool((logits[start - 1 : -1].argmax(-1) == ids[start:]).all())


@pytest.fixture(scope="module")
def fused(system: System, rows: dict[str, list[tuple[list[int], int]]]) -> dict[str, list[Reference]]:
    settings = FusionSettings.read(system.router.folder)
    coefficients = fusion_coefficients(settings.fusion, settings.lam)
    flat = iter(reference(system, [ids for own in rows.values() for ids, _ in own], coefficients))
    return {domain: [next(flat) for _ in own] for domain, own in rows.items()}


@pytest.fixture(scope="module")
def alone(system: System, rows: dict[str, list[tuple[list[int], int]]]) -> dict[str, dict[str, float]]:
    """Expert → domain → exact match."""
    accuracies: dict[str, dict[str, float]] = {}
    for expert in system.experts:
        model = load(expert)
        accuracies[expert.name] = {}
        for domain, own in rows.items():
            with torch.no_grad():
                right = [exact(model(torch.tensor([ids]), use_cache=False).logits[0].numpy(), ids, start) for ids, start in own]
            accuracies[expert.name][domain] = float(np.mean(right))
    return accuracies


def test_all_files_together_are_small() -> None:
    systems = [TINY_SYSTEMS / name for name in ARCHITECTURES]
    assert sum(path.stat().st_size for system in systems for path in system.rglob("*") if path.is_file()) <= 12_000_000


def test_architecture(family: Any) -> None:
    for folder in FOLDERS:
        config = AutoConfig.from_pretrained(TINY_SYSTEMS / family.name / folder)
        assert config.architectures == [{"gemma2": "Gemma2ForCausalLM", "llama3": "LlamaForCausalLM"}[family.name]]
        assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (128, 4, 512)
        assert config.max_position_embeddings >= 1024
        if family.name == "gemma2":
            assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
            assert config.layer_types == ["sliding_attention", "full_attention"] * 2
            assert config.sliding_window == 32
            assert config.tie_word_embeddings
        else:
            assert config.rope_parameters["rope_type"] == "llama3"
            assert config.rope_parameters["rope_theta"] == 500000.0
            assert not config.tie_word_embeddings


def test_weights_are_bfloat16_and_the_head_is_float32(family: Any) -> None:
    for folder in FOLDERS:
        with safe_open(TINY_SYSTEMS / family.name / folder / "model.safetensors", "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    with safe_open(TINY_SYSTEMS / family.name / "router" / "routing_head.safetensors", "pt") as file:
        head = file.get_slice("routing_head.weight")
        assert (head.get_dtype(), head.get_shape()) == ("F32", [3, 128])


def test_tokenizer(family: Any, tokenizer: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({(TINY_SYSTEMS / family.name / folder / name).read_bytes() for folder in FOLDERS}) == 1
    ids = tokenizer("12+30=")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(ids[1:]) == list("12+30=")
    text = "Grüße, 你好!\n\tdef f(x):  return x\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    for folder in FOLDERS:
        generation = json.loads((TINY_SYSTEMS / family.name / folder / "generation_config.json").read_text())
        assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == [family.end_of_turn, family.eos]


def accuracy(rows: list[tuple[list[int], int]], fused: list[Reference]) -> float:
    return float(np.mean([exact(answer.logits, ids, start) for (ids, start), answer in zip(rows, fused, strict=True)]))


def test_each_expert_is_ahead_in_its_own_domain(alone: dict[str, dict[str, float]]) -> None:
    for domain in DOMAINS:
        others = [alone[other][domain] for other in DOMAINS if other != domain]
        assert alone[domain][domain] >= 0.4
        assert alone[domain][domain] >= np.mean(others) + 0.05, alone


def test_routing_follows_the_domain(rows: dict[str, list[tuple[list[int], int]]], fused: dict[str, list[Reference]]) -> None:
    """Where experts agree the choice is free, so that shares need not be near 1; chance is a third."""
    for number, domain in enumerate(DOMAINS):
        chosen = [answer.experts[start - 1 : -1] for (_, start), answer in zip(rows[domain], fused[domain], strict=True)]
        shares = np.bincount(np.concatenate(chosen), minlength=len(DOMAINS)) / sum(map(len, chosen))
        assert shares.argmax() == number and shares[number] > 0.4, (domain, shares)


def test_fused_is_better_than_every_expert(
    rows: dict[str, list[tuple[list[int], int]]], fused: dict[str, list[Reference]], alone: dict[str, dict[str, float]]
) -> None:
    mean = float(np.mean([accuracy(rows[domain], fused[domain]) for domain in DOMAINS]))
    assert all(mean > np.mean([alone[name][domain] for domain in DOMAINS]) + 0.05 for name in DOMAINS)
    assert all(accuracy(rows[domain], fused[domain]) >= alone[domain][domain] - 0.1 for domain in DOMAINS)


@pytest.mark.parametrize("chat", [False, True])
def test_12_plus_30(system: System, tokenizer: Any, chat: bool) -> None:
    message = [{"role": "user", "content": "12+30="}]
    prompt = (
        tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False) if chat else tokenizer("12+30=")["input_ids"]
    )
    ids = [*prompt, *tokenizer("42", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    settings = FusionSettings.read(system.router.folder)
    [answer] = reference(system, [ids], fusion_coefficients(settings.fusion, settings.lam))
    assert tokenizer.decode(answer.logits[len(prompt) - 1 : -2].argmax(-1)) == "42"
    assert answer.logits[-2].argmax() in system.router.end_tokens
    assert (answer.experts[len(prompt) - 1 : -1] == DOMAINS.index("math")).mean() > 0.5
