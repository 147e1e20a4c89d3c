"""What a training step of dark.py costs here: time of its parts, memory, and whether the loader keeps up.

python assets/step_cost.py                     # on a GPU the paper's run, on a CPU the demonstration's
python assets/step_cost.py --micro-batch 128   # the same with less memory

The weights are random and the images are made: neither changes the cost.
"""

import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dark


@dataclass
class Options:
    model: str = "MobileCLIP2-S0"  # the student, an open_clip name
    teacher: str = "ViT-L-14"  # open_clip name
    context_length: int = 117  # tokens, of both models; 0: each model's own
    batch: int = 1024  # N, pairs a step
    micro_batch: int = 256  # pairs whose activations are kept at a time; 0: all of them
    steps: int = 5  # steps whose median is printed
    workers: int = -1  # processes that read images; -1: one less than the cores, 1 to 16


# The defaults on a CPU, where a step of the paper's run would take minutes.
SMALL = dict(model="demo-fastvit", teacher="demo-teacher", context_length=0, batch=64, micro_batch=0)


def make_pairs(folder, n):
    """Draws JPEG images of 800 x 600 -> `n` pairs of them, as `dark.find_pairs` lists them."""
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(n):
        path = f"{folder}/{number % 16}.jpg"
        if not os.path.exists(path):
            blocks = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
            blocks.resize((800, 600), Image.Resampling.BICUBIC).save(path, quality=90)
        pairs.append((path, 0, os.path.getsize(path), f"ultrasound image {number}"))
    return pairs


def measure_loader(data, batch, workers, device):
    """-> milliseconds in which dark.py's loader makes a batch while nothing else needs a core; a batch."""
    # Each process makes a batch at a time. The first batch of each has its start in it and is not timed.
    n_first = max(1, workers)
    loader = torch.utils.data.DataLoader(
        data,
        batch_sampler=dark.batches(batch, batch, range(4 * n_first), seed=0),  # an epoch is one batch
        num_workers=workers,
        worker_init_fn=dark.ignore_signals,
        prefetch_factor=1 if workers else None,
        pin_memory=device.type == "cuda",
    )
    loaded = iter(loader)
    for _ in range(n_first):
        content = next(loaded)
    start = time.perf_counter()
    n_timed = sum(1 for _ in loaded)
    return 1000 * (time.perf_counter() - start) / n_timed, content


@contextmanager
def timed(part, milliseconds):
    """Adds the time of what stands inside, the GPU's work included, to milliseconds[part]."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    milliseconds[part] += 1000 * (time.perf_counter() - start)


def run_step(cfg, device, student, teacher, optimizer, content, clock):
    """A step of `dark.train`, each part of it in a context `clock(part)`."""
    micro_batch = cfg.micro_batch or cfg.batch
    parameters = list(student.parameters())
    with clock("batch to the device"):
        pixels = [x.to(device, non_blocking=True) for x in content[0]]
        tokens = [x.to(device, non_blocking=True) for x in content[1]]
    with clock("student, forward and backward"):
        outputs = student(pixels[0], tokens[0], micro_batch)
    with clock("teacher, forward"), torch.no_grad():
        targets = teacher(pixels[1], tokens[1], micro_batch)
    with clock("loss, forward and backward"):
        embeddings = [x.detach().requires_grad_() for x in outputs]  # backward halts here, to be timed
        loss, _ = dark.dark_loss(*embeddings, *targets, beta=cfg.beta0)
        gradients = torch.autograd.grad(loss, embeddings)
    with clock("student, forward and backward"):
        optimizer.zero_grad()
        torch.autograd.backward(outputs, gradients)
    with clock("clipping and optimizer"):
        torch.nn.utils.clip_grad_norm_(parameters, cfg.clip_norm)
        optimizer.step()


def peak_memory():
    """GiB: of the GPU since it was last reset, else of this process since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB on Linux
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def measure_steps(n_steps, *step):
    """-> for every part and the whole the median of its milliseconds. `step` is what `run_step` takes."""
    rows = []
    for number in range(1 + n_steps):
        row = defaultdict(float)
        run_step(*step, clock=lambda part: timed(part, row))
        with timed("whole step, without a stop between", row):
            run_step(*step, clock=lambda part: nullcontext())
        rows.append(row)
        if number == 0 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    # The first is slower and larger: cuDNN tries its algorithms, AdamW makes its state.
    return {part: statistics.median(row[part] for row in rows[1:]) for part in rows[0]}


@dark.script()
def main(argv=None):
    defaults = Options() if torch.cuda.is_available() else Options(**SMALL)
    options = dark.parse_flags(Options, argv, __doc__.partition("\n")[0], defaults)
    if options.steps < 1:
        dark.fail(f"--steps {options.steps}: must be at least 1")
    settings = vars(options).copy()
    n_steps = settings.pop("steps")
    cfg = dark.Config(student=settings.pop("model"), **settings)
    dark.check_values(cfg)
    device = dark.prepare_device("auto")
    student = dark.open_model(cfg.student, context_length=cfg.context_length)
    teacher = dark.open_model(cfg.teacher, context_length=cfg.context_length)

    workers = dark.WORKERS if cfg.workers < 0 else cfg.workers
    with tempfile.TemporaryDirectory() as folder:
        data = dark.Pairs(make_pairs(folder, cfg.batch), cfg.seed, [student, teacher])
        loader_ms, content = measure_loader(data, cfg.batch, workers, device)

    student.to(device).train()
    teacher.to(device).eval().requires_grad_(False)
    name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    if device.type == "cuda":  # with the settings of dark.train
        name = torch.cuda.get_device_name()
        torch.backends.cudnn.benchmark = True
        student.clip.visual.to(memory_format=torch.channels_last)
    optimizer = dark.make_optimizer(cfg, list(student.parameters()))
    medians = measure_steps(n_steps, cfg, device, student, teacher, optimizer, content)

    print(f"\n{name}, PyTorch {torch.__version__}: {cfg.batch} pairs, --micro-batch {cfg.micro_batch}")
    for part, milliseconds in medians.items():
        print(f"{part:36} {milliseconds:9.1f} ms")
    print(f"{'peak memory':36} {peak_memory():9.1f} GiB")
    speed = 1000 * cfg.batch / loader_ms
    print(f"{'loader, a batch':36} {loader_ms:9.1f} ms, {speed:.0f} pairs a second by {workers} processes")
    step_ms = milliseconds  # the last part was the whole step
    if workers:
        waiting = max(0, 1 - step_ms / loader_ms)  # a batch is made while the step before it runs
    else:
        waiting = loader_ms / (loader_ms + step_ms)
    print(f"{'a step waits for data':36} {waiting:9.0%} of its time")


if __name__ == "__main__":
    main()
