"""What scoring costs: a scored training step over the plain step, in time and in memory, beside two baselines.

    python examples/benchmarks/bench_scoring.py --model vit-s --max last_mlp=1.05 --max memory_all=1.6

Read `scored_step` (what is measured), `measure_times` (paired and interleaved) and `step_memory` (one process each).
Models have random weights: nothing is downloaded.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification

from hf_mimic.losses import loss_for_model, model_inputs
from hf_mimic.mimic import MimicDirection, mimic_forward

VIT = {
    "tiny": dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, image_size=64),
    "vit-s": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
    "vit-b": {},
}


class Setup(NamedTuple):  # enough to build the same task in another process
    model: str
    batch: int
    device: str
    threads: int


@dataclass
class Task:
    """A model in training mode, one batch, an optimizer, and a direction for every choice of layers measured."""

    device: str
    model: torch.nn.Module
    batch: dict
    loss_fn: Callable
    optimizer: torch.optim.Optimizer
    directions: dict
    keep_gradients: bool = False

    def autocast(self) -> AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def losses(self) -> torch.Tensor:
        with self.autocast():
            return self.loss_fn(self.model(**model_inputs(self.batch)), self.batch)

    def learn(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)


def make_task(setup: Setup, names: list[str]) -> Task:
    torch.manual_seed(0)
    torch.set_num_threads(setup.threads)
    if setup.model == "clip-b32":
        model = CLIPModel(CLIPConfig(vision_config={"patch_size": 32}))  # every other default is CLIP ViT-B's
        ids = torch.randint(3, 1000, (setup.batch, model.config.text_config.max_position_embeddings))
        ids[:, -1] = model.config.text_config.eos_token_id
        batch, size = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 224
    else:
        model = ViTForImageClassification(ViTConfig(num_labels=100, **VIT[setup.model]))
        batch, size = {"labels": torch.randint(0, 100, (setup.batch,))}, model.config.image_size
    batch["pixel_values"] = torch.randn(setup.batch, 3, size, size)
    batch = {key: value.to(setup.device) for key, value in batch.items()}
    model.to(setup.device).train()
    reference = {name: p.detach() + 1e-3 * torch.randn_like(p) for name, p in model.named_parameters()}
    layers = {"last_mlp" if name in BASELINES else name for name in names} - {"plain"}
    directions = {name: MimicDirection(model, reference, name) for name in layers}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return Task(setup.device, model, batch, loss_for_model(model), optimizer, directions)


def plain_step(task: Task) -> None:
    task.learn(task.losses().mean())


def scored_step(task: Task, layers: str) -> None:
    """Score and weigh the batch (temperature 1) in the training pass.

    Its arithmetic floor for `all` over plain: a linear layer y = x W' takes one matrix product forward and two
    backward (dL/dx = g W, dL/dW = g' x); its tangent dy = dx W' + x dW' takes two more, without a backward of their
    own. Convolutions and the products inside attention count alike, so (3 + 2) / 3 = 1.67.
    """
    with task.autocast():
        result = mimic_forward(task.model, task.batch, task.directions[layers](), task.loss_fn)
    task.learn((result.scores.softmax(0) * result.losses).sum())


def vmap_step(task: Task) -> None:
    """Per-sample gradients by torch.func, with the attention kernel that vmap can take; then the training pass."""
    v = task.directions["last_mlp"]()
    rest = {name: p.detach() for name, p in task.model.named_parameters()}
    chosen = {name: rest.pop(name) for name in v}

    def loss_of_one(chosen: dict, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        outputs = functional_call(task.model, (rest, chosen), kwargs={"pixel_values": image[None]})
        return task.loss_fn(outputs, {"labels": label[None]})[0]

    with task.autocast(), sdpa_kernel(SDPBackend.MATH):
        per_sample = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")
        scores = score(v, per_sample(chosen, task.batch["pixel_values"], task.batch["labels"]))
    task.learn((scores.softmax(0) * task.losses()).sum())


def loop_step(task: Task) -> None:
    """One backward per sample from the training graph, cut at the chosen layer; then the training backward."""
    v = task.directions["last_mlp"]()
    chosen = [dict(task.model.named_parameters())[name] for name in v]
    losses, scores = task.losses(), []
    for one in losses:
        gradients = torch.autograd.grad(one, chosen, retain_graph=True)
        scores.append(score(v, {name: g[None] for name, g in zip(v, gradients, strict=True)}))
    task.learn((torch.cat(scores).softmax(0) * losses).sum())


def score(v: dict, gradients: dict) -> torch.Tensor:
    """-<g_i, v> / ||v|| for gradients with a leading sample dimension."""
    norm = torch.stack([d.square().sum() for d in v.values()]).sum().sqrt()
    return -sum(gradients[name].flatten(1) @ d.flatten() for name, d in v.items()) / norm


LAYERS = {layers: partial(scored_step, layers=layers) for layers in ("head", "last_mlp", "last_block", "all")}
BASELINES = {"vmap": vmap_step, "loop": loop_step}
STEPS = {"plain": plain_step, **LAYERS, **BASELINES}
NAMES = (*LAYERS, *BASELINES)


def measure_times(task: Task, names: list[str], repeats: int) -> tuple[dict, float]:
    """Return {name: {"wall": ratios, "cpu": ratios}} and the median plain step in seconds.

    Every measured step has a plain step right before or right after it, in turn: whatever else the machine does then
    slows both, and their ratio stays. All variants alternate within one run.
    """
    for name in ("plain", *names):
        clock_step(task, name)  # warm-up
    ratios, plain = {name: {"wall": [], "cpu": []} for name in names}, []
    for i in tqdm(range(repeats), desc="time", unit="round"):
        for name in names:
            clocks = {which: clock_step(task, which) for which in (("plain", name) if i % 2 else (name, "plain"))}
            plain.append(clocks["plain"]["wall"])
            for clock, own in clocks[name].items():
                ratios[name][clock].append(own / clocks["plain"][clock])
    return ratios, median(plain)


def clock_step(task: Task, name: str) -> dict[str, float]:
    """Return the wall time and the processor time (all threads) of one step, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    STEPS[name](task)
    if task.device == "cuda":
        torch.cuda.synchronize()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def measure_memory(setup: Setup, names: list[str]) -> dict[str, float]:
    """Return {"plain": bytes, name: bytes} that a step takes above the state; empty where it cannot be measured.

    NOTE: each variant has a process of its own. On the CPU malloc is told to map every block from 64 KiB on and to
    unmap it when it is freed: resident memory then follows the live tensors, and no earlier peak hides a later one.
    """
    if setup.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return {}
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_TOP_PAD_="0")
    result, spawn = {}, multiprocessing.get_context("spawn")
    for name in tqdm(("plain", *names), desc="memory", unit="process"):
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            result[name] = pool.submit(step_memory, setup, name).result()
    return result


def step_memory(setup: Setup, name: str) -> float:
    """Return the peak of one step above what lives between steps: parameters, gradients, optimizer, reference."""
    task = make_task(setup, [name])
    task.keep_gradients = True
    for _ in range(2):
        STEPS[name](task)
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        STEPS[name](task)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the kernel's high-water mark, falls to what is resident
    before = resident("VmRSS")
    STEPS[name](task)
    return resident("VmHWM") - before


def resident(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def summarize(setup: Setup, ratios: dict, plain_seconds: float, memory: dict) -> dict:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    chip = torch.cuda.get_device_name() if setup.device == "cuda" else (names or [platform.machine()])[0]
    return {
        "machine": {"chip": chip, "cores": os.cpu_count(), "torch": torch.__version__, **setup._asdict()},
        "plain_step_ms": 1000 * plain_seconds,
        "plain_step_memory_mb": memory["plain"] / 1e6 if memory else None,
        "floor_all": 5 / 3,  # see `scored_step`
        "ratios": {
            name: {clock: {"median": median(x), "min": min(x), "max": max(x)} for clock, x in clocks.items()}
            for name, clocks in ratios.items()
        },
        "memory": {name: memory[name] / memory["plain"] for name in ratios} if memory else {},
    }


def print_table(summary: dict) -> None:
    memory = summary["plain_step_memory_mb"]
    line = "{model}, batch {batch}, {chip}, {threads} threads on {cores} cores, torch {torch}"
    print(line.format(**summary["machine"]))
    shown = "not measured" if memory is None else f"{memory:.0f} MB"
    print(f"plain step {summary['plain_step_ms']:.0f} ms, memory above the state {shown}")
    print(f"{'step over plain':<16} {'wall (min-max)':<22} {'cpu (min-max)':<22} memory")
    for name, clocks in summary["ratios"].items():
        wall, cpu = (f"{x['median']:.3f} ({x['min']:.2f}-{x['max']:.2f})" for x in clocks.values())
        print(f"{name:<16} {wall:<22} {cpu:<22}", f"{summary['memory'][name]:.2f}" if memory else "-")
    print(f"{'floor of all':<16} {summary['floor_all']:.3f}")


def violations(summary: dict, limits: dict[str, float], clock: str) -> list[str]:
    measured = {name: clocks[clock]["median"] for name, clocks in summary["ratios"].items()}
    measured |= {f"memory_{name}": ratio for name, ratio in summary["memory"].items()}
    missing = [f"{name} has a limit but was not measured" for name in limits if name not in measured]
    above = {name: limit for name, limit in limits.items() if measured.get(name, 0) > limit}
    return missing + [f"{name} is {measured[name]:.3f}, above its limit {limit}" for name, limit in above.items()]


def parse_limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    known = (*NAMES, *(f"memory_{name}" for name in NAMES))
    if name not in known or not value.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"must be name=ratio, got {text!r}; the names are {', '.join(known)}")
    return name, float(value)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[*VIT, "clip-b32"], help="default: vit-s; with --quick tiny")
    parser.add_argument("--batch", type=int, help="default: 8, on cuda 128")
    parser.add_argument("--repeats", type=int, help="paired steps per variant; default: 15, with --quick 5")
    parser.add_argument("--quick", action="store_true", help="small model, few repeats, no memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda runs under bf16 autocast")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="measure these alone")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--max", type=parse_limit, action="append", default=[], metavar="NAME=RATIO")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="which time `--max` looks at")
    args = parser.parse_args()
    args.model = args.model or ("tiny" if args.quick else "vit-s")
    args.batch = args.batch or (128 if args.device == "cuda" else 8)
    args.repeats = args.repeats or (5 if args.quick else 15)
    return args


def main() -> int:
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    names = [name for name in NAMES if name in args.only]
    if args.model == "clip-b32" and "vmap" in names:
        names.remove("vmap")
        print("vmap: impossible for CLIP, whose loss couples the samples of a batch")
    setup = Setup(args.model, args.batch, args.device, args.threads)
    memory = {} if args.quick else measure_memory(setup, names)
    summary = summarize(setup, *measure_times(make_task(setup, names), names, args.repeats), memory)
    print_table(summary)
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    broken = violations(summary, dict(args.max), args.clock)
    print("".join(f"{line}\n" for line in broken), end="")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
