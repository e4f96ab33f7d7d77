"""Small random models and tokenizers, made without a network, and the truth they are judged by."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, CLS, SEP, UNK, USER, ASSISTANT = range(256, 264)
VOCAB = 272  # 256 bytes, 8 special tokens, 8 rows that no tokenizer uses
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<assistant>' }}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}"
)
_SPECIAL = ["<s>", "</s>", "<pad>", "<cls>", "<sep>", "<unk>", "<user>", "<assistant>"]
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}  # fmt: skip
_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    # Eager: SDPA, the default up to transformers 5.23, drops its softcap, and is refused.
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16, "attn_implementation": "eager"},
    ),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", {}),
    "phi3-longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 6,
                "long_factor": [4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
                "original_max_position_embeddings": 24,
            },
        },
    ),
    "llama-dynamic": (
        "Llama",
        {
            "max_position_embeddings": 24,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "gpt2": ("GPT2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rope_parameters": _ROPE,
        },
    ),
    "deepseek-v2": ("DeepseekV2", {**_LATENT, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "deepseek-v3": ("DeepseekV3", {**_LATENT, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    "bloom": ("Bloom", {}),
    "mpt": ("Mpt", {"max_seq_len": 128}),
    "falcon-alibi": ("Falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
}
MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "deepseek-v2", "deepseek-v3"]
ALIBI = ["bloom", "mpt", "falcon-alibi"]
# Long and short mixed, on both sides of every length at which a model's rules change (16: sliding windows, 24: rotary).
LENGTHS = [5, 60, 3, 17, 24, 1, 25, 2, 23, 41, 16, 90]
DECODERS = [name for name in _DECODERS if name not in ("gpt2", *MIXTURES, *ALIBI)]


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """Values at which mistakes show: norm gains far from 1, biases far from 0, rewards of order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1 and ("embed" in name or "wte" in name or "wpe" in name):
                p.copy_(noise)
            elif p.dim() > 1:
                p.copy_(noise / p.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            else:
                p.copy_(0.5 + 0.5 * noise)
    return model.eval()


def decoder(
    family: str = "llama", labels: int = 1, task: str = "SequenceClassification", seed: int = 0, **kw: Any
) -> Any:
    """A two-layer decoder with a reward head, fp32, eval mode."""
    prefix, extra = _DECODERS[family]
    config = getattr(transformers, f"{prefix}Config")(**{**_SHAPE, "num_labels": labels, **extra, **kw})
    torch.manual_seed(seed)
    kind = getattr(transformers, f"{prefix}For{task}", None)
    if kind is None:  # as transformers makes them for other families
        bases = (
            getattr(transformers.modeling_layers, f"GenericFor{task}"),
            getattr(transformers, f"{prefix}PreTrainedModel"),
        )
        kind = type(f"{prefix}For{task}", bases, {})
    return randomised(kind(config), seed)


def encoder(
    family: str = "Bert", labels: int = 1, task: str = "SequenceClassification", seed: int = 0, **kw: Any
) -> Any:
    """A two-layer encoder, fp32, eval mode."""
    shape = {k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"}
    config = getattr(transformers, f"{family}Config")(**{**shape, "num_labels": labels, "type_vocab_size": 2, **kw})
    torch.manual_seed(seed)
    return randomised(getattr(transformers, f"{family}For{task}")(config), seed)


def mlp_head(model: Any, labels: int = 1, seed: int = 1) -> Any:
    """Give a sequence- or token-classification model a Linear–ReLU–Linear head."""
    d = model.config.hidden_size
    torch.manual_seed(seed)
    model.score = nn.Sequential(nn.Linear(d, 32), nn.ReLU(), nn.Linear(32, labels))
    return model.eval()


class Int8Linear(nn.Module):
    """A weight-only quantised Linear, as the libraries that transformers loads put in a model's place."""

    def __init__(self, linear, dynamic=False):
        super().__init__()
        self.dynamic = dynamic
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        if self.dynamic:  # activations too, with one scale for the whole batch
            scale = x.abs().max() / 127
            x = (x / scale).round() * scale
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantised(with_head=False, dynamic=False):
    model = decoder("llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (with_head or name != "score"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear(module, dynamic))
    return model


def tokenizer(kind: str = "decoder", chat: bool = False, **kw: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: "decoder" adds BOS, "plain" adds nothing, "encoder" adds <cls> a <sep> b <sep>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *_SPECIAL])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(_SPECIAL)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if kind == "decoder":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if kind == "encoder":
        backend.post_processor = processors.TemplateProcessing(
            single="<cls> $A <sep>",
            pair="<cls> $A:0 <sep>:0 $B:1 <sep>:1",
            special_tokens=[("<cls>", CLS), ("<sep>", SEP)],
        )
        names = {"cls_token": "<cls>", "sep_token": "<sep>", "pad_token": "<pad>", "unk_token": "<unk>"}
        kw.setdefault("model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **kw})
    if chat:
        made.chat_template = TEMPLATE
    return made


def token_ids(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Ordinary token ids of the given lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(n)] for n in lengths]


def alone(model: nn.Module, ids: list[int], **kw: Any) -> Tensor:
    """The model's own logits for one text, unpadded: (K,), or (T, K) for token classification."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **kw).logits[0].float()


def fresh(model: nn.Module) -> nn.Module:
    """A copy for each text: dynamic rotary frequencies remember the longest text they have seen."""
    return copy.deepcopy(model)


def own(model: nn.Module, texts: list[list[int]]) -> Tensor:
    """The model's own rewards, (N,) or (N, K)."""
    return torch.stack([alone(fresh(model), ids) for ids in texts]).squeeze(-1)


def reward_scale(model: Any) -> float:
    """‖γ⊙w‖₂, the largest over the heads, of a model with a linear head."""
    head = next(getattr(model, name) for name in ("score", "classifier") if hasattr(model, name))
    body = model.base_model
    norm = getattr(body, "norm", None) or getattr(body, "ln_f", None)
    gain = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
    return float((head.weight * gain).norm(dim=-1).max().detach())


def assert_rewards(got: Tensor, want: Tensor, scale: float) -> None:
    """Within 1e-5 · max(|r|, reward scale): what the project promises for fp32."""
    assert got.shape == want.shape, (got.shape, want.shape)
    error = (got - want).abs() / want.abs().clamp(min=scale)
    assert float(error.max()) <= 1e-5, f"{float(error.max()):.2e}"
