"""The checks that are Python of their own, a function a step: `python tests/gpu/steps.py STEP --out DIR`.

`check.py` starts each in a process of its own, with the checkout on its path. With --rehearse it runs on the CPU,
small, with the CPU's backends in place of the GPU's: the same lines, so that no slip of the pen is found on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attentions
import torch
from record import Record, Row

import rmfast
from bench import machine, runner
from bench.registry import Benchmark, benchmarks
from rmfast.backends import why_not

# Rows whose kernels move bytes: the ops, without whole models.
OPS = r"^(reward_head|rms_norm|rotary|gated_activation|patch_rows|neuron_stats|topk_encode|losses|suffix_attention)/"


@dataclass
class Run:
    """A step under way."""

    step: str
    record: Record
    device: torch.device
    rehearsal: bool

    def note(self, name: str, value: Any = None, unit: str = "", target: float | None = None) -> None:
        self.record.add(Row(self.step, name, value, unit, None if self.rehearsal else target))

    def fail(self, name: str, cause: BaseException | str) -> None:
        said = cause if isinstance(cause, str) else f"{type(cause).__name__}: {cause}"
        self.record.add(Row(self.step, name, failed=" ".join(said.split())[:160]))

    def ms(self, call: Callable[[], Any], seconds: float = 0.4) -> float:
        """Median milliseconds of a call, after a warm-up."""
        contender = runner.Contender(call)
        rounds = (2, 2) if self.rehearsal else (5, 100)
        runner.measure([contender], self.device, 0 if self.rehearsal else seconds, rounds, 0.005)
        return contender.ms

    @property
    def backends(self) -> tuple[str, ...]:
        return ("cpp", "eager") if self.rehearsal else ("triton", "cuda", "varlen")

    def done(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def ceilings(run: Run) -> None:
    """What the machine is, and what it can do: a copy's bytes/s, a bf16 product's FLOP/s on random data."""
    for name, value in machine.describe(run.device).items():
        if name not in ("isa", "cpu_family", "cpu_model"):
            run.note(name, str(value))
    for choice in rmfast.explain(device=run.device.type):
        run.note(f"{choice.op} runs", choice.runs)
    size = 1 << 20 if run.rehearsal else 4 << 30
    moved, copy = machine.bandwidth_probes(run.device, size)["copy"]
    run.note("copy", moved / run.ms(copy) / 1e9, "TB/s")
    n = 64 if run.rehearsal else 8192
    a, b = torch.randn(2, n, n, device=run.device).bfloat16()
    run.note(f"bf16 product, {n}", 2 * n**3 / run.ms(lambda: a @ b) / 1e9, "TFLOP/s")


def agree(run: Run) -> None:
    """Every op on every backend of this device against the fp64 truth, at the shapes of the benchmarks.

    One backend after the other: a kernel that faults takes along all that this process has yet to run.
    """
    chosen = [b for b in benchmarks() if re.search(OPS, b.name) and run.device.type in b.devices]
    if run.rehearsal:
        chosen = [b for b in chosen if re.search(r"bf16$|mmd$|tcrm$", b.name)]

    def error(benchmark: Benchmark) -> float:
        problem = benchmark.problem(benchmark.quick if run.rehearsal else benchmark.shape, run.device, 1)
        with torch.set_grad_enabled(problem.grad):
            return float(problem.error(benchmark.ours(problem)(problem.inputs[0]))) / problem.tolerance

    seen = set()
    for name in run.backends:
        for benchmark in chosen:
            op = benchmark.name.split("/")[0]
            if why_not("reward_head" if op == "losses" else op, name, run.device.type) is not None:
                continue  # losses are several ops, of which none has a backend that the head has not
            try:
                with rmfast.backend(name):
                    run.note(f"{benchmark.name}, {name}, of its tolerance", error(benchmark), "", -1.0)
            except rmfast.BackendError:
                continue  # an op inside of it has no such kernel
            except Exception as failure:
                run.fail(f"{benchmark.name}, {name}", failure)
            seen.add(benchmark.name)
    for benchmark in chosen:
        if benchmark.name not in seen:
            run.fail(benchmark.name, "no backend ran it")


def attention(run: Run) -> None:
    """suffix_attention's kernels and well-kept ones, TFLOP/s at three head sizes: whole texts, and a shared prompt."""
    shapes = ((128, 32, 8), (64, 32, 8), (256, 16, 8))
    works = [(*shape, work) for shape in shapes[: 1 if run.rehearsal else 3] for work in attentions.WORKS]
    # wgmma last of all: a kernel that faults or hangs takes along all that this process has yet to run.
    for last, (d, heads, kv_heads, work) in itertools.product((False, True), works):
        case = attentions.Case.of(work, d, heads, kv_heads, run.device, small=run.rehearsal)
        truth = case.truth()
        for name, call in attentions.contenders(case, run.backends).items():
            if ("wgmma" in name) != last:
                continue
            label = f"{work} d{d}, {name}"
            try:
                error = float((call().double() - truth).norm() / truth.norm())
                if not error <= 1e-2:
                    run.fail(label, f"off by {error:.1e}")
                    continue
                target = {"triton": 400.0, "cuda, wgmma": 550.0}.get(name) if d == 128 else None
                run.note(label, case.flops / run.ms(call, 0.2) / 1e9, "TFLOP/s", target)
            except Exception as failure:
                run.fail(label, failure)
        del case, truth


# Hidden and intermediate size, layers and heads of Llamas with a fourth as many heads of K and V.
SIZES = {"8B": (4096, 14336, 32, 32), "0.4B": (1024, 3072, 24, 16), "0.15B": (512, 1536, 32, 8)}


def _model(run: Run, size: str = "8B") -> Any:
    """A random Llama in bf16, made where it runs."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip(names, SIZES[size]))
    if run.rehearsal:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=49152, max_position_embeddings=8192, num_key_value_heads=sizes["num_attention_heads"] // 4,
        num_labels=1, pad_token_id=0, rope_theta=500000.0, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with run.device:
            return LlamaForSequenceClassification(config).eval()
    finally:
        torch.set_default_dtype(before)


def _texts(run: Run, count: int, shared: int, own: tuple[int, int]) -> list[list[int]]:
    """Random ids; the first `shared` of each text are the same in all of 16 texts."""
    small = 16 if run.rehearsal else 1
    count = -(-count // small)
    draw = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(10, 49000, (max(1, n // small),), generator=draw).tolist()

    lengths = torch.randint(*own, (count,), generator=draw).tolist()
    prompts = [ids(shared) if shared else [] for _ in range(-(-count // 16))]
    return [prompts[i // 16] + ids(n) for i, n in enumerate(lengths)]


def _padded(model: Any, texts: list[list[int]], device: torch.device, size: int = 16) -> None:
    """transformers' own forward over the texts sorted by length."""
    texts = sorted(texts, key=len)
    with torch.inference_mode():
        for i in range(0, len(texts), size):
            batch = texts[i : i + size]
            ids = torch.zeros(len(batch), len(batch[-1]), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(batch):
                ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)


def _seconds(run: Run, call: Callable[[], Any]) -> float:
    call()
    run.done()
    begin = time.perf_counter()
    call()
    run.done()
    return time.perf_counter() - begin


def model(run: Run) -> None:
    """An 8B model in bf16: tokens/s packed and padded, best of 16, and the share of time in which the GPU waits."""
    begin = time.perf_counter()
    own = _model(run)
    rm = rmfast.RewardModel(own)
    run.note("seconds to make and bind it", time.perf_counter() - begin, "s")
    run.note("engine", rm.explain().splitlines()[0])
    for name, texts, target in (
        ("texts of 100 to 900 tokens", _texts(run, 128, 0, (100, 900)), 35000.0),
        ("best of 16, prompt 2048, responses of 100 to 400", _texts(run, 64, 2048, (100, 400)), None),
    ):
        tokens = sum(map(len, texts))
        packed = _seconds(run, lambda texts=texts: rm.score(texts))
        run.note(f"packed, {name}", tokens / packed, "tokens/s", target)
        try:
            padded = _seconds(run, lambda texts=texts: _padded(own, texts, run.device))
        except Exception as error:
            run.fail(f"padded, {name}", error)
            continue
        run.note(f"padded, {name}", tokens / padded, "tokens/s")
        run.note(f"packed / padded, {name}", padded / packed, "x", None if target else 3.0)
    texts = _texts(run, 64, 0, (100, 900))
    run.note("GPU idle while scoring", 100 * _idle(run, lambda: rm.score(texts)), "%", -5.0)


def _idle(run: Run, call: Callable[[], Any]) -> float:
    """The share of a call's time in which no kernel runs."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = run.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    call()
    run.done()
    with profile(activities=[activity]) as seen:
        begin = time.perf_counter()
        call()
        run.done()
        whole = (time.perf_counter() - begin) * 1e6
    # The activity of CUDA has the host's own calls (launches, waits) among its events.
    spans = [event.time_range for event in seen.events() if event.device_type == kind]
    busy, reached = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return max(0.0, 1 - busy / whole)


def graphs(run: Run) -> None:
    """Small models with CUDA graphs and without: the same rewards, tokens/s of many texts, milliseconds of one."""
    for size in ("0.15B", "0.4B"):
        own = _model(run, size)
        plain, captured = rmfast.RewardModel(own), rmfast.RewardModel(own, cuda_graphs=not run.rehearsal)
        run.note(f"{size}, explain", captured.explain().splitlines()[1])
        many = _texts(run, 512, 200, (50, 300))
        spread = float(plain.score(many).std())
        for work, some in (("512 texts", many), ("a prompt's 16", many[:16]), ("one", many[:1])):
            tokens, taken = sum(map(len, some)), []
            got = [captured.score(some) for _ in range(3)][-1]  # as it is, captured, replayed
            off = float((got - plain.score(some)).abs().max()) / spread
            run.note(f"{size}, {work}: rewards with graphs off, of their spread", off, "", -0.1)
            for how, rm in (("without", plain), ("with", captured)):
                taken.append(run.ms(lambda rm=rm, some=some: rm.score(some)))
                run.note(f"{size}, {work}, {how} graphs", tokens / taken[-1] * 1e3, "tokens/s")
            run.note(f"{size}, {work}: without / with graphs", taken[0] / taken[1], "x", 1.0)
            if work == "512 texts":
                for how, rm in (("without", plain), ("with", captured)):
                    idle = 100 * _idle(run, lambda rm=rm, some=some: rm.score(some))
                    run.note(f"{size}, {work}, {how} graphs: GPU idle", idle, "%")


def sweep(run: Run) -> None:
    """A residual sweep of the 8B model over every layer and position of 512 tokens."""
    own = _model(run)
    rm = rmfast.RewardModel(own)
    clean = torch.randint(10, 49000, (16 if run.rehearsal else 512,), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[::9] += 1
    rm.patch_sweep(clean.tolist(), corrupted.tolist(), layers=[0], positions=[3, 5])
    run.done()
    begin = time.perf_counter()
    found = rm.patch_sweep(clean.tolist(), corrupted.tolist())
    run.done()
    run.note("residual sweep, all layers and positions", time.perf_counter() - begin, "s", -50.0)
    run.note("rewards that are finite", float(found.rewards.isfinite().double().mean()), "", 1.0)


def kernels(run: Run) -> None:
    """Five kernels once each between the profiler's start and stop, for ncu."""
    small, device = run.rehearsal, run.device
    n, d = (48, 96) if small else (32768, 4096)
    hidden, weight, gain = (torch.randn(*size, device=device).bfloat16() for size in ((1, n, d), (1, d), (d,)))
    index = torch.arange(n, device=device)
    case = attentions.Case.of("shared prompt", 128, 32, 8, device, small=small)
    calls = {
        "reward_head": lambda: rmfast.ops.reward_head(hidden, weight.float(), norm="rms", norm_weight=gain.float()),
        "rms_norm": lambda: rmfast.ops.rms_norm(hidden[0], gain, eps=1e-5),
        "patch_rows": lambda: rmfast.ops.patch_rows(hidden[0], hidden[0], index, index - 1, gain),
        "suffix_attention": case.ours,
    }

    def all_of_them() -> None:
        for name, call in calls.items():
            for backend in run.backends[: 2 if name == "suffix_attention" else 1]:
                with rmfast.backend(backend):
                    call()
        run.done()

    all_of_them()  # compiles
    if device.type == "cuda":
        torch.cuda.profiler.start()
    all_of_them()
    if device.type == "cuda":
        torch.cuda.profiler.stop()
    run.note("kernels for ncu", len(calls) + 1)


STEPS = {step.__name__: step for step in (ceilings, agree, attention, model, graphs, sweep, kernels)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu/steps.py", description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.rehearse else "cuda")
    run = Run(args.step, Record(args.out), device, args.rehearse)
    try:
        STEPS[args.step](run)
    except Exception as error:
        run.fail("the rest of it", error)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
