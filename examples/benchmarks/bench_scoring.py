"""What scoring costs: a scored training step over the plain step, in time and in memory, beside two baselines.

    python examples/benchmarks/bench_scoring.py --model vit-s --max last_mlp=1.05 --max memory_all=1.6

Read `scored_step` (what is measured), `measure_times` (paired and interleaved) and `step_memory` (one process each).
Models have random weights: nothing is downloaded.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification

from hf_mimic.losses import loss_for_model, model_inputs
from hf_mimic.mimic import MimicDirection, mimic_forward

LAYERS = ("head", "last_mlp", "last_block", "all")
BASELINES = ("vmap", "loop")  # per-sample gradients of last_mlp
NAMES = (*LAYERS, *BASELINES)
LIMITS = (*NAMES, *(f"memory_{name}" for name in NAMES))
VIT = {
    "tiny": dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, image_size=64),
    "vit-s": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
    "vit-b": {},
}
BATCH = {("vit-b", "cuda"): 128, ("vit-s", "cuda"): 256, ("clip-b32", "cuda"): 256}  # elsewhere 8
TAU = 1.0


@dataclass(frozen=True)
class Setup:
    """What a run measures; enough to build the same task in another process."""

    model: str
    batch: int
    device: str
    threads: int


@dataclass
class Task:
    """A model in training mode with its optimizer, a reference with other weights, and one batch."""

    setup: Setup
    model: torch.nn.Module
    batch: dict
    loss_fn: Callable
    optimizer: torch.optim.Optimizer
    reference: dict
    keep_gradients: bool = False
    directions: dict = field(default_factory=dict)

    def direction(self, layers: str) -> MimicDirection:
        if layers not in self.directions:
            self.directions[layers] = MimicDirection(self.model, self.reference, layers)
        return self.directions[layers]

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if self.setup.device == "cuda" else contextlib.nullcontext()

    def learn(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)


def make_task(setup: Setup) -> Task:
    torch.manual_seed(0)
    torch.set_num_threads(setup.threads)
    if setup.model == "clip-b32":
        model = CLIPModel(CLIPConfig(vision_config={"patch_size": 32}))  # the other defaults are CLIP ViT-B's
        text = model.config.text_config
        ids = torch.randint(1, 1000, (setup.batch, text.max_position_embeddings))
        ids[:, -1] = text.eos_token_id if text.eos_token_id < text.vocab_size else text.vocab_size - 1
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        size = model.config.vision_config.image_size
    else:
        model = ViTForImageClassification(ViTConfig(num_labels=100, **VIT[setup.model]))
        batch, size = {"labels": torch.randint(0, 100, (setup.batch,))}, model.config.image_size
    batch["pixel_values"] = torch.randn(setup.batch, 3, size, size)
    model.to(setup.device).train()
    batch = {key: value.to(setup.device) for key, value in batch.items()}
    reference = {name: p.detach() + 1e-3 * torch.randn_like(p) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return Task(setup, model, batch, loss_for_model(model), optimizer, reference)


# ---- the steps ------------------------------------------------------------------------------------------------------


def plain_step(task: Task) -> None:
    with task.autocast():
        losses = task.loss_fn(task.model(**model_inputs(task.batch)), task.batch)
    task.learn(losses.mean())


def scored_step(task: Task, layers: str) -> None:
    direction = task.direction(layers)
    with task.autocast():
        result = mimic_forward(task.model, task.batch, direction(), task.loss_fn)
    task.learn((weights(result.scores) * result.losses).sum())


def vmap_step(task: Task) -> None:
    """Per-sample gradients by torch.func, then the training pass: the attention is set to the kernel that vmap takes."""
    v = task.direction("last_mlp")()
    rest = {name: p.detach() for name, p in task.model.named_parameters()}
    chosen = {name: rest.pop(name) for name in v}

    def loss_of_one(chosen: dict, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        outputs = functional_call(task.model, (rest, chosen), kwargs={"pixel_values": image[None]})
        return task.loss_fn(outputs, {"labels": label[None]})[0]

    with task.autocast(), sdpa_kernel(SDPBackend.MATH):
        per_sample = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")
        gradients = per_sample(chosen, task.batch["pixel_values"], task.batch["labels"])
    scores = score(v, gradients)
    with task.autocast():
        losses = task.loss_fn(task.model(**model_inputs(task.batch)), task.batch)
    task.learn((weights(scores) * losses).sum())


def loop_step(task: Task) -> None:
    """One backward per sample from the training graph, cut at the chosen layer, then the training backward."""
    v = task.direction("last_mlp")()
    chosen = [dict(task.model.named_parameters())[name] for name in v]
    with task.autocast():
        losses = task.loss_fn(task.model(**model_inputs(task.batch)), task.batch)
    scores = []
    for one in losses:
        gradients = torch.autograd.grad(one, chosen, retain_graph=True)
        scores.append(score(v, {name: g[None] for name, g in zip(v, gradients, strict=True)}))
    task.learn((weights(torch.cat(scores)) * losses).sum())


def weights(scores: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores / TAU, 0)


def score(v: dict, gradients: dict) -> torch.Tensor:
    """-<g_i, v> / ||v|| for gradients with a leading sample dimension."""
    norm = torch.stack([d.square().sum() for d in v.values()]).sum().sqrt()
    return -sum(gradients[name].flatten(1) @ d.flatten() for name, d in v.items()) / norm


def run_step(task: Task, name: str) -> None:
    if name in LAYERS:
        scored_step(task, name)
    else:
        {"plain": plain_step, "vmap": vmap_step, "loop": loop_step}[name](task)


# ---- time -----------------------------------------------------------------------------------------------------------


def measure_times(task: Task, names: list[str], repeats: int) -> tuple[dict, float]:
    """Return {name: {"wall": ratios, "cpu": ratios}} and the median plain step in seconds.

    Every measured step has a plain step right before or right after it (in turn): what else the machine does at that
    time slows both, and their ratio stays. The variants alternate within one run.
    """
    for name in ("plain", *names):
        run_step(task, name)
    ratios = {name: {"wall": [], "cpu": []} for name in names}
    plain = []
    for i in tqdm(range(repeats), desc="time", unit="round", file=sys.stderr):
        for name in names:
            pair = ("plain", name) if i % 2 else (name, "plain")
            clocks = {which: clock_step(task, which) for which in pair}
            plain.append(clocks["plain"][0])
            for kind, own, other in zip(("wall", "cpu"), clocks[name], clocks["plain"], strict=True):
                ratios[name][kind].append(own / other)
    return ratios, statistics.median(plain)


def clock_step(task: Task, name: str) -> tuple[float, float]:
    """Return the wall time and the processor time (all threads) of one step, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run_step(task, name)
    if task.setup.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def arithmetic_floor() -> float:
    """Step time of `all` over plain if only matrix products counted: 5/3.

    A linear layer y = x W' costs one product forward and two backward (dL/dx = g W, dL/dW = g' x): 3 units. Its
    tangent is dy = dx W' + x dW', 2 units more, and nothing of it is differentiated. Convolutions and the two
    products inside attention count alike. (Layers that v does not reach from the front save one of the two.)
    """
    return 5 / 3


# ---- memory ---------------------------------------------------------------------------------------------------------


def measure_memory(setup: Setup, names: list[str]) -> dict[str, float]:
    """Return the bytes of a step above the state, {"plain": ..., name: ...}; empty where it cannot be measured.

    NOTE: on the CPU each variant has a process of its own, where malloc gives every larger block back to the system
    as soon as it is freed (mmap from 64 KiB on, nothing trimmed late); resident memory then follows the live tensors.
    """
    if setup.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return {}
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_TOP_PAD_="0")
    result, context = {}, multiprocessing.get_context("spawn")
    for name in tqdm(("plain", *names), desc="memory", unit="process", file=sys.stderr):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            result[name] = pool.submit(step_memory, setup, name).result()
    return result


def step_memory(setup: Setup, name: str) -> float:
    """Return the peak of one step above what lives between steps: parameters, gradients, optimizer, reference."""
    task = make_task(setup)
    task.keep_gradients = True
    if name != "plain":
        task.direction(name if name in LAYERS else "last_mlp")
    task.reference = {}
    for _ in range(2):
        run_step(task, name)
    return statistics.median(_peak_of_step(task, name) for _ in range(3))


def _peak_of_step(task: Task, name: str) -> float:
    if task.setup.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_step(task, name)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark VmHWM falls to what is resident now
    before = _resident("VmRSS")
    run_step(task, name)
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


# ---- report ---------------------------------------------------------------------------------------------------------


def summarize(setup: Setup, ratios: dict, plain_seconds: float, memory: dict) -> dict:
    def spread(values: list[float]) -> dict:
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    return {
        "machine": {**describe_machine(setup.device), **asdict(setup)},
        "repeats": len(next(iter(ratios.values()))["wall"]),
        "plain_step_ms": 1000 * plain_seconds,
        "plain_step_memory_mb": memory["plain"] / 1e6 if memory else None,
        "floor_all": arithmetic_floor(),
        "ratios": {name: {kind: spread(values) for kind, values in kinds.items()} for name, kinds in ratios.items()},
        "memory": {name: memory[name] / memory["plain"] for name in ratios} if memory else {},
    }


def describe_machine(device: str) -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__}


def print_table(summary: dict) -> None:
    machine = summary["machine"]
    print(f"{machine['model']}, batch {machine['batch']}, {machine['gpu'] or machine['cpu']}, ", end="")
    print(f"{machine['threads']} of {machine['cores']} cores, torch {machine['torch']}")
    memory = summary["plain_step_memory_mb"]
    print(f"plain step {summary['plain_step_ms']:.0f} ms, ", end="")
    print(f"memory above the state {memory:.0f} MB" if memory else "memory not measured: needs Linux or CUDA")
    print(f"{'step over plain':<16} {'wall (min-max)':<22} {'cpu (min-max)':<22} memory")
    for name, kinds in summary["ratios"].items():
        cells = [f"{s['median']:.3f} ({s['min']:.2f}-{s['max']:.2f})" for s in (kinds["wall"], kinds["cpu"])]
        own = summary["memory"].get(name)
        print(f"{name:<16} {cells[0]:<22} {cells[1]:<22} {'-' if own is None else f'{own:.2f}'}")
    print(f"{'floor of all':<16} {summary['floor_all']:.3f}")


def violations(summary: dict, limits: dict[str, float], clock: str) -> list[str]:
    found = []
    for name, limit in limits.items():
        layer = name.removeprefix("memory_")
        if layer not in summary["ratios"] or (name != layer and not summary["memory"]):
            found.append(f"{name}: limit {limit} given, but it was not measured here")
            continue
        value = summary["memory"][layer] if name != layer else summary["ratios"][layer][clock]["median"]
        if value > limit:
            found.append(f"{name}: {value:.3f} is above the limit {limit}")
    return found


def parse_limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in LIMITS:
        raise argparse.ArgumentTypeError(f"unknown name {name!r}; known: {', '.join(LIMITS)}")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"`--max` takes name=ratio, got {text!r}") from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[*VIT, "clip-b32"], help="default: vit-s; with --quick tiny")
    parser.add_argument("--batch", type=int, help="default: 8; on cuda 128 for vit-b, 256 for the others")
    parser.add_argument("--repeats", type=int, help="paired measurements per variant; default: 15, with --quick 5")
    parser.add_argument("--quick", action="store_true", help="small model, few repeats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda runs under bf16 autocast")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="measure these variants alone")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--max", type=parse_limit, action="append", default=[], metavar="NAME=RATIO")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="which time `--max` looks at")
    args = parser.parse_args()
    args.model = args.model or ("tiny" if args.quick else "vit-s")
    args.repeats = args.repeats or (5 if args.quick else 15)
    args.batch = args.batch or BATCH.get((args.model, args.device), 8)
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
    memory = {} if args.no_memory else measure_memory(setup, names)
    ratios, plain_seconds = measure_times(make_task(setup), names, args.repeats)
    summary = summarize(setup, ratios, plain_seconds, memory)
    print_table(summary)
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    broken = violations(summary, dict(args.max), args.clock)
    print(*broken, sep="\n", end="\n" if broken else "")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
