"""The systems that lie in the repository: their form, and that they do what they are there to show."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from fr_export.training.architectures import FAMILIES
from fr_export.training.domains import DOMAINS, draw_many
from fr_export.training.rows import Encoder, collate
from fr_export.training.system import FUSION_WEIGHT, Measurement, System, mean_accuracy, measure
from fr_export.training.tiny import SHIPPED

FOLDERS = ("router", *(f"experts/{name}" for name in DOMAINS))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def system(family: Any) -> System:
    return System.load(SHIPPED / family.name)


@pytest.fixture(scope="module")
def tokenizer(family: Any) -> Any:
    return AutoTokenizer.from_pretrained(SHIPPED / family.name / "router")


@pytest.fixture(scope="module")
def measured(family: Any, system: System, tokenizer: Any) -> dict[str, Measurement]:
    encoder = Encoder(tokenizer, family)
    found = {}
    for domain in DOMAINS:
        samples = draw_many(domain, "test", 30, seed=5)
        found[domain] = measure(system, collate([encoder.row([s], chat=i % 2 == 1) for i, s in enumerate(samples)]))
    return found


def generate(system: System, ids: list[int], stop: list[int]) -> Iterator[tuple[int, int]]:
    """Fused greedy decoding in the plainest way: (token, expert) pairs."""
    for _ in range(24):
        with torch.no_grad():
            router, routing = system.route(torch.tensor([ids]))
            expert = int(routing[0, -1].argmax())
            own = system.experts[expert](torch.tensor([ids]), use_cache=False).logits
        token = int((FUSION_WEIGHT * router[0, -1] + (1 - FUSION_WEIGHT) * own[0, -1]).argmax())
        if token in stop:
            return
        yield token, expert
        ids = [*ids, token]


def test_all_files_together_are_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 12_000_000


def test_architecture(family: Any) -> None:
    for folder in FOLDERS:
        config = AutoConfig.from_pretrained(SHIPPED / family.name / folder)
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
        with safe_open(SHIPPED / family.name / folder / "model.safetensors", "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    with safe_open(SHIPPED / family.name / "router" / "routing_head.safetensors", "pt") as file:
        head = file.get_slice("routing_head.weight")
        assert (head.get_dtype(), head.get_shape()) == ("F32", [3, 128])


def test_tokenizer(family: Any, tokenizer: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({(SHIPPED / family.name / folder / name).read_bytes() for folder in FOLDERS}) == 1
    ids = tokenizer("12+30=")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(ids[1:]) == list("12+30=")
    text = "Grüße, 你好!\n\tdef f(x):  return x\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    for folder in FOLDERS:
        generation = json.loads((SHIPPED / family.name / folder / "generation_config.json").read_text())
        assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == [family.end_of_turn, family.eos]


def test_each_expert_is_the_best_in_its_own_domain(measured: dict[str, Measurement]) -> None:
    for domain in DOMAINS:
        accuracy = measured[domain].accuracy
        assert accuracy[domain] >= 0.8
        assert all(accuracy[domain] >= accuracy[other] + 0.2 for other in DOMAINS if other != domain), accuracy


def test_routing_follows_the_domain(measured: dict[str, Measurement]) -> None:
    for i, domain in enumerate(DOMAINS):
        assert measured[domain].routing[i] > 0.5, measured[domain]


def test_fused_is_the_best_on_average(measured: dict[str, Measurement]) -> None:
    mean = mean_accuracy(list(measured.values()))
    assert all(mean["fused"] > mean[name] for name in DOMAINS)
    assert all(m.accuracy["fused"] >= m.accuracy[domain] - 0.1 for domain, m in measured.items())


@pytest.mark.parametrize("chat", [False, True])
def test_12_plus_30(family: Any, system: System, tokenizer: Any, chat: bool) -> None:
    prompt = "12+30="
    if chat:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(prompt)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids([family.end_of_turn, family.eos])
    tokens, experts = zip(*generate(system, list(ids), stop), strict=True)
    assert tokenizer.decode(tokens) == "42"
    assert experts.count(DOMAINS.index("math")) > len(experts) / 2
