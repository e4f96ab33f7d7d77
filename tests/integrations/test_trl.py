"""The trainer: TRL's own but for the loss. Tiny random models; everything in fp32 on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import datasets
import trl
from models import BOS, EOS, TEMPLATE, decoder, encoder, tokenizer
from peft import LoraConfig
from tokenizers import processors

import rmfast
from rmfast import losses
from rmfast.integrations.trl import RewardConfig, RewardTrainer, rmfast_reward

datasets.disable_progress_bars()

ROWS = [
    {"prompt": f"Q{i}? ", "chosen": "good " * (1 + i % 3) + str(i), "rejected": "bad " * (1 + i % 4)} for i in range(12)
]


def config(folder, kind=RewardConfig, **kw):
    common = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "logging_steps": 1, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return kind(**{**common, **kw})


def trainer(
    folder, rows=ROWS, model=None, chat=False, text=None, cls=RewardTrainer, kind=RewardConfig, extra=None, **kw
):
    return cls(
        model or decoder(),
        config(folder, kind, **kw),
        train_dataset=datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=text or tokenizer(chat=chat),
        **(extra or {}),
    )


def batch_loss(made, size=4):
    """The loss, outputs and inputs of the first rows."""
    rows = [made.train_dataset[i] for i in range(size)]
    inputs = made.data_collator(rows)
    loss, outputs = made.compute_loss(made.model, dict(inputs), return_outputs=True)
    return loss, outputs, inputs, rows


def weights(made):
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)


def spoken(row):
    """The same as a conversation."""
    turns = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **turns}


def adding(begin, end):
    """A tokenizer that adds BOS, EOS, both or nothing."""
    made = tokenizer(chat=True)
    single = f"{'<s> ' * begin}$A{' </s>' * end}"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return made


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{ bos_token }}", ""), "\n " + TEMPLATE])
def test_what_is_trained_on_is_what_is_scored(tmp_path, begin, end, template):
    text = adding(begin, end)
    text.chat_template = template
    rows = [*ROWS[:2], {"prompt": "<s>So ", "chosen": "it is</s>", "rejected": "be it"}]
    for data in (rows, [spoken(row) for row in rows]):
        made = trainer(tmp_path, data, text=text)
        rm = rmfast.RewardModel(made.model, text)
        for side in ("chosen", "rejected"):
            scored = rm.encode(
                [(row["prompt"], row[side]) for row in rows], format="concat" if data is rows else "chat"
            )
            assert made.train_dataset[f"{side}_ids"][:] == [item.ids.tolist() for item in scored]


def test_tools_and_template_kwargs_of_a_row_are_trained_on_and_scored(tmp_path):
    text = tokenizer(chat=True)
    text.chat_template = "{% for tool in tools or [] %}{{ tool['name'] }}{% endfor %}{{ style }}" + TEMPLATE
    tools, kwargs = [{"name": "add"}], {"style": "terse"}
    row = {**spoken(ROWS[0]), "tools": json.dumps(tools), "chat_template_kwargs": kwargs}
    made = trainer(tmp_path, [row] * 4, text=text, loss="tcrm")
    rm = rmfast.RewardModel(made.model, text)
    turns = row["prompt"] + row["chosen"]
    trained = made.train_dataset[0]
    want = text.apply_chat_template(turns, tools=tools, tokenize=True, return_dict=False, **kwargs)
    assert trained["chosen_ids"] == want == rm.encode([turns], tools=tools, chat_template_kwargs=kwargs)[0].ids.tolist()
    assert text.decode(trained["chosen_ids"][trained["chosen_start"] :]) == f"<assistant>{ROWS[0]['chosen']}</s>"
    asked = {"prompts": [row["prompt"]] * 2, "completions": [row["chosen"]] * 2}
    some = rmfast_reward(rm)(**asked, tools=[None, tools], chat_template_kwargs=[None, kwargs])
    assert some == rm.score([turns, want]).tolist()
    assert rmfast_reward(rm, tools=tools, chat_template_kwargs=kwargs)(**asked) == rm.score([want, want]).tolist()


def test_a_row_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="row 1 of the dataset, rejected: its message 1 has no content"):
        trainer(
            tmp_path,
            [spoken(ROWS[0]), {**spoken(ROWS[1]), "rejected": [{"role": "assistant", "content": None}]}],
            chat=True,
        )


def test_bt_is_trl_s_own_training(tmp_path):
    made = [
        trainer(tmp_path / str(i), [spoken(row) for row in ROWS], chat=True, cls=cls, kind=kind)
        for i, (cls, kind) in enumerate([(RewardTrainer, RewardConfig), (trl.RewardTrainer, trl.RewardConfig)])
    ]
    for each in made:
        each.train()
    assert_same(weights(made[0]), weights(made[1]))
    assert made[0].state.log_history[0]["loss"] == made[1].state.log_history[0]["loss"]


def test_tcrm_without_its_terms_is_bt_with_margin_and_centring(tmp_path):
    rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(ROWS)]
    options = {"rows": rows, "center_rewards_coefficient": 0.01}
    tcrm, _, _, _ = batch_loss(trainer(tmp_path, loss="tcrm", smooth=0.0, lookahead=0.0, **options))
    bt, _, _, _ = batch_loss(trainer(tmp_path, loss="bt", **options))
    torch.testing.assert_close(tcrm, bt, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_tcrm_is_the_loss_of_the_values_at_response_tokens(tmp_path, reduction):
    made = trainer(tmp_path, loss="tcrm", smooth=0.3, lookahead=0.2, reduction=reduction)
    loss, _, _, rows = batch_loss(made)
    rm = rmfast.RewardModel(made.model)
    sides = []
    for side in ("chosen", "rejected"):
        values = rm.token_values([row[f"{side}_ids"] for row in rows])
        parts = [v[row[f"{side}_start"] :] for v, row in zip(values, rows)]
        sides.append((torch.cat(parts), torch.tensor([0, *map(len, parts)]).cumsum(0)))
    (chosen, cu_chosen), (rejected, cu_rejected) = sides
    expected, _ = losses.tcrm_loss(
        chosen, rejected, cu_chosen, cu_rejected, smooth=0.3, lookahead=0.2, reduction=reduction
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_one_step_runs_the_model_once(tmp_path):
    made = trainer(tmp_path, loss="tcrm")
    runs = []
    made.model.model.register_forward_hook(lambda *_: runs.append(1))
    batch_loss(made)
    assert len(runs) == 1


def test_where_a_response_starts(tmp_path):
    def starts(rows, **kw):
        row = trainer(tmp_path, rows, loss="tcrm", **kw).train_dataset[0]
        ids = [row["chosen_ids"], row["rejected_ids"]]
        return [tokenizer().decode(i[s:]) for i, s in zip(ids, (row["chosen_start"], row["rejected_start"]))]

    plain = {"chosen": "Q? so it is", "rejected": "Q? so be it"}
    turns = [{"role": "user", "content": "Q?"}]
    spoken = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "a b"), ("rejected", "a c"))}
    # With a prompt: behind its tokens. Without: where chosen and rejected differ.
    assert starts([{"prompt": "Q?", "chosen": " so it is", "rejected": " so be it"}]) == [
        " so it is",
        " so be it",
    ]
    assert starts([plain]) == ["it is", "be it"]
    assert starts([{"prompt": turns, **spoken}], chat=True) == ["<assistant>a b</s>", "<assistant>a c</s>"]
    assert starts([{side: turns + spoken[side] for side in spoken}], chat=True) == ["b</s>", "c</s>"]
    # An empty prompt is one too, also where the tokenizer gives it no token.
    bare = tokenizer()
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    row = trainer(tmp_path, [{"prompt": "", "chosen": "so it", "rejected": "so be"}], text=bare, loss="tcrm")
    assert [row.train_dataset[0][name] for name in ("chosen_start", "rejected_start")] == [0, 0]
    # One response that the other goes on from keeps its last token.
    assert starts([{"chosen_ids": [5, 6], "rejected_ids": [5, 6, 7, 8]}]) == [tokenizer().decode([i]) for i in (6,)] + [
        tokenizer().decode([7, 8])
    ]
    given = {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 8, 9], "chosen_start": 0, "rejected_start": 2}
    assert starts([given]) == [tokenizer().decode([5, 6, 7]), tokenizer().decode([9])]


def test_a_response_ends_where_the_model_s_own_score_is_read(tmp_path):
    # Padding is EOS: sequence classification reads the token before the closing EOS.
    text = tokenizer(pad_token="</s>")
    args = config(tmp_path, loss="tcrm", smooth=0.0, lookahead=0.0)
    data = datasets.Dataset.from_list(ROWS)
    made = RewardTrainer(decoder(), args, train_dataset=data, processing_class=text)
    loss, outputs, _, _ = batch_loss(made)
    torch.testing.assert_close(loss, losses.bradley_terry(*outputs.logits[:, 0].chunk(2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("conditional", [False, True])
def test_crm_adds_the_mmd_over_bins_of_the_training_set(tmp_path, conditional):
    rows = [{**row, "chosen_price": i % 3, "rejected_price": (i + 1) % 3} for i, row in enumerate(ROWS)]
    options = {"factor": "price", "bins": 3, "crm_weight": 2.0, "bandwidth": 0.7, "conditional": conditional}
    loss, outputs, _, _ = batch_loss(trainer(tmp_path, rows, loss="crm", **options))
    rewards = outputs.logits[:, 0]
    bins = torch.tensor([row[f"{side}_price"] for side in ("chosen", "rejected") for row in rows[:4]])
    groups = torch.arange(8) // 4 if conditional else None
    expected = losses.bradley_terry(*rewards.chunk(2)) + 2 * losses.binned_mmd(
        rewards, bins, bandwidth=0.7, groups=groups
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_each_value_of_a_factor_of_few_is_a_bin(tmp_path):
    rows = [{**row, "chosen_price": 1, "rejected_price": int(i > 6)} for i, row in enumerate(ROWS)]
    made = trainer(tmp_path, rows, loss="crm", factor="price", bins=2, bandwidth=0.7)
    loss, outputs, _, _ = batch_loss(made)
    rewards = outputs.logits[:, 0]
    expected = losses.bradley_terry(*rewards.chunk(2)) + losses.binned_mmd(
        rewards, torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]), bandwidth=0.7
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_length_is_the_number_of_the_response_s_tokens(tmp_path):
    made = trainer(tmp_path, loss="crm", factor="length", bins=2)
    row = made.train_dataset[1]
    assert row["chosen_length"] == len("good good 1")
    assert batch_loss(made)[2]["factor"][1] == row["chosen_length"]


def test_streamed_data_take_edges(tmp_path):
    rows = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    made = trainer(tmp_path, rows, loss="crm", bin_edges=[6.0, 11.0])
    made.train()
    assert "mmd" in made.state.log_history[0]


def test_tcrm_and_crm_together_log_their_terms_and_trl_s(tmp_path):
    made = trainer(tmp_path, loss="tcrm+crm", bins=2, extra={"eval_dataset": datasets.Dataset.from_list(ROWS[:6])})
    made.train()
    ours = {"bradley_terry", "smoothness", "lookahead", "middle_accuracy", "mmd"}
    assert ours | {"accuracy", "margin", "mean_reward", "loss"} <= made.state.log_history[0].keys()
    assert {f"eval_{name}" for name in ours} <= made.evaluate().keys()


@pytest.mark.parametrize("loss", ["tcrm", "crm"])
def test_training_goes_on_from_a_checkpoint_to_the_same_weights(tmp_path, loss):
    straight = trainer(tmp_path / "a", loss=loss, bins=3, max_steps=6)
    straight.train()
    # Interrupted after three of the six steps, and gone on with in a new process's objects.
    half = trainer(tmp_path / "b", loss=loss, bins=3, max_steps=6, save_strategy="steps", save_steps=3)
    half.add_callback(StopAt(3))
    half.train()
    resumed = trainer(tmp_path / "b", loss=loss, bins=3, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert_same(weights(resumed), weights(straight))


class StopAt(trl.trainer.reward_trainer.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kw):
        control.should_training_stop = state.global_step == self.step


def test_checkpoints_are_ordinary_folders(tmp_path):
    made = trainer(tmp_path, loss="tcrm", save_strategy="steps", save_steps=4)
    made.train()
    rm = rmfast.load(tmp_path / "checkpoint-4", device="cpu")
    ids = [made.train_dataset[0]["chosen_ids"]]
    torch.testing.assert_close(rm.score(ids), rmfast.RewardModel(made.model).score(ids), rtol=0, atol=0)


def test_lora_trains_adapters_and_head_alone(tmp_path):
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"])
    made = trainer(tmp_path, loss="tcrm+crm", bins=2, save_strategy="steps", save_steps=4, extra={"peft_config": lora})
    before = weights(made)
    made.train()
    after = weights(made)
    assert all("lora_" in name or "score" in name for name in after)
    assert all(not torch.equal(before[name], after[name]) for name in after)
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"bf16": True}, {"gradient_accumulation_steps": 2}],
    ids=["gradient checkpointing", "bf16", "gradient accumulation"],
)
def test_the_trainer_s_own_options_work(tmp_path, options):
    made = trainer(tmp_path, loss="tcrm", max_steps=2, **options)
    made.train()
    plain = trainer(tmp_path, loss="tcrm", max_steps=2, **{k: v for k, v in options.items() if "accum" in k})
    plain.train()
    for name, p in weights(made).items():
        torch.testing.assert_close(p, weights(plain)[name], rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    "options,error",
    [
        ({"loss": "dpo"}, "loss to be one of bt, tcrm, crm, tcrm\\+crm"),
        ({"reduction": "max"}, "reduction"),
        ({"smooth": -1.0}, "smooth to be a finite number of at least 0"),
        ({"crm_weight": float("nan")}, "crm_weight to be a finite number of at least 0, got nan"),
        ({"bins": 0}, "bins to be a positive int"),
        ({"bin_edges": [2.0, 1.0]}, "bin_edges to rise"),
    ],
)
def test_bad_options_are_named(tmp_path, options, error):
    with pytest.raises(ValueError, match=error):
        config(tmp_path, **options)


def priced(price):
    return [{**row, "chosen_price": 1.0, "rejected_price": price} for row in ROWS]


@pytest.mark.parametrize(
    "make,error",
    [
        (lambda path: trainer(path, kind=trl.RewardConfig), "args to be a rmfast.integrations.trl.RewardConfig"),
        (lambda path: trainer(path, loss="crm", factor="price"), "a column chosen_price"),
        (lambda path: trainer(path, priced(None), loss="crm", factor="price"), "column rejected_price, got None"),
        (lambda path: trainer(path, priced("low"), loss="crm", factor="price"), "column rejected_price, got 'low'"),
        (
            lambda path: trainer(path, priced(float("nan")), loss="crm", factor="price"),
            "column rejected_price, got nan",
        ),
        (
            lambda path: trainer(path, datasets.Dataset.from_list(ROWS).to_iterable_dataset(), loss="crm"),
            "bin_edges for a streamed dataset",
        ),
        (lambda path: trainer(path, model=encoder(), loss="tcrm"), "sees none behind it"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_starts(tmp_path, make, error):
    with pytest.raises((ValueError, TypeError), match=error):
        make(tmp_path)


def test_the_reward_function_gives_scores_of_strings_and_of_turns():
    rm = rmfast.RewardModel(decoder(), tokenizer(chat=True))
    reward = rmfast_reward(rm, name="taste")
    assert reward.__name__ == "taste"
    assert reward(prompts=["Q? "], completions=["so"], completion_ids=[[1]]) == rm.score(["Q? so"]).tolist()
    turns = [{"role": "user", "content": "Q?"}], [{"role": "assistant", "content": "so"}]
    assert reward(prompts=[turns[0]], completions=[turns[1]]) == rm.score([turns[0] + turns[1]]).tolist()
    with pytest.raises(ValueError, match="one label, got 3"):
        rmfast_reward(rmfast.RewardModel(decoder(labels=3)))


def test_grpo_takes_the_reward_function(tmp_path):
    reward = rmfast_reward(rmfast.RewardModel(decoder(), tokenizer()))
    args = config(tmp_path, trl.GRPOConfig, max_steps=1, num_generations=2, max_completion_length=4, learning_rate=1e-3)
    made = trl.GRPOTrainer(
        decoder(task="CausalLM"), reward, args, datasets.Dataset.from_list([{"prompt": "Q?"}] * 4),
        processing_class=tokenizer(),
    )  # fmt: skip
    made.train()
    assert "rewards/rmfast_reward/mean" in made.state.log_history[0]


RANKS = """
import os
import sys
import torch
sys.path[:0] = {tests!r}
from test_trl import trainer, weights
torch.set_num_threads(1)
made = trainer({folder!r}, loss="tcrm+crm", bins=3, bandwidth=0.5, per_device_train_batch_size=2, ddp_backend="gloo")
made.train()
if made.accelerator.is_main_process:
    torch.save(weights(made), {folder!r} + "/weights.pt")
torch.distributed.barrier()  # a rank that ends while gloo's threads still talk to it takes the other one down
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # under load torch's threads abort an interpreter that ends now and then, with all trained and saved
"""


def test_two_ranks_train_what_one_does_with_their_batches_together(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=[str(folder) for folder in Path(__file__).parents[:2]], folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    subprocess.run(command, check=True, timeout=300, cwd=Path(__file__).parents[2])
    alone = trainer(tmp_path, loss="tcrm+crm", bins=3, bandwidth=0.5)
    alone.train()
    together = torch.load(tmp_path / "weights.pt")
    for name, p in weights(alone).items():
        torch.testing.assert_close(together[name], p, rtol=1e-4, atol=1e-5)
