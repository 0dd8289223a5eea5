"""Measures checkpoints: import, export, save and load against cp, and what a save costs a step.

    python tools/bench/checkpoint.py --folder /a/disk                   7B-shaped, 13.5 GB of bf16
    python tools/bench/checkpoint.py --folder /a/disk --size 1b
    torchrun --nproc-per-node 4 tools/bench/checkpoint.py --stall --folder /a/disk

The model is random and of the chosen shape. Each figure is one run in one process, started with
cold caches where the system lets us drop them (root on Linux); every write ends with fsync, while
cp's doesn't, so its time is given with and without a sync. Peak memory is the process's largest
resident size. Needs four times the model's size on the disk and, for save and load, the
model's size in memory; cleans up after itself.

--stall trains the shape with LoRA (rank 1024 on q, k, v) on random tokens and tells how long a save
holds up the steps, synchronous and asynchronous, in a share of a step over an interval of 50.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, heads=32),
    "1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, heads=16),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, heads=4),
}


# the folders that --stall makes and removes
STALLED = ("synchronous", "asynchronous")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="an empty or new folder to use")
    parser.add_argument("--size", choices=SHAPES, default="7b", help="shape (default: 7b)")
    parser.add_argument("--stall", action="store_true", help="measure the stall of a step instead")
    parser.add_argument("--context", type=int, default=4096, help="--stall: tokens a step")
    parser.add_argument("--steps", type=int, default=30, help="--stall: steps a measurement")
    parser.add_argument("--worker", choices=("make", "save", "load"), help=argparse.SUPPRESS)
    return parser.parse_args()


def model_config(size: str) -> dict:
    shape = dict(SHAPES[size])
    heads = shape.pop("heads")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **shape,
    }


class RandomWeights:
    """Noise in the shape of a model, in bf16; no file stands behind it."""

    def __init__(self, size: str):
        import torch

        from megalard.checkpoint.build import empty_decoder
        from megalard.model.rope import rope_table
        from megalard.model.spec import spec_from_config
        from megalard.parallel.mesh import SINGLE

        self.spec = spec_from_config(model_config(size), size)
        self.layouts = empty_decoder(self.spec, rope_table(self.spec), SINGLE).layouts
        self.directory = Path(f"random-{size}")
        noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0))
        self._noise = (noise * 0.02).to(torch.bfloat16)

    def names(self):
        return list(self.layouts)

    def shape(self, name):
        return self.layouts[name].full_shape

    def dtype(self, name):
        return self._noise.dtype

    def files(self):
        return []

    def read(self, name, layout=None):
        import torch

        shape = layout.local_shape if layout is not None else self.shape(name)
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._noise.dtype)
        count = torch.Size(shape).numel()
        times = -(-count // self._noise.numel())
        return self._noise.repeat(times)[:count].view(shape)


def worker(options: argparse.Namespace) -> None:
    """One measured piece of work in a process of its own; prints its seconds and bytes held."""
    import torch

    from megalard.checkpoint.huggingface_writer import write_huggingface
    from megalard.checkpoint.sharded.manifest import written_by
    from megalard.checkpoint.sharded.save_load import ShardedWeights, load_sharded, save_sharded
    from megalard.parallel.agreement import checked_meanwhile
    from megalard.parallel.mesh import SINGLE, build_mesh

    folder = options.folder
    random = RandomWeights(options.size)
    config = model_config(options.size)
    if options.worker == "make":
        write_huggingface(folder / "hf", random, config, [])
        return
    held = {name: torch.zeros(random.shape(name), dtype=torch.bfloat16) for name in random.names()}
    if options.worker == "save":
        for name, tensor in held.items():
            tensor.copy_(random.read(name))
    head = {"kind": "model", "config": config, "base": None, "trained": None, "training": None}
    head["written_by"] = written_by(build_mesh("cpu", 1))
    began = time.perf_counter()
    if options.worker == "save":
        save_sharded(folder / "saved", held, head, SINGLE)
    else:
        weights = ShardedWeights(folder / "saved")
        with checked_meanwhile(weights.check_sums, SINGLE) as wait:
            load_sharded(weights, held, SINGLE)
            wait()
    print(json.dumps({"seconds": time.perf_counter() - began}))


def drop_caches() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def measure(command: list[str]) -> tuple[float, float, str]:
    """Seconds, peak GiB and output of a command, from cold caches."""
    drop_caches()
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20, output


def bench(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: choose another folder")
    tool = str(Path(__file__).with_name("convert_hf.py"))
    again = [sys.executable, __file__, "--folder", str(folder), "--size", options.size, "--worker"]
    cold = drop_caches()
    try:
        subprocess.run([*again, "make"], check=True)
        size = sum(path.stat().st_size for path in (folder / "hf").iterdir())
        rows = []

        copied, _, _ = measure(["cp", "-r", str(folder / "hf"), str(folder / "copy")])
        began = time.perf_counter()
        os.sync()
        synced = copied + time.perf_counter() - began
        rows += [("cp", copied, None), ("cp, then sync", synced, None)]
        shutil.rmtree(folder / "copy")
        for name, source, target in (("import", "hf", "sharded"), ("export", "sharded", "back")):
            paths = [str(folder / source), str(folder / target)]
            seconds, peak, _ = measure([sys.executable, tool, name, *paths])
            rows.append((f"convert_hf.py {name}", seconds, peak))
        verify = str(Path(__file__).with_name("verify_checkpoint.py"))
        pair = [str(folder / "hf"), str(folder / "back")]
        same = subprocess.run([sys.executable, verify, *pair]).returncode == 0
        for name in ("sharded", "back"):
            shutil.rmtree(folder / name)
        for name in ("save", "load"):
            _, peak, output = measure([*again, name])
            rows.append((name, json.loads(output)["seconds"], peak - size / 2**30))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{options.size}: {size / 1e9:.2f} GB of bf16, caches {'cold' if cold else 'not dropped'}"
    )
    print("| | s | GB/s | of cp | of cp, synced | peak memory, GiB |\n|---|---|---|---|---|---|")
    for name, seconds, peak in rows:
        held = (
            ""
            if peak is None
            else f"{peak:.2f}" + (" beyond the state" * (name in ("save", "load")))
        )
        print(
            f"| {name} | {seconds:.1f} | {size / seconds / 1e9:.2f} | {seconds / copied:.2f} | "
            f"{seconds / synced:.2f} | {held} |"
        )
    print(f"the exported model is the original, bit for bit: {'yes' if same else 'NO'}")


def stall(options: argparse.Namespace) -> None:
    """What a save costs the steps around it, on the ranks that torchrun started."""
    import torch
    import torch.distributed as dist

    from megalard import config as settings
    from megalard.checkpoint.build import load_decoder
    from megalard.checkpoint.convert import check_target
    from megalard.checkpoint.provenance import Origins
    from megalard.checkpoint.sharded.save_load import checkpoint_axis
    from megalard.data.batch import collate
    from megalard.distill.student import build_student
    from megalard.model.rope import rope_table, scaled_config
    from megalard.model.spec import spec_from_config
    from megalard.parallel.agreement import checked_on_all_ranks
    from megalard.parallel.collectives import all_reduce
    from megalard.parallel.mesh import build_mesh
    from megalard.training.saver import Saver
    from megalard.training.step import Distiller

    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = min(1024, SHAPES[options.size]["hidden_size"] // 4)
    config = settings.Config(
        model=settings.ModelConfig(teacher="random"),
        trainable=settings.TrainableConfig(
            "lora", settings.LoraConfig(rank=rank, alpha=2.0 * rank)
        ),
        data=settings.DataConfig(["random"], context_length=options.context),
        optimizer=settings.OptimizerConfig(steps=10**6, global_batch=1),
        parallel=settings.ParallelConfig(tp=world),
    )
    mesh = build_mesh("auto", world)
    with checked_on_all_ranks(mesh.world):
        check_target(options.folder)
    random = RandomWeights(options.size)
    dtype = torch.bfloat16
    teacher = load_decoder(
        random.spec, rope_table(random.spec), mesh.tp, random, mesh.device, dtype
    )
    scaled = spec_from_config(scaled_config(random.spec, config.rope, 4096), "student")
    student = build_student(teacher, scaled, rope_table(scaled), config, mesh.tp)
    distiller = Distiller(teacher, student, config, mesh)
    state_bytes = 12 * sum(parameter.numel() for parameter in student.trained.values())
    tokens = torch.randint(32000, (options.context,)).numpy()
    number = 0

    def steps(count: int) -> list[float]:
        nonlocal number
        seconds = []
        for _ in range(count):
            batch = collate([(tokens, [(0, options.context)])]).to(mesh.device)
            began = time.perf_counter()
            distiller.step({"main": [batch]}, number)
            seconds.append(time.perf_counter() - began)
            number += 1
        return seconds

    axis = checkpoint_axis(mesh)
    steps(5)
    plain = statistics.median(steps(options.steps))
    lines = [f"a step: {plain:.3f} s; state: {state_bytes / 1e9:.2f} GB a rank"]
    for kind in STALLED:
        chosen = settings.CheckpointConfig(asynchronous=kind == "asynchronous", keep_last=1)
        head = {"kind": "training", "config": model_config(options.size), "trained": None}
        head |= {"training": None, "written_by": {}}

        def describe(step: int, head=head) -> dict:
            return {**head, "step": step}

        folder, origins = options.folder / kind, Origins(random)
        with Saver(folder, distiller, origins, describe, [], chosen, axis) as saver:
            saver.save(number)  # the first allocates what the others use again
            saver.wait()
            began = time.perf_counter()
            saver.save(number + 1)
            held = time.perf_counter() - began
            after, wrote = [], time.perf_counter()
            writing = torch.ones(1, device=mesh.device)
            while len(after) < options.steps or writing:  # the same on every rank
                after += steps(1)
                all_reduce(writing.fill_(saver.is_writing()), mesh.world, dist.ReduceOp.MAX)
                if writing:
                    wrote = time.perf_counter()
            slowed = max(0.0, sum(after) - plain * len(after))
        share = (held + slowed) / (50 * plain)
        lines.append(
            f"{kind}: save() held the run for {held:.3f} s, the {len(after)} steps after it took "
            f"{slowed:.3f} s more than without, {wrote - began:.1f} s until it was written; "
            f"{share:.2%} of a step over an interval of 50 steps"
        )
    if mesh.world.rank == 0:
        print("\n".join(lines), flush=True)
        for kind in STALLED:
            shutil.rmtree(options.folder / kind, ignore_errors=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = parse()
    if arguments.stall:
        from megalard.errors import UserError

        try:
            stall(arguments)
        except UserError as error:
            sys.exit(f"megalard: error: {error}")
    elif arguments.worker:
        worker(arguments)
    else:
        bench(arguments)
