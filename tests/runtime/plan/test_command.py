"""`plan` as people and scripts call it."""

import json
from pathlib import Path

import pytest

from fusionroute.runtime.bench import bandwidth
from fusionroute.runtime.plan.devices import devices
from fusionroute.runtime.precisions import exported_for, fastest_first
from tests.support.commands import Command

OF_ORIN = [name for name in fastest_first(exported_for("tensorrt"), "tensorrt") if name not in ("fp8", "nvfp4")]  # it is SM87
SMALL = ("--family", "llama3", "--size", "1B", "--target", "orin-nx-16gb")


def test_json_has_what_scripts_rely_on(command: Command) -> None:
    ended = command("plan", *SMALL, "--experts", 2, "--json")
    assert ended.status == 0
    result = json.loads(ended.out)
    assert result["estimate"].startswith("An estimate, not a measurement: ")
    names = [each["precision"] for each in result["precisions"]]
    assert names == OF_ORIN and {"int4", "int8", "bf16"} <= {*names}
    for each in result["precisions"]:
        low, expected, high = each["decode_tokens_per_second"]
        assert 0 < low < expected < high
        assert each["fits"] is (each["placement"] == "fits")
        assert each["weights_bytes"] > 3 * 1e9 * 0.5 and each["kv_bytes"] == 3 * 2 * 16 * 8 * 64 * 4096 * (
            4 if each["precision"] == "fp32" else 2
        )
    assert result["recommended"] == {"precision": "int8", "command": result["precisions"][names.index("int8")]["command"]}
    assert result["recommended"]["command"] == (
        "fusionroute export --family llama3 --router router --expert expert1=experts/expert1 --expert expert2=experts/expert2 "
        "--target tensorrt --precision int8 --max-seq-len 4096"
    )


def test_the_table_fits_80_columns_and_says_that_it_is_an_estimate(command: Command) -> None:
    ended = command("plan", *SMALL, "--shared-base", "--rank", 16)
    assert ended.status == 0 and ended.err == ""
    assert max(map(len, ended.out.splitlines())) <= 80
    joined = " ".join(ended.out.split())
    assert "An estimate, not a measurement" in joined and "48 published measurements on 15 boards and cards" in joined
    commands = ended.out[ended.out.index("  fusionroute export") :].partition("\nAn")[0]
    assert "--shared-base --rank 16" in " ".join(commands.replace("\\\n", " ").split())


def test_a_system_that_does_not_fit_comes_with_its_budget(command: Command) -> None:
    """Not where host and GPU share their memory: engines refuse it there."""
    asked = ("plan", "--family", "llama3", "--size", "8B", "--experts", 3, "--precision", "int8", "--target")
    choice = json.loads(command(*asked, "rtx-4090", "--json").out)["precisions"][0]
    assert choice["placement"] == "fits with evicting experts" and choice["experts_in_memory"] == 1
    assert f"and run it with --expert-memory {choice['expert_memory_bytes'] >> 20}\n" in command(*asked, "rtx-4090").out
    assert "--expert-memory" not in command(*asked, "agx-orin-32gb").out


@pytest.mark.parametrize(("target", "floats"), [("rtx-3060-12gb", []), ("rtx-4060-8gb", ["fp8"]), ("rtx-5090", ["nvfp4", "fp8"])])
def test_precisions_are_those_whose_types_a_gpu_has(target: str, floats: list[str], command: Command) -> None:
    planned = json.loads(command("plan", "--family", "llama3", "--size", "1B", "--target", target, "--json").out)
    assert [each["precision"] for each in planned["precisions"] if each["precision"] in ("fp8", "nvfp4")] == floats


def test_one_model_alone_is_planned_and_not_exported(command: Command) -> None:
    alone = json.loads(command("plan", "--family", "llama3", "--size", "8B", "--experts", 0, "--target", "rtx-4090", "--json").out)
    assert alone["recommended"] == {"precision": "int8", "command": None}
    ended = command("plan", *SMALL, "--experts", 0)
    assert "Take int8, of a router with at least one expert." in ended.out and "fusionroute export" not in ended.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--family", "llama3", "--size", "8B", "--target", "orin"),
            f"Unknown target 'orin': use one of {', '.join(devices())}, this, or --device-memory with --bandwidth.",
        ),
        (
            ("--family", "llama3", "--size", "9B", "--target", "thor"),
            "The size '9B' of family llama3 is not known: use one of 135M (SmolLM2-135M), 360M (SmolLM2-360M), 1.7B (SmolLM2-1.7B), "
            "1B (Llama-3.2-1B), 3B (Llama-3.2-3B), 8B (Llama-3.1-8B), 7B (Llama-2-7B), or plan an exported bundle.",
        ),
        (
            ("--family", "gpt", "--size", "8B", "--target", "thor"),
            "The family 'gpt' has no known sizes: use one of llama3, gemma2, gemma3, mistral, phi3, qwen2, qwen3, olmo2, smollm3, or plan "
            "an exported bundle.",
        ),
        ((*SMALL, "--experts", "65"), "65 experts make no system: plan 0, which is one model alone, to 64."),
        ((*SMALL, "--experts", "-1"), "-1 experts make no system: plan 0, which is one model alone, to 64."),
        (
            (*SMALL, "--experts", "0", "--shared-base"),
            "One model alone shares its base with nothing: leave --shared-base out, or plan --experts.",
        ),
        ((*SMALL, "--shared-base", "--rank", "0"), "A rank of 0 does not fit matrices of 2048 rows: give --rank 1 to 2048."),
        ((*SMALL, "--context", "200000"), "A context of 200000 tokens is outside what the model takes: give --context 2 to 131072."),
        ((*SMALL, "--context", "1"), "A context of 1 tokens is outside what the model takes: give --context 2 to 131072."),
        (
            (*SMALL, "--precision", "w8a8"),
            f"There is no precision 'w8a8' for Jetson Orin NX 16GB (tensorrt): use one of {', '.join(OF_ORIN)}.",
        ),
        ((*SMALL, "--switch-rate", "2"), "--switch-rate 2 is no share of the tokens: give a number from 0 to 1."),
        ((*SMALL, "--acceptance", "-1"), "--acceptance -1 is no share of the tokens: give a number from 0 to 1."),
        (
            ("--size", "8B", "--target", "thor"),
            "Name what to plan: the folder of a bundle, or --family and --size, such as --family llama3 --size 8B.",
        ),
        (
            ("--family", "llama3", "--size", "8B", "--device-memory", "8GiB"),
            f"Name one device: --target ({', '.join(devices())}, this), or --device-memory 8GiB with --bandwidth 68.",
        ),
        (
            ("--family", "llama3", "--size", "8B", "--device-memory", "8 apples", "--bandwidth", "68"),
            "'8 apples' is no size of a device's memory: give a number with a unit, such as 8GiB.",
        ),
        (
            ("--family", "llama3", "--size", "8B", "--device-memory", "8GiB", "--bandwidth", "0"),
            "A bandwidth of 0 GB/s is impossible: give GB/s as the maker does, such as 68 or 1008.",
        ),
    ],
)
def test_refusals_are_one_sentence(arguments: tuple[str, ...], sentence: str, command: Command) -> None:
    ended = command("plan", *arguments)
    assert (ended.status, ended.out, ended.err) == (1, "", f"error: {sentence}\n")


def test_a_bundle_says_what_it_holds(bundles: list[Path], command: Command) -> None:
    ended = command("plan", bundles[0], "--experts", 2, "--target", "thor")
    assert (ended.status, ended.err) == (
        1, "error: A bundle says what it holds: leave --family, --size, --experts and --shared-base out, or the bundle.\n",
    )  # fmt: skip
    ended = command("plan", bundles[0], "--target", "thor")
    assert (ended.status, ended.err) == (
        1,
        "error: The bundle has nothing for Jetson AGX Thor (T5000), and its models have no known sizes: export it with --target tensorrt, "
        "or plan with --family and --size.\n",
    )


def test_a_plan_for_this_machine_is_held_against_a_run(bundles: list[Path], command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "of_host", lambda: bandwidth.Bandwidth(24e9, 1 << 28))
    ended = command("plan", bundles[0], "--target", "this", "--precision", "int8", "--json")
    assert ended.status == 0
    result = json.loads(ended.out)
    assert result["device"]["bandwidth"] == 24e9 and result["device"]["target"] == "ort:cpu"
    (check,) = result["checks"]
    assert check["precision"] == "int8" and check["measured"] > 0
    assert check["error"] == pytest.approx(check["estimated"] / check["measured"] - 1, abs=2e-3)


def test_the_picture_is_drawn(command: Command, tmp_path: Path) -> None:
    from PIL import Image

    ended = command("plan", *SMALL, "--picture", tmp_path / "plan.png", "--json")
    assert ended.status == 0
    with Image.open(tmp_path / "plan.png") as image:
        assert image.format == "PNG" and image.width > 800
    ended = command("plan", *SMALL, "--picture", tmp_path / "no" / "plan.png")
    assert ended.status == 1 and ended.err.count("\n") == 1
