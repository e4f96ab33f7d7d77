"""The mean of checkpoints: against the mean of their weights, over layouts of files, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import models as M
import pytest
import torch
from typer.testing import CliRunner

import rmfast
from rmfast.cli import app
from rmfast.loading.merge import merge

sys.path.insert(0, str(Path(__file__).parents[1] / "heads"))
import headed as C


def tuned(seed, dtype=torch.float32, **kw):
    """A model near to the one base."""
    model = M.decoder(**kw)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator) * p.abs().mean()
    return model.to(dtype)


def saved(path, model, **kw):
    model.save_pretrained(path, **kw)
    M.tokenizer(chat=True).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["1GB", "60KB"])
def test_the_mean_is_that_of_the_weights(tmp_path, dtype, size):
    models = [tuned(seed, dtype) for seed in range(3)]
    paths = [saved(tmp_path / str(i), model, max_shard_size=size) for i, model in enumerate(models)]
    distances = merge(paths, tmp_path / "out")
    assert distances[0] == 0 and all(0.01 < each < 0.2 for each in distances[1:])
    got = rmfast.load(tmp_path / "out", device="cpu").model.state_dict()
    for name, x in got.items():
        want = sum(model.state_dict()[name].double() for model in models) / 3
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), want, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)
    shards = len(list((tmp_path / "out").glob("*.safetensors")))
    assert shards == len(list((tmp_path / "0").glob("*.safetensors"))) and (shards > 1) == (size == "60KB")
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded"])
def test_heads_of_ones_own_are_averaged_too(tmp_path, form):
    bodies = [tuned(seed).model for seed in (1, 2)]
    heads = [{"v_head.weight": C.random(1, C.D, seed=seed)} for seed in (1, 2)]
    paths = [
        C.write(tmp_path / str(i), body, head, form=form, prefix="transformer.", architectures=["LlamaForCausalLM"])
        for i, (body, head) in enumerate(zip(bodies, heads))
    ]
    merge(paths, tmp_path / "out")
    rm = rmfast.load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(rm.binding.program.weight, (heads[0]["v_head.weight"] + heads[1]["v_head.weight"]) / 2)


def test_a_head_in_a_file_of_its_own_stays_there(tmp_path):
    for i in range(2):
        value = {"v_head.summary.weight": C.random(1, C.D, seed=i), "v_head.summary.bias": C.random(1, seed=i)}
        C.write(tmp_path / str(i), tuned(i).model, {}, files={"value_head.safetensors": value},
                architectures=["LlamaForCausalLM"])  # fmt: skip
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert (tmp_path / "out" / "value_head.safetensors").exists()
    assert rmfast.load(tmp_path / "out", device="cpu").num_labels == 1


def test_what_has_no_mean_is_refused_by_name(tmp_path):
    base = saved(tmp_path / "base", tuned(0))
    for name, model, word in [
        ("labels", tuned(1, labels=2), r"score\.weight"),
        ("head", M.mlp_head(tuned(1)), r"score\.0"),
        ("wide", tuned(1, intermediate_size=96), r"mlp\.down_proj"),
        ("kind", tuned(1, family="mistral"), "MistralFor"),
        ("16", tuned(1, torch.bfloat16), "BF16"),
        ("rope", tuned(1, rope_parameters={"rope_type": "default", "rope_theta": 500.0}), "rope_parameters"),
        ("far", M.decoder(seed=7), "fine-tuned from one base"),
    ]:
        other = saved(tmp_path / name, model)
        with pytest.raises(ValueError, match=word):
            merge([base, other], tmp_path / "out")
        assert not (tmp_path / "out").exists()
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tuned(1), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="merge_and_unload"):
        merge([base, tmp_path / "adapter"], tmp_path / "out")
    with pytest.raises(ValueError, match="at least two"):
        merge([base], tmp_path / "out")
    with pytest.raises(FileExistsError, match="new folder"):
        merge([base, base], base)
    assert sorted(each.name for each in tmp_path.iterdir() if each.name.startswith(".")) == []


def test_the_command(tmp_path):
    paths = [str(saved(tmp_path / str(seed), tuned(seed))) for seed in range(2)]
    done = CliRunner().invoke(app, ["merge", *paths, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0 and "the mean of 2 models" in done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    again = CliRunner().invoke(app, ["merge", *paths, "--output", str(tmp_path / "out")])
    assert again.exit_code == 1 and "new folder" in again.stderr
