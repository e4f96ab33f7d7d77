"""Linear heads and MLPs in the layouts of published reward models and of training frameworks."""

from __future__ import annotations

import headed as C
import models as M
import pytest
import torch

import rmfast
from rmfast.texts.inputs import InputError

TEXTS = M.token_ids([5, 30, 3, 17, 24, 2])
LINEAR = {
    "UltraRM": ("regression_head", "model.", {"architectures": ["LlamaRewardModel"]}),
    "Eurus": ("regression_head", "model.", {"architectures": ["EurusRewardModel"]}),
    "Starling": ("v_head", "transformer.", {"architectures": ["LlamaForRewardModel"]}),
    "OpenRLHF score": ("score", "model.", {"architectures": ["RewardModel"], "mean": 0.5, "std": 2.0}),
    "OpenRLHF value_head": ("value_head", "model.", {"architectures": ["CriticModel"]}),
    "TRL": ("v_head.summary", "model.", {"architectures": ["LlamaForCausalLM"]}),
    "GRM linear": ("v_head.summary", "model.", {"vhead_layer_type": "linear"}),
}


def wanted(body, rm, inputs, formula):
    """The formula of each text's last hidden state."""
    return torch.stack([formula(x[-1]) for x in C.states(body, rm.encode(inputs))])


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
def test_a_linear_head_scores_as_published(tmp_path, name, form):
    head, prefix, config = LINEAR[name]
    body, weight, bias = C.body(), C.random(1, C.D), C.random(1)
    tensors = {f"{head}.weight": weight} | ({f"{head}.bias": bias} if "summary" in head else {})
    C.write(tmp_path, body, tensors, prefix=prefix, form=form, **config)
    rm = rmfast.load(tmp_path, device="cpu")
    plain = bias[0].double() if "summary" in head else 0.0
    C.assert_alike(rm, TEXTS, wanted(body, rm, TEXTS, lambda x: weight[0].double() @ x + plain))
    assert len(rm.token_values(TEXTS)[1]) == 30


@pytest.mark.parametrize(
    "architecture, name, numbers",
    [("INFORMForSequenceClassification", "score", (0, 2)), ("LlamaForCausalLM", "v_head.summary", (0, 2, 4))],
)
def test_an_mlp_scores_as_published(tmp_path, architecture, name, numbers):
    body = C.body()
    tensors = C.linears(name, *[C.D, *[40] * (len(numbers) - 1), 1], numbers=numbers)
    C.write(tmp_path, body, tensors, architectures=[architecture], vhead_num_layers=2)
    rm = rmfast.load(tmp_path, device="cpu")
    C.assert_alike(
        rm, TEXTS, wanted(body, rm, TEXTS, lambda x: C.layered(tensors, name, numbers, torch.relu, x[None])[0, 0])
    )


@pytest.mark.parametrize("file", ["value_head.safetensors", "value_head.bin"])
@pytest.mark.parametrize("lm_head", [True, False])
def test_a_value_head_lies_beside_the_base(tmp_path, file, lm_head):
    body, weight, bias = C.body(), C.random(1, C.D), C.random(1)
    head = {"lm_head.weight": C.random(M.VOCAB, C.D)} if lm_head else {}
    value_head = {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    C.write(tmp_path, body, head, files={file: value_head}, architectures=["LlamaForCausalLM"])
    rm = rmfast.load(tmp_path, device="cpu")
    C.assert_alike(rm, TEXTS, wanted(body, rm, TEXTS, lambda x: weight[0].double() @ x + bias[0].double()))


@pytest.mark.parametrize("file", ["value_head.safetensors", "value_head.bin"])
def test_a_value_head_lies_beside_an_adapter(tmp_path, file):
    peft = pytest.importorskip("peft")
    import transformers
    from safetensors.torch import save_file

    config = M.decoder("llama").config
    base = M.randomised(transformers.LlamaForCausalLM(config))
    base.save_pretrained(tmp_path / "base")
    M.tokenizer().save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    weight, bias = C.random(1, C.D), C.random(1)
    value_head = {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    (save_file if file.endswith("safetensors") else torch.save)(value_head, tmp_path / "adapter" / file)
    rm = rmfast.load(tmp_path / "adapter", device="cpu")
    adapted.merge_and_unload()
    body = adapted.base_model.model.model
    C.assert_alike(rm, TEXTS, wanted(body, rm, TEXTS, lambda x: weight[0].double() @ x + bias[0].double()))


def test_athene_is_read_at_its_token(tmp_path):
    body, weight = C.body(vocab_size=128004), C.random(1, C.D)
    C.write(tmp_path, body, {"v_head.weight": weight}, architectures=["AtheneForSequenceClassification"])
    rm = rmfast.load(tmp_path, device="cpu")
    texts = [[*ids, 128003] for ids in TEXTS]
    assert rm.pooling == 128003
    C.assert_alike(rm, texts, wanted(body, rm, texts, lambda x: weight[0].double() @ x))
    with pytest.raises(InputError, match="token id 128003"):
        rm.score(TEXTS)
    encoded = rm.encode(["a text", ("a", "b")])  # texts end in it by themselves, once
    assert all(item.ids[-1] == 128003 and item.ids[-2] != 128003 for item in encoded)
    assert [len(item) for item in rm.encode(encoded)] == [len(item) for item in encoded]
    assert len(rm.encode(["x" * 300], max_length=20, truncation="left")[0]) == 20


def test_the_own_mean_and_std_are_applied_when_asked(tmp_path):
    C.write(tmp_path, C.body(), {"score.weight": C.random(1, C.D)}, architectures=["RewardModel"], mean=0.5, std=2.0)
    rm = rmfast.load(tmp_path, device="cpu")
    assert torch.equal(rm.score(TEXTS, normalize="own"), rm.score(TEXTS, normalize=(0.5, 2.0)))
    with pytest.raises(ValueError, match="no mean and std of its own"):
        rmfast.RewardModel(M.decoder("llama")).score(TEXTS, normalize="own")


def test_texts_are_read_before_the_first_pad_where_the_model_does(tmp_path):
    body, weight = C.body(), C.random(1, C.D)
    tensors = {"v_head.weight": weight}
    C.write(tmp_path, body, tensors, prefix="transformer.", architectures=["LlamaForRewardModel"])
    rm = rmfast.load(tmp_path, device="cpu")
    text = [7, 8, M.PAD, 9, 10]
    want = torch.stack([weight[0].double() @ C.states(body, rm.encode([text]))[0][1]])
    C.assert_near(rm.score([text]), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_head_keeps_its_precision_on_a_body_of_another(tmp_path, dtype):
    body, weight = C.body(), C.random(1, C.D)
    C.write(tmp_path, body, {"regression_head.weight": weight})
    rm = rmfast.load(tmp_path, device="cpu", dtype=dtype)
    assert rm.model.dtype == dtype and rm.binding.program.weight.dtype == torch.float32
    want = wanted(body, rm, TEXTS, lambda x: weight[0].double() @ x)
    assert (rm.score(TEXTS) - want).abs().max() < (1e-6 if dtype == torch.float64 else 0.1)  # Llama's norm is in fp32


def test_a_head_of_an_unknown_name_is_refused_with_the_names_that_there_are(tmp_path):
    body, weight = C.body(), C.random(1, C.D)
    C.write(tmp_path, body, {"own_head.weight": weight}, architectures=["OwnModel"])
    with pytest.raises(
        ValueError, match=r"is not a reward model.*outside of the body, own_head\.weight.*head=\"NAME\""
    ):
        rmfast.load(tmp_path, device="cpu")
    rm = rmfast.load(tmp_path, device="cpu", head="own_head")
    C.assert_alike(rm, TEXTS, wanted(body, rm, TEXTS, lambda x: weight[0].double() @ x))
    with pytest.raises(ValueError, match=r"Expected a head other in .*own_head\.weight"):
        rmfast.load(tmp_path, device="cpu", head="other")


def test_tensors_that_are_no_part_of_the_head_are_refused(tmp_path):
    C.write(tmp_path, C.body(), {"regression_head.weight": C.random(1, C.D), "scaling.weight": C.random(1, 1)})
    with pytest.raises(ValueError, match=r"like that of UltraRM.*scaling\.weight"):
        rmfast.load(tmp_path, device="cpu")


def test_a_body_without_all_its_weights_is_refused(tmp_path):
    body = C.body()
    weights = {f"model.{name}": x for name, x in body.state_dict().items() if "layers.1.mlp" not in name}
    C.write(tmp_path, body, {"regression_head.weight": C.random(1, C.D)})
    from safetensors.torch import save_file

    save_file(weights | {"regression_head.weight": C.random(1, C.D)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no weights of their shapes for layers\.1\.mlp"):
        rmfast.load(tmp_path, device="cpu")


@pytest.mark.parametrize("prefix", ["model.", "", "transformer."])
def test_weights_that_the_body_has_no_place_for_are_refused(tmp_path, prefix):
    name = f"{prefix}layers.0.self_attn.q_proj.bias"
    tensors = {"regression_head.weight": C.random(1, C.D), name: C.random(C.D)}
    C.write(tmp_path, C.body(), tensors, prefix=prefix)
    with pytest.raises(ValueError, match=r"has layers\.0\.self_attn\.q_proj\.bias, which LlamaModel has no place for"):
        rmfast.load(tmp_path, device="cpu")
    C.write(tmp_path, C.body(), {"regression_head.weight": C.random(1, C.D)}, prefix=prefix)
    rmfast.load(tmp_path, device="cpu")


def test_a_head_of_another_width_is_refused(tmp_path):
    C.write(tmp_path, C.body(), {"regression_head.weight": C.random(1, C.D + 1)})
    with pytest.raises(ValueError, match="width 48, got Linear of width 49"):
        rmfast.load(tmp_path, device="cpu")


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    C.write(tmp_path, C.body(), {}, architectures=["LlamaForCausalLM"])
    torch.save({"v_head.summary.weight": Evil()}, tmp_path / "value_head.bin")
    with pytest.raises(pickle.UnpicklingError):
        rmfast.load(tmp_path, device="cpu")


def test_fingerprints_tell_heads_of_one_body_apart():
    body = C.body()
    one, two = (rmfast.RewardModel(body, head=rmfast.heads.Linear(weight=C.random(1, C.D, seed=s))) for s in (0, 1))
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint == rmfast.RewardModel(body, head=rmfast.heads.Linear(weight=C.random(1, C.D))).fingerprint
